// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Measures every line of the table of bars in the spaces that it is meant for, or those lines whose names
//! begin as an argument says, and ends with an error when one is short. What the same lines show with the
//! other barrier is measured too, and decides nothing.

use std::process::ExitCode;

use benches::bars::{spaces, Line, Outcome, Rig, Verdict, LINES};
use benches::footprint::CountingAllocator;
use benches::record::save;
use iommu_type1::{IoAddressSpace, ReaderBarrier};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

fn main() -> ExitCode {
    let wanted = match wanted(std::env::args().skip(1)) {
        Ok(wanted) => wanted,
        Err(usage) => {
            eprintln!("{usage}");
            return ExitCode::from(2);
        }
    };
    let rig = Rig::default();
    let asked: Vec<_> = LINES
        .iter()
        .filter(|line| is_wanted(line, &wanted))
        .collect();
    let deciding = asked.iter().map(|line| (*line, line.meant_for()));
    let outcomes = measured(&rig, deciding);
    summarize("what decides", &outcomes);
    let also = asked
        .iter()
        .filter_map(|line| Some((*line, line.also_with()?)));
    println!("also measured, with the other barrier:");
    let others = measured(&rig, also);
    summarize("decides nothing", &others);

    let is_short = outcomes.len() < asked.len() || count(&outcomes, Verdict::Short) > 0;
    if wanted.is_empty() {
        // What is kept is what all lines showed in one run.
        if let Err(error) = save("bars", &[outcomes, others].concat()) {
            eprintln!("the figures could not be kept: {error}");
            return ExitCode::from(2);
        }
    }
    ExitCode::from(u8::from(is_short))
}

/// Lines with the barriers they are to be measured with, those left out that the kernel refuses.
fn measured<'a>(rig: &Rig, lines: impl Iterator<Item = (&'a Line, ReaderBarrier)>) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    for (line, barrier) in lines {
        if is_granted(barrier) {
            let outcome = line.judge(rig, barrier);
            println!("{outcome}");
            outcomes.push(outcome);
        } else {
            println!(
                "{:<20} {:<10} not measured, the kernel refuses it",
                line.name,
                spaces(barrier)
            );
        }
    }
    outcomes
}

fn is_granted(barrier: ReaderBarrier) -> bool {
    let space = IoAddressSpace::builder().reader_barrier(barrier).build();
    space.reader_barrier() == barrier
}

/// The names after `--only`; none means all.
fn wanted(mut args: impl Iterator<Item = String>) -> Result<Vec<String>, String> {
    const USAGE: &str = "usage: bench-bars [--only NAME]...";
    let mut names = Vec::new();
    while let Some(arg) = args.next() {
        match (arg.as_str(), args.next()) {
            ("--only", Some(name)) if begins_any(&name) => names.push(name),
            ("--only", Some(name)) => return Err(format!("no line begins with {name:?}")),
            _ => return Err(USAGE.to_owned()),
        }
    }
    Ok(names)
}

fn begins_any(name: &str) -> bool {
    let names = [name.to_owned()];
    LINES.iter().any(|line| is_wanted(line, &names))
}

fn is_wanted(line: &Line, wanted: &[String]) -> bool {
    wanted.is_empty() || wanted.iter().any(|begin| line.name.starts_with(begin))
}

fn summarize(title: &str, outcomes: &[Outcome]) {
    println!(
        "{title}: {} pass, {} short, {} noisy",
        count(outcomes, Verdict::Pass),
        count(outcomes, Verdict::Short),
        count(outcomes, Verdict::Noisy)
    );
}

fn count(outcomes: &[Outcome], verdict: Verdict) -> usize {
    let of_it = outcomes.iter().filter(|outcome| outcome.verdict == verdict);
    of_it.count()
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Measures every line of the table of bars, with either barrier where that changes something, or
//! those whose names begin as an argument says, and ends with an error when one is short.

use std::process::ExitCode;

use benches::bars::{Line, Outcome, Rig, Verdict, LINES};
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
    let mut outcomes = Vec::new();
    for (title, barrier) in BARRIERS {
        let first = outcomes.len();
        if is_granted(barrier) {
            for line in LINES
                .iter()
                .filter(|line| is_wanted(line, barrier, &wanted))
            {
                let outcome = line.judge(&rig, barrier);
                outcomes.extend(outcome.inspect(|outcome| println!("{outcome}")));
            }
        } else {
            println!("{title}: not measured, the kernel refuses it");
        }
        summarize(title, &outcomes[first..]);
    }
    if wanted.is_empty() {
        // What is kept is what all lines showed in one run.
        if let Err(error) = save("bars", &outcomes) {
            eprintln!("the figures could not be kept: {error}");
            return ExitCode::from(2);
        }
    }
    ExitCode::from(u8::from(count(&outcomes, Verdict::Short) > 0))
}

const BARRIERS: [(&str, ReaderBarrier); 2] = [
    ("as spaces are by default", ReaderBarrier::Fence),
    ("with membarrier", ReaderBarrier::Membarrier),
];

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
    let begins = |line: &Line, barrier| is_wanted(line, barrier, &[name.to_owned()]);
    let is_any = |(_, barrier)| LINES.iter().any(|line| begins(line, barrier));
    BARRIERS.into_iter().any(is_any)
}

/// Whether a line is measured with this barrier, and asked for.
fn is_wanted(line: &Line, barrier: ReaderBarrier, wanted: &[String]) -> bool {
    line.name_with(barrier)
        .is_some_and(|name| wanted.is_empty() || wanted.iter().any(|begin| name.starts_with(begin)))
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

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Measures every line of the table of bars, or those whose names begin as an argument says, and
//! ends with an error when one is short.

use std::process::ExitCode;

use benches::bars::{Outcome, Rig, Verdict, LINES};
use benches::footprint::CountingAllocator;
use benches::record::save;

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
    for line in LINES {
        if !wanted.is_empty() && !wanted.iter().any(|name| line.name.starts_with(name)) {
            continue;
        }
        let outcome = line.judge(&rig);
        println!("{outcome}");
        outcomes.push(outcome);
    }
    if wanted.is_empty() {
        // What is kept is what all lines showed in one run.
        if let Err(error) = save("bars", &outcomes) {
            eprintln!("the figures could not be kept: {error}");
            return ExitCode::from(2);
        }
    }
    let count = |verdict| count(&outcomes, verdict);
    println!(
        "{} pass, {} short, {} noisy",
        count(Verdict::Pass),
        count(Verdict::Short),
        count(Verdict::Noisy)
    );
    ExitCode::from(u8::from(count(Verdict::Short) > 0))
}

/// The names after `--only`; none means all.
fn wanted(mut args: impl Iterator<Item = String>) -> Result<Vec<String>, String> {
    const USAGE: &str = "usage: bench-bars [--only NAME]...";
    let mut names = Vec::new();
    while let Some(arg) = args.next() {
        match (arg.as_str(), args.next()) {
            ("--only", Some(name)) if LINES.iter().any(|line| line.name.starts_with(&name)) => {
                names.push(name);
            }
            ("--only", Some(name)) => return Err(format!("no line begins with {name:?}")),
            _ => return Err(USAGE.to_owned()),
        }
    }
    Ok(names)
}

fn count(outcomes: &[Outcome], verdict: Verdict) -> usize {
    let of_it = outcomes.iter().filter(|outcome| outcome.verdict == verdict);
    of_it.count()
}

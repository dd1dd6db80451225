// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Compares what gungraun says on standard input with the figures in a file, or writes them there.
//! `ci/instructions` calls it.

use std::error::Error;
use std::fs;
use std::io;
use std::process::ExitCode;

use instructions::comparison::Comparison;
use instructions::figures::Figures;
use instructions::summary::counts;

const USAGE: &str = "usage: instructions compare|update FILE MADE_WITH <SUMMARIES";

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
    }
}

/// Whether the figures are those kept.
fn run() -> Result<bool, Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [command, file, made_with] = args.as_slice() else {
        return Err(USAGE.into());
    };
    let now = Figures {
        made_with: made_with.clone(),
        counts: counts(&io::read_to_string(io::stdin())?)?,
    };
    match command.as_str() {
        "compare" => {
            let kept = fs::read_to_string(file).map_err(|error| format!("{file}: {error}"))?;
            let kept: Figures = kept.parse().map_err(|error| format!("{file}: {error}"))?;
            let comparison = Comparison::new(&kept, &now);
            if kept.made_with != now.made_with {
                println!("kept figures: {}; here: {made_with}", kept.made_with);
            }
            print!("{comparison}");
            Ok(!comparison.fails())
        }
        "update" => {
            fs::write(file, now.to_string())?;
            print!("{now}");
            Ok(true)
        }
        _ => Err(USAGE.into()),
    }
}

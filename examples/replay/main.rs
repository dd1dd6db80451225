// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Replays recorded GPU work on a vGPU and checks every byte of guest memory.
//!
//! `cargo run --release --example replay` replays the bundled recording; `--help` says what else.
//! docs/replay.md explains what is printed. How the crates are used is in gvt-replay's machine.rs.

mod args;
mod dump;

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use gvt_replay::aub::Trace;
use gvt_replay::inject::Fault;
use gvt_replay::{Contiguity, Mode, Model, Plan, ProfileFigures, Replay, Report, Result};
use indicatif::ProgressBar;

use args::{one_line, Args};
use dump::Dump;

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) if error.use_stderr() => return fail(&one_line(&error.to_string())),
        Err(help) => return print(&help.to_string(), ExitCode::SUCCESS),
    };
    let report = match replay(&args) {
        Ok(report) => report,
        Err(error) => return fail(&format!("error: {error}")),
    };
    let status = match report.verified {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(1),
    };
    let text = match args.json {
        true => serde_json::to_string_pretty(&report).map_err(|error| error.to_string()),
        false => Ok(report.to_string()),
    };
    match text {
        Ok(text) => print(&text, status),
        Err(error) => fail(&format!("error: {error}")),
    }
}

fn replay(args: &Args) -> Result<Report> {
    let trace = match &args.trace {
        Some(path) => Trace::open(path)?,
        None => Trace::bundled()?,
    };
    let profile = match Contiguity::bundled(&args.profile) {
        Some(profile) => profile,
        None => Contiguity::open(Path::new(&args.profile))?,
    };
    let modes = Mode::CORRECT
        .into_iter()
        .filter(|mode| args.mode.as_deref().is_none_or(|name| name == mode.name()));
    let fault = Fault::ALL
        .into_iter()
        .find(|fault| args.inject.as_deref() == Some(fault.name()));
    // The figures of the profiles say nothing about a fault.
    let profiles = match fault {
        Some(_) => Vec::new(),
        None => Contiguity::NAMES
            .iter()
            .filter_map(|name| Contiguity::bundled(name))
            .collect(),
    };

    let plan = Plan::new(&trace, &profile)?;
    let model = Model::after(&plan)?;
    let replay = Replay::new(&plan, &model)
        .vgpus(args.vgpus.into())
        .fault(fault)
        .record_accesses(args.dump_accesses.is_some());
    let replays = modes.clone().count() as u64 * u64::from(args.vgpus)
        + profiles.len() as u64 * ProfileFigures::REPLAYS;
    let progress = ClearedBar(ProgressBar::new(plan.submissions() * replays));
    let mut dump = args
        .dump_accesses
        .as_deref()
        .map(Dump::create)
        .transpose()?;

    let outcomes = modes
        .map(|mode| {
            replay.run(mode, &mut |workload| {
                progress.0.inc(1);
                match &mut dump {
                    Some(dump) => dump.write(mode, &workload),
                    None => Ok(()),
                }
            })
        })
        .collect::<Result<Vec<_>>>()?;
    if let Some(dump) = &mut dump {
        dump.finish()?;
    }
    let figures = profiles
        .iter()
        .map(|profile| {
            ProfileFigures::measure(&trace, profile, &mut |_| {
                progress.0.inc(1);
                Ok(())
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let file = args.trace.as_ref().map(|path| path.display().to_string());
    Ok(Report::new(
        file,
        trace.program(),
        &profile,
        &plan,
        fault,
        outcomes,
        figures,
    ))
}

/// A progress bar on stderr, if that is a terminal, that leaves nothing behind.
struct ClearedBar(ProgressBar);

impl Drop for ClearedBar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// Prints `text` and ends with `status`. A reader that has seen enough and went away is no error.
fn print(text: &str, status: ExitCode) -> ExitCode {
    match writeln!(io::stdout(), "{}", text.trim_end()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            fail(&format!("error: cannot write the report: {error}"))
        }
        _ => status,
    }
}

fn fail(message: &str) -> ExitCode {
    // There is nobody left to tell if stderr is closed.
    let _ = writeln!(io::stderr(), "{message}");
    ExitCode::from(2)
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Replays recorded GPU work on a vGPU and checks every byte of guest memory.
//!
//! `cargo run --release --example replay` replays the bundled recording; `--help` says what else.
//! docs/replay.md explains what is printed. How the crates are used is in gvt-replay's machine.rs.

mod args;
mod dump;
mod progress;
mod shares;
mod tracing;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use gvt_replay::report::one_line;
use gvt_replay::{
    aub, Contiguity, Model, Plan, ProfileFigures, Replay, Report, Result, SideBySide, Trace,
};

use args::{said_by, Args};
use dump::Dump;
use progress::Progress;
use tracing::Tracing;

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) if error.use_stderr() => return fail(&said_by(&error)),
        Err(help) => return print(&help.to_string(), ExitCode::SUCCESS),
    };
    let vgpus = match args.vgpus() {
        Ok(vgpus) => vgpus,
        Err(error) => return fail(&format!("error: {error}")),
    };
    let file = args.trace.as_ref().map(|path| path.display().to_string());
    let report = match replay(&args, vgpus, file.clone()) {
        Ok(report) => report,
        Err(error) => {
            let error = error.in_trace(file.as_deref().unwrap_or(aub::BUNDLED));
            return fail(&format!("error: {error}"));
        }
    };
    let status = match report.passed() {
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

fn replay(args: &Args, vgpus: u16, file: Option<String>) -> Result<Report> {
    args.refuse_to_overwrite_input()?;
    let trace = match &args.trace {
        Some(path) => Trace::open(path)?,
        None => Trace::bundled()?,
    };
    let profile = Contiguity::named(&args.profile)?;
    let plan = Plan::new(&trace, &profile)?;
    let model = Model::after(&plan)?;
    let modes = args.modes();
    let fault = args.fault();
    // The figures of the profiles say nothing about a fault, nor about pages that are not copied.
    let profiles = match fault {
        None if plan.copies_context_pages() => compared_profiles(&profile),
        _ => Vec::new(),
    };

    let mode_steps = plan.submissions() * u64::from(vgpus);
    let profile_steps = plan.submissions() * ProfileFigures::REPLAYS;
    let mut steps = modes.len() as u64 * mode_steps + profiles.len() as u64 * profile_steps;
    if !args.weights().is_empty() {
        steps += SideBySide::STEPS;
    }
    let progress = Progress::new(steps, args.json);
    let mut tracing = Tracing::new(args)?;
    let replay = Replay::new(&plan, &model)
        .vgpus(vgpus.into())
        .fault(fault)
        .record_accesses(args.dump_accesses.is_some() || tracing.is_wanted());
    let mut dump = args
        .dump_accesses
        .as_deref()
        .map(Dump::create)
        .transpose()?;

    let mut outcomes = Vec::new();
    for (index, mode) in modes.iter().enumerate() {
        progress.begin("mode", mode.name(), index, modes.len());
        outcomes.push(replay.run(*mode, &mut |workload| {
            progress.step();
            tracing.add(*mode, &workload)?;
            match &mut dump {
                Some(dump) => dump.write(*mode, &workload),
                None => Ok(()),
            }
        })?);
    }
    if let Some(dump) = &mut dump {
        dump.finish()?;
    }
    let trace_check = tracing.finish()?;
    let mut figures = Vec::new();
    for (index, profile) in profiles.iter().enumerate() {
        progress.begin("profile", profile.name(), index, profiles.len());
        figures.push(ProfileFigures::measure(&trace, profile, &mut |_| {
            progress.step();
            Ok(())
        })?);
    }
    let shared = match args.weights() {
        [] => None,
        _ => Some(shares::share(args, &profile, &plan, &progress)?),
    };
    let mut report = Report::new(
        file,
        trace.program(),
        &profile,
        &plan,
        fault,
        outcomes,
        figures,
    );
    if let Some(shared) = shared {
        report = report.with_shares(shared);
    }
    if let Some(check) = trace_check {
        report = report.with_trace_check(check);
    }
    Ok(report)
}

/// The bundled profiles, behind the chosen one if that is another.
fn compared_profiles(chosen: &Contiguity) -> Vec<Contiguity> {
    let bundled = Contiguity::NAMES
        .into_iter()
        .filter_map(Contiguity::bundled);
    let other = Some(chosen.clone()).filter(|chosen| !Contiguity::NAMES.contains(&chosen.name()));
    other.into_iter().chain(bundled).collect()
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
    let _ = writeln!(io::stderr(), "{}", one_line(message));
    ExitCode::from(2)
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The arguments.

use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::Parser;
use gvt_replay::inject::Fault;
use gvt_replay::Mode;

/// Replay recorded GPU work on a vGPU and check every byte of guest memory.
///
/// Exit status: 0 if guest memory is what it must be, 1 if it is not, 2 if the arguments or the
/// trace are wrong.
#[derive(Parser)]
pub(crate) struct Args {
    /// AUB trace, plain or compressed with xz or gzip [default: a bundled recording of glmark2]
    pub(crate) trace: Option<PathBuf>,
    /// How context objects lie in the guest: consecutive, fresh, as-found, churned, recycled, or a
    /// file of comma-separated run lengths, one object a line
    #[arg(long, default_value = "consecutive")]
    pub(crate) profile: String,
    /// Copy context pages only this way [default: all three in turn]
    #[arg(long, value_parser = PossibleValuesParser::new(Mode::CORRECT.map(Mode::name)))]
    pub(crate) mode: Option<String>,
    /// Virtual machines, each with a vGPU; their submissions take turns and the counts are sums
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) vgpus: u16,
    /// Print one JSON object instead of text
    #[arg(long)]
    pub(crate) json: bool,
    /// Write one line per access to guest memory: vgpu, mode, submission, kind, R or W, gpa, length
    #[arg(long, value_name = "FILE")]
    pub(crate) dump_accesses: Option<PathBuf>,
    /// Put a fault in the way to guest memory, to see it found
    #[arg(long, value_name = "FAULT", value_parser = PossibleValuesParser::new(Fault::ALL.map(Fault::name)))]
    pub(crate) inject: Option<String>,
}

/// What clap says about wrong arguments, without the usage below it.
pub(crate) fn one_line(message: &str) -> String {
    let lines = message.lines().map(str::trim);
    let said =
        lines.take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"));
    said.filter(|line| !line.is_empty())
        .collect::<Vec<_>>()
        .join(" ")
}

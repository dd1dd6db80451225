// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The arguments.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::Parser;
use gvt_replay::inject::Fault;
use gvt_replay::{Error, Mode, Result};

/// Replay recorded GPU work on a vGPU and check every byte of guest memory.
///
/// Exit status: 0 if guest memory is what it must be, 1 if it is not, 2 if the arguments or the
/// trace are wrong or the machine gives out (no memory, disk full, too many open files).
#[derive(Parser)]
#[command(name = "replay", version)]
pub(crate) struct Args {
    /// AUB trace, plain or compressed with xz or gzip [default: a bundled recording of glmark2]
    pub(crate) trace: Option<PathBuf>,
    /// How context objects lie in the guest: consecutive, fresh, as-found, churned, recycled, or a
    /// file of comma-separated run lengths, one object a line. The five are compared in any case
    #[arg(long, default_value = "consecutive", value_name = "NAME|FILE")]
    pub(crate) profile: PathBuf,
    /// Copy context pages only this way [default: all three in turn]
    #[arg(long, value_parser = PossibleValuesParser::new(Mode::CORRECT.map(Mode::name)))]
    mode: Option<String>,
    /// Virtual machines, each with a vGPU; their submissions take turns and the counts are sums
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) vgpus: u16,
    /// Print one JSON object instead of text, and show no progress
    #[arg(long)]
    pub(crate) json: bool,
    /// Write one line per access to guest memory: vgpu, mode, submission, kind, R or W, gpa, length
    #[arg(long, value_name = "FILE")]
    pub(crate) dump_accesses: Option<PathBuf>,
    /// Put a fault in the way to guest memory, to see it found
    #[arg(long, value_name = "FAULT", value_parser = PossibleValuesParser::new(Fault::ALL.map(Fault::name)))]
    inject: Option<String>,
}

impl Args {
    pub(crate) fn modes(&self) -> Vec<Mode> {
        let wanted = |mode: &Mode| self.mode.as_deref().is_none_or(|name| name == mode.name());
        Mode::CORRECT.into_iter().filter(wanted).collect()
    }

    pub(crate) fn fault(&self) -> Option<Fault> {
        let wanted = |fault: &Fault| self.inject.as_deref() == Some(fault.name());
        Fault::ALL.into_iter().find(wanted)
    }

    /// Refuses to write over a file that is read, by whatever name.
    pub(crate) fn refuse_to_overwrite_input(&self) -> Result<()> {
        let Some(dump) = &self.dump_accesses else {
            return Ok(());
        };
        let Ok(output) = fs::metadata(dump) else {
            return Ok(());
        };
        for input in self.trace.iter().chain([&self.profile]) {
            let same =
                |input: fs::Metadata| (input.dev(), input.ino()) == (output.dev(), output.ino());
            if fs::metadata(input).is_ok_and(same) {
                return Err(Error::File {
                    path: dump.clone(),
                    source: io::Error::other(
                        "--dump-accesses would write over a file that is read",
                    ),
                });
            }
        }
        Ok(())
    }
}

/// What clap says about wrong arguments in one line, without the usage below it.
pub(crate) fn said_by(error: &clap::Error) -> String {
    let message = error.to_string();
    let mut said = String::new();
    for line in message.lines().map(str::trim) {
        if line.starts_with("Usage:") || line.starts_with("For more information") {
            break;
        }
        if line.is_empty() {
            continue;
        }
        said.push_str(match line {
            _ if said.is_empty() => "",
            _ if line.starts_with("tip:") => "; ",
            _ => " ",
        });
        said.push_str(line);
    }
    said + "; see --help"
}

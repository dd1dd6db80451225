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
use vfio_dma::gvt::policy::Weight;

/// Replay recorded GPU work on a vGPU and check every byte of guest memory.
///
/// Exit status: 0 if guest memory is what it must be and every vGPU got its share, 1 if not, 2 if the
/// arguments or the trace are wrong or the machine gives out (no memory, disk full, too many open
/// files).
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
    /// [default: 1, or one for each weight]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=256))]
    vgpus: Option<u16>,
    /// Also have the vGPUs share one GPU by these weights of 1 to 16, for a second of virtual time. Each
    /// plays TRACE, or the bundled recordings are played in turn
    #[arg(long, value_delimiter = ',', value_name = "W,W,...", value_parser = weight)]
    weights: Vec<Weight>,
    /// Print one JSON object instead of text, and show no progress
    #[arg(long)]
    pub(crate) json: bool,
    /// Write one line per access to guest memory: vgpu, mode, submission, kind, R or W, gpa, length
    #[arg(long, value_name = "FILE")]
    pub(crate) dump_accesses: Option<PathBuf>,
    /// Write the accesses to guest memory as a trace, with steps and virtual times: those of --mode, or
    /// of mode skip
    #[arg(long = "trace", value_name = "FILE")]
    pub(crate) trace_file: Option<PathBuf>,
    /// Compare the accesses with those of a trace that --trace has written
    #[arg(long, value_name = "FILE")]
    pub(crate) check_trace: Option<PathBuf>,
    /// Put a fault in the way to guest memory, to see it found
    #[arg(long, value_name = "FAULT", value_parser = PossibleValuesParser::new(Fault::ALL.map(Fault::name)))]
    inject: Option<String>,
}

impl Args {
    /// How many virtual machines, unless that contradicts the weights.
    pub(crate) fn vgpus(&self) -> std::result::Result<u16, String> {
        match (self.vgpus, self.weights.len()) {
            (Some(vgpus), weights) if weights != 0 && weights != usize::from(vgpus) => {
                Err(format!(
                    "--vgpus {vgpus} and {weights} weights: there must be one for each; see --help"
                ))
            }
            (Some(vgpus), _) => Ok(vgpus),
            (None, weights @ 0..=256) => Ok((weights as u16).max(1)),
            (None, weights) => Err(format!("{weights} weights: there may be 256; see --help")),
        }
    }

    pub(crate) fn weights(&self) -> &[Weight] {
        &self.weights
    }

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
        let outputs = [
            ("--dump-accesses", &self.dump_accesses),
            ("--trace", &self.trace_file),
        ];
        for (option, path) in outputs {
            let Some(path) = path else { continue };
            let Ok(output) = fs::metadata(path) else {
                continue;
            };
            let inputs = self.trace.iter().chain(&self.check_trace);
            for input in inputs.chain([&self.profile]) {
                let same = |input: fs::Metadata| {
                    (input.dev(), input.ino()) == (output.dev(), output.ino())
                };
                if fs::metadata(input).is_ok_and(same) {
                    let message = format!("{option} would write over a file that is read");
                    return Err(Error::File {
                        path: path.clone(),
                        source: io::Error::other(message),
                    });
                }
            }
        }
        Ok(())
    }
}

fn weight(text: &str) -> std::result::Result<Weight, String> {
    let weight = text.parse().ok().map(Weight::new);
    match weight {
        Some(Ok(weight)) => Ok(weight),
        _ => Err("a weight is one of 1 to 16".to_owned()),
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

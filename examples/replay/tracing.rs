// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The trace of the accesses of one mode: written, or compared with another one.

use std::path::Path;

use gvt_replay::access_trace::{open, save, TraceCheck};
use gvt_replay::replay::Workload;
use gvt_replay::{Error, Mode, Result};
use vfio_dma::gvt::trace::AccessTrace;

use crate::args::Args;

pub(crate) struct Tracing<'a> {
    /// Whose accesses they are.
    mode: Option<Mode>,
    file: Option<&'a Path>,
    expected: Option<AccessTrace>,
    made: AccessTrace,
}

impl<'a> Tracing<'a> {
    pub(crate) fn new(args: &'a Args) -> Result<Self> {
        let expected = args.check_trace.as_deref().map(open).transpose()?;
        let file = args.trace_file.as_deref();
        let wanted = file.is_some() || expected.is_some();
        Ok(Tracing {
            mode: args.modes().last().copied().filter(|_| wanted),
            file,
            expected,
            made: AccessTrace::default(),
        })
    }

    pub(crate) fn is_wanted(&self) -> bool {
        self.mode.is_some()
    }

    pub(crate) fn add(&mut self, mode: Mode, workload: &Workload) -> Result<()> {
        if self.mode == Some(mode) {
            for access in &workload.traced {
                let pushed = self.made.push(*access);
                pushed.map_err(|source| Error::AccessTrace {
                    path: self.file.unwrap_or(Path::new("the accesses")).to_owned(),
                    source,
                })?;
            }
        }
        Ok(())
    }

    /// Writes the trace; gives how it compares.
    pub(crate) fn finish(self) -> Result<Option<TraceCheck>> {
        if let Some(file) = self.file {
            save(file, &self.made)?;
        }
        let check = |expected| TraceCheck::of(&expected, &self.made);
        Ok(self.expected.map(check))
    }
}

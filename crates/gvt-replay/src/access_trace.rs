// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Files of traces of accesses, and whether a replay makes the accesses of one.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::Path;

use gvt_scheduler::trace::{AccessTrace, MAX_ACCESSES};
use serde::Serialize;

use crate::error::{Error, Result};

/// A trace of accesses as large as one may be, in bytes.
const MAX_BYTES: u64 = 24 + 24 * MAX_ACCESSES as u64;

/// Reads a trace of accesses from a file.
///
/// # Errors
///
/// [`Error::File`], and [`Error::AccessTrace`] for what is no such trace.
pub fn open(path: &Path) -> Result<AccessTrace> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes))
        .map_err(Error::file(path))?;
    AccessTrace::from_bytes(&bytes).map_err(|source| Error::AccessTrace {
        path: path.to_owned(),
        source,
    })
}

/// Writes a trace of accesses into a file, over what is there.
///
/// # Errors
///
/// [`Error::File`].
pub fn save(path: &Path, trace: &AccessTrace) -> Result<()> {
    let write = |file| -> io::Result<()> {
        let mut file = BufWriter::new(file);
        trace.write_to(&mut file)?;
        file.flush()
    };
    File::create(path)
        .and_then(write)
        .map_err(Error::file(path))
}

/// Whether a replay has made the accesses of a trace.
///
/// ```
/// use gvt_replay::access_trace::TraceCheck;
/// use gvt_scheduler::trace::AccessTrace;
///
/// let check = TraceCheck::of(&AccessTrace::default(), &AccessTrace::default());
/// assert!(check.same);
/// ```
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct TraceCheck {
    /// Accesses that were made.
    pub accesses: usize,
    /// Whether they are those of the trace. When they were made does not count.
    pub same: bool,
    /// The first that is not.
    pub first_difference: Option<TraceDifference>,
}

/// Where a replay departs from a trace.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct TraceDifference {
    /// Number of the access, from 0.
    pub access: usize,
    /// What the trace has there: vGPU, step, direction, address, length; nothing where it has ended.
    pub expected: Option<String>,
    /// What was made; nothing where there was no more.
    pub made: Option<String>,
}

impl TraceCheck {
    /// Compares what was made with what was expected.
    pub fn of(expected: &AccessTrace, made: &AccessTrace) -> Self {
        let first_difference = expected.first_difference(made).map(|access| {
            let shown = |trace: &AccessTrace| trace.accesses().get(access).map(ToString::to_string);
            TraceDifference {
                access,
                expected: shown(expected),
                made: shown(made),
            }
        });
        TraceCheck {
            accesses: made.accesses().len(),
            same: first_difference.is_none(),
            first_difference,
        }
    }
}

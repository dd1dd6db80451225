// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can be wrong with a trace of accesses.

use crate::error::Cause;
use crate::trace::{MAX_ACCESSES, MAX_ACCESS_BYTES, VERSION};

/// What can be wrong with a trace of accesses, or with the memory that it is done again on.
///
/// ```
/// use gvt_scheduler::trace::{AccessTrace, TraceError};
///
/// let error = AccessTrace::from_bytes(b"something else").unwrap_err();
/// assert!(matches!(error, TraceError::NotATrace));
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TraceError {
    /// The bytes do not begin as a trace does.
    #[error("this is no trace of accesses: it does not begin with \"GVTTRACE\" and a header")]
    NotATrace,
    /// The trace is of another version.
    #[error("the trace is of version {version}, and this is version {VERSION}")]
    Version {
        /// What it says.
        version: u32,
    },
    /// There are more bytes than the header says, or fewer.
    #[error(
        "the trace has {actual} bytes, and the {accesses} accesses of its header take {expected}"
    )]
    Length {
        /// Accesses that the header says there are.
        accesses: u64,
        /// Bytes they take, with the header.
        expected: u64,
        /// Bytes there are.
        actual: u64,
    },
    /// There are more accesses than a trace may have.
    #[error("{accesses} accesses are more than a trace may have: {MAX_ACCESSES}")]
    TooMany {
        /// How many there are.
        accesses: u64,
    },
    /// A field of an access has a value that it cannot have.
    #[error("access {index} of the trace: {value:#x} is no {field}")]
    Field {
        /// Number of the access, from 0.
        index: usize,
        /// The field.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
    /// An access is longer than any of a vGPU can be, or wraps around.
    #[error("access {index} of the trace: {len} bytes at {iova:#x} wrap, or are more than {MAX_ACCESS_BYTES}")]
    Range {
        /// Number of the access, from 0.
        index: usize,
        /// Its address.
        iova: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// There is no memory for the accesses or for what they transfer.
    #[error("{bytes:#x} bytes of memory for a trace are not there")]
    NoMemory {
        /// What was asked for in vain.
        bytes: usize,
    },
    /// An access failed when it was done again.
    #[error("access {index} of the trace, {len} bytes at {iova:#x}: {source}")]
    Access {
        /// Number of the access, from 0.
        index: usize,
        /// Its address.
        iova: u64,
        /// Its length in bytes.
        len: u32,
        /// Why.
        source: Cause,
    },
}

impl TraceError {
    /// What the kernel would return: EFAULT for an access that failed, ENOMEM, EINVAL for the rest.
    pub fn errno(&self) -> i32 {
        match self {
            TraceError::Access { .. } => libc::EFAULT,
            TraceError::NoMemory { .. } => libc::ENOMEM,
            _ => libc::EINVAL,
        }
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can be wrong with a recording, a contiguity profile or the machine that replays them.

use std::io;
use std::path::{Path, PathBuf};

use gvt_scheduler::trace::TraceError;

use crate::contiguity::Contiguity;

/// What can be wrong with a recording, a contiguity profile or the machine that replays them.
///
/// There is no `errno()` here: nothing of this crate stands in for a kernel call. The errors of
/// the crates under test are carried along as sources.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be opened, read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is no trace of accesses.
    #[error("{}: {source}", path.display())]
    AccessTrace {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: TraceError,
    },
    /// The xz or gzip stream is damaged or cut off.
    #[error("byte offset {offset} of the compressed file: it is damaged or cut off: {source}")]
    Compressed {
        /// Byte of the compressed file the decoder has come to: the damage is there or before.
        offset: u64,
        /// What the decoder says.
        source: io::Error,
    },
    /// The trace, decompressed, is larger than [`MAX_TRACE_BYTES`](crate::aub::MAX_TRACE_BYTES).
    #[error("byte offset {limit} of the decompressed trace: it goes on, and no more is taken in")]
    TooLarge {
        /// The limit in bytes.
        limit: u64,
    },
    /// More packets, or more of what they do, than a replay keeps in memory.
    #[error("byte offset {offset} of the decompressed trace: more than {limit} packets or table entries")]
    TooMany {
        /// Where the first packet too many begins.
        offset: u64,
        /// Most of them: [`MAX_EVENTS`](crate::aub::MAX_EVENTS).
        limit: usize,
    },
    /// The file does not begin with an AUB version packet.
    #[error(
        "byte offset 0 of the decompressed trace: not AUB, it does not begin with a version packet"
    )]
    NotAub,
    /// The version packet names a file version or a GPU this replay does not know.
    #[error("byte offset {offset} of the decompressed trace: {what} is {value:#x}, only {supported:#x} is supported")]
    Version {
        /// Where the packet begins.
        offset: u64,
        /// Which field.
        what: &'static str,
        /// What the file says.
        value: u32,
        /// What is supported.
        supported: u32,
    },
    /// The file ends inside a packet.
    #[error(
        "byte offset {offset} of the decompressed trace: truncated, the packet needs {needed} bytes and {available} are left"
    )]
    Truncated {
        /// Where the packet begins.
        offset: u64,
        /// Bytes the packet needs.
        needed: u64,
        /// Bytes left in the file.
        available: u64,
    },
    /// A packet header that is not an AUB memory trace packet.
    #[error(
        "byte offset {offset} of the decompressed trace: unknown packet header {header:#010x}"
    )]
    UnknownPacket {
        /// Where the packet begins.
        offset: u64,
        /// Its first dword.
        header: u32,
    },
    /// A packet whose length does not fit its kind.
    #[error("byte offset {offset} of the decompressed trace: a {kind} packet of {dwords} dwords, {expected} are needed")]
    PacketLength {
        /// Where the packet begins.
        offset: u64,
        /// The kind of packet.
        kind: &'static str,
        /// Its length in dwords.
        dwords: u32,
        /// The length its kind and contents ask for, in dwords.
        expected: u64,
    },
    /// A field that has a value this replay does not know.
    #[error("byte offset {offset} of the decompressed trace: {what} is {value:#x}, which is not supported")]
    Field {
        /// Where the packet begins.
        offset: u64,
        /// Which field.
        what: &'static str,
        /// What the file says.
        value: u64,
    },
    /// A memory write outside of its address space.
    #[error(
        "byte offset {offset} of the decompressed trace: {length} bytes at {space} address {address:#x} are out of range"
    )]
    Address {
        /// Where the packet begins.
        offset: u64,
        /// Which address space.
        space: &'static str,
        /// First address.
        address: u64,
        /// Bytes.
        length: u64,
    },
    /// A graphics address without a valid GGTT entry.
    #[error("byte offset {offset} of the decompressed trace: graphics address {address:#x} has no GGTT entry")]
    NotMapped {
        /// Where the packet begins.
        offset: u64,
        /// The graphics address.
        address: u64,
    },
    /// The file ends inside the four dwords of a submission.
    #[error(
        "byte offset {offset} of the decompressed trace: the trace ends after {dwords} of the 4 dwords of a submission to \
         register {register:#x}"
    )]
    IncompleteSubmission {
        /// Where the submission's first packet begins.
        offset: u64,
        /// Dwords that were written.
        dwords: usize,
        /// The submission port.
        register: u32,
    },
    /// A trace that submits nothing.
    #[error("byte offset {offset} of the decompressed trace: the trace ends without a submission")]
    NoSubmission {
        /// Length of the trace.
        offset: u64,
    },
    /// The trace names more pages than the guest has.
    #[error("byte offset {offset} of the decompressed trace: the trace needs more than the guest's {pages} pages of memory")]
    GuestMemoryFull {
        /// Where the packet begins that needs one page more.
        offset: u64,
        /// Pages the guest has.
        pages: u64,
    },
    /// A line of a contiguity profile that is not a list of run lengths.
    #[error("profile {profile}, line {line}, column {column}: {reason}")]
    Profile {
        /// Its name or file.
        profile: String,
        /// Number of the line, from 1.
        line: usize,
        /// The character in it, from 1.
        column: usize,
        /// What is wrong there.
        reason: String,
    },
    /// A profile that is neither bundled nor a file.
    #[error(
        "there is no profile {profile:?}: give one of {}, or a file",
        Contiguity::NAMES.join(", ")
    )]
    UnknownProfile {
        /// What was asked for.
        profile: PathBuf,
    },
    /// The trace copies no context pages, so nothing can be injected into their copies.
    #[error("the trace copies no context pages, so there is nothing to inject a fault into")]
    NothingToInject,
    /// The scheduler refused what the trace asks for.
    #[error("byte offset {offset} of the decompressed trace: {source}")]
    Refused {
        /// Where the packet begins.
        offset: u64,
        /// The error of the crate under test.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A polled register did not take the value the recorder waited for.
    #[error(
        "byte offset {offset} of the decompressed trace: register {register:#x} reads {value:#x}, {expected:#x} was polled \
         for under mask {mask:#x}"
    )]
    Poll {
        /// Where the packet begins.
        offset: u64,
        /// The register.
        register: u32,
        /// What it reads.
        value: u32,
        /// What the recorder waited for.
        expected: u32,
        /// Bits that count.
        mask: u32,
    },
    /// A submission whose workload did not run to its end.
    #[error(
        "byte offset {offset} of the decompressed trace: the submission gave no completed workload"
    )]
    NotCompleted {
        /// Where the packet begins.
        offset: u64,
    },
    /// The virtual machine of the replay could not be set up, or its memory not be accessed.
    #[error("cannot {action}: {source}")]
    Machine {
        /// What was being done.
        action: &'static str,
        /// Why it failed.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// An error of a trace, and of which.
    #[error("{trace}: {source}")]
    InTrace {
        /// Name or file of the trace.
        trace: String,
        /// What is wrong with it.
        source: Box<Error>,
    },
}

/// A result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Names the trace in an error that is about it. The other errors say what they are about.
    ///
    /// ```
    /// use gvt_replay::{aub::Trace, Error};
    ///
    /// let error = Trace::from_bytes(b"no recording").unwrap_err();
    /// assert_eq!(
    ///     error.in_trace("a.aub").to_string(),
    ///     "a.aub: byte offset 0 of the decompressed trace: not AUB, it does not begin with a \
    ///      version packet"
    /// );
    /// ```
    #[must_use]
    pub fn in_trace(self, trace: &str) -> Error {
        match self {
            Error::File { .. }
            | Error::Profile { .. }
            | Error::UnknownProfile { .. }
            | Error::Machine { .. }
            | Error::InTrace { .. } => self,
            _ => Error::InTrace {
                trace: trace.to_owned(),
                source: Box::new(self),
            },
        }
    }

    /// Makes the closure that `map_err` wants where the machine is set up or accessed.
    pub(crate) fn machine<E>(action: &'static str) -> impl FnOnce(E) -> Error
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        move |source| Error::Machine {
            action,
            source: source.into(),
        }
    }

    /// Makes the closure that `map_err` wants where a file cannot be had.
    pub(crate) fn file(path: &Path) -> impl FnOnce(io::Error) -> Error + '_ {
        |source| Error::File {
            path: path.to_owned(),
            source,
        }
    }

    /// Makes the closure that `map_err` wants where a crate under test refuses the packet at
    /// `offset`.
    pub(crate) fn refused<E>(offset: u64) -> impl FnOnce(E) -> Error
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        move |source| Error::Refused {
            offset,
            source: source.into(),
        }
    }
}

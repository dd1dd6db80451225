// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can be wrong with a recording, a contiguity profile or the machine that replays them.

use std::io;
use std::path::PathBuf;

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
    /// The xz or gzip stream is damaged or cut off.
    #[error("byte offset {offset}: the compressed trace is damaged or cut off: {source}")]
    Compressed {
        /// Bytes of the compressed file taken in until then.
        offset: u64,
        /// What the decoder says.
        source: io::Error,
    },
    /// The trace, decompressed, is larger than [`MAX_TRACE_BYTES`](crate::aub::MAX_TRACE_BYTES).
    #[error("byte offset {limit}: the decompressed trace is larger than {limit} bytes")]
    TooLarge {
        /// The limit in bytes.
        limit: u64,
    },
    /// The file does not begin with an AUB version packet.
    #[error("byte offset 0: not an AUB trace, the file does not begin with a version packet")]
    NotAub,
    /// The version packet names a file version or a GPU this replay does not know.
    #[error("byte offset {offset}: {what} is {value:#x}, only {supported:#x} is supported")]
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
        "byte offset {offset}: truncated, the packet needs {needed} bytes and {available} are left"
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
    #[error("byte offset {offset}: unknown packet header {header:#010x}")]
    UnknownPacket {
        /// Where the packet begins.
        offset: u64,
        /// Its first dword.
        header: u32,
    },
    /// A packet whose length does not fit its kind.
    #[error("byte offset {offset}: a {kind} packet of {dwords} dwords, {expected} are needed")]
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
    #[error("byte offset {offset}: {what} is {value:#x}, which is not supported")]
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
        "byte offset {offset}: {length} bytes at {space} address {address:#x} are out of range"
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
    #[error("byte offset {offset}: graphics address {address:#x} has no GGTT entry")]
    NotMapped {
        /// Where the packet begins.
        offset: u64,
        /// The graphics address.
        address: u64,
    },
    /// The file ends inside the four dwords of a submission.
    #[error(
        "byte offset {offset}: the trace ends after {dwords} of the 4 dwords of a submission to \
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
    #[error("byte offset {offset}: the trace ends without a submission")]
    NoSubmission {
        /// Length of the trace.
        offset: u64,
    },
    /// The trace names more pages than the guest has.
    #[error("byte offset {offset}: the trace needs more than the guest's {pages} pages of memory")]
    GuestMemoryFull {
        /// Where the packet begins that needs one page more.
        offset: u64,
        /// Pages the guest has.
        pages: u64,
    },
    /// A line of a contiguity profile that is not a list of run lengths.
    #[error("byte offset {offset}: contiguity profile line {line}: {reason}")]
    Profile {
        /// Where the line begins.
        offset: usize,
        /// Its number, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// The trace copies no context pages, so nothing can be injected into their copies.
    #[error("the trace copies no context pages, so there is nothing to inject a fault into")]
    NothingToInject,
    /// The scheduler refused what the trace asks for.
    #[error("byte offset {offset}: {source}")]
    Refused {
        /// Where the packet begins.
        offset: u64,
        /// The error of the crate under test.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A polled register did not take the value the recorder waited for.
    #[error(
        "byte offset {offset}: register {register:#x} reads {value:#x}, {expected:#x} was polled \
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
    /// The virtual machine of the replay could not be set up, or its memory not be accessed.
    #[error("cannot {action}: {source}")]
    Machine {
        /// What was being done.
        action: &'static str,
        /// Why it failed.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
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

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can go wrong, and the errno that a client is told.

use std::io;
use std::time::Duration;

use iommu_type1::errno_of;

/// Errors of the server and its DMA table.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The address space refused it.
    #[error(transparent)]
    Space(#[from] iommu_type1::Error),
    /// An access by the device stopped.
    #[error("{iova:#x} ({completed} bytes were done): {cause}")]
    Access {
        /// Where.
        iova: u64,
        /// Bytes done before.
        completed: usize,
        /// Why.
        cause: AccessError,
    },
    /// The other end of a stream failed, not the memory.
    #[error("a stream stopped after {completed} bytes: {source}")]
    Stream {
        /// Bytes done before, at least.
        completed: usize,
        /// What its reader or writer says.
        source: io::Error,
    },
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What the kernel says.
        source: io::Error,
    },
    /// A message that the protocol does not allow.
    #[error("{0}")]
    Malformed(&'static str),
    /// There is no memory for a message, or for the answer to it.
    #[error("no memory for a message of {0:#x} bytes")]
    NoMemory(usize),
    /// A command that is not served.
    #[error("command {0} is not supported")]
    Unsupported(u16),
    /// Flags that no map or unmap has.
    #[error("flags {flags:#x} of a {what}")]
    Flags {
        /// A map or an unmap.
        what: &'static str,
        /// The flags.
        flags: u32,
    },
    /// An unmap that asks for its dirty pages.
    #[error("an unmap cannot hand over dirty pages")]
    DirtyBitmap,
    /// A range that begins or ends inside a page, is empty or goes beyond 2^64.
    #[error("{size:#x} bytes at {address:#x} with offset {offset:#x} are not whole pages inside the 64-bit space")]
    Range {
        /// I/O virtual address.
        address: u64,
        /// Bytes.
        size: u64,
        /// Offset in the file.
        offset: u64,
    },
    /// Something is mapped there already.
    #[error("{size:#x} bytes at {address:#x} overlap what is mapped at {mapped:#x}")]
    Overlap {
        /// I/O virtual address.
        address: u64,
        /// Bytes.
        size: u64,
        /// Start of what is in the way.
        mapped: u64,
    },
    /// An unmap that would leave a part of a mapping, or, where unmaps are strict, is not exactly one.
    #[error("{size:#x} bytes at {address:#x} do not end where mappings end")]
    Cut {
        /// I/O virtual address.
        address: u64,
        /// Bytes.
        size: u64,
    },
    /// A strict unmap of nothing.
    #[error("nothing is mapped in {size:#x} bytes at {address:#x}")]
    NothingMapped {
        /// I/O virtual address.
        address: u64,
        /// Bytes.
        size: u64,
    },
    /// As many mappings, or files behind them, as the table may have.
    #[error("the limit of {limit} {what} is reached")]
    Limit {
        /// Of what.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
    /// Memory that the client has mapped privately: what it writes there is not in the file.
    #[error("process {pid} maps the file of this memory privately and would not see what the device does (share=off?)")]
    PrivateMemory {
        /// The client.
        pid: i32,
    },
    /// A file that the client could shrink under our mapping.
    #[error("the file of this memory is not sealed against shrinking")]
    Unsealed,
    /// A file that was opened for less than the mapping should allow.
    #[error("the file of this memory does not allow writes")]
    FileAccess,
    /// A region, a part of one or an interrupt that the device does not have.
    #[error("{0}")]
    NoSuch(&'static str),
    /// The device refused it.
    #[error("the device: {0}")]
    Device(#[source] io::Error),
}

/// Why an access by the device stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AccessError {
    /// The address space refused it.
    #[error(transparent)]
    Space(#[from] iommu_type1::Error),
    /// The range, whose memory only the client has, does not permit it.
    #[error("the range does not permit it")]
    Permission,
    /// No client is connected, or it has gone meanwhile.
    #[error("the client is gone")]
    Disconnected,
    /// The client has unmapped the range meanwhile.
    #[error("the client has unmapped the range")]
    Unmapped,
    /// The device does not wait for the client any longer ([`DmaTable::cancel_messages`](crate::DmaTable::cancel_messages)).
    #[error("the device does not wait any longer")]
    Canceled,
    /// The client did not answer in time.
    #[error("no answer of the client for {0:.1?}")]
    Deadline(Duration),
    /// The client answered with an errno.
    #[error("the client answered with errno {0}")]
    Client(i32),
    /// The client's answer is not one.
    #[error("the client's answer does not fit the question")]
    BadReply,
    /// As many accesses wait for the client as may.
    #[error("{0} accesses wait for the client already")]
    TooMany(usize),
    /// There is no memory for the data.
    #[error("no memory for {0:#x} bytes of data")]
    NoMemory(usize),
    /// Asked by the thread that serves the socket: the answer could never be read.
    #[error("memory without a file cannot be accessed by the thread that serves the socket")]
    ServerThread,
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The errno that a client is told.
    pub fn errno(&self) -> i32 {
        match self {
            Error::Space(error) => error.errno(),
            Error::Access { cause, .. } => cause.errno(),
            Error::Io { source, .. } | Error::Stream { source, .. } | Error::Device(source) => {
                errno_of(source)
            }
            Error::Malformed(_)
            | Error::Flags { .. }
            | Error::Range { .. }
            | Error::Cut { .. }
            | Error::PrivateMemory { .. }
            | Error::NoSuch(_) => libc::EINVAL,
            Error::Unsupported(_) | Error::DirtyBitmap => libc::EOPNOTSUPP,
            Error::Overlap { .. } => libc::EEXIST,
            Error::NothingMapped { .. } => libc::ENOENT,
            Error::Limit { .. } => libc::ENOSPC,
            Error::Unsealed => libc::EPERM,
            Error::FileAccess => libc::EACCES,
            Error::NoMemory(_) => libc::ENOMEM,
        }
    }

    /// Bytes that an access had done before it failed.
    pub fn completed(&self) -> usize {
        match self {
            Error::Space(error) => error.completed(),
            Error::Access { completed, .. } | Error::Stream { completed, .. } => *completed,
            _ => 0,
        }
    }

    pub(crate) fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Error::Io { what, source }
    }
}

impl AccessError {
    /// The errno of the same failure of a system call.
    pub fn errno(&self) -> i32 {
        match self {
            AccessError::Space(error) => error.errno(),
            AccessError::Permission => libc::EPERM,
            AccessError::Disconnected => libc::ENOTCONN,
            AccessError::Unmapped | AccessError::Canceled => libc::ECANCELED,
            AccessError::Deadline(_) => libc::ETIMEDOUT,
            AccessError::Client(errno) => *errno,
            AccessError::BadReply => libc::EPROTO,
            AccessError::ServerThread => libc::EDEADLK,
            AccessError::TooMany(_) => libc::ENOBUFS,
            AccessError::NoMemory(_) => libc::ENOMEM,
        }
    }
}

/// Its errno, as a [`Backend`](crate::Backend) answers with. The values are in the error alone: log them before.
impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        io::Error::from_raw_os_error(error.errno())
    }
}

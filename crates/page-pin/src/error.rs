// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can go wrong with a pin.

use std::io;

use crate::Holder;

/// Errors of pinning and unpinning.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A request for no pages.
    #[error("a pin of no pages at {iova:#x}")]
    Empty {
        /// First IOVA of the request.
        iova: u64,
    },
    /// The address is not the start of a page.
    #[error("{iova:#x} is not a multiple of the page size {page_size:#x}")]
    Misaligned {
        /// First IOVA of the request.
        iova: u64,
        /// Page size of the table in bytes.
        page_size: u64,
    },
    /// More pages than one call may name.
    #[error("{npages} pages in one call, at most {max} are allowed")]
    TooMany {
        /// Number of pages asked for.
        npages: usize,
        /// Most pages of one call.
        max: usize,
    },
    /// The range does not fit the 64-bit address space.
    #[error("{npages} pages at {iova:#x} end beyond the 64-bit address space")]
    Overflow {
        /// First IOVA of the request.
        iova: u64,
        /// Number of pages asked for.
        npages: usize,
    },
    /// The owner has not kept a pin on this page, so it cannot unpin it.
    #[error("{name} (access {id}) has no kept pin on the page at {iova:#x}")]
    NotPinned {
        /// Access that asked.
        id: u64,
        /// Name the access was registered with.
        name: String,
        /// First page of the request that is not pinned.
        iova: u64,
    },
    /// Unpins have to name exactly the pages of a pin, and no pin left to the owner is of these.
    #[error("{name} (access {id}) has no kept pin of exactly the {npages} pages from {iova:#x}")]
    NotExact {
        /// Access that asked.
        id: u64,
        /// Name the access was registered with.
        name: String,
        /// First page of the request.
        iova: u64,
        /// Number of pages of the request.
        npages: usize,
    },
    /// The page is about to be unmapped.
    #[error("the page at {iova:#x} is about to be unmapped")]
    Prevented {
        /// First page of the request that is.
        iova: u64,
    },
    /// The account refuses a page.
    #[error("the page at {iova:#x} is not accounted for: {}", io::Error::from_raw_os_error(*.errno))]
    Account {
        /// The page.
        iova: u64,
        /// What the account said.
        errno: i32,
    },
    /// As many pins as the table may have, a page and owner each; or, where unpins have to be exact, ranges.
    #[error("the limit of {limit} pins is reached")]
    PinLimit {
        /// The limit.
        limit: usize,
    },
    /// There is no memory for the lists of a request of many pages.
    #[error("no memory: an allocation of {bytes:#x} bytes failed")]
    NoMemory {
        /// Bytes that were asked for.
        bytes: usize,
    },
    /// The access may not pin: it leaves its table, or has left it.
    #[error("{name} (access {id}) is not attached")]
    Detached {
        /// Access that asked.
        id: u64,
        /// Name the access was registered with.
        name: String,
    },
    /// An access has been told to let go and still holds pins at the deadline.
    #[error("an access still holds pins: {}", Listed(.holders))]
    Held {
        /// What it holds.
        holders: Vec<Holder>,
    },
    /// A notice of an access still runs at the deadline.
    #[error("a notice of {name} (access {id}) is still running")]
    NoticeRuns {
        /// The access.
        id: u64,
        /// Name the access was registered with.
        name: String,
    },
}

/// Holders one after the other.
struct Listed<'a>(&'a [Holder]);

impl std::fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, holder) in self.0.iter().enumerate() {
            let separator = if i == 0 { "" } else { "; " };
            write!(f, "{separator}{holder}")?;
        }
        Ok(())
    }
}

impl Error {
    /// The errno the kernel answers in this case.
    pub fn errno(&self) -> i32 {
        match self {
            Error::Overflow { .. } => libc::EOVERFLOW,
            Error::TooMany { .. } => libc::E2BIG,
            Error::Empty { .. }
            | Error::Misaligned { .. }
            | Error::NotPinned { .. }
            | Error::NotExact { .. } => libc::EINVAL,
            Error::Prevented { .. } | Error::NoticeRuns { .. } => libc::EBUSY,
            Error::Account { errno, .. } => *errno,
            Error::PinLimit { .. } => libc::ENOSPC,
            Error::NoMemory { .. } => libc::ENOMEM,
            Error::Detached { .. } => libc::ENOENT,
            Error::Held { .. } => libc::EDEADLK,
        }
    }
}

/// Its errno, for those who answer with one. The values are in the error alone: log them before.
///
/// ```
/// use std::sync::Arc;
/// use page_pin::{Interest, PinTable};
///
/// let access = PinTable::new(4096).register("disk", Interest::Holder, Arc::new(|_, _| ()));
/// let error = std::io::Error::from(access.pin(1, 1).unwrap_err());
/// assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
/// ```
impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        io::Error::from_raw_os_error(error.errno())
    }
}

/// Result of pinning and unpinning.
pub type Result<T> = std::result::Result<T, Error>;

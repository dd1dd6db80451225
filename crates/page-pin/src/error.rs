// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can go wrong with a pin.

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
}

impl Error {
    /// The errno the kernel answers in this case.
    pub fn errno(&self) -> i32 {
        match self {
            Error::Overflow { .. } => libc::EOVERFLOW,
            Error::TooMany { .. } => libc::E2BIG,
            Error::Empty { .. } | Error::Misaligned { .. } | Error::NotPinned { .. } => {
                libc::EINVAL
            }
        }
    }
}

/// Result of pinning and unpinning.
pub type Result<T> = std::result::Result<T, Error>;

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can go wrong, with an errno for whoever answers a message.

use std::io;
use std::time::Duration;

use vm_memory::Permissions;

/// Errors of a device IOTLB.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The bytes are too few or too many for a message.
    #[error("a message of {len} bytes")]
    MessageSize {
        /// How many they are.
        len: usize,
    },
    /// A message of a type that is not known.
    #[error("a message of the unknown type {0}")]
    UnknownType(u8),
    /// A message with an access that is not known.
    #[error("a message with the unknown access {0}")]
    UnknownAccess(u8),
    /// A message that a front end does not send.
    #[error("a message of type {0}, which a front end does not send")]
    Unexpected(u8),
    /// An address of the front end where its memory table has nothing.
    #[error("nothing of the memory table is at {userspace_addr:#x} ({size:#x} bytes wanted)")]
    NotInTable {
        /// The first address that is not there.
        userspace_addr: u64,
        /// Bytes wanted from there on.
        size: u64,
    },
    /// A range of the front end's addresses that is empty or ends beyond 64 bits.
    #[error("{size:#x} bytes at the front end's address {userspace_addr:#x} are no range")]
    UserspaceRange {
        /// Its first address.
        userspace_addr: u64,
        /// Bytes.
        size: u64,
    },
    /// Two regions of a memory table share an address of the front end.
    #[error("the regions at {userspace_addr:#x} and {other:#x} overlap")]
    RegionsOverlap {
        /// Where the one begins.
        userspace_addr: u64,
        /// Where the other begins.
        other: u64,
    },
    /// A memory table of too many regions.
    #[error("a memory table of {regions} regions, at most {limit}")]
    RegionLimit {
        /// How many there are.
        regions: usize,
        /// How many there may be.
        limit: usize,
    },
    /// A memory table of too many bytes.
    #[error("a memory table of {bytes:#x} bytes, where {limit:#x} are taken")]
    TableBytes {
        /// Bytes of all regions.
        bytes: u64,
        /// How many there may be.
        limit: u64,
    },
    /// A batch or a new memory table is wanted inside of a batch.
    #[error("a batch is open")]
    BatchOpen,
    /// The end of a batch that has not begun.
    #[error("no batch is open")]
    NoBatch,
    /// A batch of too many changes.
    #[error("a batch of more than {limit} changes")]
    BatchLimit {
        /// How many there may be.
        limit: usize,
    },
    /// A batch ended of which messages were refused: nothing of it was done.
    #[error("{refused} messages of the batch were refused, nothing of it was done")]
    BatchSpoiled {
        /// How many.
        refused: usize,
    },
    /// A space without the rules of an IOTLB.
    #[error("the space follows the rules of {0:?}, not those of an IOTLB")]
    Profile(iommu_type1::Profile),
    /// A space in which what an invalidation does not get in time comes back.
    #[error("the space unmaps with the policy {0:?}, an IOTLB takes Revoked")]
    Policy(iommu_type1::UnmapPolicy),
    /// As many misses are waited for as may be.
    #[error("{limit} misses are not answered yet")]
    MissLimit {
        /// How many there may be.
        limit: usize,
    },
    /// A miss was not answered in time, or not by what an access needs.
    #[error(
        "no answer that helps to the miss of {size:#x} bytes at {iova:#x} for {access:?} in {waited:.1?}"
    )]
    MissDeadline {
        /// First address of what is missing.
        iova: u64,
        /// Bytes.
        size: u64,
        /// For what.
        access: Permissions,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The front end says that the device may not access what was missing.
    #[error("the front end refuses {access:?} of {size:#x} bytes at {iova:#x}")]
    AccessFail {
        /// First address.
        iova: u64,
        /// Bytes.
        size: u64,
        /// For what.
        access: Permissions,
    },
    /// A miss could not be reported.
    #[error("the miss of {size:#x} bytes at {iova:#x} could not be reported: {kind}")]
    Report {
        /// First address of what is missing.
        iova: u64,
        /// Bytes.
        size: u64,
        /// Why.
        kind: io::ErrorKind,
    },
    /// The front end is gone.
    #[error("the front end is gone")]
    Disconnected,
    /// The space refuses it.
    #[error(transparent)]
    Space(#[from] iommu_type1::Error),
}

/// Result of a device IOTLB.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// What a front end that wants an answer is told.
    pub fn errno(&self) -> i32 {
        match self {
            Error::MessageSize { .. }
            | Error::UnknownType(_)
            | Error::UnknownAccess(_)
            | Error::Unexpected(_)
            | Error::RegionsOverlap { .. }
            | Error::NoBatch
            | Error::BatchSpoiled { .. }
            | Error::Profile(_)
            | Error::Policy(_) => libc::EINVAL,
            Error::NotInTable { .. } | Error::UserspaceRange { .. } => libc::EFAULT,
            Error::RegionLimit { .. } | Error::TableBytes { .. } | Error::BatchLimit { .. } => {
                libc::E2BIG
            }
            Error::BatchOpen => libc::EBUSY,
            Error::MissLimit { .. } => libc::ENOBUFS,
            Error::MissDeadline { .. } => libc::ETIMEDOUT,
            Error::AccessFail { .. } => libc::EACCES,
            Error::Report { .. } => libc::EIO,
            Error::Disconnected => libc::ENOTCONN,
            Error::Space(error) => error.errno(),
        }
    }
}

/// Its errno, for those who answer with one. The values are in the error alone: log them before.
///
/// ```
/// let error = vhost_iotlb::message::decode(&[]).map(drop).unwrap_err();
/// assert_eq!(std::io::Error::from(error).raw_os_error(), Some(libc::EINVAL));
/// ```
impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        io::Error::from_raw_os_error(error.errno())
    }
}

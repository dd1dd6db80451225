// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The errno that the kernel answers in the same case.

use std::io;

use vm_memory::mmap::MmapRegionError;

use super::Error;

impl Error {
    /// The errno the kernel answers in this case, to a space of the same profile.
    pub fn errno(&self) -> i32 {
        match self {
            Error::Empty { .. }
            | Error::Misaligned { .. }
            | Error::NoPermissions { .. }
            | Error::EmptyRange { .. }
            | Error::BitmapPageSize { .. }
            | Error::BitmapSize { .. }
            | Error::DirtyMapping { .. }
            | Error::Snapshot(_)
            | Error::Flags { .. }
            | Error::UnmapAllRange { .. }
            | Error::RangesOverlap { .. }
            | Error::OutsideRanges { .. }
            | Error::ArgumentSize { .. }
            | Error::InfoChain { .. }
            | Error::VaddrValid { .. }
            | Error::Attached { .. }
            | Error::NotInProfile(_)
            | Error::NotTracking { .. } => libc::EINVAL,
            Error::Bisect { errno, .. }
            | Error::NotMapped { errno, .. }
            | Error::VaddrInvalid { errno, .. } => *errno,
            Error::NothingMapped { .. } => libc::ENOENT,
            Error::Overflow { .. } | Error::HostOverflow { .. } => libc::EOVERFLOW,
            Error::BackingProtection { .. } | Error::BackingRange { .. } | Error::NoRegion(_) => {
                libc::EFAULT
            }
            Error::Mmap { source, .. } => match source {
                MmapRegionError::Mmap(error) => error.raw_os_error().unwrap_or(libc::ENOMEM),
                _ => libc::EINVAL,
            },
            Error::Overlap { .. } => libc::EEXIST,
            Error::EntryLimit { .. }
            | Error::TableLimit { .. }
            | Error::DirtyLimit { .. }
            | Error::ListenerLimit { .. }
            | Error::NoRoom { .. } => libc::ENOSPC,
            Error::Unmapping { .. }
            | Error::Revoked { .. }
            | Error::Pinned { .. }
            | Error::AccessRuns { .. }
            | Error::Moving { .. } => libc::EBUSY,
            Error::NotAttached { .. } => libc::ENOENT,
            Error::NoDirtyPages | Error::NoPins => libc::EACCES,
            Error::ArgumentMemory { .. } | Error::Fault { .. } => libc::EFAULT,
            Error::RangeInUse { .. } => libc::EADDRINUSE,
            Error::NoMemory { .. } => libc::ENOMEM,
            Error::Permission { .. } | Error::FileProtection { .. } | Error::NotOwned { .. } => {
                libc::EPERM
            }
            Error::Deadline { .. } | Error::InsideAccess { .. } | Error::InsideListener { .. } => {
                libc::EDEADLK
            }
            Error::Stream { source, .. } | Error::Refused { source, .. } => errno_of(source),
            Error::Pin(error) => error.errno(),
        }
    }
}

/// The errno of an error of code that is called: of a [`Listener`](crate::Listener), a stream, a device. It is the error's own, or
/// the one that its kind stands for: EPERM of `PermissionDenied`, EEXIST of `AlreadyExists`, EINVAL of `InvalidInput`, EBUSY of
/// `ResourceBusy`, ENOSPC of `StorageFull`, ENOMEM of `OutOfMemory`, EOPNOTSUPP of `Unsupported`, EIO of any other.
///
/// ```
/// use std::io::{Error, ErrorKind};
/// use iommu_type1::errno_of;
///
/// assert_eq!(errno_of(&Error::from_raw_os_error(libc::ENXIO)), libc::ENXIO);
/// assert_eq!(errno_of(&ErrorKind::InvalidInput.into()), libc::EINVAL);
/// assert_eq!(errno_of(&Error::other("the engine hangs")), libc::EIO);
/// ```
pub fn errno_of(error: &io::Error) -> i32 {
    let of_kind = match error.kind() {
        io::ErrorKind::PermissionDenied => libc::EPERM,
        io::ErrorKind::AlreadyExists => libc::EEXIST,
        io::ErrorKind::InvalidInput => libc::EINVAL,
        io::ErrorKind::ResourceBusy => libc::EBUSY,
        io::ErrorKind::StorageFull => libc::ENOSPC,
        io::ErrorKind::OutOfMemory => libc::ENOMEM,
        io::ErrorKind::Unsupported => libc::EOPNOTSUPP,
        _ => libc::EIO,
    };
    error.raw_os_error().unwrap_or(of_kind)
}

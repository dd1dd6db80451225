// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A container or an iommufd of the crate vfio-ioctls. What it maps can be read and written, always.

#![allow(unsafe_code)]

use std::error::Error as StdError;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use iommu_type1::{IoAddressSpace, MappingInfo};
use vfio_ioctls::{VfioContainer, VfioError, VfioOps};
use vm_memory::Permissions;
use vmm_sys_util::errno;

use super::hardware::has_no_iommu;
use super::Mirror;
use crate::follower::Target;
use crate::hardware::HardwareContainer;
use crate::Result;

impl Mirror {
    /// Mirrors a space into what the crate vfio-ioctls maps with: a `VfioContainer` or a `VfioIommufd`, on
    /// which devices are opened as before.
    ///
    /// All it maps can be read and written. So a mapping that cannot is refused with EPERM: a device must not be
    /// able to do more than the space allows. Where there are such mappings, [`Mirror::new`] takes
    /// the container by its file ([`HardwareContainer::of`]).
    ///
    /// # Errors
    ///
    /// As [`Mirror::new`].
    pub fn with_ops(space: &IoAddressSpace, ops: Arc<dyn VfioOps>) -> Result<Self> {
        Mirror::follow(space, ops)
    }
}

impl HardwareContainer {
    /// The container of the crate vfio-ioctls, by a file of its own: for what that crate has no call for
    /// (permissions, limits).
    ///
    /// # Errors
    ///
    /// [`Error::Hardware`](crate::Error::Hardware): no more files can be opened.
    pub fn of(container: &VfioContainer) -> Result<Self> {
        // SAFETY: it is open as long as the container, which is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(container.as_raw_fd()) };
        let file = fd.try_clone_to_owned();
        let file = file.map_err(|source| crate::Error::Hardware {
            operation: "dup",
            source,
        })?;
        Ok(HardwareContainer::from_file(File::from(file)))
    }
}

impl Target for Arc<dyn VfioOps> {
    unsafe fn map(&mut self, mapping: &MappingInfo) -> io::Result<()> {
        let &MappingInfo {
            iova,
            size,
            permissions,
            ..
        } = mapping;
        if permissions != Permissions::ReadWrite {
            let why = format!("{size:#x} bytes at {iova:#x} would be mapped for reads and writes instead of {permissions:?}");
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        let size = to_usize(size)?;
        // SAFETY: the caller keeps the memory, which is used as memory that others change.
        let mapped = unsafe { self.vfio_dma_map(iova, size, mapping.backing.host_address()) };
        mapped.map_err(into_io)
    }

    fn unmap(&mut self, iova: u64, size: u64) -> io::Result<()> {
        match self.vfio_dma_unmap(iova, to_usize(size)?) {
            Ok(()) => Ok(()),
            // It says so when the kernel has unmapped what there was, which was another size.
            Err(VfioError::InvalidDmaUnmapSize) => {
                log::warn!("of {size:#x} bytes at {iova:#x} the kernel had not all");
                Ok(())
            }
            Err(error) => match errno(&error) {
                // An iommufd has nothing there.
                Some(libc::ENOENT) => Ok(()),
                Some(libc::EINVAL) if is_released(self) => Ok(()),
                _ => Err(into_io(error)),
            },
        }
    }
}

/// Whether the last device is closed, and with it all mappings are gone.
fn is_released(ops: &Arc<dyn VfioOps>) -> bool {
    let container = ops.as_any().downcast_ref::<VfioContainer>();
    container.is_some_and(|container| {
        HardwareContainer::of(container).is_ok_and(|container| has_no_iommu(&container))
    })
}

fn to_usize(size: u64) -> io::Result<usize> {
    usize::try_from(size).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

fn into_io(error: VfioError) -> io::Error {
    match errno(&error) {
        Some(errno) => io::Error::from_raw_os_error(errno),
        None => io::Error::other(error),
    }
}

/// What the kernel has answered, however deep that error is in the other.
fn errno(error: &VfioError) -> Option<i32> {
    let mut error: Option<&(dyn StdError + 'static)> = Some(error);
    while let Some(inner) = error {
        if let Some(errno) = inner.downcast_ref::<errno::Error>() {
            return Some(errno.errno());
        }
        error = inner.source();
    }
    None
}

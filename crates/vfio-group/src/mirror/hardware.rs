// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A container of our own, by our own ioctls: permissions stay what they are.

#![allow(unsafe_code)]

use std::io;
use std::sync::Arc;

use iommu_type1::MappingInfo;
use vm_memory::Permissions;

use crate::follower::Target;
use crate::hardware::{HardwareContainer, READ, WRITE};

impl Target for Arc<HardwareContainer> {
    unsafe fn map(&mut self, mapping: &MappingInfo) -> io::Result<()> {
        let memory = mapping.backing.host_address();
        let flags = flags(mapping.permissions);
        // SAFETY: the caller keeps the memory, which is used as memory that others change.
        let mapped =
            unsafe { HardwareContainer::map(self, mapping.iova, memory, mapping.size, flags) };
        Ok(mapped?)
    }

    fn unmap(&mut self, iova: u64, size: u64) -> io::Result<()> {
        match HardwareContainer::unmap(self, iova, size) {
            Ok(unmapped) => {
                if unmapped != size {
                    log::warn!("of {size:#x} bytes at {iova:#x} the kernel had {unmapped:#x}");
                }
                Ok(())
            }
            Err(_) if has_no_iommu(self) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Whether the last group has left, and with it all mappings.
pub(super) fn has_no_iommu(container: &HardwareContainer) -> bool {
    matches!(container.info(), Err(error) if matches!(error.errno(), libc::EINVAL | libc::ENODEV))
}

fn flags(permissions: Permissions) -> u32 {
    let flag = |permission, flag| {
        if permissions.allow(permission) {
            flag
        } else {
            0
        }
    };
    flag(Permissions::Read, READ) | flag(Permissions::Write, WRITE)
}

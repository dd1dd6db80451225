// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Adding mappings: the checks of `VFIO_IOMMU_MAP_DMA`, in its order.

use std::ops::ControlFlow;
use std::sync::Arc;

use vm_memory::Permissions;

use crate::mapping::Mapping;
use crate::range::{check_aligned, IovaRange};
use crate::sync::lock;
use crate::{Backing, Error, IoAddressSpace, Result};

impl IoAddressSpace {
    /// Maps the whole of `backing` at `iova`, for accesses that `prot` permits.
    ///
    /// The mapping is visible to every user of the space when this returns. The last page of the
    /// 64-bit space can be mapped like any other.
    ///
    /// # Errors
    ///
    /// In this order, as Linux 6.18 and later check:
    /// [`Error::Empty`] (EINVAL), [`Error::Overflow`] (EOVERFLOW), [`Error::NoPermissions`]
    /// (EINVAL), [`Error::Misaligned`] (address, size or host address; EINVAL),
    /// [`Error::BackingProtection`] (EFAULT), [`Error::Overlap`] (EEXIST) or [`Error::Unmapping`]
    /// (EBUSY) where the mapping in the way is being unmapped, [`Error::EntryLimit`] or
    /// [`Error::TableLimit`] (ENOSPC).
    pub fn map(&self, iova: u64, backing: Backing, prot: Permissions) -> Result<()> {
        let size = backing.len() as u64;
        let range = IovaRange::new(iova, size)?;
        if prot == Permissions::No {
            return Err(Error::NoPermissions { iova });
        }
        check_aligned("address", iova)?;
        check_aligned("size", size)?;
        check_aligned("host address", backing.host_address() as u64)?;
        if !backing.access().allow(prot) {
            return Err(Error::BackingProtection {
                iova,
                asked: prot,
                allowed: backing.access(),
            });
        }

        let space = &self.view.space;
        let mut writer = lock(&space.writer);
        if let Some(leaving) = writer.leaving_in(range) {
            let mapped = leaving.mapping.range;
            return Err(Error::Unmapping {
                iova,
                size,
                mapped: mapped.first,
                mapped_size: mapped.size(),
            });
        }
        let in_the_way = space
            .table
            .visit(range, |mapping| ControlFlow::Break(mapping.range));
        if let Some(mapped) = in_the_way {
            return Err(Error::Overlap {
                iova,
                size,
                mapped: mapped.first,
                mapped_size: mapped.size(),
            });
        }
        if writer.len() >= space.entry_limit {
            return Err(Error::EntryLimit {
                limit: space.entry_limit,
            });
        }
        let bytes = writer.table_bytes;
        if bytes >= space.table_limit {
            return Err(Error::TableLimit {
                bytes,
                limit: space.table_limit,
            });
        }
        let mapping = Mapping::new(range, prot, backing);
        writer.publish(&space.table, Arc::new(mapping));
        Ok(())
    }
}

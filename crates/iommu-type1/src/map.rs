// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Adding mappings: the checks of `VFIO_IOMMU_MAP_DMA`, in its order.

use vm_memory::Permissions;

use crate::mapping::Mapping;
use crate::range::{check_aligned, IovaRange};
use crate::sync::write;
use crate::table::State;
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
    /// [`Error::BackingProtection`] (EFAULT), [`Error::Overlap`] (EEXIST) or [`Error::Revoked`]
    /// (EBUSY) where the mapping in the way is being unmapped, [`Error::EntryLimit`] (ENOSPC).
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
        let mut table = write(&space.table);
        if let Some(entry) = table.first_overlap(range) {
            let mapped = entry.mapping.range;
            return Err(match entry.state {
                State::Live => Error::Overlap {
                    iova,
                    size,
                    mapped: mapped.first,
                    mapped_size: mapped.size(),
                },
                State::Revoking | State::Revoked => Error::Revoked {
                    iova: mapped.first,
                    completed: 0,
                },
            });
        }
        if table.len() >= space.entry_limit {
            return Err(Error::EntryLimit {
                limit: space.entry_limit,
            });
        }
        table.insert(Mapping {
            range,
            prot,
            backing,
        });
        Ok(())
    }
}

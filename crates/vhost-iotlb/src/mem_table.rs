// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The front end's memory: its addresses, and where this process has the same bytes.

use std::fs::File;
use std::sync::Arc;

use iommu_type1::Backing;
use vm_memory::{FileOffset, GuestAddress, Permissions};

use crate::{memory, Error, Result};

/// Most regions of a memory table; QEMU and the kernel know fewer.
pub const REGION_LIMIT: usize = 512;

/// Most bytes of all regions of a memory table. They are mapped, and a process has addresses for 128 TiB, of which this
/// is a half: files may be as large as a front end likes, and take no memory themselves.
/// The memory of a [`MemRegion`] is mapped when a table is made of it: who maps what a front end sends adds the sizes up
/// before, against this or less.
pub const TABLE_BYTES_LIMIT: u64 = 64 << 40;

/// Some memory of the front end.
#[derive(Clone, Debug)]
pub struct MemRegion {
    userspace_addr: u64,
    backing: Backing,
}

impl MemRegion {
    /// Memory that this process has already, at an address of the front end's.
    pub fn new(userspace_addr: u64, backing: Backing) -> Self {
        MemRegion {
            userspace_addr,
            backing,
        }
    }

    /// A region as `SET_MEM_TABLE` and `ADD_MEM_REG` describe it, with the file that comes with it: `size` bytes from
    /// `offset` of the file are at `guest_address` of the guest and at `userspace_addr` of the front end. They are
    /// mapped into this process once, however many updates there will be of them.
    ///
    /// # Errors
    ///
    /// [`Error::Space`] of the file: it is too short, cannot be mapped there, or may not be written.
    pub fn file(
        guest_address: u64,
        size: u64,
        userspace_addr: u64,
        file: Arc<File>,
        offset: u64,
    ) -> Result<Self> {
        let too_large = |_| Error::UserspaceRange {
            userspace_addr,
            size,
        };
        let len = usize::try_from(size).map_err(too_large)?;
        let file = FileOffset::from_arc(file, offset);
        let backing = Backing::file(file, len, Permissions::ReadWrite)?
            .with_guest_address(GuestAddress(guest_address))?;
        Ok(MemRegion::new(userspace_addr, backing))
    }

    fn last(&self) -> u64 {
        self.userspace_addr + (self.backing.len() as u64 - 1)
    }
}

/// All memory of a front end, by its own addresses.
///
/// ```
/// use iommu_type1::Backing;
/// use vhost_iotlb::{MemRegion, MemTable};
///
/// let low = MemRegion::new(0x7f00_0000, Backing::anonymous(0x4000)?);
/// let high = MemRegion::new(0x7f00_4000, Backing::anonymous(0x4000)?);
/// let table = MemTable::new([low, high])?;
/// // A range may go on in the next region, and then has two parts.
/// let parts = table.resolve(0x7f00_3000, 0x2000)?;
/// assert_eq!(parts.iter().map(Backing::len).collect::<Vec<_>>(), [0x1000, 0x1000]);
/// assert_eq!(table.resolve(0x7f00_7000, 0x2000).unwrap_err().errno(), libc::EFAULT);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct MemTable {
    /// By address, apart from each other.
    regions: Vec<MemRegion>,
}

impl MemTable {
    /// A table of these regions, in any order.
    ///
    /// # Errors
    ///
    /// [`Error::RegionLimit`], [`Error::TableBytes`] (E2BIG), [`Error::UserspaceRange`] (EFAULT), [`Error::RegionsOverlap`]
    /// (EINVAL).
    pub fn new(regions: impl IntoIterator<Item = MemRegion>) -> Result<Self> {
        MemTable::within(regions, TABLE_BYTES_LIMIT)
    }

    /// A table of so many bytes at most.
    fn within(regions: impl IntoIterator<Item = MemRegion>, limit: u64) -> Result<Self> {
        let mut regions: Vec<_> = regions.into_iter().collect();
        if regions.len() > REGION_LIMIT {
            return Err(Error::RegionLimit {
                regions: regions.len(),
                limit: REGION_LIMIT,
            });
        }
        for region in &regions {
            check_range(region.userspace_addr, region.backing.len() as u64)?;
        }
        let sizes = regions.iter().map(|region| region.backing.len() as u64);
        let bytes = sizes.fold(0, u64::saturating_add);
        if bytes > limit {
            return Err(Error::TableBytes { bytes, limit });
        }
        regions.sort_unstable_by_key(|region| region.userspace_addr);
        let met = regions.windows(2);
        for pair in met {
            if pair[1].userspace_addr <= pair[0].last() {
                return Err(Error::RegionsOverlap {
                    userspace_addr: pair[0].userspace_addr,
                    other: pair[1].userspace_addr,
                });
            }
        }
        Ok(MemTable { regions })
    }

    /// The memory of `size` bytes from an address of the front end: a part for each region, in order.
    ///
    /// # Errors
    ///
    /// [`Error::UserspaceRange`], [`Error::NotInTable`] (EFAULT); [`Error::Space`] with ENOMEM.
    pub fn resolve(&self, userspace_addr: u64, size: u64) -> Result<Vec<Backing>> {
        let last = check_range(userspace_addr, size)?;
        let mut parts = Vec::new();
        let mut next = userspace_addr;
        loop {
            let left = last - next;
            let behind = |region: &MemRegion| region.userspace_addr <= next;
            let at = self.regions.partition_point(behind);
            let region = self.regions[..at].last();
            let Some(region) = region.filter(|region| next <= region.last()) else {
                return Err(Error::NotInTable {
                    userspace_addr: next,
                    size: left.saturating_add(1),
                });
            };
            // Both lie in the region, and so are as small as its length.
            let offset = (next - region.userspace_addr) as usize;
            let len = left.min(region.last() - next) as usize + 1;
            let part = region.backing.slice(offset, len)?;
            memory::extend(&mut parts, std::iter::once(part))?;
            match region.last().checked_add(1) {
                Some(behind) if behind <= last => next = behind,
                _ => return Ok(parts),
            }
        }
    }
}

/// The last address of a range that is one.
fn check_range(userspace_addr: u64, size: u64) -> Result<u64> {
    let last = size
        .checked_sub(1)
        .and_then(|behind| userspace_addr.checked_add(behind));
    last.ok_or(Error::UserspaceRange {
        userspace_addr,
        size,
    })
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn region(address: u64, len: usize) -> MemRegion {
        MemRegion::new(address, Backing::anonymous(len).unwrap())
    }

    #[test]
    fn regions_that_cannot_be_are_refused() {
        let top = u64::MAX - 0xfff;
        MemTable::new([region(top, 0x1000), region(0, 0x1000)]).unwrap();
        for wrong in [
            vec![region(top, 0x2000)],
            vec![region(0x2000, 0x1000), region(0x1000, 0x1001)],
            vec![region(0x1000, 0x1000), region(0x1000, 0x1000)],
        ] {
            MemTable::new(wrong).unwrap_err();
        }
        let many = (0..=REGION_LIMIT as u64).map(|i| region(i << 12, 0x1000));
        let error = MemTable::new(many).unwrap_err();
        assert_eq!(error.errno(), libc::E2BIG);
    }

    #[test]
    fn the_bytes_of_all_regions_have_a_limit() {
        let regions = || [region(0, 0x2000), region(0x8000, 0x1000)];
        MemTable::within(regions(), 0x3000).unwrap();
        let error = MemTable::within(regions(), 0x2fff).unwrap_err();
        assert_eq!(error.errno(), libc::E2BIG);
        assert!(error.to_string().contains("0x3000 bytes"), "{error}");
    }

    #[test]
    fn a_range_is_found_up_to_the_last_address() {
        let top = u64::MAX - 0xfff;
        let table = MemTable::new([region(top - 0x1000, 0x1000), region(top, 0x1000)]).unwrap();
        let lens = |address, size| {
            let parts = table.resolve(address, size)?;
            Ok::<_, Error>(parts.iter().map(Backing::len).collect::<Vec<_>>())
        };
        assert_eq!(lens(top - 1, 0x1001).unwrap(), [1, 0x1000]);
        assert_eq!(lens(u64::MAX, 1).unwrap(), [1]);
        for (address, size) in [
            (u64::MAX, 2),
            (top, 0),
            (0, u64::MAX),
            (top - 0x1001, 2),
            (0, 1),
        ] {
            assert_eq!(lens(address, size).unwrap_err().errno(), libc::EFAULT);
        }
        assert!(MemTable::default().resolve(0, u64::MAX).is_err());
    }
}

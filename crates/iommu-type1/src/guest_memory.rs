// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! vm-memory's traits: whatever takes guest memory takes an IO address space.

use std::fmt;
use std::iter::FusedIterator;
use std::ops::Deref;

use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryError, GuestMemoryMmap,
    GuestMemoryResult, Permissions, VolatileSlice,
};

use crate::dirty::{Dirty, DirtySlice};
use crate::lease::LeaseSet;
use crate::mapping::{Mapping, Need};
#[cfg(feature = "iommu")]
use crate::Result;
use crate::{Error, IoAddressSpace};

impl GuestAddressSpace for IoAddressSpace {
    type M = DmaMemory;
    type T = DmaGuard;

    /// A guard for one request; see [`DmaGuard`].
    #[inline]
    fn memory(&self) -> DmaGuard {
        DmaGuard {
            memory: DmaMemory {
                leases: LeaseSet::new(self.view.clone()),
            },
        }
    }
}

/// Guest memory behind an IO address space, for as long as one request lasts.
///
/// It is owned, can be sent to another thread (not shared with one: clone it), and dereferences to a
/// [`GuestMemory`]. It leases
/// every mapping of which it has lent a slice, and returns the leases when it is dropped: until
/// then an unmap of those mappings waits. A clone begins without leases.
///
/// ```
/// use iommu_type1::{Backing, IoAddressSpace, UnmapOptions};
/// use std::time::Duration;
/// use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemory, Permissions};
///
/// let space = IoAddressSpace::new().named("queue 0");
/// space.map(0x1000, Backing::anonymous(0x1000)?, Permissions::ReadWrite)?;
/// let guard = space.memory();
/// let slices = guard.get_slices(GuestAddress(0x1800), 0x10, Permissions::Read).unwrap();
/// assert_eq!(slices.map(|slice| slice.unwrap().len()).sum::<usize>(), 0x10);
///
/// let at_once = UnmapOptions::new().deadline(Duration::ZERO);
/// let error = space.unmap_with(0x1000, 0x1000, at_once).unwrap_err();
/// assert!(error.to_string().contains("queue 0 leases"));
///
/// drop(guard);
/// assert_eq!(space.unmap(0x1000, 0x1000)?, 0x1000);
/// # Ok::<(), iommu_type1::Error>(())
/// ```
#[derive(Debug)]
pub struct DmaGuard {
    memory: DmaMemory,
}

impl Deref for DmaGuard {
    type Target = DmaMemory;

    fn deref(&self) -> &DmaMemory {
        &self.memory
    }
}

impl Clone for DmaGuard {
    fn clone(&self) -> Self {
        let view = self.memory.leases.view().clone();
        IoAddressSpace { view }.memory()
    }
}

/// What a [`DmaGuard`] dereferences to: IOVAs as [`GuestMemory`].
///
/// A slice lent for [`Permissions::Read`] must only be read: the memory behind it may be mapped
/// read-only in this process.
pub struct DmaMemory {
    leases: LeaseSet,
}

impl DmaMemory {
    /// The mapping at an address, which it leases then.
    #[cfg(feature = "iommu")]
    pub(crate) fn mapping(&self, iova: u64, access: Permissions) -> Result<&Mapping> {
        self.leases.lease(iova, Need::of(access))
    }

    /// The space it belongs to.
    pub fn space(&self) -> IoAddressSpace {
        IoAddressSpace {
            view: self.leases.view().clone(),
        }
    }
}

impl fmt::Debug for DmaMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.leases.fmt(f)
    }
}

impl GuestMemory for DmaMemory {
    type PhysicalMemory = GuestMemoryMmap<()>;
    type Bitmap = Dirty;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        let space = &self.leases.view().space;
        space.grace.enter_shared(|inside| {
            space
                .for_each_chunk(inside, addr.0, count, Need::of(access), |_, _, _, _| ())
                .is_ok()
        })
    }

    #[inline]
    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> GuestMemoryResult<impl GuestMemorySliceIterator<'a, DirtySlice<'a>>> {
        let iova = addr.0;
        let fits = count == 0 || iova.checked_add(count as u64 - 1).is_some();
        // No error here: where there cannot be one, callers need not carry the iterator about in a result.
        let need = if fits {
            Need::of(access)
        } else {
            Need::IMPOSSIBLE
        };
        Ok(DmaSlices {
            memory: self,
            iova,
            left: count,
            count,
            need,
        })
    }
}

/// The slices that make up a range, one a mapping; from [`GuestMemory::get_slices`].
#[derive(Debug)]
pub struct DmaSlices<'a> {
    memory: &'a DmaMemory,
    iova: u64,
    left: usize,
    /// What was asked for.
    count: usize,
    need: Need,
}

// What `Bytes` goes through for every field of a ring. Nothing here is called by a reference to the iterator, so
// that it need not be in memory: it is as fast as on memory that is not translated.
impl<'a> DmaSlices<'a> {
    /// The mapping of the next slice; `left` is more than 0.
    #[inline(always)]
    fn mapping(&mut self) -> GuestMemoryResult<&'a Mapping> {
        let leases = &self.memory.leases;
        let (iova, need) = (self.iova, self.need);
        let known = leases.known(iova, need);
        let mapping = match known.or_else(|| leases.find(iova, need)) {
            Some(mapping) => mapping,
            None => match self.memory.look_up(iova, need, self.left, self.count) {
                Ok(mapping) => mapping,
                Err(error) => {
                    self.left = 0;
                    return Err(error);
                }
            },
        };
        match mapping.bytes_there(iova, self.left) {
            0 => Err(self.gone()),
            _ => Ok(mapping),
        }
    }

    /// The slice that begins where `mapping` was found.
    #[inline(always)]
    fn slice(
        &mut self,
        mapping: &'a Mapping,
    ) -> GuestMemoryResult<VolatileSlice<'a, DirtySlice<'a>>> {
        let there = mapping.bytes_there(self.iova, self.left);
        if there == 0 {
            return Err(self.gone());
        }
        let slice = mapping.slice(self.iova, there);
        self.left -= slice.len();
        // Only behind the last slice may the next address be 2^64, and it is not used then.
        self.iova = self.iova.wrapping_add(slice.len() as u64);
        Ok(slice)
    }

    /// What there was is there no more.
    #[inline(always)]
    fn gone(&mut self) -> GuestMemoryError {
        let completed = self.count - self.left;
        self.left = 0;
        fault(self.iova, completed)
    }
}

#[cold]
#[inline(never)]
fn fault(iova: u64, completed: usize) -> GuestMemoryError {
    Error::Fault { iova, completed }.into()
}

impl DmaMemory {
    /// The mapping, or why there is none after `count - left` bytes.
    #[cold]
    #[inline(never)]
    fn look_up(
        &self,
        iova: u64,
        need: Need,
        left: usize,
        count: usize,
    ) -> GuestMemoryResult<&Mapping> {
        let found = match need {
            Need::IMPOSSIBLE => Err(Error::Overflow {
                iova,
                size: left as u64,
            }),
            need => self.leases.look_up(iova, need),
        };
        found.map_err(|error| error.after(count - left).into())
    }

    /// As [`lease`](LeaseSet::lease), for those who see few ranges across mappings.
    #[inline(never)]
    fn after_the_first(&self, iova: u64, need: Need) -> Option<&Mapping> {
        self.leases.lease(iova, need).ok()
    }
}

impl<'a> Iterator for DmaSlices<'a> {
    type Item = GuestMemoryResult<VolatileSlice<'a, DirtySlice<'a>>>;

    #[inline(always)]
    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        match self.mapping() {
            Ok(mapping) => Some(self.slice(mapping)),
            Err(error) => Some(Err(error)),
        }
    }
}

impl FusedIterator for DmaSlices<'_> {}

impl<'a> GuestMemorySliceIterator<'a, DirtySlice<'a>> for DmaSlices<'a> {
    #[inline(always)]
    fn stop_on_error(
        mut self,
    ) -> GuestMemoryResult<impl Iterator<Item = VolatileSlice<'a, DirtySlice<'a>>>> {
        let first = match self.left {
            0 => None,
            _ => Some(self.mapping()?),
        };
        Ok(UntilError { first, rest: self })
    }
}

/// The slices up to the first that cannot be lent.
struct UntilError<'a> {
    /// The mapping of the first, until that was given.
    first: Option<&'a Mapping>,
    rest: DmaSlices<'a>,
}

impl<'a> Iterator for UntilError<'a> {
    type Item = VolatileSlice<'a, DirtySlice<'a>>;

    #[inline(always)]
    fn next(&mut self) -> Option<Self::Item> {
        let rest = &mut self.rest;
        if rest.left == 0 {
            return None;
        }
        let mapping = match self.first.take() {
            Some(mapping) => Some(mapping),
            None => rest.memory.after_the_first(rest.iova, rest.need),
        };
        match mapping {
            Some(mapping) => rest.slice(mapping).ok(),
            None => {
                rest.left = 0;
                None
            }
        }
    }
}

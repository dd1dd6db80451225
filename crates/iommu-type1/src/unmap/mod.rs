// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Removing mappings: Live, then Revoking, then gone; or, at the deadline, what the policy says.
//!
//! 1. Under the writer's lock the mappings are taken out of the table: no later access finds them.
//! 2. With no lock held, the accesses that run are waited for (the grace period), those interested
//!    are told, then leases and pins in the range are waited for.
//! 3. Under the lock again, what is free now is forgotten; its memory is released after the lock.
//!
//! What was replaced ([`crate::replace`]) is waited for in the same way, though its addresses are not
//! removed: by whoever has replaced it, and by every unmap that meets its addresses.

mod begin;
mod cuts;
mod gone;
mod holders;
mod options;
mod policy;
mod revocation;
mod select;

use std::ops::ControlFlow;
use std::sync::Arc;

use checked_sync::lock;

use crate::check::Request;
use crate::mapping::Mapping;
use crate::memory;
use crate::range::IovaRange;
use crate::space::Space;
use crate::stream;
use crate::table::Unlinked;
use crate::turn::Turn;
use crate::{DirtyPages, Error, IoAddressSpace, Result};

pub(crate) use cuts::Cuts;
pub(crate) use gone::{is_pinned_where_gone, meet_replaced};
pub(crate) use holders::Holders;
pub use holders::HOLDERS_LISTED;
pub use options::{UnmapOptions, UnmapPolicy};
pub(crate) use policy::put_back;
pub(crate) use revocation::{Replaced, Revocation, Undo};
pub(crate) use select::{beginning, check_owned, inside, share_all, stops};

impl IoAddressSpace {
    /// Removes every mapping inside `size` bytes from `iova` and returns the bytes removed, 0 where
    /// nothing is mapped. (What else [profiles](crate::Profile) do differs: bytes removed may be more
    /// than asked for with type1 v1.)
    ///
    /// When this returns without error no access to the range is running, nothing of it is leased
    /// or pinned, and its memory is released.
    ///
    /// # Errors
    ///
    /// In this order: [`Error::Misaligned`] or [`Error::Empty`] (EINVAL), [`Error::Overflow`]
    /// (EOVERFLOW), [`Error::InsideAccess`] (EDEADLK), [`Error::Bisect`] (EINVAL: type1 v2 cuts no
    /// mapping), [`Error::Unmapping`] (EBUSY: another unmap of it is running); nothing is removed by
    /// these, nor by [`Error::NoMemory`] (ENOMEM). [`Error::Deadline`] (EDEADLK) says what was removed, and who holds the rest.
    ///
    /// With [`Profile::Iommufd`](crate::Profile::Iommufd) a cut is ENOENT and so is
    /// [`Error::NothingMapped`]; address 0 and the largest size stand for everything, of which there may be
    /// nothing. With [`Profile::Iotlb`](crate::Profile::Iotlb) a cut may meet [`Error::EntryLimit`],
    /// [`Error::TableLimit`] or [`Error::DirtyLimit`] (ENOSPC); it waits for whoever leases anything of the
    /// mapping that is cut.
    pub fn unmap(&self, iova: u64, size: u64) -> Result<u64> {
        self.unmap_with(iova, size, self.view.space.unmap)
    }

    /// As [`unmap`](IoAddressSpace::unmap), with a deadline and policy of its own.
    ///
    /// # Errors
    ///
    /// As [`unmap`](IoAddressSpace::unmap).
    pub fn unmap_with(&self, iova: u64, size: u64, options: UnmapOptions) -> Result<u64> {
        self.unmap_ranges(&[self.view.space.to_unmap(iova, size)?], options)
    }

    /// As [`unmap`](IoAddressSpace::unmap) of several ranges, given as address and size: they are
    /// checked together, leave together, and one grace period serves all.
    ///
    /// ```
    /// use iommu_type1::{Backing, IoAddressSpace};
    /// use vm_memory::Permissions::ReadWrite;
    ///
    /// let space = IoAddressSpace::new();
    /// space.map_batch([
    ///     (0x1000, Backing::anonymous(0x1000)?, ReadWrite),
    ///     (0x8000, Backing::anonymous(0x2000)?, ReadWrite),
    /// ])?;
    /// assert_eq!(space.unmap_batch(&[(0x1000, 0x1000), (0x8000, 0x2000)])?, 0x3000);
    /// # Ok::<(), iommu_type1::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`unmap`](IoAddressSpace::unmap), first what is wrong with any range alone, then the rest;
    /// nothing is removed where `unmap` would not have removed anything.
    pub fn unmap_batch(&self, ranges: &[(u64, u64)]) -> Result<u64> {
        self.unmap_batch_with(ranges, self.view.space.unmap)
    }

    /// As [`unmap_batch`](IoAddressSpace::unmap_batch), with a deadline and policy of its own.
    ///
    /// # Errors
    ///
    /// As [`unmap_batch`](IoAddressSpace::unmap_batch).
    pub fn unmap_batch_with(&self, ranges: &[(u64, u64)], options: UnmapOptions) -> Result<u64> {
        let space = &self.view.space;
        let ranges = ranges
            .iter()
            .map(|(iova, size)| space.to_unmap(*iova, *size));
        self.unmap_ranges(&memory::try_collect(ranges)?, options)
    }

    /// Removes every mapping of the space and returns the bytes removed. Those that another unmap is
    /// removing at the moment are left to it.
    ///
    /// # Errors
    ///
    /// [`Error::InsideAccess`] and [`Error::Deadline`] as [`unmap`](IoAddressSpace::unmap).
    pub fn unmap_all(&self) -> Result<u64> {
        self.unmap_ranges(&[IovaRange::ALL], self.view.space.unmap)
    }

    /// As [`unmap`](IoAddressSpace::unmap), with the pages that were written since they were last taken
    /// ([`take_dirty`](IoAddressSpace::take_dirty)): of what is removed, no write is missed.
    ///
    /// ```
    /// use iommu_type1::{Backing, IoAddressSpace};
    /// use vm_memory::Permissions;
    ///
    /// let space = IoAddressSpace::new();
    /// space.map(0x1000, Backing::anonymous(0x4000)?, Permissions::ReadWrite)?;
    /// space.start_dirty_tracking()?;
    /// space.write(0x2000, &[1])?;
    /// let (bytes, dirty) = space.unmap_dirty(0x1000, 0x4000)?;
    /// assert_eq!(bytes, 0x4000);
    /// assert!(dirty.iter().eq([0x2000]));
    /// # Ok::<(), iommu_type1::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`unmap`](IoAddressSpace::unmap), and [`Error::NotTracking`] (EINVAL) before [`Error::Bisect`]. At the
    /// deadline, and where there is no memory for what is handed over, nothing is removed, as the pages would be
    /// lost: all of it is left to the policy.
    pub fn unmap_dirty(&self, iova: u64, size: u64) -> Result<(u64, DirtyPages)> {
        let space = &*self.view.space;
        let ranges = [space.to_unmap(iova, size)?];
        let mut pages = DirtyPages::default();
        let mut revocation = Revocation::new(space, space.unmap);
        revocation.begin(&ranges, self.view.set, true)?;
        let bytes = revocation.run(Some(&mut pages))?;
        Ok((bytes, pages))
    }

    /// Whether an unmap has left nothing of `size` bytes from `iova`: nothing there is mapped, and an unmap there would wait
    /// for nothing. After [`Error::Deadline`] it says what has gone.
    ///
    /// ```
    /// use iommu_type1::{Backing, IoAddressSpace};
    /// use vm_memory::Permissions::ReadWrite;
    ///
    /// let space = IoAddressSpace::new();
    /// space.map(0x1000, Backing::anonymous(0x1000)?, ReadWrite)?;
    /// assert!(!space.is_unmapped(0, 0x8000)?);
    /// space.unmap(0x1000, 0x1000)?;
    /// assert!(space.is_unmapped(0, 0x8000)?);
    /// # Ok::<(), iommu_type1::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Empty`] (EINVAL), [`Error::Overflow`] (EOVERFLOW).
    pub fn is_unmapped(&self, iova: u64, size: u64) -> Result<bool> {
        let (space, range) = (&*self.view.space, IovaRange::new(iova, size)?);
        let writer = lock(&space.writer);
        let live = space.table.visit(range, |_| ControlFlow::Break(()));
        let (leaving, ranges) = (writer.leaving_in(range), [range]);
        let replaced = writer.replaced_in(&ranges).next();
        Ok(live.is_none() && leaving.is_none() && replaced.is_none())
    }

    fn unmap_ranges(&self, ranges: &[IovaRange], options: UnmapOptions) -> Result<u64> {
        let space = &*self.view.space;
        let mut revocation = Revocation::new(space, options);
        revocation.begin(ranges, self.view.set, false)?;
        revocation.run(None)
    }
}

impl Space {
    /// A range as the profile takes it.
    fn to_unmap(&self, iova: u64, size: u64) -> Result<IovaRange> {
        if self.rules.everything == Some((iova, size)) {
            return Ok(IovaRange::ALL);
        }
        Request::to_unmap(iova, size).check(self, self.rules.unmap)
    }
}

/// Unmaps what the caller has mapped during its turn, the first `published` of these, for which it has made
/// room to leave. Those who listen were told of all.
pub(crate) fn take_back(
    space: &Space,
    mut turn: Turn<'_>,
    mut mappings: Vec<Arc<Mapping>>,
    published: usize,
) -> Result<u64> {
    let mut unlinked = Unlinked::default();
    turn.revoke(&space.table, &mappings[..published], &mut unlinked);
    drop(turn.report(&mappings, &[]));
    mappings.truncate(published);
    let mut revocation = Revocation::new(space, space.unmap);
    revocation.mappings = mappings;
    revocation.unlinked = unlinked;
    revocation.run(None)
}

/// Refuses to wait from inside an access of the same space.
pub(crate) fn check_outside(space: &Space, range: IovaRange) -> Result<()> {
    if !stream::is_inside(space) {
        return Ok(());
    }
    Err(Error::InsideAccess {
        iova: range.first,
        size: range.size(),
    })
}

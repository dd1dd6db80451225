// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Removing mappings: Live, then Revoking, then gone; or, at the deadline, what the policy says.
//!
//! 1. Under the writer's lock the mappings are taken out of the table: no later access finds them.
//! 2. With no lock held, the accesses that run are waited for (the grace period), those interested
//!    are told, then leases and pins in the range are waited for.
//! 3. Under the lock again, what is free now is forgotten; its memory is released after the lock.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use crate::deadline::Deadline;
use crate::holder::HolderKind;
use crate::mapping::Mapping;
use crate::range::{check_aligned, IovaRange};
use crate::space::Space;
use crate::stream;
use crate::sync::{lock, MutexGuard};
use crate::table::{Table, Unlinked};
use crate::writer::Writer;
use crate::{Error, Holder, IoAddressSpace, Result, UNMAP_DEADLINE};

/// What becomes of a mapping whose holders do not let go before the deadline of an unmap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum UnmapPolicy {
    /// It stays inaccessible and its addresses stay taken; its memory lives until the last holder
    /// leaves. Unmapping again waits again.
    #[default]
    Revoked,
    /// It becomes accessible again. Holders that let go meanwhile do not get back what they held.
    Restore,
}

/// How long an unmap waits for holders, and what then.
///
/// ```
/// use std::time::Duration;
/// use iommu_type1::{IoAddressSpace, UnmapOptions, UnmapPolicy};
///
/// let patient = UnmapOptions::new()
///     .deadline(Duration::from_secs(4))
///     .policy(UnmapPolicy::Restore);
/// assert_eq!(IoAddressSpace::new().unmap_with(0, 0x1000, patient)?, 0);
/// # Ok::<(), iommu_type1::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct UnmapOptions {
    deadline: Duration,
    policy: UnmapPolicy,
}

impl UnmapOptions {
    /// [`UNMAP_DEADLINE`] and [`UnmapPolicy::Revoked`].
    pub fn new() -> Self {
        UnmapOptions {
            deadline: UNMAP_DEADLINE,
            policy: UnmapPolicy::default(),
        }
    }

    /// How long to wait for holders, from when somebody first has to be waited for.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    pub(crate) fn longest(&self) -> Duration {
        self.deadline
    }

    /// What becomes of a mapping that is still held then.
    pub fn policy(mut self, policy: UnmapPolicy) -> Self {
        self.policy = policy;
        self
    }
}

impl Default for UnmapOptions {
    fn default() -> Self {
        UnmapOptions::new()
    }
}

impl IoAddressSpace {
    /// Removes every mapping inside `size` bytes from `iova` and returns the bytes removed, 0 where
    /// nothing is mapped.
    ///
    /// When this returns without error no access to the range is running, nothing of it is leased
    /// or pinned, and its memory is released.
    ///
    /// # Errors
    ///
    /// In this order: [`Error::Misaligned`] or [`Error::Empty`] (EINVAL), [`Error::Overflow`]
    /// (EOVERFLOW), [`Error::InsideAccess`] (EDEADLK), [`Error::Bisect`] (EINVAL: type1 v2 cuts no
    /// mapping), [`Error::Unmapping`] (EBUSY: another unmap of it is running); nothing is removed by
    /// these. [`Error::Deadline`] (EDEADLK) says what was removed, and who holds the rest.
    pub fn unmap(&self, iova: u64, size: u64) -> Result<u64> {
        self.unmap_with(iova, size, self.view.space.unmap)
    }

    /// As [`unmap`](IoAddressSpace::unmap), with a deadline and policy of its own.
    ///
    /// # Errors
    ///
    /// As [`unmap`](IoAddressSpace::unmap).
    pub fn unmap_with(&self, iova: u64, size: u64, options: UnmapOptions) -> Result<u64> {
        self.unmap_ranges(&[whole_pages(iova, size)?], options)
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
        let ranges = ranges.iter().map(|(iova, size)| whole_pages(*iova, *size));
        self.unmap_ranges(&ranges.collect::<Result<Vec<_>>>()?, options)
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

    fn unmap_ranges(&self, ranges: &[IovaRange], options: UnmapOptions) -> Result<u64> {
        let space = &*self.view.space;
        let mut revocation = Revocation::begin(space, ranges, options)?;
        if revocation.mappings.is_empty() {
            return Ok(0);
        }
        revocation.grace_period();
        revocation.tell();
        revocation.finish()
    }
}

/// Unmaps what the caller has mapped during its turn as the writer.
pub(crate) fn take_back(
    space: &Space,
    mut writer: MutexGuard<'_, Writer>,
    mappings: Vec<Arc<Mapping>>,
) -> Result<u64> {
    let mut unlinked = Unlinked::default();
    writer.revoke(&space.table, &mappings, &mut unlinked);
    drop(writer);
    let mut revocation = Revocation::of(space, mappings, unlinked, space.unmap);
    revocation.grace_period();
    revocation.tell();
    revocation.finish()
}

/// A range as the kernel takes it.
pub(crate) fn whole_pages(iova: u64, size: u64) -> Result<IovaRange> {
    check_aligned("address", iova)?;
    check_aligned("size", size)?;
    IovaRange::new(iova, size)
}

/// Mappings that are being removed. Dropped without [`finish`](Revocation::finish) (a notice
/// panicked), it leaves them to the policy.
struct Revocation<'a> {
    space: &'a Space,
    mappings: Vec<Arc<Mapping>>,
    policy: UnmapPolicy,
    /// What accesses that ran when it was taken out of the table may still see.
    unlinked: Unlinked,
    /// Whether none of those accesses runs any more.
    graced: bool,
    deadline: Deadline,
}

impl<'a> Revocation<'a> {
    fn begin(space: &'a Space, ranges: &[IovaRange], options: UnmapOptions) -> Result<Self> {
        if let (Some(range), true) = (ranges.first(), stream::is_inside(space)) {
            return Err(Error::InsideAccess {
                iova: range.first,
                size: range.size(),
            });
        }
        let mut writer = lock(&space.writer);
        let mut mappings = Vec::new();
        for range in ranges {
            inside(&writer, space, *range, &mut mappings)?;
            check_idle(&writer, *range)?;
        }
        if ranges.len() > 1 {
            // Ranges may overlap.
            mappings.sort_unstable_by_key(|mapping| mapping.range.first);
            mappings.dedup_by(|one, other| Arc::ptr_eq(one, other));
        }
        let mut unlinked = Unlinked::default();
        writer.revoke(&space.table, &mappings, &mut unlinked);
        for range in ranges {
            writer.retry(*range, &mut mappings);
        }
        if !mappings.is_empty() {
            // There will be a grace period; what is late can use it too.
            unlinked.append(std::mem::take(&mut writer.late));
        }
        Ok(Revocation::of(space, mappings, unlinked, options))
    }

    /// Of mappings that are being revoked already.
    fn of(
        space: &'a Space,
        mappings: Vec<Arc<Mapping>>,
        unlinked: Unlinked,
        options: UnmapOptions,
    ) -> Self {
        Revocation {
            space,
            mappings,
            policy: options.policy,
            unlinked,
            graced: false,
            deadline: Deadline::after(options.deadline),
        }
    }

    /// Waits for the accesses that run.
    fn grace_period(&mut self) {
        self.graced = self.space.grace.synchronize(&self.deadline);
    }

    fn tell(&self) {
        for mapping in &self.mappings {
            let range = mapping.range;
            self.space.pins.tell(range.first, range.size());
        }
        self.remind();
    }

    /// Tells those again who have pins and do not let go; whoever still does is found in the end.
    fn remind(&self) {
        let (pins, times) = (&self.space.pins, self.space.reminders);
        for range in self.mappings.iter().map(|mapping| mapping.range) {
            if times > 0 && pins.is_pinned(range.first, range.size()) {
                let deadline = self.deadline.instant();
                let _holders = pins.remind(range.first, range.size(), times, deadline);
            }
        }
    }

    fn finish(mut self) -> Result<u64> {
        let leases = &self.space.leases;
        let leased = leases.wait_released(&self.mappings, &self.deadline);
        let mut leased = leased.iter().peekable();
        let mut holders = Vec::new();
        let mut free = std::mem::take(&mut self.mappings);
        let mut held = Vec::new();
        free.retain(|mapping| {
            // Both in the same order.
            let is_leased = leased
                .next_if(|leased| Arc::ptr_eq(leased, mapping))
                .is_some();
            let found = self.holders(mapping, is_leased);
            if found.is_empty() {
                return true;
            }
            holders.extend(found);
            held.push(mapping.clone());
            false
        });
        self.mappings = held;
        let counters = &self.space.counters;
        counters.unmaps.add(free.len());
        counters.stragglers.add(self.mappings.len());
        counters
            .unmap_waits
            .add(usize::from(self.deadline.was_waited_for()));
        let unmapped = self.remove(free);
        if self.mappings.is_empty() {
            return Ok(unmapped);
        }
        let left = total(&self.mappings);
        log::warn!(
            "unmap at its deadline: {left:#x} bytes are still held by {} holders",
            holders.len()
        );
        Err(Error::Deadline {
            unmapped,
            left,
            holders,
        })
    }

    /// Who still holds something of the mapping when the deadline has passed.
    fn holders(&self, mapping: &Mapping, leased: bool) -> Vec<Holder> {
        let range = mapping.range;
        let mut holders = Vec::new();
        if leased {
            holders = self.space.leases.holders(mapping);
        }
        if !self.graced {
            holders.push(Holder {
                kind: HolderKind::Access,
                name: String::from("a running access"),
                iova: range.first,
                size: range.size(),
                age: self.deadline.age(),
            });
        }
        let pins = &self.space.pins;
        if pins.is_pinned(range.first, range.size()) {
            let pinned = pins.wait_released(range.first, range.size(), self.deadline.instant());
            holders.extend(pinned.err().into_iter().flatten().map(|pin| Holder {
                kind: HolderKind::Pin,
                name: pin.name,
                iova: pin.iova,
                size: pin.pages as u64 * pins.page_size(),
                age: pin.age,
            }));
        }
        holders
    }

    /// Ends the revocation of `free`, whose memory goes with the last reference to it.
    fn remove(&mut self, free: Vec<Arc<Mapping>>) -> u64 {
        let mut unlinked = std::mem::take(&mut self.unlinked);
        let mut writer = lock(&self.space.writer);
        writer.forget(&free);
        if writer.tracking {
            let logs = free.iter().map(|mapping| mapping.log_bytes());
            writer.log_bytes -= logs.sum::<usize>();
        }
        writer.table_bytes -= if self.graced { unlinked.bytes() } else { 0 };
        if !self.graced {
            writer.late.append(std::mem::take(&mut unlinked));
        }
        drop(writer);
        total(&free)
    }
}

/// The mappings of the table inside a range; refuses one that has a part of a mapping, of the table or
/// leaving.
pub(crate) fn inside(
    writer: &Writer,
    space: &Space,
    range: IovaRange,
    found: &mut Vec<Arc<Mapping>>,
) -> Result<()> {
    let live = space.table.visit(range, |mapping| {
        if !range.contains_all(mapping.range) {
            return ControlFlow::Break(mapping.range);
        }
        found.push(Table::share(mapping));
        ControlFlow::Continue(())
    });
    match live.or_else(|| writer.leaving_cut_by(range)) {
        Some(mapped) => Err(Error::Bisect {
            iova: range.first,
            size: range.size(),
            mapped: mapped.first,
            mapped_size: mapped.size(),
        }),
        None => Ok(()),
    }
}

/// Refuses a range of which another unmap is under way; everything means whatever there is to take.
fn check_idle(writer: &Writer, range: IovaRange) -> Result<()> {
    match writer.revoking_in(range) {
        Some(leaving) if range != IovaRange::ALL => {
            let mapped = leaving.mapping.range;
            Err(Error::Unmapping {
                iova: range.first,
                size: range.size(),
                mapped: mapped.first,
                mapped_size: mapped.size(),
            })
        }
        _ => Ok(()),
    }
}

fn total(mappings: &[Arc<Mapping>]) -> u64 {
    let sizes = mappings.iter().map(|mapping| mapping.range.size());
    // Only with the whole 64-bit space there is one more byte than this can say.
    sizes.fold(0, u64::saturating_add)
}

impl Drop for Revocation<'_> {
    fn drop(&mut self) {
        if self.mappings.is_empty() {
            return;
        }
        let mut writer = lock(&self.space.writer);
        writer.late.append(std::mem::take(&mut self.unlinked));
        for mapping in &self.mappings {
            match self.policy {
                UnmapPolicy::Revoked => writer.keep_revoked(mapping),
                UnmapPolicy::Restore => writer.publish(&self.space.table, mapping.clone()),
            }
        }
        if self.policy == UnmapPolicy::Restore {
            writer.forget(&self.mappings);
        }
    }
}

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

use std::borrow::Cow;
use std::collections::HashSet;
use std::ops::ControlFlow;
use std::slice;
use std::sync::Arc;
use std::time::Duration;

use crate::check::Request;
use crate::deadline::Deadline;
use crate::dirty::check_tracking;
use crate::holder::HolderKind;
use crate::map::unmapping;
use crate::mapping::Mapping;
use crate::mapping_set::SetId;
use crate::profile::Cut;
use crate::range::{check_aligned, IovaRange};
use crate::replace;
use crate::space::Space;
use crate::stream;
use crate::sync::lock;
use crate::table::{Table, Unlinked};
use crate::turn::Turn;
use crate::writer::{State, Writer};
use crate::{DirtyPages, Error, Holder, IoAddressSpace, Result, UNMAP_DEADLINE};

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
    /// these. [`Error::Deadline`] (EDEADLK) says what was removed, and who holds the rest.
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
    /// deadline nothing is removed, as the pages would be lost: all of it is left to the policy.
    pub fn unmap_dirty(&self, iova: u64, size: u64) -> Result<(u64, DirtyPages)> {
        let space = &*self.view.space;
        let ranges = [space.to_unmap(iova, size)?];
        let mut pages = DirtyPages::default();
        let bytes = Revocation::begin(space, &ranges, space.unmap, self.view.set, true)?
            .run(Some(&mut pages))?;
        Ok((bytes, pages))
    }

    fn unmap_ranges(&self, ranges: &[IovaRange], options: UnmapOptions) -> Result<u64> {
        let space = &*self.view.space;
        Revocation::begin(space, ranges, options, self.view.set, false)?.run(None)
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

/// Unmaps what the caller has mapped during its turn, and of which those who listen were told.
pub(crate) fn take_back(
    space: &Space,
    mut turn: Turn<'_>,
    mappings: Vec<Arc<Mapping>>,
) -> Result<u64> {
    let mut unlinked = Unlinked::default();
    turn.revoke(&space.table, &mappings, &mut unlinked);
    drop(turn);
    Revocation::of(space, mappings, unlinked, space.unmap).run(None)
}

/// A range as the kernel takes it.
pub(crate) fn whole_pages(space: &Space, iova: u64, size: u64) -> Result<IovaRange> {
    check_aligned("address", iova, space.unit())?;
    check_aligned("size", size, space.unit())?;
    IovaRange::new(iova, size)
}

/// Mappings that are being removed. Dropped without [`finish`](Revocation::finish) (a notice
/// panicked), it leaves them to the policy.
pub(crate) struct Revocation<'a> {
    space: &'a Space,
    mappings: Vec<Arc<Mapping>>,
    /// Mappings that others stand in place of.
    replaced: Vec<Replaced>,
    /// What these were replaced by, where it can be put back.
    undo: Option<Undo>,
    policy: UnmapPolicy,
    /// What accesses that ran when it was taken out of the table may still see.
    unlinked: Unlinked,
    /// Whether none of those accesses runs any more.
    graced: bool,
    /// Whether any page of it was pinned when that was told.
    pinned: bool,
    deadline: Deadline,
}

/// A mapping that was replaced.
pub(crate) struct Replaced {
    pub(crate) mapping: Arc<Mapping>,
    /// The part of it that is gone: pins there are told and waited for.
    pub(crate) gone: Option<IovaRange>,
}

/// How to put back what was replaced.
pub(crate) struct Undo {
    pub(crate) by: Arc<Mapping>,
    pub(crate) parts: Vec<Arc<Mapping>>,
}

impl<'a> Revocation<'a> {
    fn begin(
        space: &'a Space,
        ranges: &[IovaRange],
        options: UnmapOptions,
        set: SetId,
        marked: bool,
    ) -> Result<Self> {
        let mut revocation = Revocation::of(space, Vec::new(), Unlinked::default(), options);
        let Some(first) = ranges.first() else {
            return Ok(revocation);
        };
        check_outside(space, *first)?;
        let mut writer = space.turn(*first)?;
        for range in ranges {
            check_owned(&writer, space, *range, set)?;
        }
        if marked {
            check_tracking(&writer, *first)?;
        }
        let mut unlinked = Unlinked::default();
        let mut mappings = Vec::new();
        let mut cuts = Cuts::default();
        let selected = select(
            &mut writer,
            space,
            ranges,
            &mut mappings,
            &mut unlinked,
            &mut cuts,
        );
        if let Err(error) = selected {
            // Something may have been cut before.
            writer.late.append(unlinked);
            cuts.tell(writer, &[]);
            return Err(error);
        }
        if ranges.len() > 1 {
            // Ranges may overlap.
            mappings.sort_unstable_by_key(|mapping| mapping.range.first);
            mappings.dedup_by(|one, other| Arc::ptr_eq(one, other));
        }
        writer.revoke(&space.table, &mappings, &mut unlinked);
        let revoked = match writer.is_heard {
            true => mappings.clone(),
            false => Vec::new(),
        };
        let mut replaced: Vec<Replaced> = Vec::new();
        for range in ranges {
            if !stops(&writer, space, *range) {
                writer.retry(*range, &mut mappings);
            }
            for mapping in writer.replaced_in(*range) {
                let is_it = |other: &Replaced| Arc::ptr_eq(&other.mapping, mapping);
                if !replaced.iter().any(is_it) {
                    replaced.push(Replaced {
                        mapping: mapping.clone(),
                        gone: None,
                    });
                }
            }
        }
        if !mappings.is_empty() || !replaced.is_empty() {
            // There will be a grace period; what is late can use it too.
            unlinked.append(std::mem::take(&mut writer.late));
        }
        cuts.tell(writer, &revoked);
        drop(revoked);
        revocation.mappings = mappings;
        revocation.unlinked = unlinked;
        revocation.replaced = replaced;
        Ok(revocation)
    }

    /// Of whatever was made through a set.
    pub(crate) fn of_set(space: &'a Space, set: SetId, options: UnmapOptions) -> Result<Self> {
        check_outside(space, IovaRange::ALL)?;
        let mut turn = space.turn(IovaRange::ALL)?;
        let mut mappings = Vec::new();
        space.table.visit(IovaRange::ALL, |mapping| {
            if mapping.set == set {
                mappings.push(Table::share(mapping));
            }
            ControlFlow::<()>::Continue(())
        });
        let leaving = turn.leaving_inside(IovaRange::ALL);
        let left = leaving.filter(|leaving| leaving.mapping.set == set);
        let left: Vec<_> = left.map(|leaving| leaving.mapping.range).collect();
        let replaced = turn.replaced.iter();
        let replaced = replaced.filter(|mapping| mapping.set == set);
        let replaced = replaced.map(|mapping| Replaced {
            mapping: mapping.clone(),
            gone: None,
        });
        let replaced = replaced.collect();
        let mut unlinked = Unlinked::default();
        turn.revoke(&space.table, &mappings, &mut unlinked);
        let mut turn = turn.report(&mappings, &[]);
        for range in left {
            turn.retry(range, &mut mappings);
        }
        drop(turn);
        let mut revocation = Revocation::of(space, mappings, unlinked, options);
        revocation.replaced = replaced;
        Ok(revocation)
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
            replaced: Vec::new(),
            undo: None,
            policy: options.policy,
            unlinked,
            graced: false,
            pinned: false,
            deadline: Deadline::after(options.deadline),
        }
    }

    /// Of mappings that were replaced by one.
    pub(crate) fn of_replaced(
        space: &'a Space,
        replaced: Vec<Replaced>,
        undo: Undo,
        unlinked: Unlinked,
        options: UnmapOptions,
    ) -> Self {
        let mut revocation = Revocation::of(space, Vec::new(), unlinked, options);
        revocation.replaced = replaced;
        revocation.undo = (options.policy == UnmapPolicy::Restore).then_some(undo);
        revocation
    }

    /// Waits for everybody; the bytes unmapped. The marks of what is unmapped go to `marks`.
    pub(crate) fn run(mut self, marks: Option<&mut DirtyPages>) -> Result<u64> {
        if self.mappings.is_empty() && self.replaced.is_empty() {
            return Ok(0);
        }
        self.grace_period();
        self.tell();
        self.finish(marks)
    }

    /// Waits for the accesses that run.
    fn grace_period(&mut self) {
        self.graced = self.space.grace.synchronize(&self.deadline);
    }

    fn tell(&mut self) {
        let gone = self.replaced.iter().filter_map(|replaced| replaced.gone);
        for range in self
            .mappings
            .iter()
            .map(|mapping| mapping.range)
            .chain(gone)
        {
            let pinned = self.space.pins.tell(range.first, range.size());
            self.pinned |= pinned;
        }
        self.remind();
    }

    /// Tells those again who have pins and do not let go; whoever still does is found in the end.
    fn remind(&self) {
        let (pins, times) = (&self.space.pins, self.space.reminders);
        for range in self.mappings.iter().map(|mapping| mapping.range) {
            if times > 0 && self.is_pinned(range) {
                let deadline = self.deadline.instant();
                let _holders = pins.remind(range.first, range.size(), times, deadline);
            }
        }
    }

    fn finish(mut self, marks: Option<&mut DirtyPages>) -> Result<u64> {
        let waited = if self.replaced.is_empty() {
            Cow::Borrowed(&self.mappings)
        } else {
            let replaced = self.replaced.iter().map(|replaced| &replaced.mapping);
            Cow::Owned(replaced.chain(&self.mappings).cloned().collect())
        };
        let leased = self.space.leases.wait_released(&waited, &self.deadline);
        drop(waited);
        // Both in the same order.
        let mut leased = leased.iter().peekable();
        let mut is_leased = |mapping: &Arc<Mapping>| {
            let next = leased.next_if(|leased| Arc::ptr_eq(leased, mapping));
            next.is_some()
        };
        let mut holders = Vec::new();
        let (mut over, mut still) = (Vec::new(), Vec::new());
        for replaced in std::mem::take(&mut self.replaced) {
            let mapping = &replaced.mapping;
            let found = self.holders(mapping, replaced.gone, is_leased(mapping));
            if found.is_empty() {
                over.push(replaced.mapping);
            } else {
                holders.extend(found);
                still.push(replaced);
            }
        }
        let mut free = std::mem::take(&mut self.mappings);
        let mut held = Vec::new();
        free.retain(|mapping| {
            let found = self.holders(mapping, Some(mapping.range), is_leased(mapping));
            // Who uses what it was a part of may use it.
            let is_lent = still
                .iter()
                .any(|replaced| replaced.mapping.range.overlaps(mapping.range));
            if found.is_empty() && !is_lent {
                return true;
            }
            holders.extend(found);
            held.push(mapping.clone());
            false
        });
        if let Some(marks) = marks {
            if held.is_empty() && still.is_empty() {
                // Nobody can write to them any more.
                let _harvest = lock(&self.space.harvest);
                lock(&self.space.writer).settle_marks(&self.space.table);
                free.sort_unstable_by_key(|mapping| mapping.range.first);
                free.iter().for_each(|mapping| marks.take_last(mapping));
            } else {
                held.append(&mut free);
            }
        }
        self.mappings = held;
        self.replaced = still;
        let counters = &self.space.counters;
        counters.unmaps.add(free.len());
        let stragglers = self.mappings.len() + self.replaced.len();
        counters.stragglers.add(stragglers);
        counters
            .unmap_waits
            .add(usize::from(self.deadline.was_waited_for()));
        let unmapped = self.remove(free, over);
        if stragglers == 0 {
            return Ok(unmapped);
        }
        let gone = self.replaced.iter().filter_map(|replaced| replaced.gone);
        let gone = gone.map(|range| range.size());
        let left = gone.fold(total(&self.mappings), u64::saturating_add);
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

    fn is_pinned(&self, range: IovaRange) -> bool {
        // After the grace period there are no more pins than when they were told.
        let may_be = self.pinned || !self.graced;
        may_be && self.space.pins.is_pinned(range.first, range.size())
    }

    /// Who still holds something of the mapping when the deadline has passed, or has pinned something of
    /// `pinned`.
    fn holders(&self, mapping: &Mapping, pinned: Option<IovaRange>, leased: bool) -> Vec<Holder> {
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
        let Some(range) = pinned else {
            return holders;
        };
        if self.is_pinned(range) {
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

    /// Ends the revocation of `free` and the time of `over`, whose memory goes with the last reference to
    /// it.
    fn remove(&mut self, free: Vec<Arc<Mapping>>, over: Vec<Arc<Mapping>>) -> u64 {
        if self.replaced.is_empty() {
            self.undo = None;
        }
        let mut unlinked = std::mem::take(&mut self.unlinked);
        let mut writer = lock(&self.space.writer);
        writer.forget(&free);
        if writer.tracking {
            let logs = free.iter().map(|mapping| mapping.log_bytes());
            writer.log_bytes -= logs.sum::<usize>();
        }
        let mut released = Vec::new();
        for mapping in over {
            released.extend(writer.release(&self.space.table, mapping));
        }
        writer.table_bytes -= if self.graced { unlinked.bytes() } else { 0 };
        if !self.graced {
            writer.late.append(std::mem::take(&mut unlinked));
        }
        drop(writer);
        drop(released);
        total(&free)
    }
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

/// Refuses a set a range in which there is something that was not made through it.
pub(crate) fn check_owned(
    writer: &Writer,
    space: &Space,
    range: IovaRange,
    set: SetId,
) -> Result<()> {
    if set == SetId::NONE {
        return Ok(());
    }
    let live = space
        .table
        .visit(range, |mapping| match mapping.set == set {
            true => ControlFlow::Continue(()),
            false => ControlFlow::Break(mapping.range),
        });
    let mut leaving = writer.all_leaving_in(range);
    let other = live.or_else(|| {
        let other = leaving.find(|leaving| leaving.mapping.set != set)?;
        Some(other.mapping.range)
    });
    other.map_or(Ok(()), |mapped| {
        Err(Error::NotOwned {
            iova: range.first,
            size: range.size(),
            mapped: mapped.first,
            mapped_size: mapped.size(),
        })
    })
}

/// Adds the mappings of the table that go with these ranges, in which nothing else is being removed.
fn select(
    writer: &mut Writer,
    space: &Space,
    ranges: &[IovaRange],
    found: &mut Vec<Arc<Mapping>>,
    unlinked: &mut Unlinked,
    cuts: &mut Cuts,
) -> Result<()> {
    for range in ranges {
        let before = found.len();
        match space.rules.cut {
            Cut::Refuse => inside(writer, space, *range, found)?,
            Cut::Whole => beginning(writer, space, *range, found)?,
            Cut::Split => {
                replace::cut(writer, space, *range, unlinked, cuts)?;
                inside(writer, space, *range, found)?;
            }
        }
        check_idle(writer, *range)?;
        let must_have_some = space.rules.needs_something && *range != IovaRange::ALL;
        if must_have_some && found.len() == before && writer.leaving_in(*range).is_none() {
            return Err(Error::NothingMapped {
                iova: range.first,
                size: range.size(),
            });
        }
    }
    if space.rules.cut == Cut::Split {
        // A later range may have cut what an earlier one had found.
        found.clear();
        for range in ranges {
            inside(writer, space, *range, found)?;
        }
    }
    Ok(())
}

/// The mappings of the table that begin inside a range; none where one that begins before it ends in it.
pub(crate) fn beginning(
    writer: &Writer,
    space: &Space,
    range: IovaRange,
    found: &mut Vec<Arc<Mapping>>,
) -> Result<()> {
    if let Some(leaving) = writer.leaving_in(range) {
        if leaving.mapping.range.first < range.first && leaving.state.is_busy() {
            return Err(unmapping(range, leaving));
        }
    }
    if stops(writer, space, range) {
        return Ok(());
    }
    space.table.visit(range, |mapping| {
        found.push(Table::share(mapping));
        ControlFlow::<()>::Continue(())
    });
    Ok(())
}

/// Whether nothing of a range may be unmapped, as the first mapping in it begins before it.
pub(crate) fn stops(writer: &Writer, space: &Space, range: IovaRange) -> bool {
    if space.rules.cut != Cut::Whole {
        return false;
    }
    let begins_before = |mapped: IovaRange| mapped.first < range.first;
    let leaving = writer
        .leaving_in(range)
        .map(|leaving| leaving.mapping.range);
    let live = space
        .table
        .visit(range, |mapping| ControlFlow::Break(mapping.range));
    leaving.is_some_and(begins_before) || live.is_some_and(begins_before)
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
            errno: space.rules.cut_errno,
        }),
        None => Ok(()),
    }
}

/// Refuses a range of which another unmap is under way; everything means whatever there is to take.
fn check_idle(writer: &Writer, range: IovaRange) -> Result<()> {
    match writer.revoking_in(range) {
        Some(leaving) if range != IovaRange::ALL => Err(unmapping(range, leaving)),
        _ => Ok(()),
    }
}

fn total(mappings: &[Arc<Mapping>]) -> u64 {
    let sizes = mappings.iter().map(|mapping| mapping.range.size());
    // Only with the whole 64-bit space there is one more byte than this can say.
    sizes.fold(0, u64::saturating_add)
}

/// Has mappings that were revoked be in the table again; those that a listener refuses stay revoked.
pub(crate) fn put_back<'a>(
    mut turn: Turn<'a>,
    space: &Space,
    revoked: Vec<Arc<Mapping>>,
) -> Turn<'a> {
    let mut restored = Vec::with_capacity(revoked.len());
    for mapping in revoked {
        let (next, agreed) = turn.ask(&[], slice::from_ref(&mapping), |_| Ok(()));
        turn = next;
        match agreed {
            Ok(()) => {
                turn.publish(&space.table, mapping.clone());
                restored.push(mapping);
            }
            Err(error) => {
                log::warn!("a mapping stays revoked: {error}");
                turn.keep_revoked(&mapping);
            }
        }
    }
    turn.forget(&restored);
    turn
}

/// Mappings that were cut, and their parts.
#[derive(Default)]
pub(crate) struct Cuts {
    pub(crate) before: Vec<Arc<Mapping>>,
    pub(crate) after: Vec<Arc<Mapping>>,
}

impl Cuts {
    /// Tells those who listen of what was mapped before the turn and what is left at its end, when `revoked`
    /// has gone.
    fn tell(self, turn: Turn<'_>, revoked: &[Arc<Mapping>]) {
        if !turn.is_heard {
            return;
        }
        let address = |mapping: &Arc<Mapping>| Arc::as_ptr(mapping);
        let came: HashSet<_> = self.after.iter().map(address).collect();
        let gone = self.before.iter().chain(revoked);
        let went: HashSet<_> = gone.clone().map(address).collect();
        let before = gone.filter(|mapping| !came.contains(&address(mapping)));
        let before: Vec<_> = before.cloned().collect();
        let after = self.after.iter();
        let after = after.filter(|mapping| !went.contains(&address(mapping)));
        let after: Vec<_> = after.cloned().collect();
        turn.report(&before, &after);
    }
}

impl Drop for Revocation<'_> {
    fn drop(&mut self) {
        if self.mappings.is_empty() && self.replaced.is_empty() {
            return;
        }
        let mut writer = self.space.another_turn();
        writer.late.append(std::mem::take(&mut self.unlinked));
        let mut restored = Vec::new();
        for mapping in self.mappings.drain(..) {
            match self.policy {
                _ if mapping.is_hollow() => writer.set_state(&mapping, State::Invalid),
                UnmapPolicy::Revoked => writer.keep_revoked(&mapping),
                UnmapPolicy::Restore => restored.push(mapping),
            }
        }
        let writer = put_back(writer, self.space, restored);
        if let Some(undo) = self.undo.take() {
            replace::undo(writer, &self.space.table, undo);
        }
        // During this turn: who else waits for them may be the last then.
        self.replaced.clear();
    }
}

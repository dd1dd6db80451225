// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Mappings on their way out: waiting for those who use them, and what becomes of them at the deadline.

use std::borrow::Cow;
use std::ops::ControlFlow;
use std::slice;
use std::sync::Arc;

use super::select::select;
use super::{check_outside, check_owned, stops, Cuts};
use crate::deadline::Deadline;
use crate::dirty::check_tracking;
use crate::holder::HolderKind;
use crate::mapping::Mapping;
use crate::mapping_set::SetId;
use crate::range::IovaRange;
use crate::replace;
use crate::space::Space;
use crate::sync::lock;
use crate::table::{Table, Unlinked};
use crate::turn::Turn;
use crate::writer::State;
use crate::{DirtyPages, Error, Holder, Result, UnmapOptions, UnmapPolicy};

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
    pub(super) fn begin(
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
        // Who takes marks refers to mappings and does not forget them: none that is over may be among those.
        let harvest = (!over.is_empty()).then(|| lock(&self.space.harvest));
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
        drop(harvest);
        drop(released);
        total(&free)
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

fn total(mappings: &[Arc<Mapping>]) -> u64 {
    let sizes = mappings.iter().map(|mapping| mapping.range.size());
    // Only with the whole 64-bit space there is one more byte than this can say.
    sizes.fold(0, u64::saturating_add)
}

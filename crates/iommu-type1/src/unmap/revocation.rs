// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Mappings that are being removed, from the grace period to the release of their memory.

use std::borrow::Cow;
use std::sync::Arc;

use super::{UnmapOptions, UnmapPolicy};
use crate::deadline::Deadline;
use crate::mapping::Mapping;
use crate::range::IovaRange;
use crate::space::Space;
use crate::sync::lock;
use crate::table::Unlinked;
use crate::{DirtyPages, Error, Result};

/// Mappings that are being removed. Dropped without [`finish`](Revocation::finish) (a notice
/// panicked), it leaves them to the policy.
pub(crate) struct Revocation<'a> {
    pub(super) space: &'a Space,
    pub(super) mappings: Vec<Arc<Mapping>>,
    /// Mappings that others stand in place of.
    pub(super) replaced: Vec<Replaced>,
    /// What these were replaced by, where it can be put back.
    pub(super) undo: Option<Undo>,
    pub(super) policy: UnmapPolicy,
    /// What accesses that ran when it was taken out of the table may still see.
    pub(super) unlinked: Unlinked,
    /// Whether none of those accesses runs any more.
    pub(super) graced: bool,
    /// Whether any page of it was pinned when that was told.
    pub(super) pinned: bool,
    pub(super) deadline: Deadline,
}

/// A mapping that was replaced.
pub(crate) struct Replaced {
    pub(crate) mapping: Arc<Mapping>,
    /// The parts of it that are gone: pins there are told and waited for.
    pub(crate) gone: Vec<IovaRange>,
}

/// How to put back what was replaced.
#[derive(Default)]
pub(crate) struct Undo {
    /// What has replaced it.
    pub(crate) by: Vec<Arc<Mapping>>,
    /// Where there is nothing in its place.
    pub(crate) holes: Vec<IovaRange>,
    pub(crate) parts: Vec<Arc<Mapping>>,
}

impl<'a> Revocation<'a> {
    /// Of mappings that are being revoked already.
    pub(super) fn of(
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

    /// Of mappings that were replaced.
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
        let gone = self.replaced.iter().flat_map(|replaced| &replaced.gone);
        for range in self
            .mappings
            .iter()
            .map(|mapping| mapping.range)
            .chain(gone.copied())
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
            let found = self.holders(mapping, &replaced.gone, is_leased(mapping));
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
            let found = self.holders(mapping, &[mapping.range], is_leased(mapping));
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
        let gone = self.replaced.iter().flat_map(|replaced| &replaced.gone);
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
        let released = writer.release(&self.space.table, over);
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

fn total(mappings: &[Arc<Mapping>]) -> u64 {
    let sizes = mappings.iter().map(|mapping| mapping.range.size());
    // Only with the whole 64-bit space there is one more byte than this can say.
    sizes.fold(0, u64::saturating_add)
}

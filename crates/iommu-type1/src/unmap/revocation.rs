// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Mappings that are being removed, from the grace period to the release of their memory.

use std::sync::Arc;

use checked_sync::lock;

use super::{Holders, UnmapOptions, UnmapPolicy};
use crate::deadline::Deadline;
use crate::lease::LeasedOf;
use crate::mapping::Mapping;
use crate::range::IovaRange;
use crate::space::Space;
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
    /// Whether nobody was found to use it.
    pub(crate) over: bool,
}

impl Replaced {
    pub(crate) fn of(mapping: Arc<Mapping>) -> Self {
        Replaced {
            mapping,
            gone: Vec::new(),
            over: false,
        }
    }
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
    /// Of nothing yet.
    pub(super) fn new(space: &'a Space, options: UnmapOptions) -> Self {
        Revocation {
            space,
            mappings: Vec::new(),
            replaced: Vec::new(),
            undo: None,
            policy: options.policy,
            unlinked: Unlinked::default(),
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
        let mut revocation = Revocation::new(space, options);
        revocation.replaced = replaced;
        revocation.unlinked = unlinked;
        revocation.undo = (options.policy == UnmapPolicy::Restore).then_some(undo);
        revocation
    }

    /// Waits for everybody; the bytes unmapped. The marks of what is unmapped go to `marks`.
    pub(crate) fn run(&mut self, marks: Option<&mut DirtyPages>) -> Result<u64> {
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
        let mut pinned = false;
        for range in self.removed() {
            pinned |= self.space.pins.tell(range.first, range.size());
        }
        self.pinned |= pinned;
        self.remind();
    }

    /// Where pins are told and waited for.
    fn removed(&self) -> impl Iterator<Item = IovaRange> + '_ {
        let mappings = self.mappings.iter().map(|mapping| mapping.range);
        let replaced = self.replaced.iter();
        mappings.chain(replaced.flat_map(|replaced| replaced.gone.iter().copied()))
    }

    /// Tells those again who have pins and do not let go; whoever still does is found in the end.
    fn remind(&self) {
        let (pins, times) = (&self.space.pins, self.space.reminders);
        for range in self.removed() {
            if times > 0 && self.is_pinned(range) {
                let deadline = self.deadline.instant();
                let _holders = pins.remind(range.first, range.size(), times, deadline);
            }
        }
    }

    fn finish(&mut self, marks: Option<&mut DirtyPages>) -> Result<u64> {
        let replaced = self.replaced.iter().map(|replaced| &replaced.mapping);
        let waited = replaced.chain(&self.mappings);
        let leased = self.space.leases.wait_released(waited, &self.deadline);
        let mut holders = Holders::default();
        self.look_at_replaced(&leased, &mut holders);
        let mut held = self.sort_out_held(&leased, &mut holders);
        let mut no_memory = None;
        if let Some(marks) = marks {
            if held == 0 && self.still().next().is_none() {
                // Nobody can write to them any more.
                let _harvest = lock(&self.space.harvest);
                lock(&self.space.writer).settle_marks(&self.space.table);
                no_memory = marks.take_all(&self.mappings).err();
            }
            if no_memory.is_some() || held > 0 || self.still().next().is_some() {
                held = self.mappings.len();
            }
        }
        let counters = &self.space.counters;
        let stragglers = held + self.still().count();
        counters.stragglers.add(stragglers);
        counters
            .unmap_waits
            .add(usize::from(self.deadline.was_waited_for()));
        let unmapped = self.remove(held);
        if stragglers == 0 {
            return Ok(unmapped);
        }
        if let Some(error) = no_memory {
            return Err(error);
        }
        let gone = self.replaced.iter().flat_map(|replaced| &replaced.gone);
        let gone = gone.map(|range| range.size());
        let left = gone.fold(total(&self.mappings), u64::saturating_add);
        log::warn!(
            "unmap at its deadline: {left:#x} bytes are still held by {} holders",
            holders.count
        );
        Err(Error::Deadline {
            unmapped,
            left,
            holders: holders.listed,
        })
    }

    /// Looks who uses what was replaced.
    fn look_at_replaced(&mut self, leased: &LeasedOf, holders: &mut Holders) {
        let mut replaced = std::mem::take(&mut self.replaced);
        for replaced in &mut replaced {
            let mapping = &replaced.mapping;
            let leased = leased.has(mapping);
            replaced.over = !self.add_holders(mapping, &replaced.gone, leased, holders);
        }
        self.replaced = replaced;
    }

    /// Has what is removed and still held come first; how many there are.
    fn sort_out_held(&mut self, leased: &LeasedOf, holders: &mut Holders) -> usize {
        let mut mappings = std::mem::take(&mut self.mappings);
        // By address, so that of many each is looked at once, and as marks are taken.
        let replaced = &mut self.replaced;
        replaced.sort_unstable_by_key(|replaced| replaced.mapping.range.first);
        mappings.sort_unstable_by_key(|mapping| mapping.range.first);
        let still = self.still().map(|replaced| replaced.mapping.range);
        let mut still = still.peekable();
        // Where the last ends of those that begin before the mapping ends.
        let mut lent = None;
        let mut held = 0;
        for at in 0..mappings.len() {
            let mapping = &mappings[at];
            let range = mapping.range;
            let leased = leased.has(mapping);
            let is_held = self.add_holders(mapping, &[range], leased, holders);
            while let Some(begun) = still.next_if(|other| other.first <= range.last) {
                lent = lent.max(Some(begun.last));
            }
            // Who uses what it was a part of may use it.
            let is_lent = lent >= Some(range.first);
            if is_held || is_lent {
                mappings.swap(held, at);
                held += 1;
            }
        }
        drop(still);
        self.mappings = mappings;
        held
    }

    /// What was replaced and is still used.
    fn still(&self) -> impl Iterator<Item = &Replaced> {
        self.replaced.iter().filter(|replaced| !replaced.over)
    }

    /// Ends the revocation of all but the first `held` mappings, and the time of what was replaced and is over, whose
    /// memory goes with the last reference to it.
    fn remove(&mut self, held: usize) -> u64 {
        if self.still().next().is_none() {
            self.undo = None;
        }
        let mut unlinked = std::mem::take(&mut self.unlinked);
        // Who takes marks refers to mappings and does not forget them: none that is over may be among those.
        let is_over = self.replaced.iter().any(|replaced| replaced.over);
        let harvest = is_over.then(|| lock(&self.space.harvest));
        let mut writer = lock(&self.space.writer);
        let forgotten = &self.mappings[held..];
        writer.forget(forgotten);
        writer.unmaps += forgotten.len() as u64;
        if writer.tracking {
            let logs = forgotten.iter().map(|mapping| mapping.log_bytes());
            writer.log_bytes -= logs.sum::<usize>();
        }
        if is_over {
            writer.release(&self.space.table, &self.space.pins, &mut self.replaced);
        }
        if self.graced {
            writer.table_bytes -= unlinked.bytes();
        } else {
            writer.late.append(std::mem::take(&mut unlinked));
        }
        drop(writer);
        drop(harvest);
        self.replaced.retain(|replaced| !replaced.over);
        let unmapped = total(forgotten);
        self.mappings.truncate(held);
        unmapped
    }
}

fn total(mappings: &[Arc<Mapping>]) -> u64 {
    let sizes = mappings.iter().map(|mapping| mapping.range.size());
    // Only with the whole 64-bit space there is one more byte than this can say.
    sizes.fold(0, u64::saturating_add)
}

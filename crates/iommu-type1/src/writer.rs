// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What only those who map and unmap look at: one at a time, under a lock that no access takes.

use std::ops::ControlFlow;
use std::sync::Arc;

use page_pin::PinTable;

use crate::gaps::Gaps;
use crate::mapping::Mapping;
use crate::memory;
use crate::range::{first_met, page_shift, IovaRange};
use crate::table::{Table, Unlinked};
use crate::unmap::{is_pinned_where_gone, Replaced};
use crate::{Error, IovaRanges, Result};

/// With more mappings that leave at once all are sorted, as each that is put in its place moves those behind it.
const MANY: usize = 64;

/// Why a mapping is not in the table any more, though it is not gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// An unmap is telling and waiting.
    Revoking,
    /// An unmap has given up at its deadline; it can be tried again.
    Revoked,
    /// Its memory is being taken away: an unmap of the address in this process only.
    Invalidating,
    /// It has no memory until it is given some.
    Invalid,
    /// It is about to be forgotten.
    Gone,
}

impl State {
    /// Whether it is still mapped, but for its memory.
    pub(crate) fn is_vaddr(self) -> bool {
        matches!(self, State::Invalidating | State::Invalid)
    }

    /// Whether somebody is working on it.
    pub(crate) fn is_busy(self) -> bool {
        matches!(self, State::Revoking | State::Invalidating)
    }
}

/// A mapping that nobody can find, whose addresses are still taken.
pub(crate) struct Leaving {
    pub(crate) mapping: Arc<Mapping>,
    pub(crate) state: State,
}

/// # Invariants
///
/// The mappings of the table and of `leaving` do not overlap; `live` counts those of the table. Those of
/// `replaced` have no addresses of their own any more.
#[derive(Default)]
pub(crate) struct Writer {
    pub(crate) live: usize,
    /// Mappings that were made so far.
    pub(crate) maps: u64,
    /// Mappings that were removed so far.
    pub(crate) unmaps: u64,
    /// Memory of the table's nodes, those included that are not freed yet.
    pub(crate) table_bytes: usize,
    /// By address.
    leaving: Vec<Leaving>,
    /// Mappings in whose place others are, or parts of them, and which somebody may still use.
    pub(crate) replaced: Vec<Arc<Mapping>>,
    /// Which addresses may be mapped.
    pub(crate) ranges: IovaRanges,
    /// Where there may be room, if somebody has asked.
    pub(crate) gaps: Option<Gaps>,
    /// Whether anybody listens, and so has to be told of changes (`Turn`).
    pub(crate) is_heard: bool,
    /// Whether mappings keep which of their pages are written.
    pub(crate) tracking: bool,
    /// Memory of what they keep.
    pub(crate) log_bytes: usize,
    /// What an unmap could not free because an access outlasted its deadline.
    pub(crate) late: Unlinked,
}

impl Writer {
    /// Of a space where these addresses may be mapped.
    pub(crate) fn new(ranges: IovaRanges) -> Self {
        Writer {
            ranges,
            ..Writer::default()
        }
    }

    /// Mappings there are, in the table and beside it.
    pub(crate) fn len(&self) -> usize {
        self.live + self.leaving()
    }

    /// Of these, those that nobody can find.
    pub(crate) fn leaving(&self) -> usize {
        self.leaving.len() + self.replaced.len()
    }

    /// Makes a mapping reachable.
    ///
    /// # Errors
    ///
    /// [`Error::NoMemory`]; nobody could have found it then.
    pub(crate) fn publish(&mut self, table: &Table, mapping: Arc<Mapping>) -> Result<()> {
        let mut log_bytes = 0;
        if self.tracking && !mapping.dirty.is_on() {
            mapping.dirty.start(mapping.pages())?;
            log_bytes = mapping.log_bytes();
        }
        self.table_bytes += table.insert(mapping)?;
        self.log_bytes += log_bytes;
        self.live += 1;
        Ok(())
    }

    /// Makes room for so many mappings to leave: without it they cannot be revoked.
    pub(crate) fn reserve_leaving(&mut self, mappings: usize) -> Result<()> {
        memory::reserve(&mut self.leaving, mappings)
    }

    /// Takes mappings out of the table, for which there is [room](Writer::reserve_leaving); they are being revoked
    /// then.
    pub(crate) fn revoke(
        &mut self,
        table: &Table,
        mappings: &[Arc<Mapping>],
        unlinked: &mut Unlinked,
    ) {
        self.live -= mappings.len();
        let is_many = mappings.len() > MANY;
        for mapping in mappings {
            let at = match is_many {
                true => self.leaving.len(),
                false => self.first_from(mapping.range.first),
            };
            let leaving = Leaving {
                mapping: table.remove(mapping, unlinked),
                state: State::Revoking,
            };
            self.leaving.insert(at, leaving);
        }
        if is_many {
            self.leaving
                .sort_unstable_by_key(|leaving| leaving.mapping.range.first);
        }
    }

    /// How many mappings [`retry`](Writer::retry) can add.
    pub(crate) fn may_retry(&self, range: IovaRange) -> usize {
        self.leaving_inside(range).count()
    }

    /// Adds the mappings inside `range` that left before and may be tried again; they are being revoked
    /// then.
    pub(crate) fn retry(&mut self, range: IovaRange, retried: &mut Vec<Arc<Mapping>>) {
        let first = self.first_from(range.first);
        for leaving in &mut self.leaving[first..] {
            if leaving.mapping.range.first > range.last {
                break;
            }
            if !leaving.state.is_busy() {
                leaving.state = State::Revoking;
                retried.push(leaving.mapping.clone());
            }
        }
    }

    /// The first mapping that leaves and shares an address with `range`.
    pub(crate) fn leaving_in(&self, range: IovaRange) -> Option<&Leaving> {
        self.all_leaving_in(range).next()
    }

    /// The mappings that leave and share an address with `range`.
    pub(crate) fn all_leaving_in(&self, range: IovaRange) -> impl Iterator<Item = &Leaving> {
        // One may begin before the range and end in it.
        let first = self.first_from(range.first).saturating_sub(1);
        self.leaving[first..]
            .iter()
            .take_while(move |leaving| leaving.mapping.range.first <= range.last)
            .filter(move |leaving| leaving.mapping.range.overlaps(range))
    }

    /// The mappings inside `range` that leave.
    pub(crate) fn leaving_inside(&self, range: IovaRange) -> impl Iterator<Item = &Leaving> {
        self.leaving[self.first_from(range.first)..]
            .iter()
            .take_while(move |leaving| leaving.mapping.range.first <= range.last)
    }

    /// Whether somebody is working on something inside `range`.
    pub(crate) fn revoking_in(&self, range: IovaRange) -> Option<&Leaving> {
        self.leaving_inside(range)
            .find(|leaving| leaving.state.is_busy())
    }

    /// A mapping that leaves and has bytes both inside and outside of `range`.
    pub(crate) fn leaving_cut_by(&self, range: IovaRange) -> Option<IovaRange> {
        let ends = [range.first, range.last].map(|iova| IovaRange {
            first: iova,
            last: iova,
        });
        ends.into_iter()
            .filter_map(|end| Some(self.leaving_in(end)?.mapping.range))
            .find(|mapped| !range.contains_all(*mapped))
    }

    /// Ends the revocation of mappings, which leave no more.
    pub(crate) fn forget(&mut self, mappings: &[Arc<Mapping>]) {
        if let Some(gaps) = &mut self.gaps {
            for mapping in mappings {
                gaps.freed(mapping.range, &self.ranges);
            }
        }
        for mapping in mappings {
            if let Some(leaving) = self.find_leaving(mapping) {
                leaving.state = State::Gone;
            }
        }
        self.leaving.retain(|leaving| leaving.state != State::Gone);
        if self.leaving.is_empty() {
            // Not for ever as large as it was when everything was unmapped at once.
            self.leaving.shrink_to(64);
        }
    }

    /// Ends a revocation in vain: the mapping may be tried again.
    pub(crate) fn keep_revoked(&mut self, mapping: &Mapping) {
        self.set_state(mapping, State::Revoked);
    }

    pub(crate) fn set_state(&mut self, mapping: &Mapping, state: State) {
        if let Some(leaving) = self.find_leaving(mapping) {
            leaving.state = state;
        }
    }

    /// Takes mappings out of the table and puts others in their place, and in that of mappings that were revoked.
    ///
    /// # Errors
    ///
    /// [`Error::NoMemory`], and how many of the others were there for a moment: they are among the replaced then, and
    /// those before are in the table.
    pub(crate) fn exchange(
        &mut self,
        table: &Table,
        before: &[Arc<Mapping>],
        revoked: &[Arc<Mapping>],
        after: &[Arc<Mapping>],
        unlinked: &mut Unlinked,
    ) -> std::result::Result<(), (usize, Error)> {
        // Whichever of the two is replaced in the end.
        let room = revoked.len() + before.len().max(after.len());
        memory::reserve(&mut self.replaced, room).map_err(|error| (0, error))?;
        for mapping in before {
            drop(table.take(mapping));
        }
        self.live -= before.len();
        let mut outcome = Ok(());
        for (published, mapping) in after.iter().enumerate() {
            if let Err(error) = self.publish(table, mapping.clone()) {
                outcome = Err((published, error));
                break;
            }
        }
        match &outcome {
            Ok(()) => {
                self.replaced.extend_from_slice(before);
                self.supersede(revoked);
            }
            Err((published, _)) => self.take_back(table, before, &after[..*published], unlinked),
        }
        for mapping in before {
            table.settle(mapping.range, unlinked);
        }
        outcome
    }

    fn take_back(
        &mut self,
        table: &Table,
        before: &[Arc<Mapping>],
        published: &[Arc<Mapping>],
        unlinked: &mut Unlinked,
    ) {
        self.live -= published.len();
        for mapping in published {
            self.replaced.push(table.remove(mapping, unlinked));
        }
        self.live += before.len();
        for mapping in before {
            // The nodes that were there before still are: nothing is allocated.
            match table.insert(mapping.clone()) {
                Ok(bytes) => debug_assert_eq!(bytes, 0),
                Err(error) => log::error!("a mapping is lost: {error}"),
            }
        }
    }

    /// The mappings that were replaced and had addresses of `ranges`, which are ascending and apart.
    pub(crate) fn replaced_in<'a>(
        &'a self,
        ranges: &'a [IovaRange],
    ) -> impl Iterator<Item = &'a Arc<Mapping>> {
        let replaced = self.replaced.iter();
        replaced.filter(|mapping| first_met(ranges, mapping.range).is_some())
    }

    /// Gives the addresses of revoked mappings to whatever has come there.
    fn supersede(&mut self, revoked: &[Arc<Mapping>]) {
        if !revoked.is_empty() {
            self.forget(revoked);
            self.replaced.extend_from_slice(revoked);
        }
    }

    /// Forgets those of replaced mappings that are over, as no access and no lease uses them, but for those to which
    /// somebody else has a reference: who waits for one too forgets it then, and pages of it that are still mapped
    /// may be pinned, and be written. Nor are those of which something is pinned that is gone. Those that are forgotten stay
    /// in the list, and their memory with it.
    pub(crate) fn release(
        &mut self,
        table: &Table,
        pins: &PinTable,
        waited_for: &mut Vec<Replaced>,
    ) {
        // During this turn, so that of several who have waited one is the last.
        let is_last = |mapping: &Arc<Mapping>| Arc::strong_count(mapping) == 2;
        waited_for.retain(|Replaced { mapping, over, .. }| {
            !over || is_last(mapping) && !is_pinned_where_gone(self, table, pins, mapping)
        });
        if !waited_for.iter().any(|replaced| replaced.over) {
            return;
        }
        waited_for.sort_unstable_by_key(|replaced| Arc::as_ptr(&replaced.mapping));
        self.replaced.retain(|mapping| {
            let at = waited_for.binary_search_by_key(&Arc::as_ptr(mapping), |replaced| {
                Arc::as_ptr(&replaced.mapping)
            });
            !at.is_ok_and(|at| waited_for[at].over)
        });
        for replaced in waited_for.iter().filter(|replaced| replaced.over) {
            self.move_marks(table, &replaced.mapping);
            if self.tracking {
                self.log_bytes -= replaced.mapping.log_bytes();
            }
        }
    }

    /// Gives the marks of replaced mappings to those that have their addresses.
    pub(crate) fn settle_marks(&self, table: &Table) {
        for mapping in &self.replaced {
            self.move_marks(table, mapping);
        }
    }

    /// Moves the marks of a mapping, in the table or not, to whatever has its addresses.
    pub(crate) fn move_marks(&self, table: &Table, from: &Mapping) {
        from.dirty.take_pages(from.pages(), |page| {
            let iova = from.range.first + ((page as u64) << page_shift());
            let at = IovaRange {
                first: iova,
                last: iova,
            };
            if let Some(leaving) = self.leaving_in(at) {
                leaving.mapping.mark_page(iova);
            }
            table.visit(at, |mapping| {
                mapping.mark_page(iova);
                ControlFlow::Break(())
            });
        });
    }

    /// Adds a mapping without memory.
    pub(crate) fn insert_hollow(&mut self, mapping: Arc<Mapping>) -> Result<()> {
        self.reserve_leaving(1)?;
        if self.tracking {
            mapping.dirty.start(mapping.pages())?;
            self.log_bytes += mapping.log_bytes();
        }
        let at = self.first_from(mapping.range.first);
        let state = State::Invalid;
        self.leaving.insert(at, Leaving { mapping, state });
        Ok(())
    }

    /// A mapping without memory that can stand for one whose memory is taken away.
    pub(crate) fn hollow(&self, mapping: &Mapping) -> Result<Arc<Mapping>> {
        let hollow = Arc::new(mapping.hollow());
        if self.tracking {
            hollow.dirty.start(hollow.pages())?;
        }
        Ok(hollow)
    }

    /// Has a mapping without memory stand for the one of the same range, marks and all.
    pub(crate) fn hollow_out(&mut self, mapping: &Mapping, hollow: Arc<Mapping>) {
        mapping.give_marks(&hollow);
        if let Some(leaving) = self.find_leaving(mapping) {
            leaving.mapping = hollow;
            leaving.state = State::Invalid;
        }
    }

    fn find_leaving(&mut self, mapping: &Mapping) -> Option<&mut Leaving> {
        let at = self.first_from(mapping.range.first);
        let leaving = self.leaving.get_mut(at)?;
        (leaving.mapping.range == mapping.range).then_some(leaving)
    }

    /// Index of the first mapping that leaves and begins at `iova` or behind it.
    fn first_from(&self, iova: u64) -> usize {
        self.leaving
            .partition_point(|leaving| leaving.mapping.range.first < iova)
    }
}

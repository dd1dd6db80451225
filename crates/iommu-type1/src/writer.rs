// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What only those who map and unmap look at: one at a time, under a lock that no access takes.

use std::collections::HashSet;
use std::mem;
use std::ops::ControlFlow;
use std::sync::Arc;

use crate::gaps::Gaps;
use crate::mapping::Mapping;
use crate::range::{page_shift, IovaRange};
use crate::table::{Table, Unlinked};
use crate::IovaRanges;

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

    pub(crate) fn publish(&mut self, table: &Table, mapping: Arc<Mapping>) {
        if self.tracking && !mapping.dirty.is_on() {
            self.log_bytes += mapping.log_bytes();
            mapping.dirty.start(mapping.pages());
        }
        self.live += 1;
        self.table_bytes += table.insert(mapping);
    }

    /// Takes mappings out of the table; they are being revoked then.
    pub(crate) fn revoke(
        &mut self,
        table: &Table,
        mappings: &[Arc<Mapping>],
        unlinked: &mut Unlinked,
    ) {
        self.live -= mappings.len();
        for mapping in mappings {
            let leaving = Leaving {
                mapping: table.remove(mapping, unlinked),
                state: State::Revoking,
            };
            self.leaving
                .insert(self.first_from(mapping.range.first), leaving);
        }
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

    /// Takes mappings out of the table and puts others in their place.
    pub(crate) fn exchange(
        &mut self,
        table: &Table,
        before: &[Arc<Mapping>],
        after: impl IntoIterator<Item = Arc<Mapping>>,
        unlinked: &mut Unlinked,
    ) {
        self.live -= before.len();
        for mapping in before {
            self.replaced.push(table.remove(mapping, unlinked));
        }
        for mapping in after {
            self.publish(table, mapping);
        }
    }

    /// The mappings that were replaced and had addresses of `range`.
    pub(crate) fn replaced_in(&self, range: IovaRange) -> impl Iterator<Item = &Arc<Mapping>> {
        let replaced = self.replaced.iter();
        replaced.filter(move |mapping| mapping.range.overlaps(range))
    }

    /// Forgets replaced mappings that no access and no lease uses, but for those to which somebody else has a
    /// reference: who waits for one too forgets it then, and pages of it that are still mapped may be pinned, and
    /// be written. Their memory goes with what is returned.
    pub(crate) fn release(&mut self, table: &Table, over: Vec<Arc<Mapping>>) -> Vec<Arc<Mapping>> {
        if over.is_empty() {
            return over;
        }
        let waited_for: HashSet<_> = over.iter().map(Arc::as_ptr).collect();
        // During this turn, so that of several who have waited one is the last.
        drop(over);
        let is_last = |mapping: &Arc<Mapping>| {
            waited_for.contains(&Arc::as_ptr(mapping)) && Arc::strong_count(mapping) == 1
        };
        let replaced = mem::take(&mut self.replaced);
        let (last, others) = replaced.into_iter().partition(is_last);
        self.replaced = others;
        for mapping in &last {
            self.move_marks(table, mapping);
            if self.tracking {
                self.log_bytes -= mapping.log_bytes();
            }
        }
        last
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
    pub(crate) fn insert_hollow(&mut self, mapping: Arc<Mapping>) {
        if self.tracking {
            self.log_bytes += mapping.log_bytes();
            mapping.dirty.start(mapping.pages());
        }
        let at = self.first_from(mapping.range.first);
        let state = State::Invalid;
        self.leaving.insert(at, Leaving { mapping, state });
    }

    /// Has a mapping without memory stand for one whose memory was taken away, marks and all.
    pub(crate) fn hollow_out(&mut self, mapping: &Mapping) {
        let hollow = Arc::new(mapping.hollow());
        if self.tracking {
            hollow.dirty.start(hollow.pages());
        }
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

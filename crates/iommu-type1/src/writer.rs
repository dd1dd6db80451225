// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What only those who map and unmap look at: one at a time, under a lock that no access takes.

use std::sync::Arc;

use crate::mapping::Mapping;
use crate::range::IovaRange;
use crate::table::{Table, Unlinked};
use crate::IovaRanges;

/// Why a mapping is not in the table any more, though it is not gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// An unmap is telling and waiting.
    Revoking,
    /// An unmap has given up at its deadline; it can be tried again.
    Revoked,
    /// It is about to be forgotten.
    Gone,
}

/// A mapping that nobody can find, whose addresses are still taken.
pub(crate) struct Leaving {
    pub(crate) mapping: Arc<Mapping>,
    pub(crate) state: State,
}

/// # Invariants
///
/// The mappings of the table and of `leaving` do not overlap; `live` counts those of the table.
#[derive(Default)]
pub(crate) struct Writer {
    pub(crate) live: usize,
    /// Memory of the table's nodes, those included that are not freed yet.
    pub(crate) table_bytes: usize,
    /// By address.
    leaving: Vec<Leaving>,
    /// Which addresses may be mapped.
    pub(crate) ranges: IovaRanges,
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

    /// Mappings whose addresses are taken.
    pub(crate) fn len(&self) -> usize {
        self.live + self.leaving.len()
    }

    /// Of these, those that leave.
    pub(crate) fn leaving(&self) -> usize {
        self.leaving.len()
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
    pub(crate) fn retry(&mut self, range: IovaRange, revoked: &mut Vec<Arc<Mapping>>) {
        let first = self.first_from(range.first);
        for leaving in &mut self.leaving[first..] {
            if leaving.mapping.range.first > range.last {
                break;
            }
            if leaving.state == State::Revoked {
                leaving.state = State::Revoking;
                revoked.push(leaving.mapping.clone());
            }
        }
    }

    /// The first mapping that leaves and shares an address with `range`.
    pub(crate) fn leaving_in(&self, range: IovaRange) -> Option<&Leaving> {
        // One may begin before the range and end in it.
        let first = self.first_from(range.first).saturating_sub(1);
        let near = self.leaving[first..].iter().take(2);
        near.into_iter()
            .find(|leaving| leaving.mapping.range.overlaps(range))
    }

    /// The mappings inside `range` that leave.
    pub(crate) fn leaving_inside(&self, range: IovaRange) -> impl Iterator<Item = &Leaving> {
        self.leaving[self.first_from(range.first)..]
            .iter()
            .take_while(move |leaving| leaving.mapping.range.first <= range.last)
    }

    /// Whether an unmap of something inside `range` is under way.
    pub(crate) fn revoking_in(&self, range: IovaRange) -> Option<&Leaving> {
        self.leaving_inside(range)
            .find(|leaving| leaving.state == State::Revoking)
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
        if let Some(leaving) = self.find_leaving(mapping) {
            leaving.state = State::Revoked;
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

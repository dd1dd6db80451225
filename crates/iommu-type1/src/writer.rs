// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What only those who map and unmap look at: one at a time, under a lock that no access takes.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use crate::mapping::Mapping;
use crate::range::IovaRange;
use crate::table::{Table, Unlinked};

/// Why a mapping is not in the table any more, though it is not gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// An unmap is telling and waiting.
    Revoking,
    /// An unmap has given up at its deadline; it can be tried again.
    Revoked,
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
    leaving: BTreeMap<u64, Leaving>,
    /// Whether mappings keep which of their pages are written.
    pub(crate) tracking: bool,
    /// What an unmap could not free because an access outlasted its deadline.
    pub(crate) late: Unlinked,
}

impl Writer {
    /// Mappings whose addresses are taken.
    pub(crate) fn len(&self) -> usize {
        self.live + self.leaving.len()
    }

    pub(crate) fn publish(&mut self, table: &Table, mapping: Arc<Mapping>) {
        if self.tracking {
            mapping.dirty.start(mapping.pages());
        }
        self.live += 1;
        self.table_bytes += table.insert(mapping);
    }

    /// Takes the mappings inside `range` out of the table, and those that left before and may be
    /// tried again; all of them are being revoked then, and added to `revoked`.
    pub(crate) fn revoke(
        &mut self,
        table: &Table,
        range: IovaRange,
        revoked: &mut Vec<Arc<Mapping>>,
        unlinked: &mut Unlinked,
    ) {
        for (_, leaving) in self.leaving.range_mut(range.first..=range.last) {
            if leaving.state == State::Revoked {
                leaving.state = State::Revoking;
                revoked.push(leaving.mapping.clone());
            }
        }
        let first = revoked.len();
        table.visit(range, |mapping| {
            revoked.push(Table::share(mapping));
            ControlFlow::<()>::Continue(())
        });
        self.live -= revoked.len() - first;
        for mapping in &revoked[first..] {
            let leaving = Leaving {
                mapping: table.remove(mapping, unlinked),
                state: State::Revoking,
            };
            self.leaving.insert(mapping.range.first, leaving);
        }
    }

    /// The first mapping that leaves and shares an address with `range`.
    pub(crate) fn leaving_in(&self, range: IovaRange) -> Option<&Leaving> {
        let before = self.leaving.range(..=range.first).next_back();
        before
            .map(|(_, leaving)| leaving)
            .filter(|leaving| leaving.mapping.range.contains(range.first))
            .or_else(|| Some(self.leaving.range(range.first..=range.last).next()?.1))
    }

    /// The mappings inside `range` that leave.
    pub(crate) fn leaving_inside(&self, range: IovaRange) -> impl Iterator<Item = &Leaving> {
        let leaving = self.leaving.range(range.first..=range.last);
        leaving.map(|(_, leaving)| leaving)
    }

    /// Whether an unmap of something inside `range` is under way.
    pub(crate) fn revoking_in(&self, range: IovaRange) -> Option<&Leaving> {
        self.leaving_inside(range)
            .find(|leaving| leaving.state == State::Revoking)
    }

    /// A mapping with bytes both inside and outside of `range`.
    pub(crate) fn cut_by(&self, table: &Table, range: IovaRange) -> Option<IovaRange> {
        let ends = [range.first, range.last].map(|iova| IovaRange {
            first: iova,
            last: iova,
        });
        ends.into_iter()
            .filter_map(|end| {
                let live = table.visit(end, |mapping| ControlFlow::Break(mapping.range));
                live.or_else(|| Some(self.leaving_in(end)?.mapping.range))
            })
            .find(|mapped| mapped.first < range.first || range.last < mapped.last)
    }

    /// Ends a revocation: the mapping is gone.
    pub(crate) fn forget(&mut self, mapping: &Mapping) -> Option<Leaving> {
        self.leaving.remove(&mapping.range.first)
    }

    /// Ends a revocation in vain: the mapping may be tried again.
    pub(crate) fn keep_revoked(&mut self, mapping: &Mapping) {
        if let Some(leaving) = self.leaving.get_mut(&mapping.range.first) {
            leaving.state = State::Revoked;
        }
    }
}

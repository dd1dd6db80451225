// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who still holds something of what is being unmapped.

use super::Revocation;
use crate::holder::HolderKind;
use crate::mapping::Mapping;
use crate::memory;
use crate::range::IovaRange;
use crate::Holder;

/// Most holders that an error names: there may be one for each mapping, and how many of these there are is up to a
/// guest. Enough for every queue of a device.
pub const HOLDERS_LISTED: usize = 64;

/// Holders that were found.
#[derive(Default)]
pub(crate) struct Holders {
    pub(crate) listed: Vec<Holder>,
    pub(super) count: usize,
}

impl Holders {
    #[cold]
    pub(crate) fn add(&mut self, holder: Holder) {
        self.count += 1;
        if self.listed.len() < HOLDERS_LISTED {
            // Without memory for the list they are only counted.
            let _listed = memory::push(&mut self.listed, holder);
        }
    }
}

impl Revocation<'_> {
    /// Adds who still holds something of the mapping when the deadline has passed, or has pinned something of
    /// `pinned`; whether anybody does.
    pub(super) fn add_holders(
        &self,
        mapping: &Mapping,
        pinned: &[IovaRange],
        leased: bool,
        holders: &mut Holders,
    ) -> bool {
        let (range, before) = (mapping.range, holders.count);
        if leased {
            let leases = &self.space.leases;
            leases.each_holder(mapping, |holder| holders.add(holder));
        }
        if !self.graced {
            holders.add(Holder {
                kind: HolderKind::Access,
                name: String::from("a running access"),
                iova: range.first,
                size: range.size(),
                age: self.deadline.age(),
            });
        }
        let pins = &self.space.pins;
        for range in pinned.iter().filter(|range| self.is_pinned(**range)) {
            let pinned = pins.wait_released(range.first, range.size(), self.deadline.instant());
            for pin in pinned.err().into_iter().flatten() {
                holders.add(Holder {
                    kind: HolderKind::Pin,
                    name: pin.name,
                    iova: pin.iova,
                    size: pin.pages as u64 * pins.page_size(),
                    age: pin.age,
                });
            }
        }
        holders.count > before
    }

    pub(super) fn is_pinned(&self, range: IovaRange) -> bool {
        // After the grace period there are no more pins than when they were told.
        let may_be = self.pinned || !self.graced;
        may_be && self.space.pins.is_pinned(range.first, range.size())
    }
}

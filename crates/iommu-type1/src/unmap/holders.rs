// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who still holds something of what is being unmapped.

use super::Revocation;
use crate::holder::HolderKind;
use crate::mapping::Mapping;
use crate::range::IovaRange;
use crate::Holder;

impl Revocation<'_> {
    /// Who still holds something of the mapping when the deadline has passed, or has pinned something of
    /// `pinned`.
    pub(super) fn holders(
        &self,
        mapping: &Mapping,
        pinned: &[IovaRange],
        leased: bool,
    ) -> Vec<Holder> {
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
        for range in pinned.iter().filter(|range| self.is_pinned(**range)) {
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

    pub(super) fn is_pinned(&self, range: IovaRange) -> bool {
        // After the grace period there are no more pins than when they were told.
        let may_be = self.pinned || !self.graced;
        may_be && self.space.pins.is_pinned(range.first, range.size())
    }
}

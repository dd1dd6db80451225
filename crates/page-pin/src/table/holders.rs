// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who holds what.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use checked_sync::now;

use super::state::{keys, State};
use super::Shared;
use crate::pages::PageRange;
use crate::AccessId;

/// Somebody who holds pins in a range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Identity of the access.
    pub id: AccessId,
    /// Name it was registered with.
    pub name: String,
    /// First of its pinned pages in the range.
    pub iova: u64,
    /// How many pages of the range it has pinned.
    pub pages: usize,
    /// How long it has held the oldest of them.
    pub age: Duration,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} (access {}) has had {} pages from {:#x} pinned for {:?}",
            self.name, self.id, self.pages, self.iova, self.age
        )
    }
}

impl Shared {
    /// Everyone with a pin in the range, in the order of their registration.
    pub(super) fn holders(&self, state: &State, range: PageRange) -> Vec<Holder> {
        let now = now();
        let mut by_owner: BTreeMap<AccessId, Holder> = BTreeMap::new();
        for ((page, id), count) in state.pins.range(keys(range)) {
            let age = now.saturating_duration_since(count.since);
            by_owner
                .entry(*id)
                .and_modify(|holder| {
                    holder.pages += 1;
                    holder.age = holder.age.max(age);
                })
                .or_insert_with(|| Holder {
                    id: *id,
                    name: state.name_of(*id),
                    iova: page * self.page_size,
                    pages: 1,
                    age,
                });
        }
        by_owner.into_values().collect()
    }
}

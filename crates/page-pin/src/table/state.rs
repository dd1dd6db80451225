// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What stands under the lock of a table: the pins, and whose they are.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Weak;
use std::time::Instant;

use checked_sync::ThreadId;

use crate::owner::Registration;
use crate::pages::{PageRange, Pages};
use crate::{AccessId, Interest, Result};

#[derive(Default)]
pub(super) struct State {
    pub(super) next_id: u64,
    pub(super) accesses: BTreeMap<AccessId, Entry>,
    pub(super) pins: BTreeMap<(u64, AccessId), Count>,
    /// Where unpins have to be exact: the ranges of guards, and of those that were kept each once.
    pub(super) exact: usize,
    /// Where the pages lie that were charged.
    pub(super) charged: BTreeMap<u64, Option<usize>>,
    pub(super) next_prevented: u64,
    pub(super) prevented: BTreeMap<u64, PageRange>,
    pub(super) waiters: usize,
}

impl State {
    #[inline]
    pub(super) fn is_pinned(&self, range: PageRange) -> bool {
        self.pins.range(keys(range)).next().is_some()
    }

    pub(super) fn is_prevented(&self, page: u64) -> bool {
        self.prevented.values().any(|range| range.contains(page))
    }

    /// Whether there is `room` for those of the pages that the owner has not pinned yet.
    #[inline]
    pub(super) fn has_room(&self, id: AccessId, pages: &Pages, room: usize) -> Result<bool> {
        if pages.len() <= room {
            return Ok(true);
        }
        let is_new = |page: &u64| !self.pins.contains_key(&(*page, id));
        let new = match pages {
            // There may be far more pages than anybody can pin: one more than there is room for is enough.
            Pages::Range(_) => {
                let new = pages.iter().filter(is_new);
                new.take(room.saturating_add(1)).count()
            }
            Pages::List(_) => {
                let counted = pages.counted()?.into_iter();
                counted.filter(|(page, _)| is_new(page)).count()
            }
        };
        Ok(new <= room)
    }

    /// Changes the counts of one owner on every page of a pin, each as often as it is named.
    #[inline]
    pub(super) fn change(&mut self, id: AccessId, pages: &Pages, change: impl Fn(&mut Count)) {
        for page in pages.iter() {
            if let Some(count) = self.pins.get_mut(&(page, id)) {
                change(count);
                if count.guarded == 0 && count.kept == 0 {
                    self.pins.remove(&(page, id));
                }
            }
        }
    }

    /// Whether the owner has left itself all of these pins; the first page of which it has not.
    pub(super) fn missing(&self, id: AccessId, pages: &Pages) -> Result<Option<u64>> {
        let kept = |page| self.pins.get(&(page, id)).map_or(0, |count| count.kept);
        Ok(match pages {
            Pages::Range(_) => pages.iter().find(|page| kept(*page) == 0),
            Pages::List(_) => {
                let mut counted = pages.counted()?.into_iter();
                counted.find_map(|(page, times)| (kept(page) < times).then_some(page))
            }
        })
    }

    pub(super) fn name_of(&self, id: AccessId) -> String {
        self.accesses
            .get(&id)
            .map_or_else(String::new, |entry| entry.name.clone())
    }
}

/// A registration as seen under the lock. Name and interest stand here again because an upgraded
/// reference must not be dropped under the lock: it may be the last, and its drop takes the lock.
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) interest: Interest,
    pub(super) registration: Weak<Registration>,
    /// Its pins, over all pages.
    pub(super) pins: u64,
    /// Pins left to the access, over all pages.
    pub(super) kept: u64,
    /// The same by the range they were made with, where unpins have to be exact.
    pub(super) kept_exactly: BTreeMap<(u64, u64), u64>,
    /// Whether it may not pin.
    pub(super) closed: bool,
    /// Whether it is never told again, and stays closed.
    pub(super) ended: bool,
    /// The threads that call its notice.
    pub(super) running: Vec<ThreadId>,
}

/// The pins of one owner on one page.
pub(super) struct Count {
    /// Pins of living guards.
    pub(super) guarded: u64,
    /// Pins left to the access.
    pub(super) kept: u64,
    pub(super) since: Instant,
}

/// The keys of all pins in a range.
#[inline]
pub(super) fn keys(range: PageRange) -> RangeInclusive<(u64, AccessId)> {
    (range.first, AccessId(0))..=(range.last, AccessId(u64::MAX))
}

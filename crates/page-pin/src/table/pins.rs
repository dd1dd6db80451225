// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pins that are made, left to an access, and released; what may not be pinned.

use checked_sync::{lock, now};

use super::state::{Count, Entry, State};
use super::Shared;
use crate::owner::Registration;
use crate::pages::Pages;
use crate::{AccessId, Error, Result};

impl Shared {
    pub(crate) fn add(
        &self,
        owner: &Registration,
        pages: &Pages,
        host: &mut dyn FnMut(u64) -> Option<usize>,
    ) -> Result<()> {
        let since = now();
        let mut state = lock(&self.state);
        let state = &mut *state;
        if state
            .accesses
            .get(&owner.id)
            .is_none_or(|entry| entry.closed)
        {
            return Err(owner.detached());
        }
        let limit = self.options.pin_limit_of();
        let room = limit.saturating_sub(state.pins.len());
        if !state.has_room(owner.id, pages, room)? {
            return Err(Error::PinLimit { limit });
        }
        // The same pages make up very many ranges.
        let exact = self.exact_ranges(pages);
        if state.exact.saturating_add(exact) > limit {
            return Err(Error::PinLimit { limit });
        }
        self.admit(state, pages, host)?;
        if let Some(entry) = state.accesses.get_mut(&owner.id) {
            entry.pins += pages.len() as u64;
        }
        state.exact += exact;
        for page in pages.iter() {
            let count = state.pins.entry((page, owner.id)).or_insert(Count {
                guarded: 0,
                kept: 0,
                since,
            });
            count.guarded += 1;
        }
        Ok(())
    }

    /// Whether the pages may be pinned; if so, they are charged.
    #[inline]
    fn admit(
        &self,
        state: &mut State,
        pages: &Pages,
        host: &mut dyn FnMut(u64) -> Option<usize>,
    ) -> Result<()> {
        if !state.prevented.is_empty() {
            if let Some(page) = pages.iter().find(|page| state.is_prevented(*page)) {
                let iova = page * self.page_size;
                return Err(Error::Prevented { iova });
            }
        }
        self.charge(state, pages, host)
    }

    pub(crate) fn release(&self, id: AccessId, pages: &Pages) {
        let mut state = lock(&self.state);
        state.change(id, pages, |count| count.guarded -= 1);
        state.exact -= self.exact_ranges(pages);
        if let Some(entry) = state.accesses.get_mut(&id) {
            entry.pins -= pages.len() as u64;
        }
        self.uncharge(&mut state, pages.iter());
        self.wake(&state);
    }

    /// Turns the pins of a guard into pins of the access.
    pub(crate) fn keep(&self, id: AccessId, pages: &Pages) {
        let mut state = lock(&self.state);
        let state = &mut *state;
        state.change(id, pages, |count| {
            count.guarded -= 1;
            count.kept += 1;
        });
        if let Some(entry) = state.accesses.get_mut(&id) {
            entry.kept += pages.len() as u64;
            if self.options.exact_unpin {
                for range in pages.ranges() {
                    let key = (range.first, range.last);
                    let times = entry.kept_exactly.entry(key).or_insert(0);
                    *times += 1;
                    state.exact -= usize::from(*times > 1);
                }
            }
        }
    }

    /// Releases a kept pin on each page, or nothing.
    pub(crate) fn release_kept(&self, owner: &Registration, pages: &Pages) -> Result<()> {
        let id = owner.id;
        let mut state = lock(&self.state);
        if let Some(page) = state.missing(id, pages)? {
            return Err(Error::NotPinned {
                id: id.0,
                name: owner.name.clone(),
                iova: page * self.page_size,
            });
        }
        let state = &mut *state;
        if let Some(entry) = state.accesses.get_mut(&id) {
            if self.options.exact_unpin {
                state.exact -= self.take_exactly(owner, entry, pages)?;
            }
            entry.kept -= pages.len() as u64;
            entry.pins -= pages.len() as u64;
        }
        state.change(id, pages, |count| count.kept -= 1);
        self.uncharge(state, pages.iter());
        self.wake(state);
        Ok(())
    }

    /// How many ranges these pages are, where unpins have to be exact.
    #[inline]
    fn exact_ranges(&self, pages: &Pages) -> usize {
        match self.options.exact_unpin {
            true => pages.ranges().count(),
            false => 0,
        }
    }

    /// Takes the ranges of an exact unpin, all or none; how many of them are not kept any more.
    fn take_exactly(
        &self,
        owner: &Registration,
        entry: &mut Entry,
        pages: &Pages,
    ) -> Result<usize> {
        let ranges = pages.exact()?;
        let kept = &mut entry.kept_exactly;
        for (range, times) in &ranges {
            let there = kept.get(&(range.first, range.last)).copied().unwrap_or(0);
            if there < *times {
                return Err(Error::NotExact {
                    id: owner.id.0,
                    name: owner.name.clone(),
                    iova: range.first * self.page_size,
                    npages: Pages::Range(*range).len(),
                });
            }
        }
        let before = kept.len();
        for (range, times) in ranges {
            let key = (range.first, range.last);
            if let Some(there) = kept.get_mut(&key) {
                *there -= times;
                if *there == 0 {
                    kept.remove(&key);
                }
            }
        }
        Ok(before - kept.len())
    }

    /// Ends a registration together with the pins left to it.
    pub(crate) fn forget(&self, id: AccessId) {
        let mut state = lock(&self.state);
        let Some(entry) = state.accesses.remove(&id) else {
            return;
        };
        if entry.kept > 0 {
            state.exact -= entry.kept_exactly.len();
            state.pins.retain(|(_, owner), _| *owner != id);
            self.uncharge_unpinned(&mut state);
            self.wake(&state);
        }
    }

    /// Ends a [`Prevented`](crate::Prevented).
    pub(crate) fn allow(&self, key: u64) {
        lock(&self.state).prevented.remove(&key);
    }

    pub(crate) fn pins_of(&self, id: AccessId, iova: u64) -> u64 {
        let state = lock(&self.state);
        let count = state.pins.get(&(self.page_of(iova), id));
        count.map_or(0, |count| count.guarded + count.kept)
    }

    pub(crate) fn total_pins(&self, id: AccessId) -> u64 {
        lock(&self.state)
            .accesses
            .get(&id)
            .map_or(0, |entry| entry.pins)
    }

    pub(crate) fn set_closed(&self, id: AccessId, closed: bool) {
        if let Some(entry) = lock(&self.state).accesses.get_mut(&id) {
            entry.closed = closed || entry.ended;
        }
    }

    pub(crate) fn is_open(&self, id: AccessId) -> bool {
        let state = lock(&self.state);
        state.accesses.get(&id).is_some_and(|entry| !entry.closed)
    }
}

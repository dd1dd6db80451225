// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The count of pins by page and owner.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crate::owner::Registration;
use crate::sync::{lock, now, wait_until, Condvar, Mutex};
use crate::{Access, AccessId, Error, Interest, Result, UnmapNotice};

/// Counts who pinned which pages; a cheap reference, all clones are the same table.
///
/// Addresses are I/O virtual addresses in bytes; the whole 64-bit space can be used, its last page
/// included.
#[derive(Clone, Debug)]
pub struct PinTable {
    shared: Arc<Shared>,
}

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

impl PinTable {
    /// A table of pages of `page_size` bytes.
    ///
    /// # Panics
    ///
    /// Panics if `page_size` is not a power of two: it is the caller's constant, never a guest's.
    pub fn new(page_size: u64) -> Self {
        assert!(
            page_size.is_power_of_two(),
            "page size {page_size} is not a power of two"
        );
        PinTable {
            shared: Arc::new(Shared {
                page_size,
                state: Mutex::new(State::default()),
                released: Condvar::new(),
            }),
        }
    }

    /// Registers an owner of pins under a name that appears in errors.
    pub fn register(
        &self,
        name: impl Into<String>,
        interest: Interest,
        notice: Arc<dyn UnmapNotice>,
    ) -> Access {
        let mut state = lock(&self.shared.state);
        let id = AccessId(state.next_id);
        state.next_id += 1;
        let registration = Arc::new(Registration {
            id,
            name: name.into(),
            notice,
            shared: self.shared.clone(),
        });
        let entry = Entry {
            name: registration.name.clone(),
            interest,
            registration: Arc::downgrade(&registration),
            kept: 0,
        };
        state.accesses.insert(id, entry);
        drop(state);
        Access::new(registration)
    }

    /// Whether [`Access::pin`] takes such a range.
    ///
    /// # Errors
    ///
    /// Those of [`Access::pin`].
    pub fn check(&self, iova: u64, npages: usize) -> Result<()> {
        self.shared.range(iova, npages).map(|_| ())
    }

    /// Tells everyone interested that `size` bytes from `iova` are about to be unmapped.
    ///
    /// Nobody is called twice, and no lock is held during the calls. Pins made after this call are
    /// not told: the caller prevents them first.
    pub fn tell(&self, iova: u64, size: u64) {
        let Some(range) = self.shared.covering(iova, size) else {
            return;
        };
        for registration in self.shared.interested(iova, iova + (size - 1), range) {
            registration.notice.dma_unmap(iova, size);
        }
    }

    /// Waits until no page of the range is pinned.
    ///
    /// # Errors
    ///
    /// Everyone who still holds a pin when `deadline` has passed. A deadline in the past asks
    /// without waiting.
    pub fn wait_released(
        &self,
        iova: u64,
        size: u64,
        deadline: Instant,
    ) -> std::result::Result<(), Vec<Holder>> {
        let Some(range) = self.shared.covering(iova, size) else {
            return Ok(());
        };
        let mut state = lock(&self.shared.state);
        while state.is_pinned(range) {
            state.waiters += 1;
            let woken = wait_until(&self.shared.released, &self.shared.state, state, deadline);
            match woken {
                Some(guard) => {
                    state = guard;
                    state.waiters -= 1;
                }
                None => {
                    let mut state = lock(&self.shared.state);
                    state.waiters -= 1;
                    let holders = self.shared.holders(&state, range);
                    return if holders.is_empty() {
                        Ok(())
                    } else {
                        Err(holders)
                    };
                }
            }
        }
        Ok(())
    }

    /// Everyone who holds a pin in the range now.
    pub fn holders(&self, iova: u64, size: u64) -> Vec<Holder> {
        self.shared
            .covering(iova, size)
            .map_or_else(Vec::new, |range| {
                self.shared.holders(&lock(&self.shared.state), range)
            })
    }

    /// Visits each page of the range that anyone holds a pin on now, by its address, ascending. It is
    /// called under the lock of the table: it must not pin or unpin.
    pub fn for_each_pinned(&self, iova: u64, size: u64, mut visit: impl FnMut(u64)) {
        let Some(range) = self.shared.covering(iova, size) else {
            return;
        };
        let mut last = None;
        for (page, _) in lock(&self.shared.state)
            .pins
            .range(range.keys())
            .map(|(key, _)| key)
        {
            if last.replace(*page) != Some(*page) {
                visit(*page * self.shared.page_size);
            }
        }
    }

    /// Whether anyone holds a pin in the range now.
    pub fn is_pinned(&self, iova: u64, size: u64) -> bool {
        self.shared
            .covering(iova, size)
            .is_some_and(|range| lock(&self.shared.state).is_pinned(range))
    }

    /// How often the page that contains `iova` is pinned, by all owners together.
    pub fn pins(&self, iova: u64) -> u64 {
        let page = iova / self.shared.page_size;
        lock(&self.shared.state)
            .pins
            .range(
                PageRange {
                    first: page,
                    last: page,
                }
                .keys(),
            )
            .map(|(_, count)| count.guarded + count.kept)
            .sum()
    }

    /// Page size in bytes.
    pub fn page_size(&self) -> u64 {
        self.shared.page_size
    }

    /// The most pages one call may pin or unpin: 512 of 4 KiB (`VFIO_PIN_PAGES_MAX_ENTRIES`).
    pub fn max_pages(&self) -> usize {
        self.shared.max_pages()
    }
}

/// The kernel takes one page of entries of this size a call; it also bounds the time under the lock.
const ENTRY_BYTES: u64 = 8;

/// A non-empty range of page numbers, inclusive at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageRange {
    first: u64,
    last: u64,
}

impl PageRange {
    pub(crate) fn iova(&self, page_size: u64) -> u64 {
        self.first * page_size
    }

    pub(crate) fn npages(&self) -> usize {
        (self.last - self.first) as usize + 1
    }

    fn keys(self) -> std::ops::RangeInclusive<(u64, AccessId)> {
        (self.first, AccessId(0))..=(self.last, AccessId(u64::MAX))
    }
}

/// # Invariants
///
/// `state.pins` has an entry for (page, owner) exactly while that owner has a pin on that page, and
/// `guarded` of it is the number of living [`PinGuard`](crate::PinGuard)s over the page.
pub(crate) struct Shared {
    page_size: u64,
    state: Mutex<State>,
    released: Condvar,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PinTable")
            .field("page_size", &self.page_size)
            .finish_non_exhaustive()
    }
}

#[derive(Default)]
struct State {
    next_id: u64,
    accesses: BTreeMap<AccessId, Entry>,
    pins: BTreeMap<(u64, AccessId), Count>,
    waiters: usize,
}

impl State {
    fn is_pinned(&self, range: PageRange) -> bool {
        self.pins.range(range.keys()).next().is_some()
    }

    /// Changes the counts of one owner on every page of a range that it has pinned.
    fn change(&mut self, id: AccessId, range: PageRange, change: impl Fn(&mut Count)) {
        for page in range.first..=range.last {
            if let Some(count) = self.pins.get_mut(&(page, id)) {
                change(count);
                if count.guarded == 0 && count.kept == 0 {
                    self.pins.remove(&(page, id));
                }
            }
        }
    }

    fn name_of(&self, id: AccessId) -> String {
        self.accesses
            .get(&id)
            .map_or_else(String::new, |entry| entry.name.clone())
    }
}

/// A registration as seen under the lock. Name and interest stand here again because an upgraded
/// reference must not be dropped under the lock: it may be the last, and its drop takes the lock.
struct Entry {
    name: String,
    interest: Interest,
    registration: Weak<Registration>,
    /// Pins left to the access, over all pages.
    kept: u64,
}

/// The pins of one owner on one page.
struct Count {
    /// Pins of living guards.
    guarded: u64,
    /// Pins left to the access.
    kept: u64,
    since: Instant,
}

impl Shared {
    pub(crate) fn page_size(&self) -> u64 {
        self.page_size
    }

    fn max_pages(&self) -> usize {
        (self.page_size / ENTRY_BYTES).max(1) as usize
    }

    /// The pages of a request that has to be aligned.
    pub(crate) fn range(&self, iova: u64, npages: usize) -> Result<PageRange> {
        let page_size = self.page_size;
        if npages == 0 {
            return Err(Error::Empty { iova });
        }
        if iova % page_size != 0 {
            return Err(Error::Misaligned { iova, page_size });
        }
        let max = self.max_pages();
        if npages > max {
            return Err(Error::TooMany { npages, max });
        }
        let first = iova / page_size;
        first
            .checked_add(npages as u64 - 1)
            .filter(|last| *last <= u64::MAX / page_size)
            .map(|last| PageRange { first, last })
            .ok_or(Error::Overflow { iova, npages })
    }

    /// The pages that `size` bytes from `iova` touch; `None` for an empty or wrapping range.
    fn covering(&self, iova: u64, size: u64) -> Option<PageRange> {
        let last = iova.checked_add(size.checked_sub(1)?)?;
        Some(PageRange {
            first: iova / self.page_size,
            last: last / self.page_size,
        })
    }

    pub(crate) fn add(&self, id: AccessId, range: PageRange) {
        let since = now();
        let mut state = lock(&self.state);
        for page in range.first..=range.last {
            let count = state.pins.entry((page, id)).or_insert(Count {
                guarded: 0,
                kept: 0,
                since,
            });
            count.guarded += 1;
        }
    }

    pub(crate) fn release(&self, id: AccessId, range: PageRange) {
        let mut state = lock(&self.state);
        state.change(id, range, |count| count.guarded -= 1);
        self.wake(&state);
    }

    /// Turns the pins of a guard into pins of the access.
    pub(crate) fn keep(&self, id: AccessId, range: PageRange) {
        let mut state = lock(&self.state);
        state.change(id, range, |count| {
            count.guarded -= 1;
            count.kept += 1;
        });
        if let Some(entry) = state.accesses.get_mut(&id) {
            entry.kept += range.npages() as u64;
        }
    }

    /// Releases a kept pin on each page, or nothing and the address of the first without.
    pub(crate) fn release_kept(
        &self,
        id: AccessId,
        range: PageRange,
    ) -> std::result::Result<(), u64> {
        let mut state = lock(&self.state);
        for page in range.first..=range.last {
            let count = state.pins.get(&(page, id));
            if count.is_none_or(|count| count.kept == 0) {
                return Err(page * self.page_size);
            }
        }
        state.change(id, range, |count| count.kept -= 1);
        if let Some(entry) = state.accesses.get_mut(&id) {
            entry.kept -= range.npages() as u64;
        }
        self.wake(&state);
        Ok(())
    }

    /// Ends a registration together with the pins left to it.
    pub(crate) fn forget(&self, id: AccessId) {
        let mut state = lock(&self.state);
        let kept = state.accesses.remove(&id).map_or(0, |entry| entry.kept);
        if kept > 0 {
            state.pins.retain(|(_, owner), _| *owner != id);
            self.wake(&state);
        }
    }

    fn wake(&self, state: &State) {
        if state.waiters > 0 {
            self.released.notify_all();
        }
    }

    fn interested(&self, iova: u64, last: u64, range: PageRange) -> Vec<Arc<Registration>> {
        let state = lock(&self.state);
        let mut ids: Vec<AccessId> = state
            .pins
            .range(range.keys())
            .map(|((_, id), _)| *id)
            .collect();
        ids.sort_unstable();
        ids.dedup();
        state
            .accesses
            .iter()
            .filter(|(id, entry)| {
                entry.interest.covers(iova, last) || ids.binary_search(id).is_ok()
            })
            .filter_map(|(_, entry)| entry.registration.upgrade())
            .collect()
    }

    fn holders(&self, state: &State, range: PageRange) -> Vec<Holder> {
        let now = now();
        let mut by_owner: BTreeMap<AccessId, Holder> = BTreeMap::new();
        for ((page, id), count) in state.pins.range(range.keys()) {
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

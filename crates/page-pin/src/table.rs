// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The count of pins by page and owner.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use checked_sync::{current, lock, now, wait_until, Condvar, Mutex, MutexGuard, ThreadId};

use crate::owner::Registration;
use crate::pages::{reserved, PageRange, Pages};
use crate::{
    Access, AccessId, Account, Error, Interest, PinOptions, PinnedPage, Prevented, Result,
    UnmapNotice,
};

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
        PinTable::with_options(page_size, PinOptions::new())
    }

    /// As [`new`](PinTable::new), with limits and rules of one's own.
    ///
    /// # Panics
    ///
    /// As [`new`](PinTable::new).
    pub fn with_options(page_size: u64, options: PinOptions) -> Self {
        assert!(
            page_size.is_power_of_two(),
            "page size {page_size} is not a power of two"
        );
        PinTable {
            shared: Arc::new(Shared {
                page_size,
                options,
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
            pins: 0,
            kept: 0,
            kept_exactly: BTreeMap::new(),
            closed: false,
            ended: false,
            running: Vec::new(),
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

    /// As [`check`](PinTable::check), for [`Access::pin_list`].
    ///
    /// # Errors
    ///
    /// Those of [`Access::pin_list`].
    pub fn check_list(&self, iovas: &[u64]) -> Result<()> {
        self.shared.list(iovas).map(|_| ())
    }

    /// Refuses pins in a range as long as the result lives; those that are there stay.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use page_pin::{Interest, PinTable};
    ///
    /// let table = PinTable::new(4096);
    /// let access = table.register("nic", Interest::Holder, Arc::new(|_, _| ()));
    /// let prevented = table.prevent(0x1000, 0x2000);
    /// assert_eq!(access.pin(0, 2).unwrap_err().errno(), libc::EBUSY);
    /// drop(prevented);
    /// assert!(access.pin(0, 2).is_ok());
    /// ```
    pub fn prevent(&self, iova: u64, size: u64) -> Prevented {
        let mut state = lock(&self.shared.state);
        let key = state.next_prevented;
        state.next_prevented += 1;
        if let Some(range) = self.shared.covering(iova, size) {
            state.prevented.insert(key, range);
        }
        drop(state);
        Prevented::new(self.shared.clone(), key)
    }

    /// Tells everyone interested that `size` bytes from `iova` are about to be unmapped; whether any
    /// page of it was pinned before.
    ///
    /// Nobody is called twice, and no lock is held during the calls. Pins made after this call are
    /// not told: the caller prevents them first.
    pub fn tell(&self, iova: u64, size: u64) -> bool {
        let Some(range) = self.shared.covering(iova, size) else {
            return false;
        };
        let (pinned, interested) = self.shared.interested(iova, iova + (size - 1), range);
        for registration in interested {
            registration.notify(iova, size);
        }
        pinned
    }

    /// Waits as [`wait_released`](PinTable::wait_released) does, and up to `times` times, spread over
    /// the time until `deadline`, tells those again who still hold pins in the range.
    ///
    /// ```
    /// use std::sync::{Arc, Mutex};
    /// use std::time::{Duration, Instant};
    /// use page_pin::{Interest, PinGuard, PinTable};
    ///
    /// let table = PinTable::new(4096);
    /// let held: Arc<Mutex<Option<PinGuard>>> = Arc::default();
    /// let told = held.clone();
    /// let access = table.register("busy", Interest::Holder, Arc::new(move |_, _| {
    ///     told.lock().unwrap().take();
    /// }));
    /// *held.lock().unwrap() = Some(access.pin(0, 1)?);
    /// let deadline = Instant::now() + Duration::from_millis(100);
    /// assert!(table.remind(0, 0x1000, 1, deadline).is_ok());
    /// # Ok::<(), page_pin::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`wait_released`](PinTable::wait_released).
    pub fn remind(
        &self,
        iova: u64,
        size: u64,
        times: u32,
        deadline: Instant,
    ) -> std::result::Result<(), Vec<Holder>> {
        for left in (1..=times).rev() {
            let now = now();
            let share = deadline.saturating_duration_since(now) / left.saturating_add(1);
            if share.is_zero() {
                break;
            }
            match self.wait_released(iova, size, now + share) {
                Ok(()) => return Ok(()),
                Err(holders) => {
                    for registration in self.shared.registrations(&holders) {
                        registration.notify(iova, size);
                    }
                }
            }
        }
        self.wait_released(iova, size, deadline)
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
        let (state, free) = self.shared.wait(deadline, |state| !state.is_pinned(range));
        if free {
            return Ok(());
        }
        Err(self.shared.holders(&state, range))
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
            .range(keys(range))
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
            .range(keys(PageRange::only(page)))
            .map(|(_, count)| count.guarded + count.kept)
            .sum()
    }

    /// Page size in bytes.
    pub fn page_size(&self) -> u64 {
        self.shared.page_size
    }

    /// The most pages one call may pin or unpin, see [`PinOptions::max_pages`].
    pub fn max_pages(&self) -> usize {
        self.shared.max_pages()
    }
}

/// The keys of all pins in a range.
fn keys(range: PageRange) -> RangeInclusive<(u64, AccessId)> {
    (range.first, AccessId(0))..=(range.last, AccessId(u64::MAX))
}

/// # Invariants
///
/// `state.pins` has an entry for (page, owner) exactly while that owner has a pin on that page, and
/// `guarded` of it is how often living [`PinGuard`](crate::PinGuard)s name the page. With an account,
/// `state.charged` has exactly the pages that somebody has pinned.
pub(crate) struct Shared {
    page_size: u64,
    options: PinOptions,
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
    /// Where the pages lie that were charged.
    charged: BTreeMap<u64, Option<usize>>,
    next_prevented: u64,
    prevented: BTreeMap<u64, PageRange>,
    waiters: usize,
}

impl State {
    fn is_pinned(&self, range: PageRange) -> bool {
        self.pins.range(keys(range)).next().is_some()
    }

    fn is_prevented(&self, page: u64) -> bool {
        self.prevented.values().any(|range| range.contains(page))
    }

    /// How many of these pages the owner has not pinned yet.
    fn new_pins(&self, id: AccessId, pages: &Pages) -> Result<usize> {
        let is_new = |page: &u64| !self.pins.contains_key(&(*page, id));
        Ok(match pages {
            Pages::Range(_) => pages.iter().filter(is_new).count(),
            Pages::List(_) => {
                let counted = pages.counted()?.into_iter();
                counted.filter(|(page, _)| is_new(page)).count()
            }
        })
    }

    /// Changes the counts of one owner on every page of a pin, each as often as it is named.
    fn change(&mut self, id: AccessId, pages: &Pages, change: impl Fn(&mut Count)) {
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
    fn missing(&self, id: AccessId, pages: &Pages) -> Result<Option<u64>> {
        let kept = |page| self.pins.get(&(page, id)).map_or(0, |count| count.kept);
        Ok(match pages {
            Pages::Range(_) => pages.iter().find(|page| kept(*page) == 0),
            Pages::List(_) => {
                let mut counted = pages.counted()?.into_iter();
                counted.find_map(|(page, times)| (kept(page) < times).then_some(page))
            }
        })
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
    /// Its pins, over all pages.
    pins: u64,
    /// Pins left to the access, over all pages.
    kept: u64,
    /// The same by the range they were made with, where unpins have to be exact.
    kept_exactly: BTreeMap<(u64, u64), u64>,
    /// Whether it may not pin.
    closed: bool,
    /// Whether it is never told again, and stays closed.
    ended: bool,
    /// The threads that call its notice.
    running: Vec<ThreadId>,
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
        self.options.max_pages_of(self.page_size)
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

    /// As [`range`](Shared::range) of pages that may lie anywhere.
    pub(crate) fn list(&self, iovas: &[u64]) -> Result<Pages> {
        let page_size = self.page_size;
        if iovas.is_empty() {
            return Err(Error::Empty { iova: 0 });
        }
        let (npages, max) = (iovas.len(), self.max_pages());
        if npages > max {
            return Err(Error::TooMany { npages, max });
        }
        match iovas.iter().find(|iova| **iova % page_size != 0) {
            Some(&iova) => Err(Error::Misaligned { iova, page_size }),
            None => Pages::list(iovas, page_size),
        }
    }

    /// The pages that `size` bytes from `iova` touch; `None` for an empty or wrapping range.
    fn covering(&self, iova: u64, size: u64) -> Option<PageRange> {
        let last = iova.checked_add(size.checked_sub(1)?)?;
        Some(PageRange {
            first: iova / self.page_size,
            last: last / self.page_size,
        })
    }

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
        let most = state.pins.len().saturating_add(pages.len());
        if most > limit && state.pins.len() + state.new_pins(owner.id, pages)? > limit {
            return Err(Error::PinLimit { limit });
        }
        self.admit(state, pages, host)?;
        if let Some(entry) = state.accesses.get_mut(&owner.id) {
            entry.pins += pages.len() as u64;
        }
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
        let Some(account) = &self.options.account else {
            return Ok(());
        };
        let counted = pages.counted()?;
        let mut fresh = reserved(counted.len())?;
        for (page, _) in counted {
            if !state.charged.contains_key(&page) {
                let iova = page * self.page_size;
                let host = host(iova);
                fresh.push(PinnedPage { iova, host });
            }
        }
        if fresh.is_empty() {
            return Ok(());
        }
        account.charge(&fresh).map_err(|refusal| Error::Account {
            // Whoever wrote the account may say anything.
            iova: fresh.get(refusal.index).unwrap_or(&fresh[0]).iova,
            errno: refusal.errno,
        })?;
        let charged = fresh
            .iter()
            .map(|page| (page.iova / self.page_size, page.host));
        state.charged.extend(charged);
        Ok(())
    }

    /// Gives back what was charged for those of the pages that nobody has pinned any more.
    fn uncharge(&self, state: &mut State, pages: impl Iterator<Item = u64>) {
        let Some(account) = &self.options.account else {
            return;
        };
        let mut gone = Gone::of(&**account);
        for page in pages {
            if !state.is_pinned(PageRange::only(page)) {
                if let Some(host) = state.charged.remove(&page) {
                    let iova = page * self.page_size;
                    gone.add(PinnedPage { iova, host });
                }
            }
        }
    }

    pub(crate) fn release(&self, id: AccessId, pages: &Pages) {
        let mut state = lock(&self.state);
        state.change(id, pages, |count| count.guarded -= 1);
        if let Some(entry) = state.accesses.get_mut(&id) {
            entry.pins -= pages.len() as u64;
        }
        self.uncharge(&mut state, pages.iter());
        self.wake(&state);
    }

    /// Turns the pins of a guard into pins of the access.
    pub(crate) fn keep(&self, id: AccessId, pages: &Pages) {
        let mut state = lock(&self.state);
        state.change(id, pages, |count| {
            count.guarded -= 1;
            count.kept += 1;
        });
        if let Some(entry) = state.accesses.get_mut(&id) {
            entry.kept += pages.len() as u64;
            if self.options.exact_unpin {
                for range in pages.ranges() {
                    let key = (range.first, range.last);
                    *entry.kept_exactly.entry(key).or_insert(0) += 1;
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
        if let Some(entry) = state.accesses.get_mut(&id) {
            if self.options.exact_unpin {
                self.take_exactly(owner, entry, pages)?;
            }
            entry.kept -= pages.len() as u64;
            entry.pins -= pages.len() as u64;
        }
        state.change(id, pages, |count| count.kept -= 1);
        self.uncharge(&mut state, pages.iter());
        self.wake(&state);
        Ok(())
    }

    /// Takes the ranges of an exact unpin, all or none.
    fn take_exactly(&self, owner: &Registration, entry: &mut Entry, pages: &Pages) -> Result<()> {
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
        for (range, times) in ranges {
            let key = (range.first, range.last);
            if let Some(there) = kept.get_mut(&key) {
                *there -= times;
                if *there == 0 {
                    kept.remove(&key);
                }
            }
        }
        Ok(())
    }

    /// Ends a registration together with the pins left to it.
    pub(crate) fn forget(&self, id: AccessId) {
        let mut state = lock(&self.state);
        let kept = state.accesses.remove(&id).map_or(0, |entry| entry.kept);
        if kept > 0 {
            state.pins.retain(|(_, owner), _| *owner != id);
            if let Some(account) = &self.options.account {
                let mut gone = Gone::of(&**account);
                let State { pins, charged, .. } = &mut *state;
                charged.retain(|page, host| {
                    let is_pinned = pins.range(keys(PageRange::only(*page))).next().is_some();
                    if !is_pinned {
                        let (iova, host) = (page * self.page_size, *host);
                        gone.add(PinnedPage { iova, host });
                    }
                    is_pinned
                });
            }
            self.wake(&state);
        }
    }

    /// Ends a [`Prevented`].
    pub(crate) fn allow(&self, key: u64) {
        lock(&self.state).prevented.remove(&key);
    }

    pub(crate) fn pins_of(&self, id: AccessId, iova: u64) -> u64 {
        let state = lock(&self.state);
        let count = state.pins.get(&(iova / self.page_size, id));
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

    pub(crate) fn wait_released_by(
        &self,
        id: AccessId,
        deadline: Instant,
    ) -> std::result::Result<(), Vec<Holder>> {
        let holds = |state: &State| state.accesses.get(&id).is_some_and(|entry| entry.pins > 0);
        let (state, free) = self.wait(deadline, |state| !holds(state));
        if free {
            return Ok(());
        }
        let everything = PageRange {
            first: 0,
            last: u64::MAX / self.page_size,
        };
        let mut holders = self.holders(&state, everything);
        holders.retain(|holder| holder.id == id);
        Err(holders)
    }

    /// A call of the owner's notice, until the result is dropped; `None` if it has ended.
    pub(crate) fn begin_notice(&self, id: AccessId) -> Option<RunningNotice<'_>> {
        let mut state = lock(&self.state);
        let entry = state.accesses.get_mut(&id).filter(|entry| !entry.ended)?;
        let thread = current().id();
        entry.running.push(thread);
        Some(RunningNotice {
            shared: self,
            id,
            thread,
        })
    }

    pub(crate) fn end(&self, owner: &Registration, deadline: Instant) -> Result<()> {
        let mut state = lock(&self.state);
        if let Some(entry) = state.accesses.get_mut(&owner.id) {
            entry.closed = true;
            entry.ended = true;
        }
        drop(state);
        let me = current().id();
        let over = |state: &State| {
            let entry = state.accesses.get(&owner.id);
            // Two notices that end their own access would wait for each other.
            entry.is_none_or(|entry| entry.running.is_empty() || entry.running.contains(&me))
        };
        match self.wait(deadline, over) {
            (_, true) => Ok(()),
            (_, false) => Err(Error::NoticeRuns {
                id: owner.id.0,
                name: owner.name.clone(),
            }),
        }
    }

    /// Waits until something `holds`, or until the deadline; whether it does.
    fn wait(
        &self,
        deadline: Instant,
        holds: impl Fn(&State) -> bool,
    ) -> (MutexGuard<'_, State>, bool) {
        let mut state = lock(&self.state);
        while !holds(&state) {
            state.waiters += 1;
            let woken = wait_until(&self.released, &self.state, state, deadline);
            let late = woken.is_none();
            state = woken.unwrap_or_else(|| lock(&self.state));
            state.waiters -= 1;
            if late {
                let holds = holds(&state);
                return (state, holds);
            }
        }
        (state, true)
    }

    fn wake(&self, state: &State) {
        if state.waiters > 0 {
            self.released.notify_all();
        }
    }

    /// Whether anyone holds a pin in the range, and whom to tell.
    fn interested(&self, iova: u64, last: u64, range: PageRange) -> (bool, Vec<Arc<Registration>>) {
        let state = lock(&self.state);
        if state.accesses.is_empty() {
            // Nor are there pins.
            return (false, Vec::new());
        }
        // As many as there are owners, and not as there are pins.
        let pins = state.pins.range(keys(range));
        let ids: BTreeSet<AccessId> = pins.map(|((_, id), _)| *id).collect();
        let accesses = state
            .accesses
            .iter()
            .filter(|(id, entry)| entry.interest.covers(iova, last) || ids.contains(id));
        let interested = accesses.filter_map(|(_, entry)| entry.registration.upgrade());
        (!ids.is_empty(), interested.collect())
    }

    /// The registrations of holders, as far as they still are.
    fn registrations(&self, holders: &[Holder]) -> Vec<Arc<Registration>> {
        let state = lock(&self.state);
        let entries = holders
            .iter()
            .filter_map(|holder| state.accesses.get(&holder.id));
        entries
            .filter_map(|entry| entry.registration.upgrade())
            .collect()
    }

    fn holders(&self, state: &State, range: PageRange) -> Vec<Holder> {
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

/// Pages that are given back to an account, some at a time: who unpins must not need memory for that.
struct Gone<'a> {
    account: &'a dyn Account,
    pages: [PinnedPage; GIVEN_BACK],
    len: usize,
}

/// Pages that are given back in one call: few enough to stand on the stack, enough for what an account does once a call.
const GIVEN_BACK: usize = 32;

impl<'a> Gone<'a> {
    fn of(account: &'a dyn Account) -> Self {
        let none = PinnedPage {
            iova: 0,
            host: None,
        };
        Gone {
            account,
            pages: [none; GIVEN_BACK],
            len: 0,
        }
    }

    fn add(&mut self, page: PinnedPage) {
        self.pages[self.len] = page;
        self.len += 1;
        if self.len == GIVEN_BACK {
            self.give_back();
        }
    }

    fn give_back(&mut self) {
        if self.len > 0 {
            self.account.uncharge(&self.pages[..self.len]);
            self.len = 0;
        }
    }
}

impl Drop for Gone<'_> {
    fn drop(&mut self) {
        self.give_back();
    }
}

/// A notice that runs.
pub(crate) struct RunningNotice<'a> {
    shared: &'a Shared,
    id: AccessId,
    thread: ThreadId,
}

impl Drop for RunningNotice<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.shared.state);
        if let Some(entry) = state.accesses.get_mut(&self.id) {
            let at = entry.running.iter().position(|id| *id == self.thread);
            if let Some(at) = at {
                entry.running.swap_remove(at);
            }
        }
        self.shared.wake(&state);
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The count of pins by page and owner: what is asked of it, and what it is made of.

mod charge;
mod holders;
mod pins;
mod request;
mod state;
mod tell;
mod wait;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use checked_sync::{lock, now, Condvar, Mutex};

pub use holders::Holder;

use crate::owner::Registration;
use crate::pages::PageRange;
use crate::{Access, AccessId, Interest, PinOptions, Prevented, Result, UnmapNotice};
use state::{keys, Entry, State};

/// Counts who pinned which pages; a cheap reference, all clones are the same table.
///
/// Addresses are I/O virtual addresses in bytes; the whole 64-bit space can be used, its last page
/// included.
#[derive(Clone, Debug)]
pub struct PinTable {
    shared: Arc<Shared>,
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
        let page = self.shared.page_of(iova);
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

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The registration of one owner of pins.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use crate::pages::Pages;
use crate::table::Shared;
use crate::{Error, Holder, PinGuard, Result, UnmapNotice};

/// Identity of an access, unique within its table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AccessId(pub(crate) u64);

impl fmt::Display for AccessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A registered owner of pins; the registration ends when this and all its pins are gone.
///
/// ```
/// use std::sync::Arc;
/// use page_pin::{Interest, PinTable};
///
/// let table = PinTable::new(4096);
/// let access = table.register("nic", Interest::All, Arc::new(|_, _| ()));
/// access.pin(0x2000, 1)?.keep();
/// assert_eq!(table.pins(0x2000), 1);
/// access.unpin(0x2000, 1)?;
/// assert_eq!(table.pins(0x2000), 0);
/// # Ok::<(), page_pin::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Access {
    registration: Arc<Registration>,
}

impl Access {
    pub(crate) fn new(registration: Arc<Registration>) -> Self {
        Access { registration }
    }

    /// Identity in the table.
    pub fn id(&self) -> AccessId {
        self.registration.id
    }

    /// The name it was registered with.
    pub fn name(&self) -> &str {
        &self.registration.name
    }

    /// Pins `npages` pages from `iova`; a page may be pinned any number of times.
    ///
    /// # Errors
    ///
    /// In this order: [`Error::Empty`], [`Error::Misaligned`], [`Error::TooMany`], [`Error::Overflow`];
    /// [`Error::Detached`], [`Error::PinLimit`], [`Error::Prevented`], [`Error::Account`]; [`Error::NoMemory`].
    /// Nothing is pinned then.
    pub fn pin(&self, iova: u64, npages: usize) -> Result<PinGuard> {
        self.pin_at(iova, npages, |_| None)
    }

    /// As [`pin`](Access::pin), for an [`Account`](crate::Account) that has to know where pages lie:
    /// `host` says it for an I/O virtual address, and is called where a page is charged, under the
    /// table's lock.
    ///
    /// # Errors
    ///
    /// As [`pin`](Access::pin).
    pub fn pin_at(
        &self,
        iova: u64,
        npages: usize,
        host: impl FnMut(u64) -> Option<usize>,
    ) -> Result<PinGuard> {
        let range = self.registration.shared.range(iova, npages)?;
        self.pin_pages(Pages::Range(range), host)
    }

    /// Pins the pages at these addresses, which may lie anywhere; one that is named twice is pinned
    /// twice.
    ///
    /// # Errors
    ///
    /// As [`pin`](Access::pin), with the address of the page that was refused. Nothing is pinned then.
    pub fn pin_list(&self, iovas: &[u64]) -> Result<PinGuard> {
        self.pin_list_at(iovas, |_| None)
    }

    /// As [`pin_list`](Access::pin_list), with the host addresses of [`pin_at`](Access::pin_at).
    ///
    /// # Errors
    ///
    /// As [`pin_list`](Access::pin_list).
    pub fn pin_list_at(
        &self,
        iovas: &[u64],
        host: impl FnMut(u64) -> Option<usize>,
    ) -> Result<PinGuard> {
        self.pin_pages(self.registration.shared.list(iovas)?, host)
    }

    fn pin_pages(
        &self,
        pages: Pages,
        mut host: impl FnMut(u64) -> Option<usize>,
    ) -> Result<PinGuard> {
        let registration = &self.registration;
        registration.shared.add(registration, &pages, &mut host)?;
        Ok(PinGuard::new(registration.clone(), pages))
    }

    /// Releases one pin of each page that was left to this access with [`PinGuard::keep`].
    ///
    /// # Errors
    ///
    /// As [`pin`](Access::pin) where the range is bad; [`Error::NotPinned`] where this access kept no
    /// pin on one of the pages, or [`Error::NotExact`] where unpins have to be exact
    /// ([`PinOptions::exact_unpin`](crate::PinOptions::exact_unpin)) and this is not.
    /// Nothing is released then: pins of others and of living guards are never touched.
    pub fn unpin(&self, iova: u64, npages: usize) -> Result<()> {
        let range = self.registration.shared.range(iova, npages)?;
        self.unpin_pages(Pages::Range(range))
    }

    /// As [`unpin`](Access::unpin) of pages that may lie anywhere; one that is named twice is unpinned
    /// twice.
    ///
    /// # Errors
    ///
    /// As [`unpin`](Access::unpin).
    pub fn unpin_list(&self, iovas: &[u64]) -> Result<()> {
        self.unpin_pages(self.registration.shared.list(iovas)?)
    }

    fn unpin_pages(&self, pages: Pages) -> Result<()> {
        let registration = &self.registration;
        registration.shared.release_kept(registration, &pages)
    }

    /// How often this access has pinned the page that contains `iova`.
    pub fn pins(&self, iova: u64) -> u64 {
        self.registration.shared.pins_of(self.id(), iova)
    }

    /// How many pins this access has on all pages together, living guards and kept ones.
    pub fn total_pins(&self) -> u64 {
        self.registration.shared.total_pins(self.id())
    }

    /// From here on pins through this access are refused with [`Error::Detached`]; unpins go on.
    pub fn close(&self) {
        self.registration.shared.set_closed(self.id(), true);
    }

    /// Takes [`close`](Access::close) back, unless the access has [ended](Access::end).
    pub fn reopen(&self) {
        self.registration.shared.set_closed(self.id(), false);
    }

    /// Whether it may pin.
    pub fn is_open(&self) -> bool {
        self.registration.shared.is_open(self.id())
    }

    /// Lets go of everything: [closes](Access::close) the access, tells it that all of the space goes
    /// (address 0, size `u64::MAX`), and waits for its pins.
    ///
    /// ```
    /// use std::sync::{Arc, Mutex};
    /// use std::time::{Duration, Instant};
    /// use page_pin::{Interest, PinGuard, PinTable};
    ///
    /// let table = PinTable::new(4096);
    /// let cache: Arc<Mutex<Option<PinGuard>>> = Arc::default();
    /// let told = cache.clone();
    /// let notice = move |_, _| drop(told.lock().unwrap().take());
    /// let access = table.register("nic", Interest::Holder, Arc::new(notice));
    /// *cache.lock().unwrap() = Some(access.pin(0x2000, 1)?);
    ///
    /// access.detach(Instant::now() + Duration::from_secs(1))?;
    /// assert_eq!(access.pin(0x2000, 1).unwrap_err().errno(), libc::ENOENT);
    /// # Ok::<(), page_pin::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Held`] when `deadline` has passed. The access is open again then, as it is if the
    /// notice panics.
    pub fn detach(&self, deadline: Instant) -> Result<()> {
        let reopen = Reopen(self);
        self.close();
        self.registration.notify(0, u64::MAX);
        self.wait_released(deadline)
            .map_err(|holders| Error::Held { holders })?;
        std::mem::forget(reopen);
        Ok(())
    }

    /// Waits until this access has no pin left.
    ///
    /// # Errors
    ///
    /// What it still holds when `deadline` has passed.
    pub fn wait_released(&self, deadline: Instant) -> std::result::Result<(), Vec<Holder>> {
        let shared = &self.registration.shared;
        shared.wait_released_by(self.id(), deadline)
    }

    /// Ends the access: it can never pin again, and once this has returned without error its
    /// notice does not run and never will. What it has pinned stays pinned, and nobody tells it.
    ///
    /// Whoever calls this must not hold a lock that the notice takes. From inside the notice itself
    /// nothing is waited for.
    ///
    /// # Errors
    ///
    /// [`Error::NoticeRuns`] if a notice that had begun still runs at the deadline; no other begins.
    pub fn end(&self, deadline: Instant) -> Result<()> {
        let registration = &self.registration;
        registration.shared.end(registration, deadline)
    }
}

/// Opens an access again, unless forgotten.
struct Reopen<'a>(&'a Access);

impl Drop for Reopen<'_> {
    fn drop(&mut self) {
        self.0.reopen();
    }
}

/// What the table knows of an owner; alive while an [`Access`] or a [`PinGuard`] refers to it.
pub(crate) struct Registration {
    pub(crate) id: AccessId,
    pub(crate) name: String,
    pub(crate) notice: Arc<dyn UnmapNotice>,
    pub(crate) shared: Arc<Shared>,
}

impl Registration {
    pub(crate) fn release(&self, pages: &Pages) {
        self.shared.release(self.id, pages);
    }

    pub(crate) fn keep(&self, pages: &Pages) {
        self.shared.keep(self.id, pages);
    }

    /// Calls the notice, unless the access has ended.
    pub(crate) fn notify(&self, iova: u64, size: u64) {
        if let Some(_running) = self.shared.begin_notice(self.id) {
            self.notice.dma_unmap(iova, size);
        }
    }

    pub(crate) fn detached(&self) -> Error {
        Error::Detached {
            id: self.id.0,
            name: self.name.clone(),
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.shared.forget(self.id);
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration")
            .field("id", &self.id)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

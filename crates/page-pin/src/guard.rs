// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pins that end with a scope.

use std::mem;
use std::sync::Arc;

use crate::owner::Registration;
use crate::pages::Pages;

/// Pinned pages; dropping it unpins them.
///
/// Made by [`Access::pin`](crate::Access::pin) and [`Access::pin_list`](crate::Access::pin_list). It may be sent to and dropped on any thread, also
/// from inside an [`UnmapNotice`](crate::UnmapNotice).
///
/// ```
/// use std::sync::Arc;
/// use page_pin::{Interest, PinTable};
///
/// let table = PinTable::new(4096);
/// let access = table.register("disk", Interest::Holder, Arc::new(|_, _| ()));
/// let pin = access.pin(u64::MAX - 4095, 1)?;
/// assert_eq!((pin.iova(), pin.npages()), (0xffff_ffff_ffff_f000, 1));
/// # Ok::<(), page_pin::Error>(())
/// ```
#[derive(Debug)]
#[must_use = "dropping the guard unpins the pages"]
pub struct PinGuard {
    registration: Arc<Registration>,
    pages: Pages,
    on_drop: OnDrop,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OnDrop {
    Unpin,
    Keep,
}

impl PinGuard {
    pub(crate) fn new(registration: Arc<Registration>, pages: Pages) -> Self {
        PinGuard {
            registration,
            pages,
            on_drop: OnDrop::Unpin,
        }
    }

    /// I/O virtual address of the first page.
    pub fn iova(&self) -> u64 {
        self.iova_of(0).unwrap_or_default()
    }

    /// I/O virtual address of page `index`, in the order they were asked for; `None` behind the last.
    pub fn iova_of(&self, index: usize) -> Option<u64> {
        let page = self.pages.get(index)?;
        Some(page * self.registration.shared.page_size())
    }

    /// I/O virtual addresses of all pages, in the order they were asked for.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use page_pin::{Interest, PinTable};
    ///
    /// let table = PinTable::new(4096);
    /// let access = table.register("disk", Interest::Holder, Arc::new(|_, _| ()));
    /// let pin = access.pin_list(&[0x5000, 0x1000, 0x5000])?;
    /// assert!(pin.iovas().eq([0x5000, 0x1000, 0x5000]));
    /// assert_eq!(table.pins(0x5000), 2);
    /// # Ok::<(), page_pin::Error>(())
    /// ```
    pub fn iovas(&self) -> impl Iterator<Item = u64> + '_ {
        let page_size = self.registration.shared.page_size();
        self.pages.iter().map(move |page| page * page_size)
    }

    /// Number of pages, those named twice counted twice.
    pub fn npages(&self) -> usize {
        self.pages.len()
    }

    /// Leaves the pins to the access that made them, until
    /// [`Access::unpin`](crate::Access::unpin) or until the access itself is gone.
    pub fn keep(mut self) {
        self.on_drop = OnDrop::Keep;
        mem::drop(self);
    }
}

impl Drop for PinGuard {
    fn drop(&mut self) {
        match self.on_drop {
            OnDrop::Unpin => self.registration.release(&self.pages),
            OnDrop::Keep => self.registration.keep(&self.pages),
        }
    }
}

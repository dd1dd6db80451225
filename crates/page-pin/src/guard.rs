// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pins that end with a scope.

use std::mem;
use std::sync::Arc;

use crate::owner::Registration;
use crate::table::PageRange;

/// Pinned pages; dropping it unpins them.
///
/// Made by [`Access::pin`](crate::Access::pin). It may be sent to and dropped on any thread, also
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
    range: PageRange,
    on_drop: OnDrop,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OnDrop {
    Unpin,
    Keep,
}

impl PinGuard {
    pub(crate) fn new(registration: Arc<Registration>, range: PageRange) -> Self {
        PinGuard {
            registration,
            range,
            on_drop: OnDrop::Unpin,
        }
    }

    /// First I/O virtual address.
    pub fn iova(&self) -> u64 {
        self.range.iova(self.registration.shared.page_size())
    }

    /// Number of pages.
    pub fn npages(&self) -> usize {
        self.range.npages()
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
            OnDrop::Unpin => self.registration.release(self.range),
            OnDrop::Keep => self.registration.keep(self.range),
        }
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The registration of one owner of pins.

use std::fmt;
use std::sync::Arc;

use crate::table::{PageRange, Shared};
use crate::{Error, PinGuard, Result, UnmapNotice};

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
    /// [`Error::Empty`], [`Error::Misaligned`], [`Error::TooMany`], [`Error::Overflow`]; nothing is pinned then.
    pub fn pin(&self, iova: u64, npages: usize) -> Result<PinGuard> {
        let shared = &self.registration.shared;
        let range = shared.range(iova, npages)?;
        shared.add(self.registration.id, range);
        Ok(PinGuard::new(self.registration.clone(), range))
    }

    /// Releases one pin of each page that was left to this access with [`PinGuard::keep`].
    ///
    /// # Errors
    ///
    /// As [`Access::pin`]; [`Error::NotPinned`] where this access kept no pin on one of the pages.
    /// Nothing is released then: pins of others and of living guards are never touched.
    pub fn unpin(&self, iova: u64, npages: usize) -> Result<()> {
        let registration = &self.registration;
        let range = registration.shared.range(iova, npages)?;
        registration
            .shared
            .release_kept(registration.id, range)
            .map_err(|iova| Error::NotPinned {
                id: registration.id.0,
                name: registration.name.clone(),
                iova,
            })
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
    pub(crate) fn release(&self, range: PageRange) {
        self.shared.release(self.id, range);
    }

    pub(crate) fn keep(&self, range: PageRange) {
        self.shared.keep(self.id, range);
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

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pinned pages: memory somebody keeps using across calls, and is told about before it goes.

use std::fmt;
use std::sync::Arc;

use page_pin::{Access, Interest, PinGuard, PinPages, UnmapNotice};
use vm_memory::{Permissions, VolatileSlice};

use crate::dirty::{mark_pinned, DirtySlice};
use crate::mapping::{Mapping, Need};
use crate::range::page_size;
use crate::space::View;
use crate::table::Table;
use crate::{Error, IoAddressSpace, Result};

/// A registered owner of pins in an [`IoAddressSpace`].
///
/// Its notice is called before a mapping in which it has pins is unmapped (or more often, as its
/// [`Interest`] says), with the address and size of the whole mapping; it should drop its pins
/// there. Clones are the same owner.
///
/// ```
/// use std::sync::{Arc, Mutex};
/// use iommu_type1::{Backing, Interest, IoAddressSpace, PinnedPages};
/// use vm_memory::{Bytes, Permissions};
///
/// let space = IoAddressSpace::new();
/// space.map(0x4000, Backing::anonymous(0x1_0000)?, Permissions::ReadWrite)?;
///
/// let cache: Arc<Mutex<Vec<PinnedPages>>> = Arc::default();
/// let notified = cache.clone();
/// let pinner = space.pinner("vgpu0", Interest::Holder, Arc::new(move |_iova, _size| {
///     notified.lock().unwrap().clear();
/// }));
/// let pinned = pinner.pin_pages(0x5000, 1, Permissions::ReadWrite)?;
/// pinned.page(0).unwrap().write_slice(b"held across calls", 0).unwrap();
/// cache.lock().unwrap().push(pinned);
///
/// assert_eq!(space.unmap(0x4000, 0x1_0000)?, 0x1_0000);
/// # Ok::<(), iommu_type1::Error>(())
/// ```
#[derive(Clone)]
pub struct Pinner {
    // Dropped first: the owner that the view keeps may wait until kept pins are gone.
    access: Access,
    view: Arc<View>,
}

impl IoAddressSpace {
    /// Registers an owner of pins under a name that appears in errors.
    pub fn pinner(&self, name: &str, interest: Interest, notice: Arc<dyn UnmapNotice>) -> Pinner {
        Pinner {
            access: self.view.space.pins.register(name, interest, notice),
            view: self.view.clone(),
        }
    }

    /// The most pages one call may pin or unpin: 512 of 4 KiB.
    pub fn max_pin_pages(&self) -> usize {
        self.view.space.pins.max_pages()
    }
}

impl Pinner {
    /// Pins `npages` host pages from `iova`, all of them or none.
    ///
    /// # Errors
    ///
    /// [`Error::Pin`]: no pages or a misaligned address (EINVAL), more pages than one call may
    /// take (E2BIG), beyond the 64-bit space (EOVERFLOW). Otherwise as an access:
    /// [`Error::NotMapped`] (EINVAL), [`Error::Revoked`] (EBUSY), [`Error::Permission`] (EPERM).
    pub fn pin_pages(&self, iova: u64, npages: usize, prot: Permissions) -> Result<PinnedPages> {
        let space = &self.view.space;
        space.pins.check(iova, npages)?;
        let len = npages * page_size() as usize;
        // The pins are made while the access runs: see the invariant of `Space`.
        space.grace.enter_shared(|inside| {
            let mut mappings = Vec::new();
            space.for_each_chunk(
                inside,
                iova,
                len,
                Need::exactly(prot),
                |mapping, _, _, _| {
                    mappings.push(Table::share(mapping));
                },
            )?;
            let guard = self.access.pin(iova, npages)?;
            // After they are pinned: whoever takes dirty pages then finds the mark or the pin.
            mark_pinned(space, &mappings, iova, len);
            Ok(PinnedPages {
                guard,
                mappings,
                view: self.view.clone(),
            })
        })
    }

    /// Releases pins that were left to this owner with [`PinnedPages::keep`].
    ///
    /// # Errors
    ///
    /// [`Error::Pin`] (EINVAL, E2BIG, EOVERFLOW): the range is bad, or this owner has kept no pin
    /// on one of the pages; nothing is released then. What others pinned is never touched.
    pub fn unpin_pages(&self, iova: u64, npages: usize) -> Result<()> {
        Ok(self.access.unpin(iova, npages)?)
    }
}

impl PinPages for Pinner {
    type Pinned = PinnedPages;
    type Error = Error;

    fn pin_pages(&self, iova: u64, npages: usize, prot: Permissions) -> Result<PinnedPages> {
        self.pin_pages(iova, npages, prot)
    }
}

impl fmt::Debug for Pinner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pinner")
            .field("name", &self.access.name())
            .field("id", &self.access.id())
            .finish_non_exhaustive()
    }
}

/// Pinned pages; dropping it unpins them.
///
/// Each page is host memory of its own: pages next to each other in IOVAs need not be so here.
#[must_use = "dropping it unpins the pages"]
pub struct PinnedPages {
    /// The mappings that the pages lie in, in order. Dropped before the pins: an unmap that these have
    /// kept waiting has the last reference.
    mappings: Vec<Arc<Mapping>>,
    // Dropped before the view: the pins go while the space is certainly there.
    guard: PinGuard,
    view: Arc<View>,
}

impl PinnedPages {
    /// First I/O virtual address.
    pub fn iova(&self) -> u64 {
        self.guard.iova()
    }

    /// Number of pages.
    pub fn npages(&self) -> usize {
        self.guard.npages()
    }

    /// The memory of page `index`; `None` behind the last.
    ///
    /// Pages pinned for [`Permissions::Read`] must only be read.
    pub fn page(&self, index: usize) -> Option<VolatileSlice<'_, DirtySlice<'_>>> {
        if index >= self.npages() {
            return None;
        }
        let page_size = page_size();
        let iova = self.iova() + index as u64 * page_size;
        let mapping = self
            .mappings
            .iter()
            .find(|mapping| mapping.range.contains(iova))?;
        Some(mapping.slice(iova, page_size as usize))
    }

    /// Leaves the pins to the [`Pinner`] that made them, until [`Pinner::unpin_pages`] or until the
    /// pinner and all its other pins are gone. Host addresses taken before must not be used then.
    pub fn keep(self) {
        self.guard.keep();
    }
}

impl fmt::Debug for PinnedPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PinnedPages")
            .field("iova", &self.iova())
            .field("npages", &self.npages())
            .field("view", &self.view)
            .finish_non_exhaustive()
    }
}

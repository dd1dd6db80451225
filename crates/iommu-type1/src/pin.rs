// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pinned pages: memory somebody keeps using across calls, and is told about before it goes.

use std::fmt;
use std::sync::Arc;

use page_pin::{Interest, PinGuard, PinPages, UnmapNotice};
use vm_memory::{Permissions, VolatileSlice};

use crate::attach::{Attachment, Owner};
use crate::dirty::{mark_pinned, DirtySlice};
use crate::grace::Inside;
use crate::mapping::{Mapping, Need};
use crate::memory;
use crate::range::{page_size, IovaRange};
use crate::space::View;
use crate::table::Table;
use crate::{Error, IoAddressSpace, Result, Transfer};

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
    pub(crate) owner: Arc<Owner>,
}

impl IoAddressSpace {
    /// Registers an owner of pins under a name that appears in errors.
    pub fn pinner(&self, name: &str, interest: Interest, notice: Arc<dyn UnmapNotice>) -> Pinner {
        Pinner {
            owner: Arc::new(Owner::new(&self.view, name, interest, notice)),
        }
    }

    /// The most pages one call may pin or unpin: 512 of 4 KiB unless told otherwise.
    pub fn max_pin_pages(&self) -> usize {
        self.view.space.pins.max_pages()
    }
}

impl Pinner {
    /// Pins `npages` host pages from `iova`, all of them or none.
    ///
    /// # Errors
    ///
    /// [`Error::NotAttached`] (ENOENT), where the range is right in itself. [`Error::Pin`]: no pages (EINVAL), more pages than one call may take
    /// (E2BIG); [`Error::NoPins`] (EACCES) by the rules of type1 v1; [`Error::Pin`] of a misaligned address
    /// (EINVAL) or beyond the 64-bit space (EOVERFLOW). Otherwise as an access: [`Error::NotMapped`] (EINVAL), [`Error::Revoked`] (EBUSY), [`Error::Permission`] (EPERM). At last
    /// [`Error::Pin`] with what the account says (ENOMEM for a limit).
    pub fn pin_pages(&self, iova: u64, npages: usize, prot: Permissions) -> Result<PinnedPages> {
        let at = self.attached_for(iova, (npages as u64).saturating_mul(page_size()))?;
        at.check(at.view.space.pins.check(iova, npages))?;
        // All addresses are one byte more than this can say.
        let len = npages.saturating_mul(page_size() as usize);
        let pin = |mappings: &[Arc<Mapping>]| {
            let host = |iova| host_address(mappings, iova);
            Ok(at.access.pin_at(iova, npages, host)?)
        };
        at.pin(
            |inside, mappings| at.find(inside, iova, len, prot, mappings),
            pin,
        )
    }

    /// Pins the host pages at these addresses, which may lie anywhere, all of them or none. A page that
    /// is named twice is pinned twice.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use iommu_type1::{page_size, Backing, Interest, IoAddressSpace};
    /// use vm_memory::Permissions::Read;
    ///
    /// let space = IoAddressSpace::new();
    /// space.map(0, Backing::anonymous(0x10 * page_size() as usize)?, Read)?;
    /// let pinner = space.pinner("disk", Interest::Holder, Arc::new(|_, _| ()));
    /// let pinned = pinner.pin_list(&[3 * page_size(), 0], Read)?;
    /// assert_eq!(pinned.iova_of(0), Some(3 * page_size()));
    /// # Ok::<(), iommu_type1::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`pin_pages`](Pinner::pin_pages), with the address of the first page that is refused.
    pub fn pin_list(&self, iovas: &[u64], prot: Permissions) -> Result<PinnedPages> {
        let at = self.owner.attached()?;
        at.check(at.view.space.pins.check_list(iovas))?;
        let find = |inside: Inside<'_>, mappings: &mut Vec<Arc<Mapping>>| {
            let len = page_size() as usize;
            for iova in iovas {
                at.find(inside, *iova, len, prot, mappings)?;
            }
            mappings.sort_unstable_by_key(|mapping| mapping.range.first);
            mappings.dedup_by(|one, other| Arc::ptr_eq(one, other));
            Ok(())
        };
        at.pin(find, |mappings| {
            let host = |iova| host_address(mappings, iova);
            Ok(at.access.pin_list_at(iovas, host)?)
        })
    }

    /// Releases pins that were left to this owner with [`PinnedPages::keep`].
    ///
    /// # Errors
    ///
    /// [`Error::NotAttached`] (ENOENT). [`Error::Pin`] (EINVAL, E2BIG, EOVERFLOW): the range is bad, or
    /// this owner has kept no pin on one of the pages, or not on exactly these where
    /// [`PinOptions::exact_unpin`](page_pin::PinOptions::exact_unpin) asks for that; nothing is released
    /// then. What others pinned is never touched.
    pub fn unpin_pages(&self, iova: u64, npages: usize) -> Result<()> {
        let at = self.owner.attached_or_moving()?;
        Ok(at.access.unpin(iova, npages)?)
    }

    /// As [`unpin_pages`](Pinner::unpin_pages) of pages that may lie anywhere.
    ///
    /// # Errors
    ///
    /// As [`unpin_pages`](Pinner::unpin_pages).
    pub fn unpin_list(&self, iovas: &[u64]) -> Result<()> {
        let at = self.owner.attached_or_moving()?;
        Ok(at.access.unpin_list(iovas)?)
    }

    /// An access of the space that this owner is attached to.
    ///
    /// # Errors
    ///
    /// [`Error::NotAttached`] (ENOENT), where the range is right in itself; otherwise as
    /// [`IoAddressSpace::dma_rw`].
    pub fn dma_rw(&self, iova: u64, transfer: Transfer<'_>) -> Result<()> {
        let len = match &transfer {
            Transfer::Read(buf) => buf.len(),
            Transfer::Write(buf) => buf.len(),
        };
        let at = self.attached_for(iova, len as u64)?;
        let space = &at.view.space;
        space.grace.enter_shared(|inside| {
            // Whoever closes it waits for accesses that run, so this is asked inside.
            if !at.access.is_open() {
                return Err(self.owner.not_attached());
            }
            space.dma_rw(inside, iova, transfer)
        })
    }

    /// Where it is attached. What is wrong with a range is said before that there is no space to look in.
    fn attached_for(&self, iova: u64, len: u64) -> Result<Arc<Attachment>> {
        self.owner.attached().or_else(|detached| {
            IovaRange::new(iova, len)?;
            Err(detached)
        })
    }
}

impl Attachment {
    /// What is wrong with pages that should be pinned: how many they are is looked at before the rules of the
    /// space, as in the kernel, where their addresses are the business of these.
    fn check(&self, pages: page_pin::Result<()>) -> Result<()> {
        match pages {
            Err(error @ (page_pin::Error::Empty { .. } | page_pin::Error::TooMany { .. })) => {
                Err(error.into())
            }
            _ if !self.view.space.rules.pins => Err(Error::NoPins),
            pages => Ok(pages?),
        }
    }

    /// The pins are made while the access runs: see the invariant of `Space`.
    fn pin(
        &self,
        find: impl FnOnce(Inside<'_>, &mut Vec<Arc<Mapping>>) -> Result<()>,
        pin: impl FnOnce(&[Arc<Mapping>]) -> Result<PinGuard>,
    ) -> Result<PinnedPages> {
        let space = &self.view.space;
        space.grace.enter_shared(|inside| {
            let mut mappings = Vec::new();
            find(inside, &mut mappings)?;
            let guard = pin(&mappings)?;
            // After they are pinned: whoever takes dirty pages then finds the mark or the pin.
            for iova in (0..guard.npages()).filter_map(|index| guard.iova_of(index)) {
                if let Some(mapping) = mapping_of(&mappings, iova) {
                    mark_pinned(space, mapping, iova);
                }
            }
            Ok(PinnedPages {
                guard,
                mappings,
                view: self.view.clone(),
            })
        })
    }

    /// The mappings of a range, behind those that were found before.
    fn find(
        &self,
        inside: Inside<'_>,
        iova: u64,
        len: usize,
        prot: Permissions,
        found: &mut Vec<Arc<Mapping>>,
    ) -> Result<()> {
        let (space, need) = (&self.view.space, Need::exactly(prot));
        let mut noted = Ok(());
        space.for_each_chunk(inside, iova, len, need, |mapping, _, _, _| {
            if noted.is_ok() {
                noted = memory::push(found, Table::share(mapping));
            }
        })?;
        noted
    }
}

/// The mapping of an address, of some in ascending order.
fn mapping_of(mappings: &[Arc<Mapping>], iova: u64) -> Option<&Arc<Mapping>> {
    let behind = mappings.partition_point(|mapping| mapping.range.first <= iova);
    let mapping = mappings.get(behind.checked_sub(1)?)?;
    mapping.range.contains(iova).then_some(mapping)
}

fn host_address(mappings: &[Arc<Mapping>], iova: u64) -> Option<usize> {
    let slice = mapping_of(mappings, iova)?.slice(iova, 1);
    Some(slice.ptr_guard().as_ptr().addr())
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
        let attached = self.owner.attached_or_moving().ok();
        f.debug_struct("Pinner")
            .field("name", &self.owner.name)
            .field("id", &attached.map(|at| at.access.id()))
            .finish_non_exhaustive()
    }
}

/// Pinned pages; dropping it unpins them.
///
/// Each page is host memory of its own: pages next to each other in IOVAs need not be so here.
#[must_use = "dropping it unpins the pages"]
pub struct PinnedPages {
    /// The mappings that the pages lie in, in ascending order. Dropped before the pins: an unmap that these have
    /// kept waiting has the last reference.
    mappings: Vec<Arc<Mapping>>,
    // Dropped before the view: the pins go while the space is certainly there.
    guard: PinGuard,
    view: Arc<View>,
}

impl PinnedPages {
    /// I/O virtual address of the first page.
    pub fn iova(&self) -> u64 {
        self.guard.iova()
    }

    /// I/O virtual address of page `index`; `None` behind the last.
    pub fn iova_of(&self, index: usize) -> Option<u64> {
        self.guard.iova_of(index)
    }

    /// Number of pages, those named twice counted twice.
    pub fn npages(&self) -> usize {
        self.guard.npages()
    }

    /// The memory of page `index`; `None` behind the last.
    ///
    /// Pages pinned for [`Permissions::Read`] must only be read.
    pub fn page(&self, index: usize) -> Option<VolatileSlice<'_, DirtySlice<'_>>> {
        let iova = self.iova_of(index)?;
        let mapping = mapping_of(&self.mappings, iova)?;
        Some(mapping.slice(iova, page_size() as usize))
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

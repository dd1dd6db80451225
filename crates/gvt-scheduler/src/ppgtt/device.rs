// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where a device reaches the pages that are pinned for it.

use std::fmt;
use std::sync::Arc;

use crate::error::Cause;

/// Gives pinned guest pages an address for the device, as `dma_map_page` does in the kernel.
///
/// `()` gives them their guest address: for engines that reach guest memory through the vGPU. An engine
/// that is a real device behind an IOMMU of its own has another one, in place by
/// [`Vgpu::set_device_map`](crate::Vgpu::set_device_map).
///
/// ```
/// use gvt_scheduler::{Cause, DeviceMap};
///
/// /// The device sees guest memory from 4 GiB on.
/// struct Shifted;
///
/// impl<G> DeviceMap<G> for Shifted {
///     fn map(&self, gfn: u64, _pages: usize, _pinned: &G) -> Result<u64, Cause> {
///         Ok((gfn << 12) + (4 << 30))
///     }
///
///     fn unmap(&self, _address: u64, _pages: usize) {}
/// }
/// assert_eq!(Shifted.map(5, 1, &()).unwrap(), 0x1_0000_5000);
/// ```
pub trait DeviceMap<G> {
    /// Maps `pages` pages of 4 KiB from guest frame `gfn`, held by `pinned`, contiguously; gives the address of
    /// the first. 512 pages that cannot be mapped are tried one by one.
    ///
    /// # Errors
    ///
    /// Why they could not be mapped: the source of [`Error::LeafPin`](crate::Error::LeafPin) (ENXIO).
    fn map(&self, gfn: u64, pages: usize, pinned: &G) -> Result<u64, Cause>;

    /// Takes back what [`map`](Self::map) gave. The pages are unpinned when this has returned.
    fn unmap(&self, address: u64, pages: usize);
}

impl<G> DeviceMap<G> for () {
    fn map(&self, gfn: u64, _: usize, _: &G) -> Result<u64, Cause> {
        Ok(gfn << 12)
    }

    fn unmap(&self, _: u64, _: usize) {}
}

pub(crate) type SharedMap<G> = Arc<dyn DeviceMap<G> + Send + Sync>;

/// Pages that are pinned and mapped; dropping it unmaps them, then unpins them.
pub(super) struct Mapping<G> {
    pub(super) address: u64,
    pages: usize,
    map: SharedMap<G>,
    _pinned: G,
}

impl<G> Mapping<G> {
    pub(super) fn new(
        map: &SharedMap<G>,
        gfn: u64,
        pages: usize,
        pinned: G,
    ) -> Result<Self, Cause> {
        Ok(Self {
            address: map.map(gfn, pages, &pinned)?,
            pages,
            map: map.clone(),
            _pinned: pinned,
        })
    }

    pub(super) fn contains(&self, address: u64) -> bool {
        let offset = address.checked_sub(self.address);
        offset.is_some_and(|offset| offset < (self.pages as u64) << 12)
    }
}

impl<G> Drop for Mapping<G> {
    fn drop(&mut self) {
        self.map.unmap(self.address, self.pages);
    }
}

impl<G> fmt::Debug for Mapping<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapping")
            .field("address", &self.address)
            .field("pages", &self.pages)
            .finish_non_exhaustive()
    }
}

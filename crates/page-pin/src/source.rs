// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The trait that others pin through.

use std::convert::Infallible;
use std::sync::Arc;

use vm_memory::Permissions;

/// Something through which guest pages can be pinned by their I/O virtual address.
///
/// A device model takes this instead of an address space, so that it can be used over any. `()`
/// pins nothing: for memory that is never unmapped.
///
/// ```
/// use page_pin::PinPages;
/// use vm_memory::Permissions;
///
/// fn hold_page<P: PinPages>(pins: &P, iova: u64) -> Result<P::Pinned, P::Error> {
///     pins.pin_pages(iova, 1, Permissions::ReadWrite)
/// }
/// assert!(hold_page(&(), 0x1000).is_ok());
/// ```
pub trait PinPages {
    /// The pinned pages; dropping it unpins them.
    type Pinned: Send + 'static;
    /// Why pages could not be pinned.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Pins `npages` pages from `iova` for `prot`, all of them or none.
    ///
    /// # Errors
    ///
    /// Why they could not be pinned.
    fn pin_pages(
        &self,
        iova: u64,
        npages: usize,
        prot: Permissions,
    ) -> std::result::Result<Self::Pinned, Self::Error>;
}

impl PinPages for () {
    type Pinned = ();
    type Error = Infallible;

    fn pin_pages(&self, _: u64, _: usize, _: Permissions) -> std::result::Result<(), Infallible> {
        Ok(())
    }
}

/// Whoever shares it with others pins through it as well.
///
/// ```
/// use std::sync::Arc;
/// use page_pin::PinPages;
/// use vm_memory::Permissions;
///
/// fn hold_page<P: PinPages>(pins: P, iova: u64) -> Result<P::Pinned, P::Error> {
///     pins.pin_pages(iova, 1, Permissions::ReadWrite)
/// }
/// let shared = Arc::new(());
/// assert!(hold_page(shared.clone(), 0x1000).is_ok());
/// assert!(hold_page(&*shared, 0x1000).is_ok());
/// ```
impl<P: PinPages + ?Sized> PinPages for Arc<P> {
    type Pinned = P::Pinned;
    type Error = P::Error;

    fn pin_pages(
        &self,
        iova: u64,
        npages: usize,
        prot: Permissions,
    ) -> std::result::Result<Self::Pinned, Self::Error> {
        (**self).pin_pages(iova, npages, prot)
    }
}

impl<P: PinPages + ?Sized> PinPages for &P {
    type Pinned = P::Pinned;
    type Error = P::Error;

    fn pin_pages(
        &self,
        iova: u64,
        npages: usize,
        prot: Permissions,
    ) -> std::result::Result<Self::Pinned, Self::Error> {
        (**self).pin_pages(iova, npages, prot)
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Marking written memory dirty, as vm-memory's slices ask for it.

use std::fmt;

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

use crate::backing::Region;

/// The [`Bitmap`] of a [`DmaMemory`](crate::DmaMemory): a write through an IOVA is marked in the
/// bitmap of the memory region behind it, so that a VMM that logs dirty pages there sees DMA too.
///
/// The IOVA space has no single flat bitmap; this type marks nothing by itself, its slices do.
#[derive(Clone, Copy, Debug)]
pub struct Dirty(());

/// The part of a region's bitmap that belongs to one slice.
#[derive(Clone, Copy)]
pub struct DirtySlice<'a> {
    /// `None` where nobody tracks.
    region: Option<&'a dyn Region>,
    offset: usize,
}

impl<'a> DirtySlice<'a> {
    pub(crate) const NONE: DirtySlice<'static> = DirtySlice {
        region: None,
        offset: 0,
    };

    pub(crate) fn new(region: &'a dyn Region, offset: usize) -> Self {
        DirtySlice {
            region: Some(region),
            offset,
        }
    }
}

impl fmt::Debug for DirtySlice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtySlice")
            .field("offset", &self.offset)
            .finish_non_exhaustive()
    }
}

impl<'a> WithBitmapSlice<'a> for Dirty {
    type S = DirtySlice<'a>;
}

impl Bitmap for Dirty {
    fn mark_dirty(&self, _offset: usize, _len: usize) {}

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, _offset: usize) -> DirtySlice<'_> {
        DirtySlice::NONE
    }
}

impl<'a> WithBitmapSlice<'_> for DirtySlice<'a> {
    type S = DirtySlice<'a>;
}

impl BitmapSlice for DirtySlice<'_> {}

impl Bitmap for DirtySlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if let Some(region) = self.region {
            // Offsets come from slices inside the region, so the sum cannot wrap.
            region.mark_dirty(self.offset.wrapping_add(offset), len);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.region
            .is_some_and(|region| region.dirty_at(self.offset.wrapping_add(offset)))
    }

    fn slice_at(&self, offset: usize) -> Self {
        DirtySlice {
            region: self.region,
            offset: self.offset.wrapping_add(offset),
        }
    }
}

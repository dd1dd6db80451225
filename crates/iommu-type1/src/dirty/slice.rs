// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Marking written memory dirty, as vm-memory's slices ask for it.

use std::fmt;

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

use crate::mapping::Mapping;

/// The [`Bitmap`] of a [`DmaMemory`](crate::DmaMemory): a write through an IOVA is marked by its
/// I/O virtual page, while that is tracked
/// ([`start_dirty_tracking`](crate::IoAddressSpace::start_dirty_tracking)), and in the bitmap of the
/// memory region behind it, so that a VMM that logs dirty pages there sees DMA too.
///
/// The IOVA space has no single flat bitmap; this type marks nothing by itself, its slices do.
#[derive(Clone, Copy, Debug)]
pub struct Dirty(());

/// The part of the marks that belongs to one slice.
#[derive(Clone, Copy)]
pub struct DirtySlice<'a> {
    /// `None` of no memory at all.
    mapping: Option<&'a Mapping>,
    offset: usize,
}

impl<'a> DirtySlice<'a> {
    #[inline]
    pub(crate) fn new(mapping: &'a Mapping, offset: usize) -> Self {
        DirtySlice {
            mapping: Some(mapping),
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
        DirtySlice {
            mapping: None,
            offset: 0,
        }
    }
}

impl<'a> WithBitmapSlice<'_> for DirtySlice<'a> {
    type S = DirtySlice<'a>;
}

impl BitmapSlice for DirtySlice<'_> {}

impl Bitmap for DirtySlice<'_> {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        if let Some(mapping) = self.mapping.filter(|mapping| mapping.wants_marks()) {
            // Offsets come from slices inside the mapping, so the sum cannot wrap.
            mapping.mark_lent(self.offset.wrapping_add(offset), len);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.mapping
            .is_some_and(|mapping| mapping.dirty_at(self.offset.wrapping_add(offset)))
    }

    fn slice_at(&self, offset: usize) -> Self {
        DirtySlice {
            mapping: self.mapping,
            offset: self.offset.wrapping_add(offset),
        }
    }
}

/// The marks of memory in the hands of an access that runs.
#[derive(Clone, Copy)]
pub(crate) struct InlineMarks<'a> {
    /// `None` where nobody wants any.
    mapping: Option<&'a Mapping>,
    offset: usize,
}

impl<'a> InlineMarks<'a> {
    pub(crate) const NONE: InlineMarks<'static> = InlineMarks {
        mapping: None,
        offset: 0,
    };

    #[inline]
    pub(crate) fn new(mapping: &'a Mapping, offset: usize) -> Self {
        InlineMarks {
            mapping: Some(mapping),
            offset,
        }
    }
}

impl fmt::Debug for InlineMarks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InlineMarks").finish_non_exhaustive()
    }
}

impl<'a> WithBitmapSlice<'_> for InlineMarks<'a> {
    type S = InlineMarks<'a>;
}

impl BitmapSlice for InlineMarks<'_> {}

impl Bitmap for InlineMarks<'_> {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        if let Some(mapping) = self.mapping.filter(|mapping| mapping.wants_marks()) {
            // Accesses mark what they have written, which lies in the mapping.
            mapping.mark_inline(self.offset + offset, len);
        }
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, offset: usize) -> Self {
        InlineMarks {
            mapping: self.mapping,
            offset: self.offset + offset,
        }
    }
}

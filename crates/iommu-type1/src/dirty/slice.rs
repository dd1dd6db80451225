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

    fn dirty_at(&self, offset: usize) -> bool {
        self.mapping
            .is_some_and(|mapping| mapping.dirty_at(self.offset + offset))
    }

    fn slice_at(&self, offset: usize) -> Self {
        InlineMarks {
            mapping: self.mapping,
            offset: self.offset + offset,
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use vm_memory::Permissions;

    use super::*;
    use crate::mapping_set::SetId;
    use crate::range::{page_size, IovaRange};
    use crate::{Backing, PermissionPolicy};

    const PAGES: usize = 8;

    fn mapping() -> Mapping {
        let size = PAGES * page_size() as usize;
        let range = IovaRange {
            first: 0,
            last: size as u64 - 1,
        };
        let backing = Backing::anonymous(size).unwrap();
        let policy = PermissionPolicy::Strict;
        let mapping = Mapping::new(range, Permissions::ReadWrite, backing, policy, SetId::NONE);
        mapping.dirty.start(PAGES).unwrap();
        mapping
    }

    /// Parts of parts of what begins in page 2: the marks stand where all their offsets together say.
    fn marks_where_its_offsets_lead<'a, B: BitmapSlice>(
        of: impl FnOnce(&'a Mapping, usize) -> B,
        mapping: &'a Mapping,
    ) {
        let p = page_size() as usize;
        let part = of(mapping, 2 * p).slice_at(p).slice_at(p - 1);
        part.mark_dirty(p, p + 2);
        for page in 0..PAGES {
            let marked = (4..7).contains(&page);
            assert_eq!(mapping.dirty_at(page * p), marked, "page {page}");
            if let Some(offset) = (page * p).checked_sub(4 * p - 1) {
                assert_eq!(part.dirty_at(offset), marked, "page {page}");
            }
        }
    }

    #[test]
    fn parts_of_parts_mark_where_their_offsets_lead() {
        marks_where_its_offsets_lead(DirtySlice::new, &mapping());
        marks_where_its_offsets_lead(InlineMarks::new, &mapping());
    }

    #[test]
    fn nothing_is_marked_by_the_whole_space_itself() {
        let space = Dirty(());
        space.mark_dirty(0, 1);
        assert!(!space.dirty_at(0));
        space.slice_at(0).mark_dirty(0, 1);
        assert!(!space.slice_at(0).dirty_at(0));
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Dirty pages by I/O virtual address: which were written since they were last asked for.

mod bitmap;
mod log;
mod slice;

use std::ops::ControlFlow;
use std::sync::Arc;

use checked_sync::lock;
use vm_memory::Permissions;

use crate::check::whole_pages;
use crate::deadline::Deadline;
use crate::map::check_log_bytes;
use crate::mapping::{Mapping, Need};
use crate::memory;
use crate::range::{page_shift, page_size, IovaRange};
use crate::space::Space;
use crate::unmap::inside;
use crate::writer::Writer;
use crate::{Error, IoAddressSpace, Result};

pub use bitmap::DirtyBitmap;
pub(crate) use log::DirtyLog;
pub(crate) use slice::InlineMarks;
pub use slice::{Dirty, DirtySlice};

/// Most pages of a mapping whose dirty pages are kept.
const DIRTY_MAPPING_PAGES: u64 = i32::MAX as u64;

impl IoAddressSpace {
    /// Begins to keep which pages are written through the space, none of them yet but those that are
    /// pinned; nothing is done where that is kept already.
    ///
    /// Every write that begins after this has returned is marked. Of those that were running, inline ones
    /// mark their bytes or have them in memory by then. Whoever writes through a slice that was lent
    /// before, at this very moment, may do neither: take slices again, or look at what is leased twice.
    ///
    /// ```
    /// use iommu_type1::{Backing, IoAddressSpace};
    /// use vm_memory::Permissions;
    ///
    /// let space = IoAddressSpace::new();
    /// space.map(0x10_0000, Backing::anonymous(0x8000)?, Permissions::ReadWrite)?;
    /// space.start_dirty_tracking()?;
    ///
    /// space.write(0x10_0fff, &[1, 2])?;
    /// let dirty = space.take_dirty(0x10_0000, 0x8000)?;
    /// assert!(dirty.iter().eq([0x10_0000, 0x10_1000]));
    /// assert!(space.take_dirty(0x10_0000, 0x8000)?.is_empty());
    /// # Ok::<(), iommu_type1::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::NoDirtyPages`] (EACCES): a space by the rules of type1 v1 keeps none.
    /// [`Error::DirtyMapping`] (EINVAL): a mapping has more than 2^31 - 1 pages; nothing is tracked.
    /// [`Error::DirtyLimit`] (ENOSPC): there are more pages than may be kept; nothing is tracked.
    /// [`Error::NoMemory`] (ENOMEM): the same.
    /// [`Error::AccessRuns`] (EBUSY): an access that began before did not end within the space's
    /// deadline for unmaps, or the kernel refuses a barrier
    /// ([`ReaderBarrier::Membarrier`](crate::ReaderBarrier::Membarrier)); what is written by it may not be
    /// marked. Tracking has begun; starting it again waits again.
    pub fn start_dirty_tracking(&self) -> Result<()> {
        let space = &*self.view.space;
        if !space.rules.dirty_pages {
            return Err(Error::NoDirtyPages);
        }
        let mut writer = lock(&space.writer);
        if !writer.tracking {
            let mut bytes = 0;
            let mut countable = Ok(());
            for_each(&writer, space, |mapping, _| {
                bytes += mapping.log_bytes();
                if countable.is_ok() {
                    countable = check_pages(mapping.range);
                }
            });
            countable?;
            check_log_bytes(bytes, space.log_limit)?;
            let mut started = Ok(());
            for_each(&writer, space, |mapping, _| {
                if started.is_ok() {
                    started = mapping.dirty.start(mapping.pages());
                }
            });
            if started.is_err() {
                for_each(&writer, space, |mapping, _| mapping.dirty.stop());
            }
            started?;
            writer.log_bytes = bytes;
            writer.tracking = true;
            for_each(&writer, space, |mapping, is_live| {
                mark_what_is_pinned(space, mapping);
                if is_live {
                    space.table.refresh(mapping);
                }
            });
        }
        drop(writer);
        // Also for whoever finds that it is tracked: somebody else may not have come so far yet.
        settle(space)
    }

    /// Keeps no longer which pages are written, and forgets which were; nothing is done where that is not
    /// kept.
    pub fn stop_dirty_tracking(&self) {
        let space = &*self.view.space;
        let mut writer = lock(&space.writer);
        if !writer.tracking {
            return;
        }
        writer.tracking = false;
        for_each(&writer, space, |mapping, is_live| {
            mapping.dirty.stop();
            if is_live {
                space.table.refresh(mapping);
            }
        });
    }

    /// The pages of `size` bytes from `iova` that were written since tracking began or since they were
    /// last taken. What was written to them is in memory when this returns.
    ///
    /// Slices of guards and lists count from the time they are written through. Pages that are pinned count
    /// each time, as in the kernel: who has pinned them says nothing. Otherwise, what is written by host
    /// address or by hardware is known from [`mark_dirty`](IoAddressSpace::mark_dirty) only. The marks of a
    /// mapping go with it, or to [`unmap_dirty`](IoAddressSpace::unmap_dirty).
    ///
    /// # Errors
    ///
    /// [`Error::Misaligned`] or [`Error::Empty`] (EINVAL), [`Error::Overflow`] (EOVERFLOW),
    /// [`Error::NotTracking`] (EINVAL), [`Error::Bisect`] (EINVAL: the range ends inside a mapping),
    /// [`Error::AccessRuns`] (EBUSY) as in
    /// [`start_dirty_tracking`](IoAddressSpace::start_dirty_tracking): nothing was taken, try again.
    pub fn take_dirty(&self, iova: u64, size: u64) -> Result<DirtyPages> {
        let space = &*self.view.space;
        let range = whole_pages(space, iova, size)?;
        let _harvest = lock(&space.harvest);
        let writer = lock(&space.writer);
        check_tracking(&writer, range)?;
        let mut mappings = Vec::new();
        inside(&writer, space, range, &mut mappings)?;
        writer.settle_marks(&space.table);
        let leaving = writer.leaving_inside(range);
        memory::extend(
            &mut mappings,
            leaving.map(|leaving| leaving.mapping.clone()),
        )?;
        let mut pages = DirtyPages::default();
        let ranges = mappings.iter().map(|mapping| mapping.range);
        memory::extend(&mut pages.mapped, ranges)?;
        mappings.sort_unstable_by_key(|mapping| mapping.range.first);
        let mut taken = Vec::new();
        let mut noted = Ok(());
        for mapping in &mappings {
            mapping.dirty.take(mapping.pages(), |index, word| {
                if let Err(error) = memory::push(&mut taken, (mapping, index, word)) {
                    mapping.dirty.put_back(index, word);
                    noted = Err(error);
                }
            });
            mark_what_is_pinned(space, mapping);
        }
        drop(writer);
        // Where there was no mark, no access can have relied on one that was taken.
        if !taken.is_empty() || noted.is_err() {
            let room = noted.and_then(|()| memory::reserve(&mut pages.words, taken.len()));
            if let Err(error) = room.and_then(|()| settle(space)) {
                for (mapping, index, marks) in taken {
                    mapping.dirty.put_back(index, marks);
                }
                // What was taken from a mapping that has lost or got its memory meanwhile goes to the one
                // that has its addresses now.
                let writer = lock(&space.writer);
                for mapping in &mappings {
                    writer.move_marks(&space.table, mapping);
                }
                return Err(error);
            }
        }
        for (mapping, index, marks) in taken {
            pages.words.push(word(mapping, index, marks));
        }
        Ok(pages)
    }

    /// As [`take_dirty`](IoAddressSpace::take_dirty) of the range of a bitmap, into that bitmap.
    ///
    /// # Errors
    ///
    /// [`Error::BitmapPageSize`] (EINVAL): a bit does not stand for the smallest size of pages of the space.
    /// Otherwise as [`take_dirty`](IoAddressSpace::take_dirty).
    pub fn take_dirty_bitmap(&self, bitmap: &mut DirtyBitmap<'_>) -> Result<()> {
        check_page_size(&self.view.space, bitmap.page_size())?;
        let pages = self.take_dirty(bitmap.iova(), bitmap.size())?;
        bitmap.fill(&pages);
        Ok(())
    }

    /// Says that `len` bytes from `iova` were written by somebody of whom the space does not know: by host
    /// address, or by hardware. It is said after the bytes are written.
    ///
    /// They are marked for [`take_dirty`](IoAddressSpace::take_dirty), while that is tracked, and in the bitmaps
    /// of the memory regions behind.
    ///
    /// ```
    /// use iommu_type1::{Backing, IoAddressSpace};
    /// use vm_memory::Permissions;
    ///
    /// let space = IoAddressSpace::new();
    /// space.map(0x1000, Backing::anonymous(0x4000)?, Permissions::ReadWrite)?;
    /// space.start_dirty_tracking()?;
    /// space.mark_dirty(0x1fff, 2)?;
    /// assert!(space.take_dirty(0x1000, 0x4000)?.iter().eq([0x1000, 0x2000]));
    /// # Ok::<(), iommu_type1::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Overflow`] (EOVERFLOW) before anything is marked; [`Error::NotMapped`] (EINVAL),
    /// [`Error::Revoked`] (EBUSY), or [`Error::Permission`] (EPERM) where nobody may write, with the bytes
    /// marked before.
    pub fn mark_dirty(&self, iova: u64, len: usize) -> Result<()> {
        let space = &*self.view.space;
        let need = Need::exactly(Permissions::Write);
        space.grace.enter_shared(|inside| {
            space.for_each_chunk(inside, iova, len, need, |mapping, at, n, _| {
                // The bytes come before this access, for which whoever takes a mark waits.
                mapping.mark_inline((at - mapping.range.first) as usize, n);
            })
        })
    }
}

/// Marks a page of a mapping that has just been pinned.
pub(crate) fn mark_pinned(space: &Space, mapping: &Mapping, iova: u64) {
    if space.rules.pinned_is_dirty {
        mapping
            .dirty
            .mark_lent((iova - mapping.range.first) as usize, 1);
    }
}

/// Marks what is pinned of a mapping: who has pinned a page may write it at any time, and says nothing.
pub(crate) fn mark_what_is_pinned(space: &Space, mapping: &Mapping) {
    if !space.rules.pinned_is_dirty {
        return;
    }
    let range = mapping.range;
    let pins = &space.pins;
    pins.for_each_pinned(range.first, range.size(), |iova| {
        mapping.dirty.mark_lent((iova - range.first) as usize, 1);
    });
}

/// Refuses a mapping of more pages than the kernel counts in a bitmap.
pub(crate) fn check_pages(range: IovaRange) -> Result<()> {
    let pages = (range.last - range.first) / page_size() + 1;
    if pages > DIRTY_MAPPING_PAGES {
        return Err(Error::DirtyMapping {
            iova: range.first,
            pages,
            limit: DIRTY_MAPPING_PAGES,
        });
    }
    Ok(())
}

/// Refuses a range whose dirty pages nobody keeps.
pub(crate) fn check_tracking(writer: &Writer, range: IovaRange) -> Result<()> {
    if writer.tracking {
        return Ok(());
    }
    Err(Error::NotTracking {
        iova: range.first,
        size: range.size(),
    })
}

/// Refuses a bitmap whose bits do not stand for the smallest size of pages.
pub(crate) fn check_page_size(space: &Space, page_size: u64) -> Result<()> {
    let unit = space.unit();
    if page_size == unit {
        return Ok(());
    }
    Err(Error::BitmapPageSize { page_size, unit })
}

/// Waits for the accesses that run.
fn settle(space: &Space) -> Result<()> {
    let deadline = Deadline::after(space.unmap.longest());
    if space.grace.synchronize(&deadline) {
        return Ok(());
    }
    Err(Error::AccessRuns {
        waited: deadline.age(),
    })
}

/// Visits every mapping, with whether it is in the table.
fn for_each(writer: &Writer, space: &Space, mut visit: impl FnMut(&Mapping, bool)) {
    space.table.visit(IovaRange::ALL, |mapping| {
        visit(mapping, true);
        ControlFlow::<()>::Continue(())
    });
    for leaving in writer.leaving_inside(IovaRange::ALL) {
        visit(&leaving.mapping, false);
    }
    for mapping in &writer.replaced {
        visit(mapping, false);
    }
}

/// A word of marks of a mapping, with the address of its first page.
fn word(mapping: &Mapping, index: usize, marks: u64) -> (u64, u64) {
    let offset = (index * log::WORD) as u64 * page_size();
    (mapping.range.first + offset, marks)
}

/// Pages that were written; from [`IoAddressSpace::take_dirty`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirtyPages {
    /// The mappings they are of, ascending.
    mapped: Vec<IovaRange>,
    /// The address of a page, and a bit for it and each of the 63 behind it; no word without a bit.
    words: Vec<(u64, u64)>,
}

impl DirtyPages {
    /// Takes the marks of mappings that nobody can write to any more, by address: all of them or none.
    pub(crate) fn take_all(&mut self, mappings: &[Arc<Mapping>]) -> Result<()> {
        memory::extend(
            &mut self.mapped,
            mappings.iter().map(|mapping| mapping.range),
        )?;
        let mut words = 0;
        for mapping in mappings {
            let marked = |marks| words += usize::from(marks != 0);
            mapping.dirty.look(mapping.pages(), marked);
        }
        memory::reserve(&mut self.words, words)?;
        for mapping in mappings {
            let taken = |index, marks| self.words.push(word(mapping, index, marks));
            mapping.dirty.take(mapping.pages(), taken);
        }
        Ok(())
    }

    /// The I/O virtual addresses of the pages, ascending inside each mapping.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.words.iter().flat_map(|(first, marks)| {
            let is_marked = move |bit: &u64| marks >> bit & 1 == 1;
            (0..u64::from(u64::BITS))
                .filter(is_marked)
                .map(move |bit| first + (bit << page_shift()))
        })
    }

    /// How many pages.
    pub fn len(&self) -> usize {
        let marks = self.words.iter().map(|(_, marks)| marks.count_ones());
        marks.map(|marks| marks as usize).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_whose_dirty_pages_are_kept_has_as_many_as_the_kernel_counts() {
        let check = |pages: u64| check_pages(IovaRange::new(0, pages * page_size())?);
        check(DIRTY_MAPPING_PAGES).unwrap();
        let error = check(DIRTY_MAPPING_PAGES + 1).unwrap_err();
        assert!(matches!(error, Error::DirtyMapping { pages, .. } if pages == 1 << 31));
    }
}

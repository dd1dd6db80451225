// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Dirty pages by I/O virtual address: which were written since they were last asked for.

mod log;
mod slice;

use std::ops::ControlFlow;

use crate::deadline::Deadline;
use crate::map::check_log_bytes;
use crate::mapping::Mapping;
use crate::range::{page_shift, page_size, IovaRange};
use crate::space::Space;
use crate::sync::lock;
use crate::table::Table;
use crate::unmap::{inside, whole_pages};
use crate::writer::Writer;
use crate::{Error, IoAddressSpace, Result};

pub(crate) use log::DirtyLog;
pub(crate) use slice::InlineMarks;
pub use slice::{Dirty, DirtySlice};

impl IoAddressSpace {
    /// Begins to keep which pages are written through the space, none of them yet; nothing is done where
    /// that is kept already.
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
    /// [`Error::DirtyLimit`] (ENOSPC): there are more pages than may be kept; nothing is tracked.
    /// [`Error::AccessRuns`] (EBUSY): an access that began before did not end within the space's
    /// deadline for unmaps, or the kernel refuses a barrier
    /// ([`ReaderBarrier::Membarrier`](crate::ReaderBarrier::Membarrier)); what is written by it may not be
    /// marked. Tracking has begun; starting it again waits again.
    pub fn start_dirty_tracking(&self) -> Result<()> {
        let space = &*self.view.space;
        let mut writer = lock(&space.writer);
        if !writer.tracking {
            let mut bytes = 0;
            for_each(&writer, space, |mapping, _| bytes += mapping.log_bytes());
            check_log_bytes(bytes, space.log_limit)?;
            writer.log_bytes = bytes;
            writer.tracking = true;
            for_each(&writer, space, |mapping, is_live| {
                mapping.dirty.start(mapping.pages());
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
    /// Slices of guards, lists and pins count from the time they are written through. What is written
    /// without them (by host address, or by hardware) is not known. The marks of a mapping go with it.
    ///
    /// # Errors
    ///
    /// [`Error::Misaligned`] or [`Error::Empty`] (EINVAL), [`Error::Overflow`] (EOVERFLOW),
    /// [`Error::NotTracking`] (EINVAL), [`Error::Bisect`] (EINVAL: the range ends inside a mapping),
    /// [`Error::AccessRuns`] (EBUSY) as in
    /// [`start_dirty_tracking`](IoAddressSpace::start_dirty_tracking): nothing was taken, try again.
    pub fn take_dirty(&self, iova: u64, size: u64) -> Result<DirtyPages> {
        let range = whole_pages(iova, size)?;
        let space = &*self.view.space;
        let mut taken = Vec::new();
        let writer = lock(&space.writer);
        if !writer.tracking {
            return Err(Error::NotTracking { iova, size });
        }
        let mut live = Vec::new();
        inside(&writer, space, range, &mut live)?;
        writer.settle_marks(&space.table);
        let leaving = writer.leaving_inside(range).map(|leaving| &leaving.mapping);
        live.iter().chain(leaving).for_each(|mapping| {
            mapping.dirty.take(mapping.pages(), |index, marks| {
                taken.push((mapping.clone(), index, marks));
            });
        });
        drop(writer);
        if taken.is_empty() {
            // No access can have relied on a mark that was taken.
            return Ok(DirtyPages { words: Vec::new() });
        }
        if let Err(error) = settle(space) {
            for (mapping, index, marks) in taken {
                mapping.dirty.put_back(index, marks);
            }
            return Err(error);
        }
        let address = |mapping: &Mapping, index| {
            mapping.range.first + ((index * log::WORD) as u64 * page_size())
        };
        let words = taken.iter();
        Ok(DirtyPages {
            words: words
                .map(|(mapping, index, marks)| (address(mapping, *index), *marks))
                .collect(),
        })
    }
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
    let mut live = Vec::new();
    space.table.visit(IovaRange::ALL, |mapping| {
        live.push(Table::share(mapping));
        ControlFlow::<()>::Continue(())
    });
    for mapping in &live {
        visit(mapping, true);
    }
    for leaving in writer.leaving_inside(IovaRange::ALL) {
        visit(&leaving.mapping, false);
    }
    for mapping in &writer.replaced {
        visit(mapping, false);
    }
}

/// Pages that were written; from [`IoAddressSpace::take_dirty`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirtyPages {
    /// The address of a page, and a bit for it and each of the 63 behind it; no word without a bit.
    words: Vec<(u64, u64)>,
}

impl DirtyPages {
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

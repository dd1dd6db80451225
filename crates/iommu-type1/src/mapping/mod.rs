// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One mapping: a range of IOVAs, the memory behind it, and what may be done with it.

mod need;
mod nowhere;
mod page_word;

use std::ptr;
use std::sync::Arc;

use vm_memory::{Permissions, VolatileSlice};

use self::need::{bits, permissions, ASKED, PLAIN, READ, WRITE};
use self::nowhere::Nowhere;
use crate::backing::{GuestPlace, Region};
use crate::dirty::{DirtyLog, DirtySlice, InlineMarks};
use crate::mapping_set::SetId;
use crate::range::{page_shift, IovaRange};
use crate::sigbus;
use crate::{Backing, PermissionPolicy};

pub(crate) use need::Need;
pub(crate) use page_word::PageWord;

/// # Invariants
///
/// As many bytes as `range` has lie at `host` inside the region, and allow what `allows` says. Of a mapping
/// without memory ([`Mapping::hollow`]) that is not so: nobody can find it.
///
/// What an access looks at stands first, to be on one cache line or two.
#[repr(C)]
pub(crate) struct Mapping {
    pub(crate) range: IovaRange,
    host: *mut u8,
    /// Which pages were written, while anybody wants to know.
    pub(crate) dirty: DirtyLog,
    /// Bits of [`Need`]: what accesses may do as the space's policy says, and what was asked for.
    allows: u8,
    /// Whether the region wants to know what was written.
    tracks: bool,
    /// Through which set it was made.
    pub(crate) set: SetId,
    region: Arc<dyn Region>,
    guest: GuestPlace,
}

// SAFETY: `Region` is `Send` and `Sync`; the address points into memory that the region owns, and
// which is only accessed through volatile slices.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

/// Memory in the hands of an access that runs.
pub(crate) type InlineSlice<'a> = VolatileSlice<'a, InlineMarks<'a>>;

impl Mapping {
    /// One without memory.
    pub(crate) fn without_memory(
        range: IovaRange,
        prot: Permissions,
        policy: PermissionPolicy,
    ) -> Self {
        let nowhere = Backing::part(Arc::new(Nowhere), 0, 0);
        Mapping::new(range, prot, nowhere, policy, SetId::NONE)
    }

    pub(crate) fn new(
        range: IovaRange,
        prot: Permissions,
        backing: Backing,
        policy: PermissionPolicy,
        set: SetId,
    ) -> Self {
        let (region, host, tracks, guest) = backing.into_parts();
        let asked = bits(prot);
        let access = match policy {
            PermissionPolicy::WriteNeedsRead if asked & READ == 0 => 0,
            _ => asked,
        };
        Mapping {
            range,
            host,
            dirty: DirtyLog::new(),
            allows: (access | asked << ASKED) as u8,
            tracks,
            set,
            region,
            guest,
        }
    }

    /// A mapping of a part of it: the same memory for the same accesses, no marks of its own.
    pub(crate) fn part(&self, range: IovaRange) -> Self {
        let offset = (range.first - self.range.first) as usize;
        Mapping {
            range,
            host: self.host.wrapping_add(offset),
            dirty: DirtyLog::new(),
            allows: self.allows,
            tracks: self.tracks,
            set: self.set,
            region: self.region.clone(),
            guest: self.guest.behind(offset),
        }
    }

    /// The same without memory, for as long as nobody can find it.
    pub(crate) fn hollow(&self) -> Self {
        Mapping {
            range: self.range,
            host: ptr::null_mut(),
            dirty: DirtyLog::new(),
            allows: self.allows,
            tracks: false,
            set: self.set,
            region: Arc::new(Nowhere),
            guest: GuestPlace::UNKNOWN,
        }
    }

    /// Whether it has no memory.
    pub(crate) fn is_hollow(&self) -> bool {
        self.host.is_null()
    }

    /// The same with other memory, of as many bytes, that allows as much.
    pub(crate) fn with_memory(&self, backing: Backing) -> Self {
        let (region, host, tracks, guest) = backing.into_parts();
        Mapping {
            range: self.range,
            host,
            dirty: DirtyLog::new(),
            allows: self.allows,
            tracks,
            set: self.set,
            region,
            guest,
        }
    }

    /// The memory of a part of it.
    pub(crate) fn backing(&self, range: IovaRange) -> Backing {
        let offset = (range.first - self.range.first) as usize;
        let start = self.region_offset() + offset;
        Backing::part(self.region.clone(), start, range.size() as usize)
            .in_guest(self.guest.behind(offset))
    }

    /// Where the guest has the byte at `iova`, which is in the range.
    #[cfg(feature = "iommu")]
    pub(crate) fn guest_address(&self, iova: u64) -> Option<vm_memory::GuestAddress> {
        let offset = (iova - self.range.first) as usize;
        self.guest.behind(offset).address()
    }

    /// The memory from `iova` to the end of the mapping, at most `len` bytes of it, for somebody who
    /// keeps it.
    #[inline]
    pub(crate) fn slice(&self, iova: u64, len: usize) -> VolatileSlice<'_, DirtySlice<'_>> {
        let (memory, len) = self.memory(iova, len);
        let dirty = DirtySlice::new(self, (iova - self.range.first) as usize);
        // SAFETY: `memory` gives bytes of the region, which `self` keeps alive; guest memory is only
        // ever accessed through volatile slices.
        unsafe { VolatileSlice::with_bitmap(memory, len, dirty, None) }
    }

    /// As [`slice`](Mapping::slice) for an access that runs.
    #[inline]
    pub(crate) fn inline_slice(&self, iova: u64, len: usize) -> InlineSlice<'_> {
        let (memory, len) = self.memory(iova, len);
        let marks = InlineMarks::new(self, (iova - self.range.first) as usize);
        // SAFETY: as in `slice`.
        unsafe { VolatileSlice::with_bitmap(memory, len, marks, None) }
    }

    /// Where `iova`, which is in the range, lies, and how many of `len` bytes do.
    #[inline]
    fn memory(&self, iova: u64, len: usize) -> (*mut u8, usize) {
        let behind = (self.range.last - iova) as usize;
        let offset = (iova - self.range.first) as usize;
        // Compared without the one byte more that might not fit.
        let len = if len > behind { behind + 1 } else { len };
        (self.host.wrapping_add(offset), len)
    }

    /// How many of `len` bytes from `iova`, which lies in it, are not known to be gone.
    #[inline]
    pub(crate) fn bytes_there(&self, iova: u64, len: usize) -> usize {
        if sigbus::seen() {
            self.bytes_before_fault(iova, len)
        } else {
            len
        }
    }

    #[cold]
    #[inline(never)]
    fn bytes_before_fault(&self, iova: u64, len: usize) -> usize {
        let offset = self.region_offset() + (iova - self.range.first) as usize;
        match self.region.fault_offset() {
            Some(gone) => gone.saturating_sub(offset).min(len),
            None => len,
        }
    }

    /// What it was made for.
    pub(crate) fn permissions(&self) -> Permissions {
        permissions(usize::from(self.allows) >> ASKED)
    }

    /// Whether `need` is permitted.
    #[inline]
    pub(crate) fn allows(&self, need: Need) -> bool {
        usize::from(self.allows) & need.0 == need.0
    }

    /// `len` bytes from `iova`, one at least, if all of them lie in it and `need` is permitted.
    #[inline]
    pub(crate) fn whole(&self, iova: u64, len: usize, need: Need) -> Option<InlineSlice<'_>> {
        // Where `iova` is below the range, the difference wraps to more than any size.
        let offset = iova.wrapping_sub(self.range.first);
        let size_less_one = self.range.last - self.range.first;
        let fits =
            offset <= size_less_one && (len as u64).wrapping_sub(1) <= size_less_one - offset;
        if !fits || !self.allows(need) {
            return None;
        }
        let offset = offset as usize;
        let (memory, marks) = (
            self.host.wrapping_add(offset),
            InlineMarks::new(self, offset),
        );
        // SAFETY: as in `slice`, and just compared.
        Some(unsafe { VolatileSlice::with_bitmap(memory, len, marks, None) })
    }

    /// Whether anybody wants to know what is written.
    #[inline]
    pub(crate) fn wants_marks(&self) -> bool {
        self.tracks || self.dirty.is_on()
    }

    /// Says that `len` bytes from `offset`, which lie in it, were written by an access that runs.
    pub(crate) fn mark_inline(&self, offset: usize, len: usize) {
        self.dirty.mark_inline(offset, len);
        if self.tracks {
            self.mark_region(offset, len);
        }
    }

    /// Says that `len` bytes from `offset` were written by somebody who has a slice. Who that is may
    /// say anything: what is not in the mapping is left out.
    pub(crate) fn mark_lent(&self, offset: usize, len: usize) {
        let len = len.min(self.len().saturating_sub(offset));
        if len > 0 {
            self.dirty.mark_lent(offset, len);
            if self.tracks {
                self.mark_region(offset, len);
            }
        }
    }

    /// Says that the page at `iova`, which is in the range, was written, to whoever takes the marks.
    pub(crate) fn mark_page(&self, iova: u64) {
        self.dirty.mark_lent((iova - self.range.first) as usize, 1);
    }

    /// Gives the marks of its pages to another mapping of the same range.
    pub(crate) fn give_marks(&self, to: &Mapping) {
        self.dirty.take_pages(self.pages(), |page| {
            to.dirty.mark_lent(page << page_shift(), 1);
        });
    }

    /// Whether the byte at `offset` is known to be written.
    pub(crate) fn dirty_at(&self, offset: usize) -> bool {
        offset < self.len()
            && (self.dirty.dirty_at(offset)
                || self.tracks && self.region.dirty_at(self.region_offset() + offset))
    }

    #[cold]
    fn mark_region(&self, offset: usize, len: usize) {
        self.region.mark_dirty(self.region_offset() + offset, len);
    }

    /// Where in the region it begins.
    fn region_offset(&self) -> usize {
        self.host.addr() - self.region.host_address().addr()
    }

    /// Bytes of it: a mapping is not larger than the address space of this process.
    fn len(&self) -> usize {
        self.range.size() as usize
    }

    /// Host pages of it.
    pub(crate) fn pages(&self) -> usize {
        self.len() >> page_shift()
    }

    /// Memory of the marks of its pages.
    pub(crate) fn log_bytes(&self) -> usize {
        log_bytes(self.range)
    }

    /// What accesses need to know of one of its pages.
    pub(crate) fn page_word(&self, page: u64) -> PageWord {
        let offset = (page - (self.range.first >> page_shift())) << page_shift();
        let plain = if self.wants_marks() { 0 } else { PLAIN };
        let flags = usize::from(self.allows) & (READ | WRITE) | plain;
        let host = self.host.wrapping_add(offset as usize).cast::<()>();
        PageWord(host.map_addr(|addr| addr | flags))
    }
}

/// Memory of the marks of a range's pages.
pub(crate) fn log_bytes(range: IovaRange) -> usize {
    DirtyLog::bytes((range.size() >> page_shift()) as usize)
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.dirty.free(self.pages());
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A dirty log of a memory region that runs code of the test, in the middle of the write.

use std::fmt;
use std::sync::mpsc::channel;
use std::sync::Mutex;
use std::thread;

use iommu_type1::{page_size, Backing, IoAddressSpace};
use vm_memory::bitmap::{Bitmap, WithBitmapSlice};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestRegionMmap, Permissions};

use super::deadline::{ended, DEADLINE};

/// Is given the offset and length of what was written.
pub struct Log(Box<dyn Fn(usize, usize) + Send + Sync>);

/// Memory of so many pages with such a log.
pub fn region(
    pages: u64,
    on_mark: impl Fn(usize, usize) + Send + Sync + 'static,
) -> GuestRegionMmap<Log> {
    let size = (pages * page_size()) as usize;
    let mmap = MmapRegionBuilder::new_with_bitmap(size, Log(Box::new(on_mark)))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE)
        .build()
        .unwrap();
    GuestRegionMmap::new(mmap, GuestAddress(0)).unwrap()
}

/// All of a region.
pub fn whole(region: &GuestRegionMmap<Log>) -> Backing {
    Backing::from_region(region, 0, region.get_mmap().size()).unwrap()
}

/// Does something while a write to a page, which is mapped for it, is in the middle of itself.
pub fn beside_a_write(
    space: &IoAddressSpace,
    iova: u64,
    write: impl FnOnce() + Send + 'static,
    meanwhile: impl FnOnce(),
) {
    let (begun, has_begun) = channel();
    let (end, may_end) = channel::<()>();
    let may_end = Mutex::new(may_end);
    let region = region(1, move |_, _| {
        begun.send(()).unwrap();
        // Or nobody is there any more to say so.
        let _ = may_end.lock().unwrap().recv();
    });
    let backing = whole(&region);
    space.map(iova, backing, Permissions::ReadWrite).unwrap();
    let writer = thread::spawn(write);
    let is_marked = has_begun.recv_timeout(DEADLINE);
    is_marked.expect("a write marks what it has written");
    meanwhile();
    drop(end);
    ended("a write ends", writer);
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Log")
    }
}

impl Bitmap for Log {
    fn mark_dirty(&self, offset: usize, len: usize) {
        (self.0)(offset, len);
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, _offset: usize) {}
}

/// The region's own slices mark nothing.
impl WithBitmapSlice<'_> for Log {
    type S = ();
}

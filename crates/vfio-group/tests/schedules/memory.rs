// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory that knows when it is gone: once its unmap has returned, its owner uses it for something else.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use iommu_type1::{page_size, Backing};
use shuttle::thread::yield_now;
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

/// What the owner fills it with when it is gone.
pub const OTHERS: u64 = u64::from_ne_bytes([0xee; 8]);

/// Places of a page that are used: one for each thread that writes.
pub const PLACES: usize = 3;

/// What a page has in its places.
pub type Contents = [u64; PLACES];

pub fn offset(place: usize) -> u64 {
    8 + 64 * place as u64
}

/// The memory behind one mapping.
pub struct Memory {
    region: GuestRegionMmap<Watch>,
    watch: Watch,
    /// What was in it, page by page, when it went.
    last: Mutex<Option<Vec<Contents>>>,
}

impl Memory {
    pub fn new(pages: usize) -> Self {
        let watch = Watch::default();
        let builder = MmapRegionBuilder::new_with_bitmap(bytes(pages), watch.clone())
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE);
        Memory {
            region: GuestRegionMmap::new(builder.build().unwrap(), GuestAddress(0)).unwrap(),
            watch,
            last: Mutex::default(),
        }
    }

    pub fn backing(&self) -> Backing {
        Backing::from_region(&self.region, 0, bytes(self.pages())).unwrap()
    }

    pub fn pages(&self) -> usize {
        (self.region.len() / page_size()) as usize
    }

    /// How often bytes of it were marked as written.
    pub fn marks(&self) -> u64 {
        self.watch.0.marks.load(SeqCst)
    }

    /// Its owner has it back.
    pub fn gone(&self) {
        let contents = (0..self.pages()).map(|page| self.live(page)).collect();
        *self.last.lock().unwrap() = Some(contents);
        let told = &self.watch.0;
        assert!(!told.owned.swap(true, SeqCst), "gone twice");
        for page in 0..self.pages() {
            for place in 0..PLACES {
                self.region.write_obj(OTHERS, at(page, place)).unwrap();
            }
        }
        told.gone.store(true, SeqCst);
    }

    /// What is in a page, or was when it went.
    pub fn contents(&self, page: usize) -> Contents {
        let last = self.last.lock().unwrap();
        match &*last {
            Some(pages) => pages[page],
            None => self.live(page),
        }
    }

    fn live(&self, page: usize) -> Contents {
        std::array::from_fn(|place| self.region.read_obj(at(page, place)).unwrap())
    }

    /// Nobody but the owner has it.
    pub fn assert_released(&self) {
        // Its own, and that which is counted here.
        let users = Arc::strong_count(&self.region.get_mmap());
        assert_eq!(users, 2, "memory is kept");
    }
}

fn bytes(pages: usize) -> usize {
    pages * page_size() as usize
}

fn at(page: usize, place: usize) -> MemoryRegionAddress {
    MemoryRegionAddress(page as u64 * page_size() + offset(place))
}

/// Is told of every write of others, in the middle of the access, as the dirty log of a region.
#[derive(Clone, Debug, Default)]
pub struct Watch(Arc<Told>);

#[derive(Debug, Default)]
struct Told {
    /// Its owner has it, and writes to it itself.
    owned: AtomicBool,
    gone: AtomicBool,
    marks: AtomicU64,
}

impl WithBitmapSlice<'_> for Watch {
    type S = Watch;
}

impl BitmapSlice for Watch {}

impl Bitmap for Watch {
    fn mark_dirty(&self, _offset: usize, _len: usize) {
        if self.0.owned.load(SeqCst) && !self.0.gone.load(SeqCst) {
            return;
        }
        yield_now();
        assert!(!self.0.gone.load(SeqCst), "written after its unmap");
        self.0.marks.fetch_add(1, SeqCst);
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, _offset: usize) -> Watch {
        self.clone()
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A bitmap of the user's runs inside of the access that marks it, and may access again.

mod common;

use std::cell::RefCell;
use std::sync::{Arc, Mutex};

use common::at_once;
use common::deadline::must_end;
use iommu_type1::{
    page_size, Backing, DmaHandle, Error, HolderKind, IoAddressSpace, ReaderBarrier, UnmapPolicy,
};
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestRegionMmap, Permissions};

thread_local! {
    static HANDLE: RefCell<Option<DmaHandle>> = const { RefCell::new(None) };
}

/// Reads by the same handle when it is marked, and has another thread try to unmap then.
#[derive(Clone, Debug)]
struct Nesting {
    space: IoAddressSpace,
    unmapped: Arc<Mutex<Vec<Result<u64, Error>>>>,
}

impl<'a> WithBitmapSlice<'a> for Nesting {
    type S = Nesting;
}

impl BitmapSlice for Nesting {}

impl Bitmap for Nesting {
    fn mark_dirty(&self, _offset: usize, _len: usize) {
        HANDLE.with_borrow(|handle| {
            let handle = handle.as_ref().unwrap();
            handle.read(page_size(), &mut [0; 8]).unwrap();
        });
        let options = at_once().policy(UnmapPolicy::Restore);
        let space = self.space.clone();
        let unmap = move || space.unmap_with(0, page_size(), options);
        let unmapped = must_end("an unmap beside an access", unmap);
        self.unmapped.lock().unwrap().push(unmapped);
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, _offset: usize) -> Nesting {
        self.clone()
    }
}

#[test]
fn an_access_inside_an_access_does_not_end_the_outer() {
    for barrier in [ReaderBarrier::Fence, ReaderBarrier::Membarrier] {
        let space = IoAddressSpace::builder().reader_barrier(barrier).build();
        let bitmap = Nesting {
            space: space.clone(),
            unmapped: Arc::default(),
        };
        let len = page_size() as usize;
        let region = MmapRegionBuilder::new_with_bitmap(len, bitmap.clone())
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE)
            .build()
            .unwrap();
        let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
        let marked = Backing::from_region(&region, 0, len).unwrap();
        let plain = Backing::anonymous(len).unwrap();
        space.map(0, marked, Permissions::ReadWrite).unwrap();
        space
            .map(page_size(), plain, Permissions::ReadWrite)
            .unwrap();

        HANDLE.set(Some(space.handle()));
        // Enough to go without barriers where that is allowed.
        HANDLE.with_borrow(|handle| {
            let handle = handle.as_ref().unwrap();
            for _ in 0..70_000 {
                handle.read(page_size(), &mut [0; 8]).unwrap();
            }
            handle.write(0, &[1; 64]).unwrap();
        });
        let unmapped = std::mem::take(&mut *bitmap.unmapped.lock().unwrap());
        let [Err(Error::Deadline { holders, .. })] = &unmapped[..] else {
            panic!("unmapped under a running access: {unmapped:?}");
        };
        assert_eq!(holders[0].kind, HolderKind::Access);

        HANDLE.set(None);
        assert_eq!(space.unmap(0, page_size()).unwrap(), page_size());
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The bitmaps of memory regions: what a VMM logs itself sees every write, after its bytes.

use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicUsize, Ordering};
use std::sync::Arc;

use iommu_type1::{page_size, Backing, Interest, IoAddressSpace};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    Permissions,
};

use super::taken;
use crate::common::log;
use Permissions::ReadWrite;

/// Where the pages of the region are mapped.
const IOVA: u64 = 0x1000_0000;
const PAGES: u64 = 8;

/// A way to write one byte, `u8`, at the address.
type Way = (&'static str, fn(&IoAddressSpace, u64, u8));

/// Each way that memory can be written through a space.
const WAYS: [Way; 10] = [
    ("space", |space, at, value| {
        space.write(at, &[value]).unwrap()
    }),
    ("handle", |space, at, value| {
        space.handle().write(at, &[value]).unwrap();
    }),
    ("store", |space, at, value| {
        let (handle, at) = (space.handle(), GuestAddress(at));
        handle.store(value, at, Ordering::Relaxed).unwrap();
    }),
    ("compare_exchange", |space, at, value| {
        let handle = space.handle();
        let current: u8 = handle.read_obj(GuestAddress(at)).unwrap();
        let orders = (Ordering::AcqRel, Ordering::Acquire);
        let found = handle.compare_exchange(at, current, value, orders.0, orders.1);
        assert_eq!(found.unwrap(), Ok(current));
    }),
    ("stream", |space, at, value| {
        let (handle, source) = (space.handle(), [value]);
        let at = GuestAddress(at);
        handle
            .read_exact_volatile_from(at, &mut &source[..], 1)
            .unwrap();
    }),
    ("guard", |space, at, value| {
        space
            .memory()
            .write_slice(&[value], GuestAddress(at))
            .unwrap();
    }),
    ("guard's store", |space, at, value| {
        let guard = space.memory();
        guard
            .store(value, GuestAddress(at), Ordering::Relaxed)
            .unwrap();
    }),
    ("guard's stream", |space, at, value| {
        let (guard, source) = (space.memory(), [value]);
        let at = GuestAddress(at);
        guard
            .read_exact_volatile_from(at, &mut &source[..], 1)
            .unwrap();
    }),
    ("list", |space, at, value| {
        let list = space.scatter(at, 1, ReadWrite).unwrap();
        list.iter().for_each(|slice| slice.copy_from(&[value]));
    }),
    ("pinned page", |space, at, value| {
        let pinner = space.pinner("pinner", Interest::Holder, Arc::new(|_, _| ()));
        let offset = at % page_size();
        let pinned = pinner.pin_pages(at - offset, 1, ReadWrite).unwrap();
        pinned
            .page(0)
            .unwrap()
            .write_obj(value, offset as usize)
            .unwrap();
    }),
];

#[test]
fn the_log_of_a_vmm_sees_every_way_to_write() {
    let p = page_size();
    let size = (PAGES * p) as usize;
    for tracking in [false, true] {
        for (name, write) in WAYS {
            let memory =
                GuestMemoryMmap::<AtomicBitmap>::from_ranges(&[(GuestAddress(0), size)]).unwrap();
            let region = memory.iter().next().unwrap();
            let dirty = || {
                let marked =
                    |page: &u64| GuestMemoryRegion::bitmap(region).dirty_at((page * p) as usize);
                (0..PAGES).filter(marked).collect::<Vec<_>>()
            };
            let space = IoAddressSpace::new();
            // Not from its start: the mapping has offsets of its own.
            let part = size - p as usize;
            let backing = Backing::from_guest_memory(&memory, GuestAddress(p), part).unwrap();
            space.map(IOVA, backing, ReadWrite).unwrap();
            if tracking {
                space.start_dirty_tracking().unwrap();
            }
            assert!(dirty().is_empty(), "{name}");
            write(&space, IOVA + 3 * p - 1, 1);
            assert_eq!(dirty(), [3], "{name}");
            write(&space, IOVA + 3 * p, 1);
            assert_eq!(dirty(), [3, 4], "{name}");
            let first = IOVA / p;
            if tracking {
                assert_eq!(
                    taken(&space, first, PAGES),
                    [first + 2, first + 3].into(),
                    "{name}"
                );
            }
        }
    }
}

#[test]
fn a_region_is_marked_after_its_bytes_are_written() {
    let p = page_size();
    for tracking in [false, true] {
        for (name, write) in WAYS {
            let memory = Arc::new(AtomicPtr::<u8>::default());
            let wanted = Arc::new(AtomicU8::new(0));
            let marks = Arc::new(AtomicUsize::new(0));
            let too_early = Arc::new(AtomicBool::new(false));
            let region = {
                let (memory, wanted) = (memory.clone(), wanted.clone());
                let (marks, too_early) = (marks.clone(), too_early.clone());
                log::region(PAGES, move |offset, len| {
                    assert_eq!(len, 1);
                    let byte = memory.load(Ordering::Relaxed).wrapping_add(offset);
                    // SAFETY: a mark lies inside of the region, which owns this log.
                    let found = unsafe { byte.read_volatile() };
                    marks.fetch_add(1, Ordering::Relaxed);
                    if found != wanted.load(Ordering::Relaxed) {
                        too_early.store(true, Ordering::Relaxed);
                    }
                })
            };
            memory.store(region.get_mmap().as_ptr(), Ordering::Relaxed);
            let space = IoAddressSpace::new();
            space.map(IOVA, log::whole(&region), ReadWrite).unwrap();
            if tracking {
                space.start_dirty_tracking().unwrap();
            }
            for value in 1..=20 {
                wanted.store(value, Ordering::Relaxed);
                write(&space, IOVA + p + u64::from(value % 3), value);
            }
            assert_eq!(marks.load(Ordering::Relaxed), 20, "{name}");
            assert!(!too_early.load(Ordering::Relaxed), "{name}");
        }
    }
}

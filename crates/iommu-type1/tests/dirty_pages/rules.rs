// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What counts as written, for how long, and what is refused.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use iommu_type1::{
    page_size, Backing, DirtyBitmap, Error, Interest, IoAddressSpace, ReaderBarrier, Transfer,
    UnmapPolicy,
};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemory, Permissions};

use super::taken;
use crate::common::deadline::skipped;
use crate::common::{at_once, log};
use Permissions::{Read, ReadWrite};

/// Mappings of 1, 100 and 2 pages at pages 0, 16 and 2^30, and the last page of the space.
fn space() -> IoAddressSpace {
    let space = IoAddressSpace::new();
    for (page, pages) in [(0, 1), (16, 100), (1 << 30, 2), (last_page(), 1)] {
        map(&space, page, pages);
    }
    space
}

fn last_page() -> u64 {
    u64::MAX / page_size()
}

fn map(space: &IoAddressSpace, page: u64, pages: u64) {
    let backing = Backing::anonymous((pages * page_size()) as usize).unwrap();
    space.map(page * page_size(), backing, ReadWrite).unwrap();
}

/// Addresses only: none of this memory is ever touched.
#[test]
fn a_mapping_of_more_pages_than_a_bitmap_of_the_kernel_is_refused() {
    const MOST: u64 = i32::MAX as u64;
    let p = page_size();
    let Ok(backing) = Backing::anonymous(((MOST + 1) * p) as usize) else {
        return skipped("this process cannot have so many addresses");
    };
    let most = backing.slice(0, (MOST * p) as usize).unwrap();
    let space = IoAddressSpace::new();
    space.map(p, backing.clone(), Read).unwrap();
    let too_many = |error: Error| {
        let Error::DirtyMapping { iova, pages, limit } = error else {
            panic!("{error}");
        };
        assert_eq!((iova, pages, limit), (p, MOST + 1, MOST));
        assert_eq!(error.errno(), libc::EINVAL);
    };
    too_many(space.start_dirty_tracking().unwrap_err());
    assert_eq!(space.stats().dirty_bytes, 0);
    space.unmap(p, (MOST + 1) * p).unwrap();
    space.start_dirty_tracking().unwrap();
    too_many(space.map(p, backing, Read).unwrap_err());
    // One page fewer is refused for the memory of its marks only.
    let error = space.map(p, most, Read).unwrap_err();
    assert!(matches!(error, Error::DirtyLimit { .. }), "{error}");
    assert_eq!((space.mappings(), space.stats().dirty_bytes), (0, 0));
}

#[test]
fn every_way_to_write_marks_the_pages_it_writes() {
    let p = page_size();
    let space = space();
    space.start_dirty_tracking().unwrap();
    let handle = space.handle();
    let at = |page: u64| GuestAddress(page * p);
    let dirty = || {
        taken(&space, 0, last_page())
            .into_iter()
            .collect::<Vec<_>>()
    };

    handle.write(17 * p - 1, &[1, 2]).unwrap();
    assert_eq!(dirty(), [16, 17]);
    space.write(20 * p, &vec![3; 80 * p as usize + 1]).unwrap();
    assert_eq!(dirty(), (20..=100).collect::<Vec<_>>());
    handle.dma_rw(31 * p, Transfer::Write(&[4])).unwrap();
    assert_eq!(dirty(), [31]);
    handle.store(5_u64, at(32), Ordering::Relaxed).unwrap();
    assert_eq!(dirty(), [32]);
    for (current, result) in [(9_u16, Err(0)), (0, Ok(0))] {
        let (success, failure) = (Ordering::AcqRel, Ordering::Acquire);
        let found = handle.compare_exchange(110 * p, current, 1, success, failure);
        assert_eq!(found.unwrap(), result);
        assert_eq!(dirty(), [110]);
    }
    let mut source = &[6; 32][..];
    handle.read_volatile_from(at(34), &mut source, 32).unwrap();
    assert_eq!(dirty(), [34]);

    let guard = space.memory();
    guard.write_obj(7_u32, at(35)).unwrap();
    assert_eq!(dirty(), [35]);
    guard.store(7_u8, at(36), Ordering::Relaxed).unwrap();
    assert_eq!(dirty(), [36]);
    let slices = guard.get_slices(at(37), 2 * p as usize, ReadWrite).unwrap();
    let slices: Vec<_> = slices.map(|slice| slice.unwrap()).collect();
    assert!(dirty().is_empty());
    for _ in 0..2 {
        slices[0].write_slice(&[8; 4], p as usize - 2).unwrap();
        assert_eq!(dirty(), [37, 38]);
    }
    let list = space
        .scatter((1 << 30) * p, 2 * p as usize, ReadWrite)
        .unwrap();
    list.iter().for_each(|slice| slice.copy_from(&[9_u8]));
    assert_eq!(dirty(), [1 << 30]);
    let pinner = space.pinner("pinner", Interest::Holder, Arc::new(|_, _| ()));
    let pinned = pinner.pin_pages(40 * p, 2, ReadWrite).unwrap();
    pinned.page(1).unwrap().write_obj(10_u8, 100).unwrap();
    // Whoever pins pages may write them at any time: each time they are asked for.
    assert_eq!(dirty(), [40, 41]);
    assert_eq!(dirty(), [40, 41]);
    drop(pinned);
    assert_eq!(dirty(), [40, 41]);
    assert!(dirty().is_empty());

    // The last page of the space, too.
    handle.write(u64::MAX, &[11]).unwrap();
    assert!(dirty().is_empty());
    assert!(taken(&space, last_page(), 1).contains(&last_page()));
}

#[test]
fn what_only_reads_or_fails_marks_nothing_more() {
    let p = page_size();
    let space = space();
    space
        .map(p, Backing::anonymous(p as usize).unwrap(), Read)
        .unwrap();
    space.start_dirty_tracking().unwrap();
    let handle = space.handle();
    let mut buf = [0; 16];
    handle.read(0, &mut buf).unwrap();
    handle
        .load::<u64>(GuestAddress(0), Ordering::Relaxed)
        .unwrap();
    space
        .memory()
        .read_slice(&mut buf, GuestAddress(8))
        .unwrap();
    let list = space.scatter(0, 16, Read).unwrap();
    list.iter()
        .for_each(|slice| assert_eq!(slice.copy_to(&mut buf), 16));
    handle.write(0, &[]).unwrap();
    handle.write(p, &buf).unwrap_err();
    handle
        .store(1_u8, GuestAddress(p), Ordering::Relaxed)
        .unwrap_err();
    assert!(taken(&space, 0, 200).is_empty());

    // What was written before an error stays, and is marked.
    let error = handle
        .write(115 * p - 8, &vec![1; 2 * p as usize])
        .unwrap_err();
    assert_eq!(error.completed(), p as usize + 8);
    assert_eq!(taken(&space, 0, 200), [114, 115].into());
}

#[test]
fn pages_are_taken_once_and_only_those_of_the_range() {
    let p = page_size();
    let space = space();
    space.start_dirty_tracking().unwrap();
    space.write(0, &[1]).unwrap();
    space.write(16 * p, &[1]).unwrap();
    space.write(80 * p, &[1]).unwrap();
    assert!(taken(&space, 1, 15).is_empty());
    assert_eq!(taken(&space, 16, 100), [16, 80].into());
    assert_eq!(taken(&space, 0, 1000), [0].into());
    assert!(taken(&space, 0, 1000).is_empty());
    // A page that was taken is marked anew.
    space.write(80 * p, &[1]).unwrap();
    assert_eq!(taken(&space, 0, 1000), [80].into());
}

#[test]
fn a_slice_knows_whether_its_page_is_marked() {
    let p = page_size() as usize;
    let space = space();
    let list = space.scatter(16 * p as u64, 2 * p, ReadWrite).unwrap();
    let slice = list.iter().next().unwrap();
    slice.copy_from(&[1_u8]);
    assert!(!slice.bitmap().dirty_at(0));
    space.start_dirty_tracking().unwrap();
    assert!(!slice.bitmap().dirty_at(0));
    slice.write_slice(&[2], p).unwrap();
    let marked = [0, p - 1, p, 2 * p - 1, 99 * p, 100 * p].map(|at| slice.bitmap().dirty_at(at));
    assert_eq!(marked, [false, false, true, true, false, false]);
    assert!(slice.subslice(p, 1).unwrap().bitmap().dirty_at(0));
}

#[test]
fn a_stop_and_a_start_forget_and_a_second_start_does_not() {
    let p = page_size();
    let space = space();
    space.write(0, &[1]).unwrap();
    space.start_dirty_tracking().unwrap();
    assert!(taken(&space, 0, 1000).is_empty());

    space.write(p - 1, &[1]).unwrap();
    space.start_dirty_tracking().unwrap();
    assert_eq!(taken(&space, 0, 1000), [0].into());

    space.write(0, &[1]).unwrap();
    space.stop_dirty_tracking();
    space.write(20 * p, &[1]).unwrap();
    space.stop_dirty_tracking();
    space.start_dirty_tracking().unwrap();
    assert!(taken(&space, 0, 1000).is_empty());
    space.write(30 * p, &[1]).unwrap();
    assert_eq!(taken(&space, 0, 1000), [30].into());
}

#[test]
fn mappings_made_while_tracked_are_tracked_and_marks_go_with_a_mapping() {
    let p = page_size();
    let space = space();
    space.start_dirty_tracking().unwrap();
    map(&space, 1, 1);
    space
        .map_batch([(2 * p, Backing::anonymous(p as usize).unwrap(), ReadWrite)])
        .unwrap();
    space.write(p, &vec![1; 2 * p as usize]).unwrap();
    space.unmap(p, p).unwrap();
    map(&space, 1, 1);
    assert_eq!(taken(&space, 0, 1000), [2].into());
    space.write(p, &[1]).unwrap();
    assert_eq!(taken(&space, 0, 1000), [1].into());
}

#[test]
fn a_mapping_whose_unmap_ended_at_its_deadline_keeps_its_marks() {
    let p = page_size();
    for policy in [UnmapPolicy::Revoked, UnmapPolicy::Restore] {
        let space = space();
        space.start_dirty_tracking().unwrap();
        space.write(16 * p, &[1]).unwrap();
        let list = space.scatter(16 * p, 100 * p as usize, ReadWrite).unwrap();
        space
            .unmap_with(16 * p, 100 * p, at_once().policy(policy))
            .unwrap_err();

        // Its holder goes on writing, tracking or not.
        let slice = list.iter().next().unwrap();
        slice.write_slice(&[1], 4 * p as usize).unwrap();
        assert_eq!(taken(&space, 0, 1000), [16, 20].into());
        slice.write_slice(&[1], 5 * p as usize).unwrap();
        space.stop_dirty_tracking();
        slice.write_slice(&[1], 6 * p as usize).unwrap();
        space.start_dirty_tracking().unwrap();
        slice.write_slice(&[1], 7 * p as usize).unwrap();
        assert_eq!(taken(&space, 0, 1000), [23].into());

        slice.write_slice(&[1], 8 * p as usize).unwrap();
        drop(list);
        if policy == UnmapPolicy::Restore {
            space.write(25 * p, &[1]).unwrap();
            assert_eq!(taken(&space, 0, 1000), [24, 25].into());
        }
        space.unmap(16 * p, 100 * p).unwrap();
        assert!(taken(&space, 0, 1000).is_empty());
    }
}

#[test]
fn marks_can_be_taken_in_the_middle_of_an_unmap() {
    let p = page_size();
    let space = space();
    space.start_dirty_tracking().unwrap();
    let found = Arc::new(Mutex::new(Vec::new()));
    let notice = {
        let (space, found) = (space.clone(), found.clone());
        move |iova: u64, size: u64| {
            let pages = taken(&space, iova / page_size(), size / page_size());
            found.lock().unwrap().push(pages);
        }
    };
    let _watcher = space.pinner("watcher", Interest::All, Arc::new(notice));
    space.write(18 * p, &[1]).unwrap();
    space.unmap(16 * p, 100 * p).unwrap();
    assert_eq!(*found.lock().unwrap(), [[18].into()]);
}

#[test]
fn what_cannot_be_asked_for_is_refused() {
    let p = page_size();
    let space = space();
    let refused = |iova, size| {
        let error = space.take_dirty(iova, size).unwrap_err();
        (error.errno(), error.to_string())
    };
    assert_eq!(
        refused(0, p),
        (
            libc::EINVAL,
            format!("{p:#x} bytes at 0x0: which pages are written is not tracked")
        )
    );
    space.start_dirty_tracking().unwrap();
    assert_eq!(
        refused(1, p),
        (
            libc::EINVAL,
            format!("address 0x1 is not a multiple of {p:#x}")
        )
    );
    assert_eq!(
        refused(0, 1),
        (
            libc::EINVAL,
            format!("size 0x1 is not a multiple of {p:#x}")
        )
    );
    assert_eq!(
        refused(p, 0),
        (libc::EINVAL, format!("a range of no bytes at {p:#x}"))
    );
    let last = last_page() * p;
    assert_eq!(
        refused(last, 2 * p),
        (
            libc::EOVERFLOW,
            format!(
                "{:#x} bytes at {last:#x} end beyond the 64-bit address space",
                2 * p
            )
        )
    );
    space.write(0, &[1]).unwrap();
    space.write(16 * p, &[1]).unwrap();
    let cut = format!(
        "{:#x} bytes at 0x0 would cut the mapping of {:#x} bytes at {:#x}",
        17 * p,
        100 * p,
        16 * p
    );
    assert_eq!(refused(0, 17 * p), (libc::EINVAL, cut.clone()));
    // Whether or not it leaves.
    let list = space.scatter(16 * p, 1, Read).unwrap();
    space.unmap_with(16 * p, 100 * p, at_once()).unwrap_err();
    assert_eq!(refused(0, 17 * p), (libc::EINVAL, cut));
    drop(list);
    // Nothing was taken by what was refused.
    assert_eq!(taken(&space, 0, 1000), [0, 16].into());
    space.stop_dirty_tracking();
    assert_eq!(refused(0, p).0, libc::EINVAL);
}

/// Runs `meanwhile` while a write to page 4 is in the middle of itself; page 0 is mapped too.
fn with_a_running_write(barrier: ReaderBarrier, meanwhile: impl FnOnce(&IoAddressSpace)) {
    let p = page_size();
    let space = IoAddressSpace::builder()
        .unmap_deadline(Duration::from_millis(1))
        .reader_barrier(barrier)
        .build();
    map(&space, 0, 1);
    let handle = space.handle();
    let write = move || handle.write(4 * p, &[1]).unwrap();
    log::beside_a_write(&space, 4 * p, write, || meanwhile(&space));
    // It has ended, and there is nothing to wait for.
    assert!(taken(&space, 4, 1).len() <= 1);
}

fn assert_access_runs<T: std::fmt::Debug>(result: Result<T, Error>) {
    let error = result.unwrap_err();
    assert!(matches!(error, Error::AccessRuns { waited } if waited >= Duration::from_millis(1)));
    assert_eq!(error.errno(), libc::EBUSY);
    assert!(
        error
            .to_string()
            .starts_with("an access has been running for "),
        "{error}"
    );
}

#[test]
fn an_access_that_runs_too_long_makes_a_start_uncertain() {
    for barrier in [ReaderBarrier::Fence, ReaderBarrier::Membarrier] {
        with_a_running_write(barrier, |space| {
            assert_access_runs(space.start_dirty_tracking());
            // It has begun all the same.
            space.write(0, &[1]).unwrap();
            space.stop_dirty_tracking();
            assert_access_runs(space.start_dirty_tracking());
            assert!(taken(space, 0, 100).is_empty());
        });
    }
}

/// A bitmap that could not be written had been shifted by then, and stayed so: the next one was wrong.
#[test]
fn b24_a_harvest_that_fails_loses_and_shifts_nothing() {
    let p = page_size();
    let mut kept = None;
    with_a_running_write(ReaderBarrier::Fence, |space| {
        assert_access_runs(space.start_dirty_tracking());
        map(space, 0x103, 100);
        for page in [0x103, 0x105, 0x103 + 63, 0x103 + 64, 0x103 + 99] {
            space.write(page * p, &[1]).unwrap();
        }
        // From inside a word of the bitmap on, and over several of them.
        let (at, size) = (0x100 * p, 0x70 * p);
        let mut words = [u64::MAX; 2];
        for _ in 0..3 {
            let mut bitmap = DirtyBitmap::new(at, size, p, &mut words).unwrap();
            assert_access_runs(space.take_dirty_bitmap(&mut bitmap));
        }
        assert_eq!(words, [u64::MAX; 2]);
        let mut short = DirtyBitmap::new(at, 4 * p, p, &mut words).unwrap();
        let error = space.take_dirty_bitmap(&mut short).unwrap_err();
        assert!(matches!(error, Error::Bisect { .. }), "{error}");
        let mut large = DirtyBitmap::new(at, size, 2 * p, &mut words).unwrap();
        let error = space.take_dirty_bitmap(&mut large).unwrap_err();
        assert!(matches!(error, Error::BitmapPageSize { .. }), "{error}");
        kept = Some(space.clone());
    });
    let space = kept.unwrap();
    let mut words = [0; 2];
    let mut bitmap = DirtyBitmap::new(0x100 * p, 0x70 * p, p, &mut words).unwrap();
    space.take_dirty_bitmap(&mut bitmap).unwrap();
    assert_eq!(words, [1 << 3 | 1 << 5, 1 << 2 | 1 << 3 | 1 << 38]);
}

#[test]
fn marks_are_not_given_away_while_an_access_that_may_rely_on_them_runs() {
    for barrier in [ReaderBarrier::Fence, ReaderBarrier::Membarrier] {
        with_a_running_write(barrier, |space| {
            assert_access_runs(space.start_dirty_tracking());
            space.write(0, &[1]).unwrap();
            let p = page_size();
            for _ in 0..2 {
                assert_access_runs(space.take_dirty(0, p));
            }
            let list = space.scatter(0, 1, ReadWrite).unwrap();
            let slice = list.iter().next().unwrap();
            assert!(slice.bitmap().dirty_at(0));
        });
    }
}

/// A mapping of up to 64 pages takes 8 bytes of marks.
#[test]
fn marks_have_a_limit_of_memory() {
    let space = IoAddressSpace::builder().dirty_limit(16).build();
    map(&space, 0, 64);
    map(&space, 100, 1);
    map(&space, 200, 1);
    let error = space.start_dirty_tracking().unwrap_err();
    assert_eq!(error.errno(), libc::ENOSPC);
    assert!(
        error.to_string().contains("0x18 bytes, the limit is 0x10"),
        "{error}"
    );
    let error = space.take_dirty(0, page_size() * 64).unwrap_err();
    assert!(matches!(error, Error::NotTracking { .. }), "{error}");

    space.unmap(200 * page_size(), page_size()).unwrap();
    space.start_dirty_tracking().unwrap();
    assert_eq!(space.stats().dirty_bytes, 16);
    let page = || Backing::anonymous(page_size() as usize).unwrap();
    let error = space.map(300 * page_size(), page(), ReadWrite).unwrap_err();
    assert_eq!(error.errno(), libc::ENOSPC);
    let batch = [(300, page()), (400, page())];
    let batch = batch.map(|(at, page)| (at * page_size(), page, ReadWrite));
    space.unmap(100 * page_size(), page_size()).unwrap();
    assert_eq!(space.map_batch(batch).unwrap_err().errno(), libc::ENOSPC);
    assert_eq!((space.mappings(), space.stats().dirty_bytes), (1, 8));
    map(&space, 100, 1);
    assert_eq!(space.stats().dirty_bytes, 16);
}

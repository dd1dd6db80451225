// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Maps and unmaps of several ranges at once: all of them or none.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use common::deadline::{ended, within};
use common::{at_once, beside_an_unmap, inside_an_access};
use iommu_type1::{page_size, Backing, Error, Interest, IoAddressSpace, UnmapPolicy};
use vm_memory::Permissions;

use Permissions::{Read, ReadWrite};

fn pages(n: u64) -> Backing {
    Backing::anonymous((n * page_size()) as usize).unwrap()
}

/// One page each, for reads and writes.
fn batch(at: impl IntoIterator<Item = u64>) -> Vec<(u64, Backing, Permissions)> {
    let one_page = |page| (page * page_size(), pages(1), ReadWrite);
    at.into_iter().map(one_page).collect()
}

/// What was mapped before is all there is, and nothing was counted.
fn assert_refused(
    space: &IoAddressSpace,
    mappings: Vec<(u64, Backing, Permissions)>,
    errno: i32,
    message: &str,
) {
    let before = space.stats();
    let error = space.map_batch(mappings).unwrap_err();
    assert_eq!(
        (error.errno(), error.to_string().as_str()),
        (errno, message)
    );
    let after = space.stats();
    assert_eq!((after.mappings, after.maps), (before.mappings, before.maps));
    assert_eq!(after.table_bytes, before.table_bytes);
}

#[test]
fn a_batch_of_maps_is_refused_for_any_of_them() {
    let p = page_size();
    let space = IoAddressSpace::builder().entry_limit(4).build();
    space.map_batch(batch([16, 17])).unwrap();
    assert_eq!(space.stats().maps, 2);

    let with = |at, backing, prot| {
        let mut mappings = batch([1]);
        mappings.push((at, backing, prot));
        mappings.extend(batch([3]));
        mappings
    };
    assert_refused(
        &space,
        with(2 * p + 1, pages(1), Read),
        libc::EINVAL,
        &format!("address {:#x} is not a multiple of {p:#x}", 2 * p + 1),
    );
    assert_refused(
        &space,
        with(2 * p, Backing::anonymous(p as usize / 2).unwrap(), Read),
        libc::EINVAL,
        &format!("size {:#x} is not a multiple of {p:#x}", p / 2),
    );
    assert_refused(
        &space,
        with(2 * p, pages(1), Permissions::No),
        libc::EINVAL,
        &format!(
            "the mapping at {:#x} would allow neither reads nor writes",
            2 * p
        ),
    );
    let last = u64::MAX - p + 1;
    assert_refused(
        &space,
        with(last, pages(2), Read),
        libc::EOVERFLOW,
        &format!(
            "{:#x} bytes at {last:#x} end beyond the 64-bit address space",
            2 * p
        ),
    );
    assert_refused(
        &space,
        with(15 * p, pages(2), Read),
        libc::EEXIST,
        &format!(
            "{:#x} bytes at {:#x} overlap the mapping of {p:#x} bytes at {:#x}",
            2 * p,
            15 * p,
            16 * p
        ),
    );
    assert_refused(
        &space,
        with(2 * p, pages(2), Read),
        libc::EEXIST,
        &format!(
            "{p:#x} bytes at {:#x} overlap the mapping of {:#x} bytes at {:#x}",
            3 * p,
            2 * p,
            2 * p
        ),
    );
    assert_refused(
        &space,
        batch([1, 2, 3]),
        libc::ENOSPC,
        "the limit of 4 mappings is reached",
    );
    // As many as there is room for.
    space.map_batch(batch([1, 2])).unwrap();
}

#[test]
fn a_batch_of_maps_waits_for_no_unmap() {
    let p = page_size();
    let space = IoAddressSpace::new();
    space.map_batch(batch([16])).unwrap();
    let list = space.scatter(16 * p, 1, Read).unwrap();
    space.unmap_with(16 * p, p, at_once()).unwrap_err();
    let message = format!(
        "{p:#x} bytes at {:#x} overlap the mapping of {p:#x} bytes at {:#x}, whose unmap has not finished",
        16 * p,
        16 * p
    );
    assert_refused(&space, batch([1, 16, 2]), libc::EBUSY, &message);
    drop(list);
    space.unmap(16 * p, p).unwrap();
    space.map_batch(batch([1, 16, 2])).unwrap();
}

#[test]
fn a_batch_that_meets_the_limit_of_the_table_leaves_nothing() {
    let p = page_size();
    let space = IoAddressSpace::builder().table_limit(64 * 1024).build();
    space.map(0, pages(1), ReadWrite).unwrap();
    // Two neighbours in a place of their own take a node.
    let far_apart = (1..1000).flat_map(|place| {
        let at = place << 40;
        [(at, pages(1), Read), (at + p, pages(1), Read)]
    });
    let error = space.map_batch(far_apart).unwrap_err();
    assert!(matches!(
        error,
        Error::TableLimit {
            limit: 0x1_0000,
            ..
        }
    ));
    assert_eq!(error.errno(), libc::ENOSPC);
    let stats = space.stats();
    assert_eq!((stats.mappings, stats.table_bytes), (1, 0));
    assert_eq!(stats.maps, stats.unmaps + 1);
    space.write(0, &[1]).unwrap();
}

#[test]
fn batches_of_nothing_succeed() {
    let space = IoAddressSpace::new();
    space.map_batch([]).unwrap();
    assert_eq!(space.unmap_batch(&[]).unwrap(), 0);
    assert_eq!(space.unmap_batch(&[(0, page_size())]).unwrap(), 0);
}

#[test]
fn who_finds_a_mapping_of_a_batch_finds_those_before() {
    let p = page_size();
    // Far from each other, so that each takes some time.
    let places = (0..64).map(|place| place << 30);
    for _ in 0..300 {
        let space = IoAddressSpace::new();
        let looks = Arc::new(AtomicBool::new(false));
        let reader = {
            let (space, looks, places) = (space.clone(), looks.clone(), places.clone());
            thread::spawn(move || {
                let handle = space.handle();
                within("the last mapping of the batch is found", || {
                    looks.store(true, Ordering::Relaxed);
                    (0..100).any(|_| handle.read(63 << 30, &mut [0]).is_ok())
                });
                places.for_each(|at| handle.read(at, &mut [0]).unwrap());
            })
        };
        let mappings = batch(places.clone().map(|at| at / p));
        within("the reader looks", || looks.load(Ordering::Relaxed));
        space.map_batch(mappings).unwrap();
        ended("the reader finds all of the batch", reader);
    }
}

#[test]
fn a_batch_of_unmaps_is_refused_for_any_of_them() {
    let p = page_size();
    let space = IoAddressSpace::new();
    space.map_batch(batch([1, 3])).unwrap();
    space.map(16 * p, pages(4), ReadWrite).unwrap();

    let last = u64::MAX - p + 1;
    for (range, errno, message) in [
        (
            (1, p),
            libc::EINVAL,
            format!("address 0x1 is not a multiple of {p:#x}"),
        ),
        (
            (0, p + 1),
            libc::EINVAL,
            format!("size {:#x} is not a multiple of {p:#x}", p + 1),
        ),
        (
            (5 * p, 0),
            libc::EINVAL,
            format!("a range of no bytes at {:#x}", 5 * p),
        ),
        (
            (last, 2 * p),
            libc::EOVERFLOW,
            format!(
                "{:#x} bytes at {last:#x} end beyond the 64-bit address space",
                2 * p
            ),
        ),
        (
            (17 * p, 8 * p),
            libc::EINVAL,
            format!(
                "{:#x} bytes at {:#x} would cut the mapping of {:#x} bytes at {:#x}",
                8 * p,
                17 * p,
                4 * p,
                16 * p
            ),
        ),
    ] {
        let error = space.unmap_batch(&[(p, p), range, (3 * p, p)]).unwrap_err();
        assert_eq!((error.errno(), error.to_string()), (errno, message));
        assert_eq!((space.mappings(), space.stats().unmaps), (3, 0));
        space.write(p, &[1]).unwrap();
    }
    assert_eq!(space.unmap_batch(&[(p, p), (3 * p, p)]).unwrap(), 2 * p);
    assert_eq!((space.mappings(), space.stats().unmaps), (1, 2));
}

#[test]
fn ranges_of_a_batch_may_overlap_and_each_mapping_is_told_of_once() {
    let p = page_size();
    let space = IoAddressSpace::new();
    space.map_batch(batch([1, 2, 3])).unwrap();
    let told = Arc::new(Mutex::new(Vec::new()));
    let notice = {
        let told = told.clone();
        move |iova: u64, size: u64| told.lock().unwrap().push((iova, size))
    };
    let _pinner = space.pinner("watcher", Interest::All, Arc::new(notice));
    let ranges = [(2 * p, 2 * p), (0, 3 * p), (2 * p, p), (0, 3 * p)];
    assert_eq!(space.unmap_batch(&ranges).unwrap(), 3 * p);
    assert_eq!(*told.lock().unwrap(), [(p, p), (2 * p, p), (3 * p, p)]);
    assert_eq!(space.mappings(), 0);
}

#[test]
fn a_batch_of_unmaps_names_the_holders_of_what_is_left() {
    let p = page_size();
    for policy in [UnmapPolicy::Revoked, UnmapPolicy::Restore] {
        let space = IoAddressSpace::new().named("queue 7");
        space.map_batch(batch([1, 3, 5])).unwrap();
        let list = space.scatter(3 * p, 8, Read).unwrap();
        let ranges = [(p, p), (3 * p, p), (5 * p, p), (2 * p, 2 * p)];
        let error = space.unmap_batch_with(&ranges, at_once().policy(policy));
        let Err(Error::Deadline {
            unmapped,
            left,
            holders,
        }) = error
        else {
            panic!("{error:?}");
        };
        assert_eq!((unmapped, left), (2 * p, p));
        assert_eq!(holders.len(), 1);
        assert_eq!(
            (holders[0].name.as_str(), holders[0].iova),
            ("queue 7", 3 * p)
        );

        let read = space.read(3 * p, &mut [0]).map_err(|error| error.errno());
        match policy {
            UnmapPolicy::Restore => read.unwrap(),
            _ => assert_eq!(read, Err(libc::EBUSY)),
        }
        drop(list);
        assert_eq!(space.unmap_batch(&ranges).unwrap(), p);
    }
}

#[test]
fn a_batch_beside_an_unmap_that_runs_is_refused() {
    let p = page_size();
    let space = IoAddressSpace::new();
    space.map_batch(batch([1, 3])).unwrap();
    beside_an_unmap(&space, 3 * p, p, || {
        let error = space.unmap_batch(&[(p, p), (3 * p, p)]).unwrap_err();
        assert!(matches!(error, Error::Unmapping { mapped, .. } if mapped == 3 * p));
        assert_eq!(error.errno(), libc::EBUSY);
        space.write(p, &[1]).unwrap();
    });
}

#[test]
fn batches_from_inside_an_access_map_and_do_not_unmap() {
    let p = page_size();
    let space = IoAddressSpace::new();
    space.map_batch(batch([1, 5])).unwrap();
    inside_an_access(&space, p, || {
        let error = space.unmap_batch(&[(5 * p, p), (p, p)]).unwrap_err();
        assert!(matches!(error, Error::InsideAccess { iova, .. } if iova == 5 * p));
        assert_eq!(error.errno(), libc::EDEADLK);
        space.map_batch(batch([7, 8])).unwrap();
    });
    assert_eq!(space.mappings(), 4);
}

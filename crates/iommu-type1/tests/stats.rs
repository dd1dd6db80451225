// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Each counter moves as it says, and no other with it.

mod common;

use std::sync::Arc;

use common::at_once;
use iommu_type1::{page_size, Backing, Interest, IoAddressSpace, Stats, Transfer, UnmapPolicy};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, Permissions};

use Permissions::{Read, ReadWrite};

fn map(space: &IoAddressSpace, page: u64) {
    let backing = Backing::anonymous(page_size() as usize).unwrap();
    space.map(page * page_size(), backing, ReadWrite).unwrap();
}

/// What is different now: made by setting it in the counters before.
#[track_caller]
fn assert_moved(space: &IoAddressSpace, stats: &mut Stats, change: impl FnOnce(&mut Stats)) {
    change(stats);
    assert_eq!(space.stats(), *stats);
}

#[test]
fn maps_and_unmaps_are_counted_by_mapping() {
    let p = page_size();
    let space = IoAddressSpace::new();
    let mut stats = Stats::default();
    assert_moved(&space, &mut stats, |_| ());
    map(&space, 0);
    assert_moved(&space, &mut stats, |stats| {
        (stats.mappings, stats.maps) = (1, 1);
    });
    let batch = [2, 3].map(|n| {
        let backing = Backing::anonymous(page_size() as usize).unwrap();
        ((n << 40) * p, backing, Read)
    });
    space.map_batch(batch).unwrap();
    let table_bytes = space.stats().table_bytes;
    assert!(table_bytes > 0);
    assert_moved(&space, &mut stats, |stats| {
        (stats.mappings, stats.maps, stats.table_bytes) = (3, 3, table_bytes);
    });
    let refused = Backing::anonymous(p as usize).unwrap();
    space.map(0, refused, Read).unwrap_err();
    assert_moved(&space, &mut stats, |_| ());
    assert_eq!(space.unmap_all().unwrap(), 3 * p);
    assert_moved(&space, &mut stats, |stats| {
        (stats.mappings, stats.unmaps, stats.table_bytes) = (0, 3, 0);
    });
    assert_eq!(space.unmap_all().unwrap(), 0);
    assert_moved(&space, &mut stats, |_| ());
}

#[test]
fn an_access_that_does_not_find_all_of_it_is_one_miss() {
    let p = page_size();
    let space = IoAddressSpace::new();
    map(&space, 0);
    let backing = Backing::anonymous(p as usize).unwrap();
    space.map(p, backing, Read).unwrap();
    let mut stats = space.stats();
    let handle = space.handle();
    let mut buf = [0; 16];

    // What succeeds, and what is refused before anything is looked up.
    handle.write(p - 16, &buf).unwrap();
    space.read(p - 8, &mut buf).unwrap();
    space.dma_rw(0, Transfer::Write(&[])).unwrap_err();
    handle.read(u64::MAX, &mut buf).unwrap_err();
    handle
        .load::<u32>(GuestAddress(2), std::sync::atomic::Ordering::Relaxed)
        .unwrap_err();
    assert_moved(&space, &mut stats, |_| ());

    let missed = |stats: &mut Stats| stats.misses += 1;
    handle.read(2 * p - 8, &mut buf).unwrap_err();
    assert_moved(&space, &mut stats, missed);
    space.write(p - 8, &buf).unwrap_err();
    assert_moved(&space, &mut stats, missed);
    handle
        .store(1_u32, GuestAddress(p), std::sync::atomic::Ordering::Relaxed)
        .unwrap_err();
    assert_moved(&space, &mut stats, missed);
    space.scatter(2 * p - 8, 16, Read).unwrap_err();
    assert_moved(&space, &mut stats, missed);
    space
        .memory()
        .read_slice(&mut buf, GuestAddress(2 * p))
        .unwrap_err();
    assert_moved(&space, &mut stats, missed);
    let pinner = space.pinner("pinner", Interest::Holder, Arc::new(|_, _| ()));
    pinner.pin_pages(p, 2, Read).unwrap_err();
    assert_moved(&space, &mut stats, missed);
}

#[test]
fn leases_are_counted_by_mapping_and_holder() {
    let p = page_size();
    let space = IoAddressSpace::new();
    (0..20).for_each(|page| map(&space, page));
    let mut stats = space.stats();
    let all = space.scatter(0, 20 * p as usize, Read).unwrap();
    assert_moved(&space, &mut stats, |stats| stats.leases = 20);
    let guard = space.memory();
    for _ in 0..2 {
        guard.write_slice(&[1; 8], GuestAddress(p - 4)).unwrap();
        guard.write_slice(&[1; 8], GuestAddress(4 * p - 4)).unwrap();
    }
    assert_moved(&space, &mut stats, |stats| stats.leases = 24);
    drop(all);
    assert_moved(&space, &mut stats, |stats| stats.leases = 4);
    drop(guard);
    assert_moved(&space, &mut stats, |stats| stats.leases = 0);
}

#[test]
fn an_unmap_at_its_deadline_counts_what_it_leaves() {
    let p = page_size();
    let space = IoAddressSpace::new();
    (0..4).for_each(|page| map(&space, page << 20));
    let mut stats = space.stats();
    let step = p << 20;
    let table_bytes = stats.table_bytes;
    assert!(table_bytes > 0);

    // Nobody holds anything: there is nothing to wait for.
    space.unmap(3 * step, p).unwrap();
    assert_moved(&space, &mut stats, |stats| {
        (stats.mappings, stats.unmaps) = (3, 1)
    });

    let list = space.scatter(step, 1, Read).unwrap();
    let all = 4 * step;
    space.unmap_with(0, all, at_once()).unwrap_err();
    assert_moved(&space, &mut stats, |stats| {
        (stats.mappings, stats.leaving, stats.leases) = (1, 1, 1);
        (stats.unmaps, stats.unmap_waits, stats.stragglers) = (3, 1, 1);
        stats.table_bytes = 0;
    });
    let restore = at_once().policy(UnmapPolicy::Restore);
    space.unmap_with(0, all, restore).unwrap_err();
    assert_moved(&space, &mut stats, |stats| {
        (stats.leaving, stats.unmap_waits, stats.stragglers) = (0, 2, 2);
    });
    drop(list);
    space.unmap_with(0, all, at_once()).unwrap();
    assert_moved(&space, &mut stats, |stats| {
        (stats.mappings, stats.leases, stats.unmaps) = (0, 0, 4);
    });
}

#[test]
fn spaces_with_fences_never_ask_the_kernel_for_barriers() {
    let space = IoAddressSpace::new();
    map(&space, 0);
    let handle = space.handle();
    for _ in 0..(1 << 16) + 1 {
        handle.read(0, &mut [0]).unwrap();
    }
    space.unmap_all().unwrap();
    assert_eq!(space.stats().membarriers, 0);
}

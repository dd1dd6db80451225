// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whoever uses what a list takes away is waited for.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

use iommu_type1::{Change, Error, HolderKind, Interest, UnmapPolicy};
use vm_memory::Permissions::ReadWrite;

use crate::common::{at_once, beside_an_unmap};
use crate::{byte, iotlb, map, p, unmap};

#[test]
fn users_of_all_that_goes_are_waited_for_and_named_once() {
    for policy in [UnmapPolicy::Revoked, UnmapPolicy::Restore] {
        let space = iotlb().named("queue 7");
        space.change([map(0, 6, 10), map(8, 1, 80)]).unwrap();
        let list = space.scatter(p(5), 4, ReadWrite).unwrap();
        let changes = [unmap(0, 1), map(2, 1, 20), unmap(4, 1), unmap(8, 1)];
        let error = space
            .change_with(changes, at_once().policy(policy))
            .unwrap_err();
        let Error::Deadline { left, holders, .. } = &error else {
            panic!("{error}");
        };
        assert_eq!(*left, p(3));
        let kinds: Vec<_> = holders.iter().map(|holder| holder.kind).collect();
        assert_eq!(kinds, [HolderKind::Lease]);
        let found: Vec<_> = [0, 1, 2, 3, 4, 8].map(|page| byte(&space, page)).into();
        let miss = Err(libc::EAGAIN);
        match policy {
            UnmapPolicy::Restore => {
                assert_eq!(found, [10, 11, 12, 13, 14, 80].map(Ok));
            }
            _ => assert_eq!(found, [miss, Ok(11), Ok(20), Ok(13), miss, miss]),
        }
        // The addresses can be used, and who unmaps them waits for whom this has waited for.
        space.change_with([map(0, 1, 1)], at_once()).ok();
        let waits = space.change_with([unmap(0, 1)], at_once());
        assert!(matches!(waits, Err(Error::Deadline { .. })), "{waits:?}");
        drop(list);
        space.change([unmap(0, 1)]).unwrap();
        space.change([Change::UnmapAll]).unwrap();
        assert_eq!(space.mappings(), 0);
    }
}

#[test]
fn pins_of_each_part_are_told() {
    let space = iotlb();
    space.change([map(0, 4, 1)]).unwrap();
    let told = Arc::new(std::sync::Mutex::new(Vec::new()));
    let heard = told.clone();
    let notice = move |iova, size| heard.lock().unwrap().push((iova, size));
    let pinner = space.pinner("pinner", Interest::All, Arc::new(notice));
    let pinned = pinner.pin_pages(p(2), 1, ReadWrite).unwrap();
    space.change([unmap(0, 1), unmap(3, 1)]).unwrap();
    assert_eq!(*told.lock().unwrap(), [(0, p(1)), (p(3), p(1))]);
    let error = space.change_with([unmap(1, 2)], at_once()).unwrap_err();
    assert!(error.to_string().contains("pinner"), "{error}");
    drop(pinned);
    space.change([Change::UnmapAll]).unwrap();
    assert_eq!(space.mappings(), 0);
}

#[test]
fn who_uses_what_was_replaced_before_is_named_once_for_all_holes() {
    let space = iotlb();
    space.change([map(0, 9, 1)]).unwrap();
    let list = space.scatter(0, 4, ReadWrite).unwrap();
    space.change_with([map(0, 9, 2)], at_once()).unwrap_err();
    let holes = [unmap(1, 1), unmap(3, 2), unmap(8, 1)];
    let refused = space.change_with(holes, at_once()).unwrap_err();
    let Error::Deadline { holders, .. } = &refused else {
        panic!("{refused}");
    };
    assert_eq!(holders.len(), 1, "{refused}");
    drop(list);
    space.change([unmap(8, 1)]).unwrap();
    assert_eq!(space.stats().leaving, 0);
}

#[test]
fn everything_leaves_out_what_another_unmap_is_about() {
    let space = iotlb();
    space.change([map(0, 1, 1), map(4, 2, 1)]).unwrap();
    beside_an_unmap(&space, p(4), p(2), || {
        space.change([Change::UnmapAll, map(1, 1, 2)]).unwrap();
        assert_eq!(space.stats().leaving, 1);
        for changes in [vec![unmap(4, 2)], vec![Change::UnmapAll, map(5, 1, 2)]] {
            let error = space.change(changes).unwrap_err();
            assert!(matches!(error, Error::Unmapping { .. }), "{error}");
        }
    });
    assert_eq!((space.mappings(), space.stats().leaving), (1, 0));
}

#[test]
fn what_was_changed_meanwhile_is_not_put_back() {
    let space = iotlb();
    space.change([map(0, 2, 1)]).unwrap();
    let list = space.scatter(0, 4, ReadWrite).unwrap();
    // Whoever is told of an unmap is in the middle of it.
    let (other, calls) = (space.clone(), Arc::new(AtomicUsize::new(0)));
    let counts = calls.clone();
    let notice = move |_, _| {
        if counts.fetch_add(1, Ordering::Relaxed) == 0 {
            assert_eq!(byte(&other, 1), Err(libc::EAGAIN));
            other.change([map(1, 1, 9)]).unwrap();
        }
    };
    let _told = space.pinner("told", Interest::All, Arc::new(notice));
    let options = at_once().policy(UnmapPolicy::Restore);
    space.change_with([unmap(0, 2)], options).unwrap_err();
    assert_eq!(calls.load(Ordering::Relaxed), 1);
    assert_eq!(
        (byte(&space, 0), byte(&space, 1)),
        (Err(libc::EAGAIN), Ok(9))
    );
    drop(list);
    space.change([Change::UnmapAll]).unwrap();
    assert_eq!(space.mappings(), 0);
}

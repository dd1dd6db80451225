// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a list does, and what is refused.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread;

use iommu_type1::{page_size, Change, Error, IoAddressSpace, Profile};
use vm_memory::Permissions::{self, ReadWrite};

use crate::common::deadline::ended;
use crate::common::{at_once, inside_an_access};
use crate::{byte, iotlb, map, memory, p, unmap};

#[test]
fn a_full_table_can_be_emptied() {
    let limit = 64 << 10;
    let space = IoAddressSpace::builder()
        .profile(Profile::Iotlb)
        .table_limit(limit)
        .build();
    // Pairs that only a node of their own tells apart.
    let full = (0..64).find_map(|pair| {
        let pair = [map(512 * pair, 1, 1), map(512 * pair + 1, 1, 2)];
        space.change(pair).err()
    });
    assert!(matches!(full, Some(Error::TableLimit { .. })), "{full:?}");
    space.change([unmap(0, 1)]).unwrap();
    assert_eq!(byte(&space, 0), Err(libc::EAGAIN));
    space.change([Change::UnmapAll]).unwrap();
    assert_eq!(space.mappings(), 0);
    space.change([map(0, 1, 7)]).unwrap();
    assert_eq!(byte(&space, 0), Ok(7));
}

/// What is replaced and still used counts as entries.
#[test]
fn a_full_list_of_entries_can_be_emptied() {
    let space = IoAddressSpace::builder()
        .profile(Profile::Iotlb)
        .entry_limit(1)
        .build();
    space.change([map(0, 1, 1)]).unwrap();
    let list = space.scatter(0, 4, ReadWrite).unwrap();
    let refused = space.change_with([map(0, 1, 2)], at_once());
    assert!(matches!(refused, Err(Error::Deadline { .. })));
    for changes in [[unmap(0, 1)], [Change::UnmapAll]] {
        let refused = space.change_with(changes, at_once());
        assert!(matches!(refused, Err(Error::Deadline { .. })));
        assert_eq!(byte(&space, 0), Err(libc::EAGAIN));
    }
    drop(list);
    space.change([Change::UnmapAll]).unwrap();
    space.change([map(0, 1, 3)]).unwrap();
}

#[test]
fn other_profiles_know_no_lists_of_changes() {
    for profile in [Profile::Type1v1, Profile::Type1v2, Profile::Iommufd] {
        let space = IoAddressSpace::builder().profile(profile).build();
        let error = space.change([map(0, 1, 0)]).unwrap_err();
        assert!(matches!(error, Error::NotInProfile(_)), "{error}");
    }
}

#[test]
fn the_last_has_the_say() {
    let space = iotlb();
    space
        .change([
            map(0, 8, 10),
            unmap(2, 2),
            map(3, 2, 50),
            unmap(9, 1),
            map(9, 1, 90),
        ])
        .unwrap();
    let found: Vec<_> = (0..10).map(|page| byte(&space, page)).collect();
    let miss = Err(libc::EAGAIN);
    let expected = [
        Ok(10),
        Ok(11),
        miss,
        Ok(50),
        Ok(51),
        Ok(15),
        Ok(16),
        Ok(17),
        miss,
        Ok(90),
    ];
    assert_eq!(found, expected);
    assert_eq!(space.mappings(), 4);
    space
        .change([map(0, 1, 1), Change::UnmapAll, map(5, 1, 2)])
        .unwrap();
    assert_eq!((space.mappings(), byte(&space, 5)), (1, Ok(2)));
    assert_eq!(space.stats().maps, 4 + 1);
}

#[test]
fn what_is_wrong_in_one_changes_nothing() {
    let space = IoAddressSpace::builder()
        .profile(Profile::Iotlb)
        .entry_limit(3)
        .build();
    space.change([map(0, 4, 1)]).unwrap();
    let size = page_size();
    let wrong = [
        (Change::Unmap { iova: 1, size }, libc::EINVAL),
        (Change::Unmap { iova: 0, size: 0 }, libc::EINVAL),
        (
            Change::Unmap {
                iova: 0_u64.wrapping_sub(size),
                size: 2 * size,
            },
            libc::EOVERFLOW,
        ),
        (
            Change::Map {
                iova: 0,
                backing: memory(1, 0),
                prot: Permissions::No,
            },
            libc::EINVAL,
        ),
        // Of four pages two stay apart, and there would be four mappings.
        (map(10, 1, 0), libc::ENOSPC),
    ];
    for (wrong, errno) in wrong {
        let error = space
            .change([map(1, 2, 7), wrong, map(8, 1, 3)])
            .unwrap_err();
        assert_eq!(error.errno(), errno, "{error}");
        assert_eq!((space.mappings(), byte(&space, 1)), (1, Ok(2)));
    }
    space.change([map(1, 2, 7)]).unwrap();
    assert_eq!(space.mappings(), 3);
    space.change([]).unwrap();
}

#[test]
fn changes_from_inside_an_access_are_refused_where_they_would_wait() {
    let space = iotlb();
    space.change([map(0, 1, 0), map(2, 1, 0)]).unwrap();
    inside_an_access(&space, 0, || {
        // Whoever uses what goes would be waited for, this access too.
        for change in [map(0, 1, 1), unmap(2, 1), Change::UnmapAll] {
            let error = space.change([change]).unwrap_err();
            assert!(matches!(error, Error::InsideAccess { .. }), "{error}");
        }
        space.change([map(8, 1, 8), unmap(9, 1)]).unwrap();
    });
    assert_eq!(space.mappings(), 3);
}

#[test]
fn an_access_finds_no_hole_where_both_have_something() {
    let space = iotlb();
    space.change([map(0, 8, 0)]).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let reader = {
        let (space, stop) = (space.clone(), stop.clone());
        thread::spawn(move || {
            let handle = space.handle();
            let mut bytes = vec![0; p(8) as usize];
            let mut reads = 0;
            while !stop.load(Ordering::Relaxed) {
                handle.read(0, &mut bytes).unwrap();
                reads += 1;
            }
            reads
        })
    };
    for round in 0..2000_u64 {
        let page = round % 7;
        let changes = [
            map(page, 1, 1),
            unmap(page, 2),
            map(page, 2, 3),
            unmap(20, 1),
        ];
        space.change(changes).unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    assert!(ended("a reader ends when it is told to", reader) > 0);
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pins of what is gone from an IOTLB, but for those who have pinned it: whoever unmaps there waits for them, too,
//! however often.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Duration;

use iommu_type1::{
    page_size, Backing, Change, Error, HolderKind, Interest, IoAddressSpace, Pinner, Profile,
    Result, UnmapOptions, UnmapPolicy,
};
use vm_memory::Permissions::ReadWrite;

fn p(pages: u64) -> u64 {
    pages * page_size()
}

fn iotlb() -> IoAddressSpace {
    IoAddressSpace::builder().profile(Profile::Iotlb).build()
}

fn map(page: u64, pages: u64) -> Change {
    Change::Map {
        iova: p(page),
        backing: Backing::anonymous(p(pages) as usize).unwrap(),
        prot: ReadWrite,
    }
}

fn unmap(page: u64, pages: u64) -> Change {
    Change::Unmap {
        iova: p(page),
        size: p(pages),
    }
}

fn at_once() -> UnmapOptions {
    UnmapOptions::new().deadline(Duration::ZERO)
}

/// Does not let go, and counts how often it is told.
fn stubborn(space: &IoAddressSpace) -> (Pinner, Arc<AtomicUsize>) {
    let told = Arc::new(AtomicUsize::new(0));
    let counter = told.clone();
    let notice = move |_, _| {
        counter.fetch_add(1, Ordering::Relaxed);
    };
    (
        space.pinner("stubborn", Interest::Holder, Arc::new(notice)),
        told,
    )
}

#[track_caller]
fn is_held_by_one(refused: Result<()>) {
    let Err(Error::Deadline { left, holders, .. }) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!((left, holders.len()), (p(2), 1), "{holders:?}");
    assert_eq!(holders[0].kind, HolderKind::Pin);
}

type Again = fn(&IoAddressSpace) -> Result<()>;

const WAYS: [Again; 4] = [
    |space| space.change_with([unmap(4, 2)], at_once()),
    |space| space.change_with([Change::UnmapAll], at_once()),
    |space| space.unmap_with(p(4), p(2), at_once()).map(drop),
    |space| space.change_with([unmap(4, 2), map(4, 2)], at_once()),
];

#[test]
fn each_unmap_of_what_is_pinned_waits_again() {
    for revoked in [false, true] {
        for way in WAYS {
            for kept in [false, true] {
                let space = iotlb();
                let (pinner, told) = stubborn(&space);
                space.change([map(4, 2)]).unwrap();
                let pinned = pinner.pin_pages(p(5), 1, ReadWrite).unwrap();
                is_held_by_one(match revoked {
                    true => space.unmap_with(p(4), p(2), at_once()).map(drop),
                    false => space.change_with([unmap(4, 2)], at_once()),
                });
                let pinned = match kept {
                    true => {
                        pinned.keep();
                        None
                    }
                    false => Some(pinned),
                };
                for _ in 0..3 {
                    let before = told.load(Ordering::Relaxed);
                    is_held_by_one(way(&space));
                    assert!(told.load(Ordering::Relaxed) > before);
                }
                match pinned {
                    Some(pinned) => drop(pinned),
                    None => pinner.unpin_pages(p(5), 1).unwrap(),
                }
                way(&space).unwrap();
                space.change([Change::UnmapAll]).unwrap();
                assert_eq!((space.mappings(), space.stats().leaving), (0, 0));
            }
        }
    }
}

#[test]
fn the_end_of_a_set_waits_for_pins_of_what_it_has_had() {
    let space = iotlb();
    let (pinner, _told) = stubborn(&space);
    let set = space.mapping_set();
    set.map(p(4), Backing::anonymous(p(2) as usize).unwrap(), ReadWrite)
        .unwrap();
    let pinned = pinner.pin_pages(p(4), 1, ReadWrite).unwrap();
    is_held_by_one(space.change_with([unmap(4, 2)], at_once()));
    let other = space.mapping_set();
    assert_eq!(other.close().unwrap(), 0);
    is_held_by_one(set.close().map(drop));
    drop(pinned);
    space.change([unmap(4, 2)]).unwrap();
}

/// What is pinned of a mapping is told from what is gone of it.
#[test]
fn pins_of_parts_that_stay_are_waited_for_when_they_go_only() {
    let space = iotlb();
    let (pinner, _told) = stubborn(&space);
    space.change([map(0, 8)]).unwrap();
    let list = space.scatter(0, 8, ReadWrite).unwrap();
    let pinned = pinner.pin_pages(p(6), 1, ReadWrite).unwrap();
    let refused = space.change_with([unmap(2, 1)], at_once());
    let Err(Error::Deadline { holders, .. }) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(holders[0].kind, HolderKind::Lease);
    drop(list);
    space.change_with([unmap(1, 3)], at_once()).unwrap();
    let refused = space.change_with([Change::UnmapAll], at_once());
    let Err(Error::Deadline { left, holders, .. }) = refused else {
        panic!("{refused:?}");
    };
    // The page in front is not held.
    assert_eq!((left, holders.len()), (p(4), 1), "{holders:?}");
    drop(pinned);
    space.change([Change::UnmapAll]).unwrap();
}

/// An unmap of a part of what is gone waits for pins of that part, and leaves those of the rest to be waited for.
#[test]
fn kept_pins_of_another_part_are_still_waited_for() {
    let space = iotlb();
    let (pinner, _told) = stubborn(&space);
    space.change([map(4, 2)]).unwrap();
    pinner.pin_pages(p(5), 1, ReadWrite).unwrap().keep();
    is_held_by_one(space.change_with([unmap(4, 2)], at_once()));
    // Neither in the table nor leaving it, and waited for.
    assert!(!space.is_unmapped(p(5), p(1)).unwrap());
    space.change_with([unmap(4, 1)], at_once()).unwrap();
    is_held_by_one(space.change_with([unmap(4, 2)], at_once()));
    pinner.unpin_pages(p(5), 1).unwrap();
    space.change([unmap(4, 2)]).unwrap();
    assert_eq!((space.mappings(), space.stats().leaving), (0, 0));
    assert!(space.is_unmapped(p(4), p(2)).unwrap());
}

#[test]
fn pins_of_what_is_still_mapped_keep_nothing_of_what_is_gone() {
    let space = iotlb();
    let (pinner, _told) = stubborn(&space);
    space.change([map(4, 2)]).unwrap();
    pinner.pin_pages(p(5), 1, ReadWrite).unwrap().keep();
    space.change_with([unmap(4, 1)], at_once()).unwrap();
    assert_eq!((space.mappings(), space.stats().leaving), (1, 0));
}

/// What is gone of several is told, waited for and counted once.
#[test]
fn what_several_have_had_is_waited_for_once() {
    for kept in [false, true] {
        let space = iotlb();
        let (pinner, told) = stubborn(&space);
        let mut pinned = Vec::new();
        let changes = [map(4, 2), map(4, 2), map(4, 2), unmap(4, 2)];
        for (n, change) in changes.into_iter().enumerate() {
            assert_eq!(space.change_with([change], at_once()).is_err(), n > 0);
            if n < 3 {
                let pages = pinner.pin_pages(p(5), 1, ReadWrite).unwrap();
                match kept {
                    true => pages.keep(),
                    false => pinned.push(pages),
                }
            }
        }
        for way in WAYS {
            let before = told.load(Ordering::Relaxed);
            is_held_by_one(way(&space));
            assert_eq!(told.load(Ordering::Relaxed), before + 1);
            // One way maps.
            space.change_with([unmap(4, 2)], at_once()).unwrap_err();
        }
        drop(pinned);
        if kept {
            (0..3).for_each(|_| pinner.unpin_pages(p(5), 1).unwrap());
        }
        space.change([Change::UnmapAll]).unwrap();
        assert_eq!((space.mappings(), space.stats().leaving), (0, 0));
    }
}

#[test]
fn what_is_gone_of_mappings_that_overlap_is_counted_once() {
    let space = iotlb();
    let (pinner, _told) = stubborn(&space);
    let mut pinned = Vec::new();
    for (first, pages) in [(2, 4), (4, 4), (3, 2), (0, 3)] {
        let _held = space.change_with([map(first, pages)], at_once());
        pinned.push(
            pinner
                .pin_pages(p(first), pages as usize, ReadWrite)
                .unwrap(),
        );
    }
    for _ in 0..2 {
        let refused = space.change_with([Change::UnmapAll], at_once());
        let Err(Error::Deadline { left, .. }) = refused else {
            panic!("{refused:?}");
        };
        assert_eq!(left, p(8));
    }
    drop(pinned);
    space.change([Change::UnmapAll]).unwrap();
    assert_eq!((space.mappings(), space.stats().leaving), (0, 0));
}

/// However often it is tried in vain.
#[test]
fn a_replacement_that_is_undone_leaves_nothing_behind() {
    for profile in [Profile::Type1v2, Profile::Iotlb] {
        let page = || Backing::anonymous(p(1) as usize).unwrap();
        let space = IoAddressSpace::builder().profile(profile).build();
        space.map(0, page(), ReadWrite).unwrap();
        let (pinner, _) = stubborn(&space);
        let pinned = pinner.pin_pages(0, 1, ReadWrite).unwrap();
        let leased = space.scatter(0, 1, ReadWrite).unwrap();
        let restoring = at_once().policy(UnmapPolicy::Restore);
        let in_vain = || {
            for _ in 0..8 {
                let replaced = space.replace_with(0, page(), ReadWrite, restoring);
                assert_eq!(replaced.unwrap_err().errno(), libc::EDEADLK);
            }
            space.stats().leaving
        };
        assert_eq!(in_vain(), 1, "what is leased and pinned");
        drop(leased);
        assert_eq!(in_vain(), 1, "what is pinned");
        drop(pinned);
        space.replace_with(0, page(), ReadWrite, restoring).unwrap();
        assert_eq!(space.unmap(0, p(1)).unwrap(), p(1));
        assert_eq!(space.stats().leaving, 0);
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pages that are dirty because they are pinned, or marked by whoever knows; and the marks of what is unmapped.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use iommu_type1::{
    page_size, Backing, Error, Interest, IoAddressSpace, Pinner, Profile, UnmapPolicy,
};
use vm_memory::{Bytes, Permissions};
use Permissions::{Read, ReadWrite};

use super::taken;
use crate::common::deadline::{ended, within, DEADLINE};

/// 8 pages at page 16, and 2 behind them.
fn space(profile: Profile) -> IoAddressSpace {
    let space = IoAddressSpace::builder()
        .profile(profile)
        .unmap_deadline(Duration::from_millis(20))
        .build();
    map(&space);
    space
}

fn map(space: &IoAddressSpace) {
    for (page, count) in [(16, 8), (24, 2)] {
        let backing = Backing::anonymous((count * page_size()) as usize).unwrap();
        space.map(page * page_size(), backing, ReadWrite).unwrap();
    }
}

fn pinner(space: &IoAddressSpace) -> Pinner {
    space.pinner("pinner", Interest::Holder, Arc::new(|_, _| ()))
}

#[test]
fn pinned_pages_are_dirty_each_time_and_once_more() {
    let p = page_size();
    let space = space(Profile::Type1v2);
    let pinner = pinner(&space);
    // Whatever they are pinned for.
    let before = pinner.pin_pages(17 * p, 1, Read).unwrap();
    space.start_dirty_tracking().unwrap();
    assert_eq!(taken(&space, 16, 10), [17].into());
    let over_both = pinner.pin_pages(23 * p, 2, ReadWrite).unwrap();
    let twice = pinner.pin_pages(24 * p, 1, ReadWrite).unwrap();
    for _ in 0..2 {
        assert_eq!(taken(&space, 24, 2), [24].into());
        assert_eq!(taken(&space, 16, 10), [17, 23, 24].into());
    }
    drop(over_both);
    drop(before);
    assert_eq!(taken(&space, 16, 10), [17, 23, 24].into());
    assert_eq!(taken(&space, 16, 10), [24].into());
    twice.keep();
    assert_eq!(taken(&space, 16, 10), [24].into());
    pinner.unpin_pages(24 * p, 1).unwrap();
    assert_eq!(taken(&space, 16, 10), [24].into());
    assert!(taken(&space, 16, 10).is_empty());
    // Between two looks.
    drop(pinner.pin_pages(20 * p, 1, Read).unwrap());
    assert_eq!(taken(&space, 16, 10), [20].into());
    assert!(taken(&space, 16, 10).is_empty());
}

#[test]
fn by_other_rules_pinned_pages_are_dirty_when_they_are_written() {
    let p = page_size();
    for profile in [Profile::Iommufd, Profile::Iotlb] {
        let space = space(profile);
        let pinner = pinner(&space);
        let pinned = pinner.pin_pages(17 * p, 1, ReadWrite).unwrap();
        space.start_dirty_tracking().unwrap();
        let _later = pinner.pin_pages(18 * p, 1, ReadWrite).unwrap();
        assert!(taken(&space, 16, 10).is_empty());
        pinned.page(0).unwrap().write_obj(1_u8, 0).unwrap();
        assert_eq!(taken(&space, 16, 10), [17].into());
    }
}

#[test]
fn v1_keeps_no_dirty_pages() {
    let space = space(Profile::Type1v1);
    let error = space.start_dirty_tracking().unwrap_err();
    assert_eq!(error.errno(), libc::EACCES);
    let error = space.take_dirty(16 * page_size(), page_size()).unwrap_err();
    assert!(matches!(error, Error::NotTracking { .. }), "{error}");
}

#[test]
fn who_writes_unseen_says_so() {
    let p = page_size();
    let space = space(Profile::Type1v2);
    space
        .map(0, Backing::anonymous(p as usize).unwrap(), Read)
        .unwrap();
    // Where nobody tracks there is nothing to do.
    space.mark_dirty(16 * p, 1).unwrap();
    space.start_dirty_tracking().unwrap();
    space.mark_dirty(16 * p, 0).unwrap();
    assert!(taken(&space, 0, 100).is_empty());
    space.mark_dirty(23 * p + 5, p as usize).unwrap();
    assert_eq!(taken(&space, 0, 100), [23, 24].into());
    for (iova, len, errno, completed) in [
        (0, 1, libc::EPERM, 0),
        (25 * p, p + 1, libc::EINVAL, p as usize),
        (u64::MAX, 2, libc::EOVERFLOW, 0),
    ] {
        let error = space.mark_dirty(iova, len as usize).unwrap_err();
        assert_eq!((error.errno(), error.completed()), (errno, completed));
    }
    assert_eq!(taken(&space, 0, 100), [25].into());
}

#[test]
fn an_unmap_hands_over_the_marks_of_what_it_removes() {
    let p = page_size();
    let space = space(Profile::Type1v2);
    let not_tracked = space.unmap_dirty(16 * p, p).unwrap_err();
    assert!(matches!(not_tracked, Error::NotTracking { .. }));
    space.start_dirty_tracking().unwrap();
    space.write(18 * p, &[1]).unwrap();
    space.write(25 * p, &[1]).unwrap();
    let errnos = [(16 * p, p), (16 * p + 1, p), (16 * p, 0)].map(|(iova, size)| {
        let error = space.unmap_dirty(iova, size).unwrap_err();
        error.errno()
    });
    assert_eq!(errnos, [libc::EINVAL; 3]);
    let (bytes, dirty) = space.unmap_dirty(16 * p, 8 * p).unwrap();
    assert_eq!(bytes, 8 * p);
    assert!(dirty.iter().eq([18 * p]));
    // Those elsewhere are not touched.
    let (bytes, dirty) = space.unmap_dirty(0, 100 * p).unwrap();
    assert_eq!((bytes, dirty.len()), (2 * p, 1));
    assert!(dirty.iter().eq([25 * p]));
    let (bytes, dirty) = space.unmap_dirty(0, 100 * p).unwrap();
    assert_eq!((bytes, dirty.is_empty()), (0, true));
    assert_eq!(space.stats().dirty_bytes, 0);
    map(&space);
    assert!(taken(&space, 0, 100).is_empty());
}

#[test]
fn what_the_last_holder_writes_is_handed_over() {
    let p = page_size();
    let space = IoAddressSpace::builder().unmap_deadline(DEADLINE).build();
    map(&space);
    space.start_dirty_tracking().unwrap();
    let list = space.scatter(16 * p, 8 * p as usize, ReadWrite).unwrap();
    let pinned = pinner(&space).pin_pages(20 * p, 1, ReadWrite).unwrap();
    assert_eq!(taken(&space, 0, 100), [20].into());
    let unmapping = space.clone();
    let unmap = thread::spawn(move || unmapping.unmap_dirty(16 * p, 8 * p).unwrap());
    within("nobody finds what is being unmapped", || {
        space.read(16 * p, &mut [0]).is_err()
    });
    let slice = list.iter().next().unwrap();
    slice.write_slice(&[1], 3 * p as usize).unwrap();
    drop(pinned);
    drop(list);
    let (bytes, dirty) = ended("an unmap ends when nobody uses its range", unmap);
    assert_eq!(bytes, 8 * p);
    assert!(dirty.iter().eq([19 * p, 20 * p]));
}

#[test]
fn at_the_deadline_no_mark_is_lost() {
    let p = page_size();
    for policy in [UnmapPolicy::Revoked, UnmapPolicy::Restore] {
        let space = IoAddressSpace::builder()
            .unmap_deadline(Duration::from_millis(1))
            .unmap_policy(policy)
            .build();
        map(&space);
        space.start_dirty_tracking().unwrap();
        space.write(16 * p, &[1]).unwrap();
        space.write(24 * p, &[1]).unwrap();
        let list = space.scatter(24 * p, 1, ReadWrite).unwrap();
        let error = space.unmap_dirty(16 * p, 10 * p).unwrap_err();
        let Error::Deadline { unmapped, left, .. } = error else {
            panic!("{error}");
        };
        // The mapping that nobody holds is left, too: its marks would be gone.
        assert_eq!((unmapped, left), (0, 10 * p));
        assert_eq!(space.mappings(), 2);
        let is_there = space.read(16 * p, &mut [0]).is_ok();
        assert_eq!(is_there, policy == UnmapPolicy::Restore);
        drop(list);
        let (bytes, dirty) = space.unmap_dirty(16 * p, 10 * p).unwrap();
        assert_eq!(bytes, 10 * p);
        assert!(dirty.iter().eq([16 * p, 24 * p]));
    }
}

/// Parts of a mapping are replaced while somebody has slices of it: what is written there stays dirty.
#[test]
fn marks_of_what_was_cut_are_handed_over() {
    let p = page_size();
    let space = space(Profile::Iotlb);
    space.start_dirty_tracking().unwrap();
    space.write(17 * p, &[1]).unwrap();
    space.write(20 * p, &[1]).unwrap();
    let (bytes, dirty) = space.unmap_dirty(16 * p, 2 * p).unwrap();
    assert_eq!(bytes, 2 * p);
    assert!(dirty.iter().eq([17 * p]));
    assert_eq!(taken(&space, 0, 100), [20].into());
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An access that runs beyond the deadline of who wants to take away what it may use.

mod common;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use common::deadline::{ended, DEADLINE as LONG};
use common::log;
use iommu_type1::{
    page_size, Backing, Error, Interest, IoAddressSpace, ReaderBarrier, UnmapOptions, UnmapPolicy,
};
use vm_memory::Permissions::{Read, ReadWrite};

const DEADLINE: Duration = Duration::from_millis(1);

/// Runs `meanwhile` while a write to page 4 is in the middle of itself; page 0 is mapped too.
fn beside_a_write(barrier: ReaderBarrier, meanwhile: impl FnOnce(&IoAddressSpace)) {
    beside_a_write_after(|_| (), DEADLINE, barrier, meanwhile);
}

/// As [`beside_a_write`], with something done before the write and a deadline of one's own.
fn beside_a_write_after(
    before: impl FnOnce(&IoAddressSpace),
    deadline: Duration,
    barrier: ReaderBarrier,
    meanwhile: impl FnOnce(&IoAddressSpace),
) {
    let p = page_size();
    let space = IoAddressSpace::builder()
        .unmap_deadline(deadline)
        .reader_barrier(barrier)
        .build();
    let page = Backing::anonymous(p as usize).unwrap();
    space.map(0, page, ReadWrite).unwrap();
    before(&space);
    let writing = space.clone();
    let write = move || writing.write(4 * p, &[1]).unwrap();
    log::beside_a_write(&space, 4 * p, write, || meanwhile(&space));
}

#[track_caller]
fn assert_access_runs<T: std::fmt::Debug>(result: Result<T, Error>) {
    let error = result.unwrap_err();
    assert!(
        matches!(error, Error::AccessRuns { waited } if waited >= DEADLINE),
        "{error}"
    );
    assert_eq!(error.errno(), libc::EBUSY);
}

#[test]
fn memory_is_not_taken_away() {
    for barrier in [ReaderBarrier::Fence, ReaderBarrier::Membarrier] {
        beside_a_write(barrier, |space| {
            let p = page_size();
            for _ in 0..2 {
                assert_access_runs(space.invalidate_vaddr(0, p));
                assert_access_runs(space.invalidate_all_vaddr());
                // It is there as before, for everybody else.
                space.write(0, &[1]).unwrap();
                assert_eq!(space.mappings(), 2);
            }
        });
    }
}

#[test]
fn what_has_no_memory_is_not_put_back_in_the_table() {
    for policy in [UnmapPolicy::Restore, UnmapPolicy::Revoked] {
        let p = page_size();
        let without_memory = |space: &IoAddressSpace| {
            space.invalidate_vaddr(0, p).unwrap();
        };
        let barrier = ReaderBarrier::Fence;
        beside_a_write_after(without_memory, DEADLINE, barrier, |space| {
            let options = UnmapOptions::new().deadline(DEADLINE).policy(policy);
            let error = space.unmap_with(0, p, options).unwrap_err();
            assert!(
                matches!(error, Error::Deadline { unmapped: 0, left, .. } if left == p),
                "{error}"
            );
            let error = space.read(0, &mut [0]).unwrap_err();
            assert!(matches!(error, Error::VaddrInvalid { .. }), "{error}");
            assert_eq!(space.without_memory(), 1);
            let page = Backing::anonymous(p as usize).unwrap();
            space.resume_vaddr(0, p, page).unwrap();
            space.write(0, &[1]).unwrap();
            assert_eq!(space.mappings(), 2);
        });
    }
}

#[test]
fn a_pinner_stays_where_it_is() {
    for barrier in [ReaderBarrier::Fence, ReaderBarrier::Membarrier] {
        let other = IoAddressSpace::new();
        let mut pinner = None;
        beside_a_write(barrier, |space| {
            let stays = space.pinner("nic", Interest::Holder, Arc::new(|_, _| ()));
            assert_access_runs(stays.replace(&other, DEADLINE));
            assert_access_runs(stays.detach(DEADLINE));
            drop(stays.pin_pages(0, 1, Read).unwrap());
            pinner = Some(stays);
        });
        // The write has ended.
        let pinner = pinner.unwrap();
        pinner.replace(&other, LONG).unwrap();
        let error = pinner.pin_pages(0, 1, Read).unwrap_err();
        assert_eq!(error.errno(), libc::EINVAL, "nothing is mapped there");
    }
}

/// Marks that a harvest had taken when it failed belong to whatever has the addresses by then.
#[test]
fn marks_follow_a_mapping_that_gets_memory_during_a_harvest_in_vain() {
    let p = page_size();
    let written_without_memory = |space: &IoAddressSpace| {
        space.start_dirty_tracking().unwrap();
        space.write(0, &[1]).unwrap();
        space.invalidate_vaddr(0, p).unwrap();
    };
    let deadline = Duration::from_millis(300);
    let barrier = ReaderBarrier::Fence;
    let mut resumed = None;
    beside_a_write_after(written_without_memory, deadline, barrier, |space| {
        let harvesting = space.clone();
        let harvest = thread::spawn(move || harvesting.take_dirty(0, p));
        // Most likely the harvest waits by now; if it does not, it finds all of it.
        thread::sleep(deadline / 3);
        let page = Backing::anonymous(p as usize).unwrap();
        space.resume_vaddr(0, p, page).unwrap();
        let harvested = ended("a harvest ends at its deadline", harvest);
        assert!(matches!(harvested, Err(Error::AccessRuns { .. })));
        resumed = Some(space.clone());
    });
    let dirty = resumed.unwrap().take_dirty(0, p).unwrap();
    assert!(dirty.iter().eq([0]));
}

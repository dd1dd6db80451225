// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Replacements, cuts and memory that is taken away: an access finds what was there or what is there, and
//! what was there is nobody's when they return.

use loom::thread::spawn;
use vm_memory::{MmapRegion, Permissions};

use Permissions::ReadWrite;

use super::holder::use_up;
use super::{
    bounded_by, exhaustively, is_refusal, join, kernel, map, patient, refused, space, watched,
    Memory,
};
use crate::backing::Region;
use crate::range::page_size;
use crate::{Backing, Change, Error, IoAddressSpace, Profile};

/// Pages of one region, each with a memory of its own.
struct Pages {
    bytes: MmapRegion<()>,
    memory: Vec<Memory>,
}

// SAFETY: everything is the wrapped region's, which upholds the same contract.
unsafe impl Region for Pages {
    fn host_address(&self) -> *mut u8 {
        self.bytes.as_ptr()
    }

    fn size(&self) -> usize {
        self.bytes.size()
    }

    fn access(&self) -> Permissions {
        ReadWrite
    }

    fn tracks(&self) -> bool {
        true
    }

    fn mark_dirty(&self, offset: usize, _len: usize) {
        kernel::look_out();
        self.memory[offset / page_size() as usize].access();
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }
}

/// A device IOTLB with one mapping of two pages at 0.
fn two_pages() -> (IoAddressSpace, [Memory; 2]) {
    checked_sync::clock::now();
    let space = IoAddressSpace::builder().profile(Profile::Iotlb).build();
    let memory = [Memory::new(), Memory::new()];
    let pages = Pages {
        bytes: MmapRegion::new(2 * page_size() as usize).unwrap(),
        memory: memory.to_vec(),
    };
    space.map(0, Backing::for_model(pages), ReadWrite).unwrap();
    (space, memory)
}

fn replace(space: &IoAddressSpace, memory: &Memory) -> Result<(), Error> {
    let backing = watched(std::slice::from_ref(memory));
    space.replace_with(0, backing, ReadWrite, patient())
}

/// Unmaps the first page and replaces the second.
fn change(space: &IoAddressSpace, memory: &Memory) -> Result<(), Error> {
    let unmap = Change::Unmap {
        iova: 0,
        size: page_size(),
    };
    let map = Change::Map {
        iova: page_size(),
        backing: watched(std::slice::from_ref(memory)),
        prot: ReadWrite,
    };
    space.change_with([unmap, map], patient())
}

/// With a neighbour the page is found by its word.
#[test]
fn an_access_against_a_replacement() {
    for neighbour in [false, true] {
        exhaustively(move || {
            let (space, owner) = space();
            if neighbour {
                map(&space, 1, &Memory::new()).unwrap();
            }
            let handle = space.handle();
            let reader = spawn(move || handle.write(8, &[1]).unwrap());
            replace(&space, &Memory::new()).unwrap();
            owner.gone();
            join([reader]);
            space.write(8, &[1]).unwrap();
        });
    }
}

#[test]
fn a_lease_that_was_there_before_a_replacement() {
    exhaustively(|| {
        let (space, owner) = space();
        let list = space.scatter(0, 8, ReadWrite).unwrap();
        let user = spawn(move || use_up(list));
        replace(&space, &Memory::new()).unwrap();
        owner.gone();
        join([user]);
    });
}

/// Who unmaps what has replaced it waits for the users of what was there before, too.
#[test]
fn a_replacement_and_an_unmap_against_an_access() {
    bounded_by(2, || {
        let (space, owner) = space();
        let after = Memory::new();
        let (handle, other) = (space.handle(), space.clone());
        let reader = spawn(move || refused(handle.write(8, &[1])));
        let by = after.clone();
        let replacer = spawn(move || match replace(&other, &by) {
            Ok(()) | Err(Error::NothingMapped { .. }) => {}
            Err(error) => assert!(is_refusal(&error), "{error}"),
        });
        space.unmap_with(0, page_size(), patient()).unwrap();
        owner.gone();
        after.gone();
        join([reader, replacer]);
    });
}

#[test]
fn what_was_written_stays_dirty_through_a_replacement() {
    exhaustively(|| {
        let (space, _owner) = space();
        space.start_dirty_tracking().unwrap();
        let handle = space.handle();
        let writer = spawn(move || handle.write(8, &[1]).unwrap());
        replace(&space, &Memory::new()).unwrap();
        join([writer]);
        let dirty = space.take_dirty(0, page_size()).unwrap();
        assert!(dirty.iter().eq([0]));
    });
}

#[test]
fn accesses_against_a_cut() {
    bounded_by(3, || {
        let (space, [gone, _stays]) = two_pages();
        let handle = space.handle();
        let reader = spawn(move || {
            handle.write(page_size() + 8, &[1]).unwrap();
            refused(handle.write(8, &[1]));
        });
        space.unmap_with(0, page_size(), patient()).unwrap();
        gone.gone();
        join([reader]);
        space.write(page_size(), &[1]).unwrap();
    });
}

#[test]
fn a_lease_of_what_is_cut() {
    exhaustively(|| {
        let (space, [gone, _stays]) = two_pages();
        let list = space.scatter(0, 8, ReadWrite).unwrap();
        let user = spawn(move || use_up(list));
        space.unmap_with(0, page_size(), patient()).unwrap();
        gone.gone();
        join([user]);
    });
}

/// Both wait for the users of what was cut, and one of them is the last.
#[test]
fn a_cut_and_an_unmap_of_the_rest() {
    exhaustively(|| {
        let (space, [first, second]) = two_pages();
        let other = space.clone();
        let unmapper = spawn(move || {
            let removed = other.unmap_with(page_size(), page_size(), patient());
            assert_eq!(removed.unwrap(), page_size());
            second.gone();
        });
        space.unmap_with(0, page_size(), patient()).unwrap();
        first.gone();
        join([unmapper]);
        assert_eq!(space.mappings(), 0);
    });
}

#[test]
fn accesses_against_an_update() {
    bounded_by(3, || {
        let (space, [gone, _stays]) = two_pages();
        let handle = space.handle();
        let reader = spawn(move || {
            handle.write(8, &[1]).unwrap();
            handle.write(page_size() + 8, &[1]).unwrap();
        });
        map(&space, 0, &Memory::new()).unwrap();
        gone.gone();
        join([reader]);
    });
}

/// One page goes and the other is replaced: an access to what is replaced never fails.
#[test]
fn accesses_against_a_list_of_changes() {
    bounded_by(3, || {
        let (space, [first, second]) = two_pages();
        let after = Memory::new();
        let handle = space.handle();
        let reader = spawn(move || {
            handle.write(page_size() + 8, &[1]).unwrap();
            refused(handle.write(8, &[1]));
        });
        change(&space, &after).unwrap();
        first.gone();
        second.gone();
        join([reader]);
    });
}

#[test]
fn a_lease_of_what_a_list_of_changes_cuts() {
    exhaustively(|| {
        let (space, [first, second]) = two_pages();
        let list = space.scatter(0, 8, ReadWrite).unwrap();
        let user = spawn(move || use_up(list));
        change(&space, &Memory::new()).unwrap();
        first.gone();
        second.gone();
        join([user]);
    });
}

/// Who unmaps what a list of changes has mapped waits for the users of what was there before, too.
#[test]
fn a_list_of_changes_and_another_against_an_access() {
    bounded_by(2, || {
        let (space, [first, second]) = two_pages();
        let (handle, other) = (space.handle(), space.clone());
        let after = Memory::new();
        let by = after.clone();
        let reader = spawn(move || refused(handle.write(page_size() + 8, &[1])));
        let changer = spawn(move || change(&other, &by).unwrap());
        space.change_with([Change::UnmapAll], patient()).unwrap();
        first.gone();
        second.gone();
        join([reader, changer]);
    });
}

#[test]
fn an_access_against_memory_that_is_taken_away() {
    exhaustively(|| {
        let (space, owner) = space();
        let handle = space.handle();
        let reader = spawn(move || refused(handle.write(8, &[1])));
        space.invalidate_vaddr(0, page_size()).unwrap();
        owner.gone();
        let backing = watched(&[Memory::new()]);
        space.resume_vaddr(0, page_size(), backing).unwrap();
        join([reader]);
        space.write(8, &[1]).unwrap();
    });
}

#[test]
fn a_lease_against_memory_that_is_taken_away() {
    exhaustively(|| {
        let (space, owner) = space();
        let list = space.scatter(0, 8, ReadWrite).unwrap();
        let user = spawn(move || use_up(list));
        space.invalidate_vaddr(0, page_size()).unwrap();
        owner.gone();
        join([user]);
    });
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! More holders, and more leases of one, than there is room for without a lock: all of them count.

use std::time::Duration;

use iommu_type1::{page_size, Backing, Error, IoAddressSpace, UnmapOptions, HOLDERS_LISTED};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemory, Permissions};

use Permissions::ReadWrite;

const MANY: u64 = 40;

/// So many mappings of a page each, the first byte of each its number.
fn many_mappings() -> IoAddressSpace {
    let space = IoAddressSpace::new();
    for i in 0..MANY {
        let backing = Backing::anonymous(page_size() as usize).unwrap();
        space.map(i * page_size(), backing, ReadWrite).unwrap();
        space.write(i * page_size(), &[i as u8]).unwrap();
    }
    space
}

/// Who holds page `i`.
fn holders(space: &IoAddressSpace, i: u64) -> Vec<String> {
    let at_once = UnmapOptions::new()
        .deadline(Duration::ZERO)
        .policy(iommu_type1::UnmapPolicy::Restore);
    match space.unmap_with(i * page_size(), page_size(), at_once) {
        Ok(bytes) => {
            assert_eq!(bytes, page_size());
            Vec::new()
        }
        Err(Error::Deadline { holders, .. }) => {
            holders.into_iter().map(|holder| holder.name).collect()
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn one_guard_leases_every_mapping_it_lends_of() {
    let space = many_mappings();
    let guard = space.named("greedy").memory();
    // Twice: what is leased already is not leased again.
    for i in (0..MANY).chain(0..MANY) {
        let mut slices = guard
            .get_slices(GuestAddress(i * page_size()), 1, Permissions::Read)
            .unwrap();
        let slice = slices.next().unwrap().unwrap();
        assert_eq!(slice.read_obj::<u8>(0).unwrap(), i as u8);
    }
    assert_eq!(space.stats().leases, MANY);
    for i in [0, 1, 11, 12, 13, MANY - 1] {
        assert_eq!(holders(&space, i), ["greedy"]);
    }
    drop(guard);
    assert_eq!(space.stats().leases, 0);
    assert_eq!(space.unmap_all().unwrap(), MANY * page_size());
}

#[test]
fn every_one_of_many_guards_is_named() {
    let space = many_mappings();
    let guards: Vec<_> = (0..MANY)
        .map(|i| {
            let guard = space.named(format!("queue {i:02}")).memory();
            let slices = guard.get_slices(GuestAddress(0), 1, Permissions::Read);
            assert_eq!(slices.unwrap().count(), 1);
            guard
        })
        .collect();
    let mut names = holders(&space, 0);
    names.sort();
    let expected: Vec<_> = (0..MANY).map(|i| format!("queue {i:02}")).collect();
    assert_eq!(names, expected);
    drop(guards);
    assert!(holders(&space, 0).is_empty());
}

#[test]
fn of_very_many_holders_some_are_named() {
    let space = many_mappings();
    let lists: Vec<_> = (0..3 * HOLDERS_LISTED as u64)
        .map(|i| space.scatter(i % MANY * page_size(), 8, Permissions::Read))
        .collect();
    let at_once = UnmapOptions::new().deadline(Duration::ZERO);
    let error = space.unmap_with(0, MANY * page_size(), at_once);
    let Err(Error::Deadline { left, holders, .. }) = error else {
        panic!("{error:?}");
    };
    assert_eq!(left, MANY * page_size());
    assert_eq!(holders.len(), HOLDERS_LISTED);
    drop(lists);
    assert_eq!(space.unmap_all().unwrap(), MANY * page_size());
}

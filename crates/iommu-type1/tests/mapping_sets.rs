// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Sets of mappings: they go with whoever has made them, and nothing else does.

use std::time::Duration;

use iommu_type1::{page_size, Backing, Error, IoAddressSpace, Profile, UnmapOptions, UnmapPolicy};
use vm_memory::Permissions::{Read, ReadWrite};

fn p(pages: u64) -> u64 {
    pages * page_size()
}

fn memory(pages: u64) -> Backing {
    Backing::anonymous(p(pages) as usize).unwrap()
}

/// Which of the first pages are mapped.
fn mapped(space: &IoAddressSpace) -> Vec<u64> {
    let is_mapped = |page: &u64| space.read(p(*page), &mut [0]).is_ok();
    (0..16).filter(is_mapped).collect()
}

#[test]
fn what_is_left_goes_with_the_set() {
    let space = IoAddressSpace::new();
    space.map(p(1), memory(1), ReadWrite).unwrap();
    let (one, other) = (space.mapping_set(), space.mapping_set());
    one.map(p(2), memory(1), ReadWrite).unwrap();
    one.map_batch([3, 4].map(|page| (p(page), memory(1), ReadWrite)))
        .unwrap();
    other.map(p(5), memory(1), ReadWrite).unwrap();
    assert_eq!(one.unmap(p(3), p(1)).unwrap(), p(1));
    // Somebody else may unmap it, and map there.
    space.unmap(p(4), p(1)).unwrap();
    space.map(p(4), memory(1), ReadWrite).unwrap();
    assert_eq!(mapped(&space), [1, 2, 4, 5]);
    drop(one);
    assert_eq!(mapped(&space), [1, 4, 5]);
    assert_eq!(other.close().unwrap(), p(1));
    assert_eq!(mapped(&space), [1, 4]);
}

#[test]
fn what_is_of_others_is_not_unmapped() {
    let space = IoAddressSpace::new();
    let (one, other) = (space.mapping_set(), space.mapping_set());
    space.map(p(1), memory(1), ReadWrite).unwrap();
    one.map(p(2), memory(1), ReadWrite).unwrap();
    other.map(p(3), memory(1), ReadWrite).unwrap();
    for (page, pages) in [(1, 1), (1, 2), (2, 2), (3, 1), (0, 8)] {
        let error = one.unmap(p(page), p(pages)).unwrap_err();
        assert!(matches!(error, Error::NotOwned { .. }), "{error}");
        assert_eq!(error.errno(), libc::EPERM);
    }
    assert_eq!(mapped(&space), [1, 2, 3]);
    assert_eq!(one.unmap(p(4), p(1)).unwrap(), 0);
    assert_eq!(one.unmap_all().unwrap(), p(1));
    assert_eq!(mapped(&space), [1, 3]);
}

/// Also what is revoked, and waits to be unmapped again.
#[test]
fn what_is_held_is_an_error_of_the_close_and_of_others_again() {
    let space = IoAddressSpace::builder()
        .unmap_deadline(Duration::ZERO)
        .build();
    let set = space.mapping_set();
    set.map(p(1), memory(1), ReadWrite).unwrap();
    let held = space.scatter(p(1), 8, Read).unwrap();
    assert!(matches!(set.unmap_all(), Err(Error::Deadline { .. })));
    let other = space.mapping_set();
    assert!(matches!(
        other.unmap(p(1), p(1)),
        Err(Error::NotOwned { .. })
    ));
    assert_eq!(other.close().unwrap(), 0);
    assert_eq!(space.mappings(), 1);
    drop(held);
    assert_eq!(set.close().unwrap(), p(1));
    assert_eq!(space.mappings(), 0);

    let set = space.mapping_set();
    set.map(p(1), memory(1), ReadWrite).unwrap();
    let held = space.scatter(p(1), 8, Read).unwrap();
    assert!(matches!(set.close(), Err(Error::Deadline { .. })));
    drop(held);
    assert_eq!(space.unmap(p(1), p(1)).unwrap(), p(1));
}

/// What the set itself has replaced, too, while somebody uses it.
#[test]
fn what_was_replaced_and_is_held_is_an_error_of_the_close() {
    let space = IoAddressSpace::builder()
        .profile(Profile::Iotlb)
        .unmap_deadline(Duration::ZERO)
        .build();
    let (set, other) = (space.mapping_set(), space.mapping_set());
    set.map(p(1), memory(1), ReadWrite).unwrap();
    let held = space.scatter(p(1), 8, Read).unwrap();
    let replaced = set.map(p(1), memory(1), ReadWrite);
    assert!(matches!(replaced, Err(Error::Deadline { .. })));
    // It is nothing of another set's.
    other.map(p(2), memory(1), ReadWrite).unwrap();
    assert_eq!(other.close().unwrap(), p(1));
    assert!(matches!(set.unmap_all(), Err(Error::Deadline { .. })));
    drop(held);
    assert_eq!(set.close().unwrap(), p(1));
}

#[test]
fn parts_and_other_memory_belong_to_the_set_too() {
    let space = IoAddressSpace::builder().profile(Profile::Iotlb).build();
    let set = space.mapping_set();
    set.map(p(1), memory(4), ReadWrite).unwrap();
    space.unmap(p(2), p(1)).unwrap();
    space.map(p(3), memory(1), ReadWrite).unwrap();
    assert!(matches!(
        set.map(p(3), memory(1), ReadWrite),
        Err(Error::NotOwned { .. })
    ));
    set.map(p(4), memory(2), ReadWrite).unwrap();
    assert_eq!(mapped(&space), [1, 3, 4, 5]);
    drop(set);
    assert_eq!(mapped(&space), [3]);

    let space = IoAddressSpace::new();
    let set = space.mapping_set();
    for page in [1, 3] {
        set.map(p(page), memory(1), ReadWrite).unwrap();
        space.invalidate_vaddr(p(page), p(1)).unwrap();
    }
    space.resume_vaddr(p(1), p(1), memory(1)).unwrap();
    assert_eq!(space.mappings(), 2);
    assert_eq!(set.close().unwrap(), p(2));
    assert_eq!(space.mappings(), 0);
}

#[test]
fn a_mapping_that_may_be_anywhere_belongs_to_the_set() {
    let space = IoAddressSpace::new();
    let (one, other) = (space.mapping_set(), space.mapping_set());
    let iova = one.map_anywhere(memory(2), Read).unwrap();
    assert_eq!(space.write(iova, &[1]).unwrap_err().errno(), libc::EPERM);
    space.read(iova + p(2) - 1, &mut [0]).unwrap();
    assert!(matches!(
        other.unmap(iova, p(2)),
        Err(Error::NotOwned { .. })
    ));
    drop(other);
    assert_eq!(space.mappings(), 1);
    drop(one);
    assert_eq!(space.mappings(), 0);
}

/// The policy is the call's, and not that of the space.
#[test]
fn an_unmap_through_a_set_may_have_options() {
    let space = IoAddressSpace::new();
    let (one, other) = (space.mapping_set(), space.mapping_set());
    one.map(p(1), memory(1), ReadWrite).unwrap();
    let at_once = UnmapOptions::default().deadline(Duration::ZERO);
    let held = space.scatter(p(1), 8, Read).unwrap();
    let restore = at_once.policy(UnmapPolicy::Restore);
    let error = other.unmap_with(p(1), p(1), restore).unwrap_err();
    assert_eq!(error.errno(), libc::EPERM);
    for (policy, is_mapped) in [
        (UnmapPolicy::Restore, vec![1]),
        (UnmapPolicy::Revoked, vec![]),
    ] {
        let error = one.unmap_with(p(1), p(1), at_once.policy(policy));
        assert_eq!(error.unwrap_err().errno(), libc::EDEADLK);
        assert_eq!(mapped(&space), is_mapped);
    }
    drop(held);
    assert_eq!(one.unmap_with(p(1), p(1), at_once).unwrap(), p(1));
    assert_eq!(space.mappings(), 0);
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What generated operations beside the real kernel have found (`ci/real-kernel/run`), as small as it gets.

use iommu_type1::{Backing, IoAddressSpace, IovaRanges, Profile};
use vm_memory::Permissions::{Read, ReadWrite};
use vm_memory::{GuestAddress, GuestRegionMmap};

const PAGE: u64 = 0x1000;

fn memory(size: u64) -> Backing {
    Backing::anonymous(size as usize).unwrap()
}

#[test]
fn a_v1_invalidation_that_stops_looks_at_nothing_behind() {
    let space = IoAddressSpace::builder().profile(Profile::Type1v1).build();
    space.map(0, memory(2 * PAGE), ReadWrite).unwrap();
    space.map(2 * PAGE, memory(PAGE), ReadWrite).unwrap();
    assert_eq!(space.invalidate_vaddr(2 * PAGE, PAGE).unwrap(), PAGE);
    assert_eq!(space.invalidate_vaddr(PAGE, 2 * PAGE).unwrap(), 0);
    // From its own beginning it is looked at.
    let error = space.invalidate_vaddr(0, 3 * PAGE).unwrap_err();
    assert_eq!(error.errno(), libc::EINVAL);
}

#[test]
fn a_range_that_is_not_allowed_is_refused_before_its_marks_are_too_many() {
    let ranges = IovaRanges::new(&[0..=8 * PAGE - 1], &[]).unwrap();
    let space = IoAddressSpace::builder()
        .iova_ranges(ranges)
        .dirty_limit(0)
        .build();
    space.start_dirty_tracking().unwrap();
    let outside = space.map(8 * PAGE, memory(PAGE), ReadWrite).unwrap_err();
    assert_eq!(outside.errno(), libc::EINVAL);
    let inside = space.map(0, memory(PAGE), ReadWrite).unwrap_err();
    assert_eq!(inside.errno(), libc::ENOSPC);
}

/// An iommufd's, behind an IOMMU that has reserved the first pages from 16 on.
fn reserved() -> IoAddressSpace {
    let ranges = IovaRanges::new(&[], &[16 * PAGE..=32 * PAGE - 1]).unwrap();
    let builder = IoAddressSpace::builder().profile(Profile::Iommufd);
    builder.iova_ranges(ranges).build()
}

/// Memory that begins inside a page.
fn inside_a_page() -> Backing {
    let region = GuestRegionMmap::<()>::from_range(GuestAddress(0), 2 * PAGE as usize, None);
    Backing::from_region(&region.unwrap(), 1, PAGE as usize).unwrap()
}

#[test]
fn iommufd_refuses_what_is_reserved_before_what_is_mapped_and_memory_last() {
    let space = reserved();
    space.map(14 * PAGE, memory(PAGE), ReadWrite).unwrap();
    let both = space.map(14 * PAGE, memory(4 * PAGE), ReadWrite);
    assert_eq!(both.unwrap_err().errno(), libc::EINVAL);
    let batch = [
        (14 * PAGE, memory(PAGE), ReadWrite),
        (16 * PAGE, memory(PAGE), ReadWrite),
    ];
    assert_eq!(space.map_batch(batch).unwrap_err().errno(), libc::EINVAL);

    let mapped = space.map(14 * PAGE, inside_a_page(), ReadWrite);
    assert_eq!(mapped.unwrap_err().errno(), libc::EEXIST);
    let free = space.map(PAGE, inside_a_page(), ReadWrite);
    assert_eq!(free.unwrap_err().errno(), libc::EINVAL);
    assert!(space.map_anywhere(inside_a_page(), ReadWrite).is_err());
}

#[test]
fn iommufd_finds_the_largest_number_before_an_empty_range() {
    let space = reserved();
    for (iova, size) in [
        (u64::MAX, 0),
        (u64::MAX, 1),
        (1, u64::MAX),
        (0, u64::MAX - 1),
    ] {
        let errno = space.unmap(iova, size).map_err(|error| error.errno());
        let expected = if size == u64::MAX - 1 {
            libc::ENOENT
        } else {
            libc::EOVERFLOW
        };
        assert_eq!(errno, Err(expected), "{iova:#x} {size:#x}");
    }
}

#[test]
fn iommufd_maps_beside_the_allowed_ranges_where_it_is_told_to() {
    let space = reserved();
    space.map(8 * PAGE, memory(PAGE), ReadWrite).unwrap();
    let allowed = |ranges: &[_]| IovaRanges::new(ranges, &[16 * PAGE..=32 * PAGE - 1]).unwrap();
    // What is mapped elsewhere is not in the way.
    space
        .set_iova_ranges(allowed(&[64 * PAGE..=66 * PAGE - 1]))
        .unwrap();
    assert_eq!(
        space.map_anywhere(memory(PAGE), ReadWrite).unwrap() / PAGE / 2,
        32
    );
    space.map(9 * PAGE, memory(PAGE), ReadWrite).unwrap();
    let reserved = space.map(16 * PAGE, memory(PAGE), ReadWrite);
    assert_eq!(reserved.unwrap_err().errno(), libc::EINVAL);
    // What is free there again is not found for anybody.
    assert_eq!(space.unmap(8 * PAGE, 2 * PAGE).unwrap(), 2 * PAGE);
    assert_eq!(
        space.map_anywhere(memory(PAGE), ReadWrite).unwrap() / PAGE / 2,
        32
    );
    let full = space.map_anywhere(memory(PAGE), ReadWrite);
    assert_eq!(full.unwrap_err().errno(), libc::ENOSPC);
}

#[test]
fn iommufd_looks_at_a_copy_in_the_order_of_the_kernel() {
    let (from, to) = (reserved(), reserved());
    from.map(PAGE, memory(2 * PAGE), Read).unwrap();
    from.map(3 * PAGE, memory(PAGE), ReadWrite).unwrap();
    to.map(PAGE, memory(PAGE), Read).unwrap();
    let copy = |iova, size, to_iova, prot| {
        let copied = from.copy_to(iova, size, &to, to_iova, prot);
        copied.map_err(|error| error.errno())
    };
    assert_eq!(copy(8 * PAGE, PAGE, u64::MAX, Read), Err(libc::EOVERFLOW));
    assert_eq!(
        copy(8 * PAGE + 1, PAGE, 1, Read),
        Err(libc::ENOENT),
        "no such memory"
    );
    assert_eq!(
        copy(PAGE + 1, PAGE, 1, Read),
        Err(libc::EINVAL),
        "no page there"
    );
    assert_eq!(
        copy(PAGE, 4 * PAGE, PAGE, ReadWrite),
        Err(libc::ENOENT),
        "a hole behind it"
    );
    assert_eq!(
        copy(PAGE, PAGE, 16 * PAGE, ReadWrite),
        Err(libc::EINVAL),
        "reserved"
    );
    assert_eq!(
        copy(PAGE, PAGE, PAGE, ReadWrite),
        Err(libc::EEXIST),
        "mapped"
    );
    assert_eq!(copy(PAGE, PAGE, 2 * PAGE, ReadWrite), Err(libc::EPERM));
    assert_eq!(copy(PAGE + 1, PAGE, PAGE, Read), Err(libc::EEXIST));
    assert_eq!(copy(PAGE + 1, PAGE, 2 * PAGE, Read), Err(libc::EINVAL));
    // Of several parts the first that is wrong.
    from.map(4 * PAGE, memory(PAGE), Read).unwrap();
    assert_eq!(
        copy(3 * PAGE + 1, PAGE, 2 * PAGE, ReadWrite),
        Err(libc::EINVAL)
    );
    to.map(4 * PAGE, memory(PAGE), Read).unwrap();
    assert_eq!(copy(PAGE + 1, 3 * PAGE, 2 * PAGE, Read), Err(libc::EEXIST));
    to.unmap(4 * PAGE, PAGE).unwrap();
    assert_eq!(copy(PAGE, 3 * PAGE, 2 * PAGE, Read), Ok(()));
    assert_eq!(to.mappings(), 3);
}

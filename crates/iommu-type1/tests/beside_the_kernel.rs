// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What generated operations beside the real kernel have found (`ci/real-kernel/run`), as small as it gets.

use iommu_type1::{Backing, IoAddressSpace, IovaRanges, Profile};
use vm_memory::Permissions::ReadWrite;

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

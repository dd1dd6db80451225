// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What debug output says: enough to know in a log which space, who and where.

use std::sync::Arc;

use iommu_type1::{page_size, Backing, DmaMemory, Interest, IoAddressSpace};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemory, Permissions};

#[test]
fn everything_made_from_a_space_says_which_space() {
    let p = page_size();
    let space = IoAddressSpace::default().named("nvme0");
    let backing = Backing::anonymous(p as usize).unwrap();
    assert!(!backing.is_empty());
    let shown = format!("{backing:?}");
    assert!(shown.contains(&format!("len: {p}")), "{shown}");
    assert!(shown.contains("access: ReadWrite"), "{shown}");
    space.map(0, backing, Permissions::ReadWrite).unwrap();

    let handle = space.handle();
    let guard = space.memory();
    let lent = guard.get_slices(GuestAddress(8), 1, Permissions::Read);
    let slice = lent.unwrap().next().unwrap().unwrap();
    let marks = format!("{:?}", slice.bitmap());
    assert!(marks.contains("offset: 8"), "{marks}");
    let list = handle.space().scatter(0, 16, Permissions::Read).unwrap();
    assert!(!list.is_empty());
    let pinner = space.pinner("vgpu", Interest::Holder, Arc::new(|_, _| ()));
    let pinned = pinner.pin_pages(0, 1, Permissions::Read).unwrap();
    let memory: &DmaMemory = &guard;
    for shown in [
        format!("{space:?}"),
        format!("{handle:?}"),
        format!("{guard:?}"),
        format!("{memory:?}"),
        format!("{list:?}"),
        format!("{pinned:?}"),
        format!("{:?}", memory.space()),
    ] {
        assert!(shown.contains("nvme0"), "{shown}");
    }
    assert!(format!("{list:?}").contains("len: 16"));
    assert!(format!("{pinner:?}").contains("vgpu"));
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pins and tables are there as long as somebody needs them, and where the device sees them.

use gvt_scheduler::{Cause, DeviceMap, PageTableRoot};
use vm_memory::GuestAddress;

use crate::{four_level, four_tables, to, Pinned, Tables};

#[test]
fn tables_and_pins_go_with_their_last_user() {
    let mut tables = four_tables();
    let (one, two) = (four_level(0x200), four_level(0x210));
    tables.set(0x210, 0, to(0x201));
    tables.submit(one).unwrap();
    tables.submit(two).unwrap();
    assert_eq!(tables.reads().len(), 5 * 512);
    tables.guest.vgpu.release_page_tables(one);
    assert_eq!(tables.guest.vgpu.shadowed_tables(), 4);
    assert_eq!(tables.pinned(), [(0x900, 1)]);
    tables.write(0x210, 0, 0);
    tables.submit(two).unwrap();
    assert_eq!(tables.guest.vgpu.shadowed_tables(), 1);
    assert!(tables.pinned().is_empty());
    tables.guest.vgpu.release_page_tables(two);
    tables.guest.vgpu.release_page_tables(two);
    assert_eq!(tables.guest.vgpu.shadowed_tables(), 0);
}

#[test]
fn directories_shared_by_roots_go_with_the_last_of_them() {
    let mut tables = Tables::new();
    let [x, y] = [0x202 << 12, 0x212 << 12];
    let one = PageTableRoot::ThreeLevel { pdps: [x, 0, 0, 0] };
    let both = PageTableRoot::ThreeLevel { pdps: [x, y, x, 0] };
    tables.set(0x202, 0, to(0x203));
    tables.set(0x203, 3, to(0x900));
    for (first, second) in [(one, both), (both, one)] {
        tables.submit(one).unwrap();
        tables.submit(both).unwrap();
        assert_eq!(tables.guest.vgpu.shadowed_tables(), 3);
        tables.guest.vgpu.release_page_tables(first);
        let translated = tables.guest.vgpu.translate(second, 0x3000);
        assert_eq!(translated, Some(GuestAddress(0x90_0000)));
        assert_eq!(tables.pinned(), [(0x900, 1)]);
        tables.guest.vgpu.release_page_tables(second);
        assert_eq!(tables.guest.vgpu.shadowed_tables(), 0);
        assert!(tables.pinned().is_empty());
    }
}

#[test]
fn pages_lost_to_an_unmap_are_pinned_again_without_reads() {
    let mut tables = four_tables();
    let root = four_level(0x200);
    tables.set(0x203, 4, to(0x901));
    tables.submit(root).unwrap();
    tables.reads();
    tables.guest.vgpu.release_pins(0x90_0000, 0x1000);
    assert_eq!(tables.pinned(), [(0x901, 1)]);
    tables.submit(four_level(0x210)).unwrap();
    assert_eq!(
        tables.pinned(),
        [(0x901, 1)],
        "another root does not map it"
    );
    tables.reads();
    tables.submit(root).unwrap();
    assert_eq!(tables.pinned(), [(0x900, 1), (0x901, 1)]);
    assert!(tables.reads().is_empty());
    tables.guest.vgpu.release_pins(0, u64::MAX);
    assert!(tables.pinned().is_empty());
}

#[test]
fn dropping_the_vgpu_drops_its_pins() {
    let mut tables = four_tables();
    tables.submit(four_level(0x200)).unwrap();
    let Tables { guest, pins, .. } = tables;
    drop(guest);
    assert!(pins.0.lock().unwrap().is_empty());
}

/// The device sees each guest page 1 TiB further up.
struct Shifted;

impl DeviceMap<Pinned> for Shifted {
    fn map(&self, gfn: u64, pages: usize, pinned: &Pinned) -> Result<u64, Cause> {
        assert_eq!(pinned.1, (gfn, pages));
        Ok((gfn << 12) + (1 << 40))
    }

    fn unmap(&self, _: u64, _: usize) {}
}

#[test]
fn a_device_reaches_pages_at_its_own_addresses() {
    let mut tables = four_tables();
    let root = four_level(0x200);
    tables.submit(root).unwrap();
    // Without an IOMMU these are the guest's.
    let vgpu = &mut tables.guest.vgpu;
    assert_eq!(vgpu.device_address(root, 0x3abc), Some(0x90_0abc));
    assert_eq!(vgpu.frame_at_device_address(0x90_0abc), Some(0x900));

    vgpu.set_device_map(Shifted);
    assert_eq!((vgpu.shadowed_tables(), vgpu.pinned_leaves()), (0, 0));
    tables.submit(root).unwrap();
    let vgpu = &mut tables.guest.vgpu;
    let address = vgpu.device_address(root, 0x3abc).unwrap();
    assert_eq!(address, (1 << 40) + 0x90_0abc);
    assert_eq!(vgpu.frame_at_device_address(address), Some(0x900));
    assert_eq!(vgpu.frame_at_device_address(0x90_0abc), None);
    vgpu.release_pins(0x900 << 12, 0x1000);
    assert_eq!(vgpu.device_address(root, 0x3abc), None);
    assert_eq!(vgpu.frame_at_device_address(address), None);
}

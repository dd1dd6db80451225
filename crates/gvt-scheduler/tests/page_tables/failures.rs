// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What cannot be shadowed is an error of those who need it, and of nobody else.

use gvt_scheduler::{Error, PageTableRoot, VgpuConfig};

use crate::{four_level, four_tables, to, Tables, PSE, UNPINNABLE};

#[test]
fn a_trapped_entry_that_cannot_be_shadowed_is_an_error_at_once() {
    let mut tables = four_tables();
    let root = four_level(0x200);
    tables.submit(root).unwrap();
    for (table, value, errno) in [
        (0x203, to(UNPINNABLE), libc::ENXIO),
        (0x201, to(0x202) | PSE, libc::EINVAL),
    ] {
        let at = tables.set(table, 7, value);
        let error = tables.guest.vgpu.page_table_trapped(at, 8).unwrap_err();
        assert_eq!(error.errno(), errno);
        assert_eq!(tables.submit(root).unwrap_err().errno(), errno);
        let at = tables.set(table, 7, 0);
        tables.guest.vgpu.page_table_trapped(at, 8).unwrap();
        tables.submit(root).unwrap();
    }
}

#[test]
fn huge_pages_and_unpinnable_pages_leave_nothing_behind() {
    let mut tables = four_tables();
    let root = four_level(0x200);
    tables.set(0x201, 1, to(0) | PSE);
    let error = tables.submit(root).unwrap_err();
    assert!(matches!(error, Error::HugePage { .. }));
    assert_eq!(error.errno(), libc::EINVAL);
    assert_eq!(tables.guest.vgpu.shadowed_tables(), 0);
    assert!(tables.pinned().is_empty());
    tables.set(0x201, 1, 0);
    tables.set(0x203, 500, to(UNPINNABLE));
    let error = tables.submit(root).unwrap_err();
    assert_eq!(error.errno(), libc::ENXIO);
    assert!(tables.pinned().is_empty());
    tables.set(0x203, 500, 0);
    tables.submit(root).unwrap();
}

#[test]
fn an_entry_that_failed_is_not_present_until_it_is_mended() {
    let mut tables = four_tables();
    let root = four_level(0x200);
    tables.submit(root).unwrap();
    tables.write(0x203, 3, to(UNPINNABLE));
    for _ in 0..2 {
        assert_eq!(tables.submit(root).unwrap_err().errno(), libc::ENXIO);
        assert_eq!(tables.guest.vgpu.translate(root, 0x3000), None);
        assert!(tables.pinned().is_empty());
    }
    tables.set(0x203, 3, to(0x901));
    tables.submit(root).unwrap();
    assert_eq!(tables.pinned(), [(0x901, 1)]);
}

#[test]
fn a_failed_entry_is_an_error_of_the_roots_that_reach_it_only() {
    let mut tables = four_tables();
    let (bad, good) = (four_level(0x200), four_level(0x210));
    tables.set(0x210, 0, to(0x211));
    tables.submit(bad).unwrap();
    tables.submit(good).unwrap();
    tables.reads();
    tables.write(0x203, 3, to(UNPINNABLE));
    tables.write(0x203, 4, to(0x904));
    tables.submit(good).unwrap();
    // Both entries were read, and the failure is remembered.
    assert_eq!(tables.reads(), [0x20_3018, 0x20_3020]);
    assert_eq!(tables.pinned(), [(0x904, 1)]);
    for _ in 0..2 {
        assert_eq!(tables.submit(bad).unwrap_err().errno(), libc::ENXIO);
        assert_eq!(tables.reads(), [0x20_3018]);
        tables.submit(good).unwrap();
        assert!(tables.reads().is_empty());
    }
    // A root that comes to reach it fails as well, one that ceases to does not.
    tables.write(0x210, 1, to(0x201));
    assert_eq!(tables.submit(good).unwrap_err().errno(), libc::ENXIO);
    tables.write(0x210, 1, 0);
    tables.submit(good).unwrap();
    tables.write(0x200, 0, 0);
    tables.submit(bad).unwrap();
    assert_eq!(tables.guest.vgpu.shadowed_tables(), 3);
}

/// Found by fuzzing: the entry is read while a workload is created that does not reach it.
#[test]
fn a_table_beyond_memory_is_an_error_of_the_roots_that_reach_it_only() {
    let mut tables = four_tables();
    let (bad, good) = (four_level(0x200), four_level(0x210));
    tables.submit(bad).unwrap();
    tables.submit(good).unwrap();
    tables.reads();
    tables.write(0x202, 1, to(0xfff_ffff));
    tables.submit(good).unwrap();
    assert_eq!(tables.reads(), [0x20_2008, 0xff_ffff_f000]);
    assert_eq!(tables.submit(bad).unwrap_err().errno(), libc::EFAULT);
    tables.write(0x202, 1, 0);
    tables.submit(bad).unwrap();
}

#[test]
fn a_failure_goes_with_its_table() {
    let mut tables = four_tables();
    let root = four_level(0x200);
    tables.submit(root).unwrap();
    tables.write(0x203, 3, to(UNPINNABLE));
    tables.submit(root).unwrap_err();
    tables.write(0x202, 0, 0);
    tables.submit(root).unwrap();
    tables.set(0x203, 3, to(0x901));
    tables.write(0x202, 0, to(0x203));
    tables.reads();
    tables.submit(root).unwrap();
    // The entry was read with its table, and not once more.
    assert_eq!(tables.reads().len(), 1 + 512);
}

#[test]
fn a_workload_whose_pages_stay_unmapped_is_refused() {
    let mut tables = four_tables();
    let (root, other) = (four_level(0x200), four_level(0x210));
    tables.submit(root).unwrap();
    tables.guest.vgpu.release_pins(0x90_0000, 0x1000);
    tables.pins.refuse(Some(0x900));
    for _ in 0..2 {
        let error = tables.submit(root).unwrap_err();
        assert!(matches!(error, Error::LeafPin { gfn: 0x900, .. }));
        tables.submit(other).unwrap();
    }
    // The guest may map something else instead, or the page comes back.
    tables.write(0x203, 3, 0);
    tables.submit(root).unwrap();
    tables.pins.refuse(None);
    tables.write(0x203, 3, to(0x900));
    tables.submit(root).unwrap();
    assert_eq!(tables.pinned(), [(0x900, 1)]);
}

#[test]
fn shadowed_tables_are_limited() {
    let config = VgpuConfig {
        max_page_tables: 5,
        ..VgpuConfig::default()
    };
    let mut tables = Tables::with(config);
    let (one, two) = (four_level(0x200), four_level(0x210));
    for (table, child) in [(0x200, 0x201), (0x201, 0x202), (0x202, 0x203)] {
        tables.set(table, 0, to(child));
    }
    tables.submit(one).unwrap();
    let error = tables.submit(two).unwrap_err();
    assert!(matches!(error, Error::TooManyTables { limit: 5 }));
    assert_eq!(error.errno(), libc::ENOMEM);
    tables.write(0x202, 1, to(0x204));
    assert_eq!(tables.submit(one).unwrap_err().errno(), libc::ENOMEM);
    assert_eq!(tables.guest.vgpu.shadowed_tables(), 4);
    // Roots count, or those without tables were free.
    let empty = PageTableRoot::ThreeLevel { pdps: [0; 4] };
    assert_eq!(tables.submit(empty).unwrap_err().errno(), libc::ENOMEM);
    tables.write(0x202, 1, 0);
    tables.write(0x202, 0, 0);
    tables.submit(one).unwrap();
    tables.guest.vgpu.release_page_tables(one);
    tables.submit(two).unwrap();
    tables.submit(empty).unwrap();
}

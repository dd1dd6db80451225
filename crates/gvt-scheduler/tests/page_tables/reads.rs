// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which entries are read, and when.

use gvt_scheduler::{PageTableRoot, SimulatedEngine};
use vm_memory::GuestAddress;

use crate::{four_level, four_tables, to, Tables, ENGINE, IPS, PSE};

#[test]
fn an_unknown_root_is_read_whole_and_once() {
    let mut tables = four_tables();
    let root = four_level(0x200);
    tables.submit(root).unwrap();
    assert_eq!(tables.reads().len(), 4 * 512);
    assert_eq!(tables.guest.vgpu.shadowed_tables(), 4);
    assert_eq!(tables.pinned(), [(0x900, 1)]);
    let translated = tables.guest.vgpu.translate(root, 0x3abc);
    assert_eq!(translated, Some(GuestAddress(0x90_0abc)));
    tables.submit(root).unwrap();
    assert!(tables.reads().is_empty());
}

#[test]
fn written_entries_are_read_once_and_in_ascending_order() {
    let mut tables = four_tables();
    let root = four_level(0x200);
    tables.submit(root).unwrap();
    tables.reads();
    tables.write(0x203, 5, to(0x905));
    tables.write(0x202, 7, 0);
    tables.write(0x203, 4, to(0x904));
    tables.write(0x203, 5, to(0x906));
    tables.submit(root).unwrap();
    assert_eq!(tables.reads(), [0x20_2038, 0x20_3020, 0x20_3028]);
    assert_eq!(tables.pinned(), [(0x900, 1), (0x904, 1), (0x906, 1)]);
    tables.submit(root).unwrap();
    assert!(tables.reads().is_empty());
}

#[test]
fn a_trapped_write_of_an_entry_is_followed_at_once() {
    let mut tables = four_tables();
    let root = four_level(0x200);
    tables.submit(root).unwrap();
    tables.reads();
    let translate = |tables: &Tables| tables.guest.vgpu.translate(root, 0x5000);
    let whole = tables.set(0x203, 5, to(0x905));
    tables.guest.vgpu.page_table_trapped(whole, 8).unwrap();
    assert_eq!(tables.reads(), [whole.0]);
    assert_eq!(translate(&tables), Some(GuestAddress(0x90_5000)));
    assert_eq!(tables.pinned(), [(0x900, 1), (0x905, 1)]);

    // Half an entry: it is gone, and read when both halves are there.
    let half = tables.set(0x203, 5, to(0x906));
    tables.guest.vgpu.page_table_trapped(half, 4).unwrap();
    assert_eq!((tables.reads(), translate(&tables)), (vec![], None));
    assert_eq!(tables.pinned(), [(0x900, 1)]);
    tables
        .guest
        .vgpu
        .page_table_trapped(GuestAddress(half.0 + 4), 4)
        .unwrap();
    tables.submit(root).unwrap();
    assert_eq!(tables.reads(), [half.0]);
    assert_eq!(translate(&tables), Some(GuestAddress(0x90_6000)));

    // Where no table is.
    let elsewhere = GuestAddress(0x30_0000);
    tables.guest.vgpu.page_table_trapped(elsewhere, 8).unwrap();
    assert!(tables.reads().is_empty());
}

#[test]
fn what_is_written_or_unmapped_before_a_workload_runs_is_followed() {
    let mut tables = four_tables();
    let root = four_level(0x200);
    tables.set_root(root);
    let context = tables.context;
    tables.guest.submit(&[context]).unwrap();
    tables.reads();
    let at = tables.set(0x203, 5, to(0x905));
    tables.guest.vgpu.page_table_trapped(at, 4).unwrap();
    tables.guest.vgpu.release_pins(0x900 << 12, 0x1000);
    assert!(tables.pinned().is_empty());
    tables.guest.run(ENGINE);
    assert_eq!(tables.reads(), [at.0]);
    assert_eq!(tables.pinned(), [(0x900, 1), (0x905, 1)]);
    // It does not run on pages that are gone.
    tables.guest.submit(&[context]).unwrap();
    tables.pins.refuse(Some(0x900));
    tables.guest.vgpu.release_pins(0x900 << 12, 0x1000);
    let mut hw = SimulatedEngine::new();
    let error = tables.guest.vgpu.run_next(ENGINE, &mut hw).unwrap_err();
    assert_eq!(error.errno(), libc::ENXIO);
}

#[test]
fn a_write_covers_every_entry_it_touches() {
    let mut tables = four_tables();
    let root = four_level(0x200);
    tables.submit(root).unwrap();
    tables.reads();
    // From the last byte of entry 510 of one table into entry 0 of the next.
    let gpa = GuestAddress(0x20_2ff7);
    tables.guest.vgpu.page_table_written(gpa, 10);
    tables.guest.vgpu.page_table_written(gpa, 0);
    tables.submit(root).unwrap();
    assert_eq!(tables.reads(), [0x20_2ff0, 0x20_2ff8, 0x20_3000]);
    tables
        .guest
        .vgpu
        .page_table_written(GuestAddress(0), u64::MAX);
    tables.submit(root).unwrap();
    assert_eq!(tables.reads().len(), 4 * 512);
}

#[test]
fn a_new_table_is_read_whole_and_not_for_its_earlier_writes() {
    let mut tables = four_tables();
    let root = four_level(0x200);
    tables.write(0x203, 9, to(0x909));
    tables.submit(root).unwrap();
    assert_eq!(tables.reads().len(), 4 * 512);
    tables.write(0x204, 1, to(0x901));
    tables.write(0x202, 1, to(0x204));
    tables.submit(root).unwrap();
    let reads = tables.reads();
    assert_eq!(reads.len(), 1 + 512);
    assert_eq!(reads[0], 0x20_2008);
    let translated = tables.guest.vgpu.translate(root, 0x20_1000);
    assert_eq!(translated, Some(GuestAddress(0x90_1000)));
}

#[test]
fn a_table_of_64_kib_pages_takes_32_reads() {
    let mut tables = four_tables();
    let root = four_level(0x200);
    tables.set(0x202, 0, to(0x203) | IPS);
    tables.set(0x203, 16, to(0x900));
    tables.submit(root).unwrap();
    assert_eq!(tables.reads().len(), 3 * 512 + 32);
    // Entry 3, which four_tables() set, is not one of those.
    let frames: Vec<_> = (0x900..0x910).map(|gfn| (gfn, 1)).collect();
    assert_eq!(tables.pinned(), frames);
    let translated = tables.guest.vgpu.translate(root, 0x1_2345);
    assert_eq!(translated, Some(GuestAddress(0x90_2345)));
    tables.write(0x203, 17, to(0x950));
    tables.submit(root).unwrap();
    assert!(tables.reads().is_empty());
}

#[test]
fn two_mib_pages_are_pinned_at_once() {
    let mut tables = four_tables();
    let root = four_level(0x200);
    tables.set(0x202, 1, to(0x600) | PSE);
    tables.submit(root).unwrap();
    assert_eq!(tables.pinned(), [(0x600, 512), (0x900, 1)]);
    let translated = tables.guest.vgpu.translate(root, 0x3f_fffe);
    assert_eq!(translated, Some(GuestAddress(0x7f_fffe)));
}

#[test]
fn three_levels_have_four_directories() {
    let mut tables = four_tables();
    let root = PageTableRoot::ThreeLevel {
        pdps: [0, 0x202 << 12, 0, 0x202 << 12],
    };
    tables.submit(root).unwrap();
    assert_eq!(tables.reads().len(), 2 * 512);
    let translate = |gma| tables.guest.vgpu.translate(root, gma);
    assert_eq!(translate(0x4000_3000), Some(GuestAddress(0x90_0000)));
    assert_eq!(translate(0xc000_3000), Some(GuestAddress(0x90_0000)));
    assert_eq!(translate(0x3000), None);
    assert_eq!(translate(0x1_4000_3000), None);
}

#[test]
fn a_table_that_contains_itself_ends() {
    let mut tables = Tables::new();
    for index in 0..512 {
        tables.set(0x200, index, to(0x200));
    }
    tables.submit(four_level(0x200)).unwrap();
    // The page is a table of each of the four levels.
    assert_eq!(tables.guest.vgpu.shadowed_tables(), 4);
    assert_eq!(tables.pinned(), [(0x200, 1)]);
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The shadow of page tables follows the guest's, by the reads it should take and no others.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use common::{Context, Guest, Trace};
use gvt_scheduler::{
    ring_context, AccessKind, AddressingMode, Cause, ContextDescriptor, DeviceMap, EngineId, Error,
    PageTableRoot, SimulatedEngine, VgpuConfig,
};
use page_pin::PinPages;
use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};

const PRESENT: u64 = 1;
const PSE: u64 = 1 << 7;
const IPS: u64 = 1 << 11;
const ENGINE: EngineId = EngineId::Bcs;

/// Tables are made of these guest pages.
const POOL: u64 = 0x200;
const POOL_PAGES: u64 = 12;
/// A frame that cannot be pinned.
const UNPINNABLE: u64 = 0x3333;

/// Live pins, by what was asked for.
#[derive(Clone, Debug, Default)]
struct Pins(
    Arc<Mutex<BTreeMap<(u64, usize), usize>>>,
    Arc<Mutex<Option<u64>>>,
);

impl Pins {
    /// From now on one more frame cannot be pinned.
    fn refuse(&self, gfn: Option<u64>) {
        *self.1.lock().unwrap() = gfn;
    }
}

struct Pinned(Pins, (u64, usize));

#[derive(Debug, thiserror::Error)]
#[error("not pinnable")]
struct NotPinnable;

impl PinPages for Pins {
    type Pinned = Pinned;
    type Error = NotPinnable;

    fn pin_pages(
        &self,
        iova: u64,
        npages: usize,
        prot: Permissions,
    ) -> Result<Pinned, NotPinnable> {
        assert_eq!(prot, Permissions::ReadWrite);
        let gfn = iova >> 12;
        let refused = self.1.lock().unwrap().unwrap_or(UNPINNABLE);
        let frames = gfn..gfn + npages as u64;
        if frames.contains(&UNPINNABLE) || frames.contains(&refused) {
            return Err(NotPinnable);
        }
        *self.0.lock().unwrap().entry((gfn, npages)).or_default() += 1;
        Ok(Pinned(self.clone(), (gfn, npages)))
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let mut pins = self.0 .0.lock().unwrap();
        let count = pins.get_mut(&self.1).expect("was pinned");
        *count -= 1;
        if *count == 0 {
            pins.remove(&self.1);
        }
    }
}

struct Tables {
    guest: Guest<Pins, Trace>,
    pins: Pins,
    context: Context,
}

impl Tables {
    fn new() -> Self {
        Self::with(VgpuConfig::default())
    }

    fn with(config: VgpuConfig) -> Self {
        let pins = Pins::default();
        let mut guest = Guest::with(config, pins.clone(), Trace::default());
        let context = guest.context(ENGINE, 0x40, 1);
        Self {
            guest,
            pins,
            context,
        }
    }

    fn set(&self, table: u64, index: u64, value: u64) -> GuestAddress {
        let gpa = GuestAddress((table << 12) | (index * 8));
        self.guest.memory.write_obj(value, gpa).unwrap();
        gpa
    }

    /// A write of the guest that the caller was told of.
    fn write(&mut self, table: u64, index: u64, value: u64) {
        let gpa = self.set(table, index, value);
        self.guest.vgpu.page_table_written(gpa, 8);
    }

    fn set_root(&self, root: PageTableRoot) {
        let pdps = match root {
            PageTableRoot::FourLevel { pml4 } => [pml4, 0, 0, 0],
            PageTableRoot::ThreeLevel { pdps } => pdps,
        };
        for (offset, pdp) in (ring_context::PDP3_UDW..)
            .step_by(16)
            .zip(pdps.into_iter().rev())
        {
            self.guest.set(&self.context, offset, (pdp >> 32) as u32);
            self.guest.set(&self.context, offset + 8, pdp as u32);
        }
    }

    fn submit(&mut self, root: PageTableRoot) -> Result<(), Error> {
        self.set_root(root);
        let mode = match root {
            PageTableRoot::FourLevel { .. } => AddressingMode::Legacy64,
            PageTableRoot::ThreeLevel { .. } => AddressingMode::Legacy32,
        };
        let descriptor = ContextDescriptor::new(self.context.lrca, self.context.id, mode);
        common::submit(&mut self.guest.vgpu, ENGINE, &[descriptor])?;
        self.guest.run(ENGINE);
        Ok(())
    }

    /// Addresses of the entries read since the last call.
    fn reads(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.guest.vgpu.observer_mut().accesses)
            .into_iter()
            .map(|(_, access)| access)
            .filter(|access| access.kind == AccessKind::PageTable)
            .inspect(|access| assert_eq!((access.len, access.write), (8, false)))
            .map(|access| access.gpa.0)
            .collect()
    }

    fn pinned(&self) -> Vec<(u64, usize)> {
        self.pins.0.lock().unwrap().keys().copied().collect()
    }
}

fn four_level(frame: u64) -> PageTableRoot {
    PageTableRoot::FourLevel { pml4: frame << 12 }
}

fn to(frame: u64) -> u64 {
    frame << 12 | PRESENT | 2
}

/// One table of each level; the last one maps frame 0x900 at index 3.
fn four_tables() -> Tables {
    let tables = Tables::new();
    tables.set(0x200, 0, to(0x201));
    tables.set(0x201, 0, to(0x202));
    tables.set(0x202, 0, to(0x203));
    tables.set(0x203, 3, to(0x900));
    tables
}

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

#[test]
fn dropping_the_vgpu_drops_its_pins() {
    let mut tables = four_tables();
    tables.submit(four_level(0x200)).unwrap();
    let Tables { guest, pins, .. } = tables;
    drop(guest);
    assert!(pins.0.lock().unwrap().is_empty());
}

/// A walk through the tables in guest memory, as they are now.
struct FreshWalk<'a> {
    memory: &'a GuestMemoryMmap,
    /// Tables seen: page, level, and whether it is one of 64 KiB pages.
    tables: BTreeSet<(u64, u32, bool)>,
    /// Frames that are mapped.
    frames: BTreeSet<u64>,
}

impl FreshWalk<'_> {
    fn visit(&mut self, page: u64, level: u32, wide: bool) {
        if !self.tables.insert((page, level, wide)) {
            return;
        }
        for index in (0..512).step_by(if wide { 16 } else { 1 }) {
            let entry = self.entry(page, index);
            let frame = entry >> 12 & 0x3_ffff_ffff;
            if entry & PRESENT == 0 {
                continue;
            }
            match level {
                1 if wide => self.frames.extend(frame & !15..=frame | 15),
                1 => self.frames.extend([frame]),
                2 if entry & PSE != 0 => self.frames.extend(frame & !511..=frame | 511),
                2 => self.visit(frame, 1, entry & IPS != 0),
                _ => self.visit(frame, level - 1, false),
            }
        }
    }

    fn translate(&self, mut page: u64, level: u32, gma: u64) -> Option<u64> {
        let mut wide = false;
        for level in (1..=level).rev() {
            let index = gma >> (12 + 9 * (level - 1)) & 511;
            let entry = self.entry(page, if wide { index & !15 } else { index });
            if entry & PRESENT == 0 {
                return None;
            }
            page = entry >> 12 & 0x3_ffff_ffff;
            let bits = match level {
                1 if wide => 16,
                1 => 12,
                2 if entry & PSE != 0 => 21,
                _ => {
                    wide = level == 2 && entry & IPS != 0;
                    continue;
                }
            };
            let mask = (1 << bits) - 1;
            return Some(page << 12 & !mask | gma & mask);
        }
        None
    }

    fn entry(&self, page: u64, index: u64) -> u64 {
        let gpa = GuestAddress((page << 12) | (index * 8));
        self.memory.read_obj(gpa).unwrap()
    }
}

const INDEXES: [u64; 5] = [0, 1, 16, 17, 511];

#[derive(Clone, Debug)]
enum Step {
    Write {
        table: u64,
        index: u64,
        value: u64,
        trapped: u64,
    },
    Submit(PageTableRoot),
    Release(PageTableRoot),
    Unmap {
        gfn: u64,
        pages: u64,
    },
}

fn root() -> impl Strategy<Value = PageTableRoot> {
    // Few directories, so that roots share them.
    let pdp = || prop_oneof![Just(0), (POOL..POOL + 3).prop_map(|page| page << 12)];
    prop_oneof![
        (POOL..POOL + 2).prop_map(four_level),
        [pdp(), pdp(), pdp(), pdp()].prop_map(|pdps| PageTableRoot::ThreeLevel { pdps }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let flags = prop_oneof![
        12 => Just(PRESENT),
        4 => Just(0),
        2 => Just(PRESENT | IPS),
        1 => Just(PRESENT | PSE),
    ];
    let frame = prop_oneof![
        30 => POOL..POOL + POOL_PAGES,
        1 => Just(UNPINNABLE),
    ];
    let write = (
        POOL..POOL + POOL_PAGES,
        prop::sample::select(INDEXES.to_vec()),
        frame,
        flags,
        prop::sample::select(vec![0, 4, 8]),
    )
        .prop_map(|(table, index, frame, flags, trapped)| Step::Write {
            table,
            index,
            value: frame << 12 | flags,
            trapped,
        });
    prop_oneof![
        10 => write,
        4 => root().prop_map(Step::Submit),
        1 => root().prop_map(Step::Release),
        1 => (POOL..POOL + POOL_PAGES, 1..4u64).prop_map(|(gfn, pages)| Step::Unmap { gfn, pages }),
    ]
}

/// The uppermost tables of a root: first address, page and level.
fn uppermost(root: PageTableRoot) -> Vec<(u64, u64, u32)> {
    match root {
        PageTableRoot::FourLevel { pml4 } => vec![(0, pml4 >> 12, 4)],
        PageTableRoot::ThreeLevel { pdps } => (0..)
            .zip(pdps)
            .filter(|(_, pdp)| *pdp != 0)
            .map(|(directory, pdp)| (directory << 30, pdp >> 12, 2))
            .collect(),
    }
}

/// Whether addresses of `root` translate as a fresh walk says.
fn check_translations(tables: &Tables, fresh: &FreshWalk, root: PageTableRoot) -> TestCaseResult {
    for (base, page, level) in uppermost(root) {
        let upper: &[u64] = if level == 4 { &INDEXES } else { &[0] };
        for (a, b) in upper.iter().flat_map(|a| upper.iter().map(move |b| (a, b))) {
            for (c, d) in INDEXES
                .iter()
                .flat_map(|c| INDEXES.iter().map(move |d| (c, d)))
            {
                let gma = base | a << 39 | b << 30 | c << 21 | d << 12 | 0x123;
                let found = tables.guest.vgpu.translate(root, gma).map(|gpa| gpa.0);
                let expected = fresh.translate(page, level, gma);
                prop_assert_eq!(found, expected, "{:#x}", gma);
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn the_shadow_is_what_a_fresh_walk_finds(steps in prop::collection::vec(step(), 1..80)) {
        let mut tables = Tables::new();
        let memory = tables.guest.memory.clone();
        let mut roots: Vec<PageTableRoot> = Vec::new();
        for step in steps {
            let root = match step {
                Step::Write { table, index, value, trapped: 0 } => {
                    tables.write(table, index, value);
                    continue;
                }
                Step::Write { table, index, value, trapped } => {
                    let gpa = tables.set(table, index, value);
                    // What cannot be shadowed is an error of the next submission too.
                    let _failed = tables.guest.vgpu.page_table_trapped(gpa, trapped);
                    continue;
                }
                Step::Release(root) => {
                    tables.guest.vgpu.release_page_tables(root);
                    roots.retain(|known| *known != root);
                    continue;
                }
                Step::Unmap { gfn, pages } => {
                    tables.guest.vgpu.release_pins(gfn << 12, pages << 12);
                    continue;
                }
                Step::Submit(root) => root,
            };
            if tables.submit(root).is_err() {
                if !roots.contains(&root) {
                    // It may be known by now all the same.
                    tables.guest.vgpu.release_page_tables(root);
                }
                continue;
            }
            if !roots.contains(&root) {
                roots.push(root);
            }
            let mut fresh = FreshWalk {
                memory: &memory,
                tables: BTreeSet::new(),
                frames: BTreeSet::new(),
            };
            check_translations(&tables, &fresh, root)?;

            // What another root reaches and failed is mended only when that root is used.
            if roots.iter().any(|root| tables.submit(*root).is_err()) {
                continue;
            }
            for (_, page, level) in roots.iter().flat_map(|root| uppermost(*root)) {
                fresh.visit(page, level, false);
            }
            prop_assert_eq!(tables.guest.vgpu.shadowed_tables(), fresh.tables.len());
            let pinned: BTreeSet<_> = tables
                .pinned()
                .into_iter()
                .flat_map(|(gfn, pages)| gfn..gfn + pages as u64)
                .collect();
            prop_assert_eq!(&pinned, &fresh.frames);
            for root in &roots {
                check_translations(&tables, &fresh, *root)?;
            }
        }
    }
}

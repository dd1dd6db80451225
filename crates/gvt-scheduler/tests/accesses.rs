// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Each workload makes the kernel's accesses to guest memory, except those of the command parser, in
//! the kernel's order.

mod common;

use common::{entry, FaultyEngine, Guest, HWSP_PAGE, REQUEST, RING_PAGE};
use gvt_scheduler::{
    ring_context, AccessCounts, AccessKind, CopyMode, Counts, EngineId, Generation, HalfEntry,
    Observer, Step, VgpuConfig,
};
use vm_memory::{Bytes, GuestAddress};

const RCS: EngineId = EngineId::Rcs;
const LRCA: u32 = 0x40;

fn reads(reads: u64, read_bytes: u64) -> Counts {
    Counts {
        reads,
        read_bytes,
        ..Counts::default()
    }
}

fn writes(writes: u64, written_bytes: u64) -> Counts {
    Counts {
        writes,
        written_bytes,
        ..Counts::default()
    }
}

fn counts(guest: &mut Guest) -> AccessCounts {
    let mut counts = AccessCounts::default();
    for (_, access) in guest.take_trace() {
        counts.access(&access);
    }
    counts
}

fn context_page_counts(copy_mode: CopyMode, generation: Generation) -> AccessCounts {
    let mut guest = Guest::new(VgpuConfig {
        copy_mode,
        generation,
        ..VgpuConfig::default()
    });
    let context = guest.context(RCS, LRCA, 1);
    guest.submit_and_run(&context);
    counts(&mut guest)
}

#[test]
fn one_render_workload() {
    let counts = context_page_counts(CopyMode::Coalesced, Generation::Gen9);
    let page1 = Counts {
        reads: 1,
        read_bytes: 3888,
        writes: 1,
        written_bytes: 3888,
    };
    let pages = Counts {
        reads: 1,
        read_bytes: 81920,
        writes: 1,
        written_bytes: 81920,
    };
    assert_eq!(counts.get(AccessKind::ContextDword), reads(20, 80));
    assert_eq!(counts.get(AccessKind::Ring), reads(1, REQUEST.into()));
    assert_eq!(counts.get(AccessKind::Page1), page1);
    assert_eq!(counts.get(AccessKind::ContextPage), pages);
    assert_eq!(counts.get(AccessKind::PageTable), Counts::default());
    assert_eq!(counts.get(AccessKind::Completion), writes(7, 12 + 2 * 12));
}

#[test]
fn one_render_workload_page_by_page() {
    let counts = context_page_counts(CopyMode::PerPage, Generation::Gen9);
    assert_eq!(counts.get(AccessKind::ContextPage).reads, 20);
    assert_eq!(counts.get(AccessKind::ContextPage).writes, 20);
    let counts = context_page_counts(CopyMode::PerPage, Generation::Gen8);
    assert_eq!(counts.get(AccessKind::ContextPage).writes, 17);
    assert_eq!(counts.get(AccessKind::ContextPage).written_bytes, 69632);
}

#[test]
fn one_workload_of_each_other_engine() {
    for engine in [EngineId::Vcs, EngineId::Vcs2, EngineId::Vecs, EngineId::Bcs] {
        let mut guest = Guest::new(VgpuConfig::default());
        let context = guest.context(engine, LRCA, 1);
        guest.submit_and_run(&context);
        let counts = counts(&mut guest);
        assert_eq!(counts.get(AccessKind::ContextDword), reads(15, 60));
        assert_eq!(counts.get(AccessKind::ContextPage), Counts::default());
        assert_eq!(counts.get(AccessKind::Completion).writes, 7);
        assert_eq!(counts.total().reads, 15 + 1 + 1);
        assert_eq!(counts.total().writes, 7 + 1);
    }
}

#[test]
fn the_order_is_the_kernels() {
    let mut guest = Guest::new(VgpuConfig::default());
    let context = guest.context(RCS, LRCA, 1);
    guest.set(&context, ring_context::INDIRECT_CTX, 0x8 << 12 | 2);
    guest.submit_and_run(&context);
    let page1 = guest.field(&context, 0).0;
    let hwsp = u64::from(HWSP_PAGE) << 12;
    let mut expected = Vec::new();
    let mut add = |step: Step, write: bool, gpa: u64, len: usize| {
        expected.push((step, write, gpa, len));
    };
    for offset in [0x14, 0x1c, 0x24, 0x2c, 0x0c, 0x64, 0x6c] {
        add(Step::Create, false, page1 + offset, 4);
    }
    for offset in [0x94, 0x9c, 0xa4, 0xac, 0xb4, 0xbc, 0xc4, 0xcc] {
        add(Step::Create, false, page1 + offset, 4);
    }
    add(Step::Scan, false, u64::from(RING_PAGE) << 12, 160);
    add(Step::Scan, false, 0x8000, 128);
    for offset in [0x0c, 0x64, 0x6c, 0x74, 0x8c] {
        add(Step::Populate, false, page1 + offset, 4);
    }
    add(Step::Populate, false, page1 + 208, 3888);
    add(Step::Populate, false, page1 + 4096, 81920);
    add(Step::Prepare, true, hwsp + 0x40, 8);
    add(Step::Prepare, true, hwsp + 0x7c, 4);
    add(Step::Complete, true, page1 + 4096, 81920);
    for offset in [0x14, 0x0c, 0x8c] {
        add(Step::Complete, true, page1 + offset, 4);
    }
    add(Step::Complete, true, page1 + 208, 3888);
    add(Step::Complete, true, hwsp + 0x48, 8);
    add(Step::Complete, true, hwsp + 0x7c, 4);
    let found: Vec<_> = guest
        .take_trace()
        .into_iter()
        .map(|(step, access)| (step, access.write, access.gpa.0, access.len))
        .collect();
    assert_eq!(found, expected);
}

#[test]
fn ring_is_read_page_by_page_and_around_its_end() {
    let mut guest = Guest::new(VgpuConfig::default());
    let context = guest.context(RCS, LRCA, 1);
    guest.set(&context, ring_context::HEAD, 0x2ff0);
    guest.set(&context, ring_context::TAIL, 0x10);
    guest.submit_and_run(&context);
    let ring = counts(&mut guest).get(AccessKind::Ring);
    assert_eq!((ring.reads, ring.read_bytes), (3, 0x10 + 0x1000 + 0x10));
    assert_eq!(guest.get(&context, ring_context::HEAD), 0x10);
}

#[test]
fn restore_inhibit_reads_no_pages_and_the_engine_clears_it() {
    let mut guest = Guest::new(VgpuConfig::default());
    let context = guest.context(RCS, LRCA, 1);
    guest.set(&context, ring_context::CTX_CTRL, 0x0001_0001);
    assert_eq!(guest.submit_and_run(&context).populate.pages, 0);
    assert_eq!(guest.get(&context, ring_context::CTX_CTRL), 0x0001_0000);
    let second = guest.submit_and_run(&context);
    assert!(!second.skipped);
    assert_eq!(second.populate.pages, 20);
    assert!(guest.submit_and_run(&context).skipped);
}

#[test]
fn restore_inhibit_of_another_context_ends_the_skip() {
    let mut guest = Guest::new(VgpuConfig::default());
    let one = guest.context(RCS, LRCA, 1);
    let two = guest.context(RCS, LRCA + 32, 2);
    guest.set(&two, ring_context::CTX_CTRL, 0x0001_0001);
    guest.submit_and_run(&one);
    guest.submit_and_run(&two);
    // The image holds the state of the other context by now, although that was never read.
    assert!(!guest.submit_and_run(&one).skipped);
}

#[test]
fn pages_are_skipped_for_the_same_context_only() {
    let mut guest = Guest::new(VgpuConfig::default());
    let one = guest.context(RCS, LRCA, 1);
    let two = guest.context(RCS, LRCA + 32, 2);
    let skipped: Vec<_> = [&one, &one, &two, &two, &one, &one]
        .map(|context| guest.submit_and_run(context).skipped)
        .into();
    assert_eq!(skipped, [false, true, false, true, false, true]);
    assert_eq!(guest.vgpu.skips(), 3);
    let pages = counts(&mut guest).get(AccessKind::ContextPage);
    assert_eq!((pages.reads, pages.writes), (3, 6));
}

#[test]
fn a_ggtt_write_to_the_context_ends_the_skip() {
    let mut guest = Guest::new(VgpuConfig::default());
    let context = guest.context(RCS, LRCA, 1);
    guest.submit_and_run(&context);
    for (index, skipped) in [
        (LRCA, false),
        (LRCA + 21, false),
        (LRCA + 22, true),
        (LRCA - 1, true),
    ] {
        guest
            .vgpu
            .write_ggtt_entry(index, entry(index.into()))
            .unwrap();
        assert_eq!(guest.submit_and_run(&context).skipped, skipped, "{index}");
    }
}

#[test]
fn a_ggtt_entry_written_in_halves_ends_the_skip() {
    let mut guest = Guest::new(VgpuConfig::default());
    let context = guest.context(RCS, LRCA, 1);
    guest.submit_and_run(&context);
    for (half, value) in [
        (HalfEntry::High, 0),
        (HalfEntry::Low, (LRCA + 300) << 12 | 1),
    ] {
        guest.vgpu.write_ggtt_half(LRCA + 5, half, value).unwrap();
    }
    guest.take_trace();
    assert!(!guest.submit_and_run(&context).skipped);
    let moved = u64::from(LRCA + 300) << 12;
    let reads = guest.take_trace();
    assert!(reads
        .iter()
        .any(|(_, access)| access.gpa.0 == moved && !access.write));
}

#[test]
fn a_failed_workload_ends_the_skip() {
    let mut guest = Guest::new(VgpuConfig::default());
    let context = guest.context(RCS, LRCA, 1);
    guest.submit_and_run(&context);
    guest.submit(&[context]).unwrap();
    guest.vgpu.run_next(RCS, &mut FaultyEngine).unwrap_err();
    assert!(!guest.submit_and_run(&context).skipped);
}

#[test]
fn without_skipping_every_populate_reads_the_pages() {
    let mut guest = Guest::new(VgpuConfig {
        skip_unchanged: false,
        ..VgpuConfig::default()
    });
    let context = guest.context(RCS, LRCA, 1);
    for _ in 0..3 {
        assert_eq!(guest.submit_and_run(&context).populate.calls, 1);
    }
    assert_eq!(guest.vgpu.skips(), 0);
}

#[test]
fn two_elements_are_two_workloads_of_one_execlist() {
    let mut guest = Guest::new(VgpuConfig::default());
    let one = guest.context(RCS, LRCA, 1);
    let two = guest.context(RCS, LRCA + 32, 2);
    let submission = guest.submit(&[one, two]).unwrap();
    assert_eq!((submission.sequence, submission.workloads), (0, 2));
    assert_eq!(guest.vgpu.mmio_read(0x2234), 0);
    let first = guest.run(RCS);
    assert_eq!((first.events, first.interrupts), (2, 2));
    assert_eq!(guest.vgpu.mmio_read(0x2238), 2);
    let second = guest.run(RCS);
    assert_eq!((second.events, second.interrupts), (1, 1));
    assert_eq!(guest.vgpu.mmio_read(0x2234) & 0x18, 0);
    // Idle to active, element switch, active to idle.
    for (slot, event) in [(0, 0x1), (1, 0x1_0000_0014), (2, 0x2_0000_0018)] {
        let gpa = GuestAddress(0x1040 + 8 * slot);
        assert_eq!(guest.memory.read_obj::<u64>(gpa).unwrap(), event);
    }
}

#[test]
fn the_same_context_queued_again_continues_at_the_queued_tail() {
    let mut guest = Guest::new(VgpuConfig::default());
    let context = guest.context(RCS, LRCA, 1);
    guest.submit(&[context]).unwrap();
    guest.set(&context, ring_context::TAIL, 2 * REQUEST);
    guest.submit(&[context]).unwrap();
    guest.take_trace();
    // To the hardware the context goes on: it is not scheduled out in between.
    assert_eq!(guest.run(RCS).events, 1);
    assert_eq!(guest.get(&context, ring_context::HEAD), REQUEST);
    let second = guest.run(RCS);
    assert_eq!((second.events, second.interrupts), (2, 2));
    assert_eq!(guest.get(&context, ring_context::HEAD), 2 * REQUEST);
    let ring: Vec<_> = guest
        .take_trace()
        .into_iter()
        .filter(|(_, access)| access.kind == AccessKind::Ring)
        .map(|(_, access)| (access.gpa.0, access.len))
        .collect();
    assert_eq!(ring, [(0x2000 + u64::from(REQUEST), REQUEST as usize)]);
}

#[test]
fn an_untranslatable_status_page_is_passed_over() {
    let mut guest = Guest::new(VgpuConfig::default());
    let context = guest.context(RCS, LRCA, 1);
    guest.vgpu.write_ggtt_entry(HWSP_PAGE, 0).unwrap();
    let completion = guest.submit_and_run(&context);
    assert_eq!(completion.events, 2);
    assert_eq!(counts(&mut guest).get(AccessKind::Completion).writes, 3);
    assert_eq!(guest.vgpu.mmio_read(0x2370), 1);
}

#[test]
fn registers_are_stored_except_those_of_the_device() {
    let mut guest = Guest::new(VgpuConfig::default());
    for (offset, stored) in [
        (0x2084, true),
        (0x4_0000, true),
        (0x2234, false),
        (0x2370, false),
    ] {
        guest.vgpu.mmio_write(offset, 0x55).unwrap();
        let expected = if stored { 0x55 } else { 0 };
        assert_eq!(guest.vgpu.mmio_read(offset), expected, "{offset:#x}");
    }
    for offset in [0x2081, 0x20_0000, u32::MAX] {
        assert!(guest.vgpu.mmio_write(offset, 0).is_err());
        assert_eq!(guest.vgpu.mmio_read(offset), 0);
    }
}

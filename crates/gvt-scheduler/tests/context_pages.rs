// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Copies of context pages, for any layout of the pages in guest memory.

mod common;

use common::{entry, memory};
use gvt_scheduler::{AccessCounts, AccessKind, ContextPages, CopyMode, Ggtt, Run, PAGE_SIZE};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const LRCA: u32 = 16;
const FRAMES: u64 = 64;

fn ggtt(frames: &[u64]) -> Ggtt {
    let mut ggtt = Ggtt::new(64);
    for (page, frame) in (LRCA + 2..).zip(frames) {
        ggtt.write_entry(page, entry(*frame)).unwrap();
    }
    ggtt
}

fn pages<'a>(ggtt: &'a Ggtt, frames: &[u64]) -> ContextPages<'a> {
    ContextPages::new(ggtt, LRCA, 2 + frames.len())
}

fn runs(frames: &[u64], mode: CopyMode) -> Vec<Run> {
    let ggtt = ggtt(frames);
    pages(&ggtt, frames)
        .runs(mode)
        .collect::<Result<_, _>>()
        .unwrap()
}

/// Frames of 1 to 24 pages: each either is the neighbour of the last one, above or below, or is
/// anywhere.
fn frames() -> impl Strategy<Value = Vec<u64>> {
    #[derive(Clone, Copy, Debug)]
    enum Page {
        Above,
        Below,
        At(u64),
    }
    let page = prop_oneof![
        3 => Just(Page::Above),
        2 => Just(Page::Below),
        2 => (0..FRAMES).prop_map(Page::At)
    ];
    prop::collection::vec(page, 1..25).prop_map(|pages| {
        let mut last = 0;
        pages
            .into_iter()
            .map(|page| {
                last = match page {
                    Page::Above => (last + 1) % FRAMES,
                    Page::Below => (last + FRAMES - 1) % FRAMES,
                    Page::At(frame) => frame,
                };
                last
            })
            .collect()
    })
}

/// Guest memory in which each frame has its own bytes.
fn guest_memory() -> GuestMemoryMmap {
    let memory = memory(FRAMES as usize * PAGE_SIZE);
    for frame in 0..FRAMES {
        let bytes: Vec<_> = (0..PAGE_SIZE)
            .map(|i| (i as u64 * 3 + frame * 41) as u8)
            .collect();
        let gpa = GuestAddress(frame * PAGE_SIZE as u64);
        memory.write_slice(&bytes, gpa).unwrap();
    }
    memory
}

fn contents(memory: &GuestMemoryMmap) -> Vec<u8> {
    let mut bytes = vec![0; FRAMES as usize * PAGE_SIZE];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn runs_add_up_to_the_pages_and_are_maximal(frames in frames()) {
        let runs = runs(&frames, CopyMode::Coalesced);
        let mut covered = Vec::new();
        for run in &runs {
            prop_assert_eq!(run.first_page, 2 + covered.len());
            covered.extend((0..run.pages as u64).map(|page| (run.gpa.0 >> 12) + page));
        }
        prop_assert_eq!(&covered, &frames);
        for pair in runs.windows(2) {
            prop_assert_ne!(pair[0].gpa.0 + pair[0].bytes() as u64, pair[1].gpa.0);
        }
    }

    #[test]
    fn scatter_lists_add_up_to_the_pages_and_are_no_more_than_runs(frames in frames()) {
        let runs_of = |mode| runs(&frames, mode);
        let mut covered = Vec::new();
        for run in runs_of(CopyMode::Scattered) {
            prop_assert_eq!(run.first_page, 2 + covered.len());
            let mut pages: Vec<_> = (0..run.pages as u64).map(|page| (run.gpa.0 >> 12) + page).collect();
            if run.descending {
                prop_assert!(run.pages > 1);
                pages.reverse();
            }
            covered.extend(pages);
        }
        prop_assert_eq!(&covered, &frames);
        prop_assert!(runs_of(CopyMode::Scattered).len() <= runs_of(CopyMode::Coalesced).len());
    }

    #[test]
    fn upstream_loses_exactly_a_lone_last_page(frames in frames()) {
        let mut expected = runs(&frames, CopyMode::Coalesced);
        let lone = frames.len() > 1 && frames[frames.len() - 2] + 1 != frames[frames.len() - 1];
        if lone {
            prop_assert_eq!(expected.pop().map(|run| run.pages), Some(1));
        }
        prop_assert_eq!(runs(&frames, CopyMode::UpstreamTail), expected);
    }

    #[test]
    fn populate_is_the_same_in_every_mode(frames in frames()) {
        let (ggtt, memory) = (ggtt(&frames), guest_memory());
        let context = pages(&ggtt, &frames);
        let mut counts = AccessCounts::default();
        let mut populate = |mode| {
            let mut bytes = vec![0xaa; frames.len() * PAGE_SIZE];
            let stats = context.populate(&memory, mode, &mut bytes, &mut counts).unwrap();
            (stats, bytes)
        };
        let (page_stats, by_page) = populate(CopyMode::PerPage);
        let (run_stats, by_run) = populate(CopyMode::Coalesced);
        let (scatter_stats, scattered) = populate(CopyMode::Scattered);
        prop_assert!(by_page == by_run);
        prop_assert!(by_page == scattered);
        for (frame, bytes) in frames.iter().zip(by_run.chunks(PAGE_SIZE)) {
            prop_assert_eq!(bytes[1], (3 + frame * 41) as u8);
        }
        prop_assert_eq!((page_stats.calls, page_stats.pages), (frames.len() as u64, frames.len() as u64));
        prop_assert_eq!(run_stats.calls, runs(&frames, CopyMode::Coalesced).len() as u64);
        prop_assert_eq!(run_stats.pages, frames.len() as u64);
        prop_assert_eq!(scatter_stats.calls, runs(&frames, CopyMode::Scattered).len() as u64);
        let calls = page_stats.calls + run_stats.calls + scatter_stats.calls;
        prop_assert_eq!(counts.get(AccessKind::ContextPage).reads, calls);
        prop_assert_eq!(counts.total().read_bytes, 3 * by_run.len() as u64);
    }

    #[test]
    fn write_back_is_the_same_in_every_mode(frames in frames(), seed: u8) {
        let ggtt = ggtt(&frames);
        let context = pages(&ggtt, &frames);
        let bytes: Vec<_> = (0..frames.len() * PAGE_SIZE)
            .map(|i| (i % 251) as u8 ^ seed)
            .collect();
        let write_back = |mode| {
            let memory = guest_memory();
            let stats = context.write_back(&memory, mode, &bytes, &mut ()).unwrap();
            (stats.pages, contents(&memory))
        };
        let by_page = write_back(CopyMode::PerPage);
        prop_assert!(by_page == write_back(CopyMode::Coalesced));
        prop_assert!(by_page == write_back(CopyMode::Scattered));
    }
}

#[test]
fn upstream_leaves_the_lost_page_as_it_was() {
    let frames = [3, 4, 9];
    let (ggtt, memory) = (ggtt(&frames), guest_memory());
    let before = contents(&memory);
    let bytes = vec![0xee; 3 * PAGE_SIZE];
    let context = pages(&ggtt, &frames);
    let stats = context
        .write_back(&memory, CopyMode::UpstreamTail, &bytes, &mut ())
        .unwrap();
    assert_eq!((stats.calls, stats.pages), (1, 2));
    let after = contents(&memory);
    assert!(after[3 * PAGE_SIZE..5 * PAGE_SIZE]
        .iter()
        .all(|byte| *byte == 0xee));
    assert!(after[9 * PAGE_SIZE..10 * PAGE_SIZE] == before[9 * PAGE_SIZE..10 * PAGE_SIZE]);
}

#[test]
fn a_buffer_of_another_size_is_refused() {
    let frames = [3, 4];
    let (ggtt, memory) = (ggtt(&frames), guest_memory());
    let context = pages(&ggtt, &frames);
    for size in [0, PAGE_SIZE, 3 * PAGE_SIZE] {
        let mut bytes = vec![0; size];
        let mode = CopyMode::Coalesced;
        let error = context
            .populate(&memory, mode, &mut bytes, &mut ())
            .unwrap_err();
        assert_eq!(error.errno(), libc::EINVAL);
        assert!(context.write_back(&memory, mode, &bytes, &mut ()).is_err());
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! After any writes the shadow is what a walk through the guest's tables finds.

use std::collections::BTreeSet;

use gvt_scheduler::PageTableRoot;
use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::{four_level, Tables, IPS, PRESENT, PSE, UNPINNABLE};

/// Tables are made of these guest pages.
const POOL: u64 = 0x200;
const POOL_PAGES: u64 = 12;

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

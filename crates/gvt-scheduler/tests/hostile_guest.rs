// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Nothing a guest puts into its memory, registers or tables makes the vGPU panic.

mod common;

use std::cell::Cell;

use common::memory;
use gvt_scheduler::{
    ring_context, AccessCounts, AccessKind, CopyMode, EngineId, Error, Generation, HalfEntry,
    SimulatedEngine, Vgpu, VgpuConfig,
};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const PAGES: u64 = 64;
const CASES: u32 = 192;

#[derive(Clone, Debug)]
enum Action {
    Ggtt(u32, u64),
    GgttHalf(u32, bool, u32),
    Mmio(u32, u32),
    Submit(EngineId, [u64; 2]),
    Memory(u64, Vec<u64>),
    TableWritten(u64, u64),
    ReleasePins(u64, u64),
    Run(EngineId),
    /// Makes a context with a ring and page tables, spoils some of it, and submits it.
    Context(Plausible),
}

/// A context that could be a driver's.
#[derive(Clone, Debug)]
struct Plausible {
    engine: EngineId,
    lrca: u32,
    id: u32,
    four_level: bool,
    ring_page: u32,
    head: u32,
    tail: u32,
    /// Cache lines of the indirect context batch.
    indirect: u32,
    /// First of four pages with a table of each level.
    tables: u64,
    /// Entries of these tables: which table, which entry, and its value.
    entries: Vec<(u64, u64, u64)>,
    /// Words of the ring context that are spoilt.
    spoilt: Vec<(u64, u64)>,
}

impl Plausible {
    fn write(&self, memory: &GuestMemoryMmap) {
        let set = |gpa: u64, word: u64| memory.write_obj(word, GuestAddress(gpa)).unwrap();
        for word in 0..4 * 512 {
            set((self.tables << 12) + word * 8, 0);
        }
        for table in 0..4 {
            // The last one maps itself.
            let next = self.tables + (table + 1).min(3);
            set((self.tables + table) << 12, next << 12 | 1);
        }
        for (table, index, entry) in &self.entries {
            set((self.tables + table) << 12 | index << 3, *entry);
        }

        let ring_context = u64::from(self.lrca + 1) << 12;
        for word in 0..ring_context::SIZE as u64 / 8 {
            set(ring_context + word * 8, 0);
        }
        let pdp0 = if self.four_level {
            self.tables
        } else {
            self.tables + 2
        };
        let indirect = match self.indirect {
            0 => 0,
            lines => self.ring_page << 12 | lines,
        };
        for (field, value) in [
            (ring_context::HEAD, self.head),
            (ring_context::TAIL, self.tail),
            (ring_context::START, self.ring_page << 12),
            (ring_context::CTL, 1),
            (ring_context::INDIRECT_CTX, indirect),
            (ring_context::PDP3_UDW + 56, (pdp0 as u32) << 12),
            // A second directory where there are four, nothing where there is one root.
            (ring_context::PDP3_UDW + 40, (pdp0 as u32) << 12),
        ] {
            let gpa = GuestAddress(ring_context + field as u64);
            memory.write_obj(value, gpa).unwrap();
        }
        for (word, value) in &self.spoilt {
            set(ring_context + word * 8, *value);
        }
    }

    fn descriptor(&self) -> u64 {
        let mode = u64::from(self.four_level) << 4;
        u64::from(self.id) << 32 | u64::from(self.lrca) << 12 | 0x109 | mode
    }
}

fn plausible() -> impl Strategy<Value = Plausible> {
    let entries = prop::collection::vec((0..4u64, 0..512u64, entry()), 0..8);
    let spoilt = prop::collection::vec((0..ring_context::SIZE as u64 / 8, word()), 0..2);
    (
        (engine(), 0..20u32, 0..3u32, prop::bool::weighted(0.7)),
        (42..48u32, 0..512u32, 0..512u32),
        prop_oneof![2 => Just(0), 1 => 1..0x40u32],
        (48..PAGES - 4, entries),
        prop_oneof![2 => Just(Vec::new()), 1 => spoilt],
    )
        .prop_map(
            |(
                (engine, lrca, id, four_level),
                (ring_page, head, tail),
                indirect,
                tables,
                spoilt,
            )| {
                Plausible {
                    engine,
                    lrca,
                    id,
                    four_level,
                    ring_page,
                    head: head * 8,
                    tail: tail * 8,
                    indirect,
                    tables: tables.0,
                    entries: tables.1,
                    spoilt,
                }
            },
        )
}

/// Mostly a present entry of a page in memory, sometimes with the bits that make it a large one.
fn entry() -> impl Strategy<Value = u64> {
    let flags = prop_oneof![6 => Just(1u64), 1 => Just(0x801), 1 => Just(0x81)];
    prop_oneof![
        8 => (0..PAGES, flags).prop_map(|(page, flags)| page << 12 | flags),
        1 => word(),
    ]
}

/// Numbers with a preference for those that mean something.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        (0..PAGES, 0..0x1000u64).prop_map(|(page, bits)| page << 12 | bits),
        (0..PAGES).prop_map(|page| page << 12 | 1),
        0..64u64,
        (0..64u64).prop_map(|below| u64::MAX - below),
    ]
}

fn engine() -> impl Strategy<Value = EngineId> {
    prop::sample::select(EngineId::ALL.to_vec())
}

fn descriptor() -> impl Strategy<Value = u64> {
    prop_oneof![
        1 => any::<u64>(),
        4 => (0..PAGES, 0..3u64, prop::bool::ANY)
            .prop_map(|(lrca, id, four)| id << 32 | lrca << 12 | 0x109 | u64::from(four) << 4),
    ]
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        2 => (0..80u32, word()).prop_map(|(index, value)| Action::Ggtt(index, value)),
        1 => (0..80u32, any::<bool>(), any::<u32>())
            .prop_map(|(index, low, value)| Action::GgttHalf(index, low, value)),
        1 => (engine(), 0..0x400u32, word())
            .prop_map(|(engine, register, value)| Action::Mmio(engine.mmio_base() + register, value as u32)),
        1 => (any::<u32>(), any::<u32>()).prop_map(|(offset, value)| Action::Mmio(offset, value)),
        6 => (engine(), [descriptor(), descriptor()])
            .prop_map(|(engine, elements)| Action::Submit(engine, elements)),
        4 => (0..PAGES * 512, prop::collection::vec(word(), 1..32))
            .prop_map(|(at, words)| Action::Memory(at * 8, words)),
        2 => (word(), word()).prop_map(|(gpa, len)| Action::TableWritten(gpa, len)),
        1 => (word(), word()).prop_map(|(iova, size)| Action::ReleasePins(iova, size)),
        6 => engine().prop_map(Action::Run),
        6 => plausible().prop_map(Action::Context),
    ]
}

fn fill(memory: &GuestMemoryMmap, mut seed: u64) {
    for at in (0..PAGES << 12).step_by(8) {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        // Most words point into guest memory, so that structures nest.
        let word = match seed % 8 {
            0 => seed,
            1 => 0,
            _ => ((seed >> 8) % (PAGES << 12)) | (seed >> 3 & 1),
        };
        memory.write_obj(word, GuestAddress(at)).unwrap();
    }
}

/// How far the guests of a run have come.
#[derive(Clone, Copy, Debug, Default)]
struct Reached {
    tables: usize,
    leaves: usize,
    ring_reads: u64,
    completions: u64,
}

type TestVgpu = Vgpu<GuestMemoryMmap, (), AccessCounts>;

/// Graphics page by guest page, and some pages twice.
fn map(vgpu: &mut TestVgpu) {
    for page in 0..72 {
        let entry = ((u64::from(page) % PAGES) << 12) | 1;
        vgpu.write_ggtt_entry(page, entry).unwrap();
    }
}

fn perform(
    action: Action,
    vgpu: &mut TestVgpu,
    memory: &GuestMemoryMmap,
    hw: &mut SimulatedEngine,
) -> Result<bool, Error> {
    let mut submit = |engine: EngineId, [first, second]: [u64; 2]| {
        [second >> 32, second, first >> 32, first]
            .into_iter()
            .try_for_each(|dword| {
                vgpu.mmio_write(engine.mmio_base() + 0x230, dword as u32)
                    .map(drop)
            })
    };
    match action {
        Action::Submit(engine, elements) => submit(engine, elements)?,
        Action::Context(context) => {
            context.write(memory);
            submit(context.engine, [context.descriptor(), 0])?;
        }
        Action::Ggtt(index, value) => vgpu.write_ggtt_entry(index, value)?,
        Action::GgttHalf(index, low, value) => {
            let half = if low { HalfEntry::Low } else { HalfEntry::High };
            vgpu.write_ggtt_half(index, half, value)?;
        }
        Action::Mmio(offset, value) => {
            vgpu.mmio_read(offset);
            vgpu.mmio_write(offset, value)?;
        }
        Action::Memory(at, words) => {
            for (at, word) in (at..PAGES << 12).step_by(8).zip(words) {
                memory.write_obj(word, GuestAddress(at)).unwrap();
                vgpu.page_table_written(GuestAddress(at), 8);
            }
        }
        Action::TableWritten(gpa, len) => vgpu.page_table_written(GuestAddress(gpa), len),
        Action::ReleasePins(iova, size) => vgpu.release_pins(iova, size),
        Action::Run(engine) => {
            let completion = vgpu.run_next(engine, hw)?;
            return Ok(completion.is_some());
        }
    }
    Ok(false)
}

#[test]
fn no_panic() {
    let modes = vec![
        CopyMode::PerPage,
        CopyMode::Coalesced,
        CopyMode::UpstreamTail,
    ];
    let input = (
        1..u64::MAX,
        prop::sample::select(modes),
        any::<[bool; 2]>(),
        prop::collection::vec(action(), 0..40),
    );
    let reached = Cell::new(Reached::default());
    let mut runner = TestRunner::new(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(CASES)
    });
    let result = runner.run(&input, |(seed, copy_mode, [gen8, audited], actions)| {
        let memory = memory((PAGES << 12) as usize);
        fill(&memory, seed);
        let generation = if gen8 {
            Generation::Gen8
        } else {
            Generation::Gen9
        };
        let config = VgpuConfig {
            generation,
            copy_mode,
            ggtt_entries: 72,
            ..VgpuConfig::default()
        };
        let mut vgpu = Vgpu::new(memory.clone(), (), AccessCounts::default(), config);
        map(&mut vgpu);
        if !audited {
            vgpu.set_auditor(());
        }
        // Noise is rarely commands that are all executed.
        let mut hw = if audited {
            SimulatedEngine::new().step_limit(1000)
        } else {
            SimulatedEngine::without_commands()
        };
        let mut now = reached.get();
        for action in actions {
            match perform(action, &mut vgpu, &memory, &mut hw) {
                Ok(completed) => now.completions += u64::from(completed),
                Err(error) => {
                    prop_assert_ne!(error.errno(), 0);
                    prop_assert!(!error.to_string().is_empty());
                    let refused = matches!(error, Error::Read { .. } | Error::Write { .. });
                    let unhealthy =
                        !refused && [libc::EBADRQC, libc::EFAULT].contains(&error.errno());
                    prop_assert_eq!(vgpu.failsafe().is_some(), unhealthy);
                }
            }
            if vgpu.failsafe().is_some() {
                prop_assert_eq!((vgpu.shadowed_tables(), vgpu.pinned_leaves()), (0, 0));
                prop_assert!(EngineId::ALL.iter().all(|engine| vgpu.queued(*engine) == 0));
                vgpu.reset();
                map(&mut vgpu);
            }
            now.tables = now.tables.max(vgpu.shadowed_tables());
            now.leaves = now.leaves.max(vgpu.pinned_leaves());
        }
        now.ring_reads += vgpu.observer().get(AccessKind::Ring).reads;
        reached.set(now);
        Ok(())
    });
    result.unwrap();

    // Nothing is shown by guests that fail at the first field of a context.
    let reached = reached.get();
    assert!(reached.tables >= 8, "{reached:?}");
    assert!(reached.leaves >= 8, "{reached:?}");
    assert!(reached.ring_reads >= u64::from(CASES), "{reached:?}");
    assert!(reached.completions >= u64::from(CASES) / 4, "{reached:?}");
}

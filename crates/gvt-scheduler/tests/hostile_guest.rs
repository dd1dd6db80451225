// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Nothing a guest puts into its memory, registers or tables makes the vGPU panic.

mod common;

use common::memory;
use gvt_scheduler::{CopyMode, EngineId, Generation, HalfEntry, SimulatedEngine, Vgpu, VgpuConfig};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const PAGES: u64 = 64;

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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn no_panic(
        seed in 1..u64::MAX,
        mode in prop::sample::select(vec![CopyMode::PerPage, CopyMode::Coalesced, CopyMode::UpstreamTail]),
        gen8: bool,
        actions in prop::collection::vec(action(), 0..40),
    ) {
        let memory = memory((PAGES << 12) as usize);
        fill(&memory, seed);
        let generation = if gen8 { Generation::Gen8 } else { Generation::Gen9 };
        let config = VgpuConfig {
            generation,
            copy_mode: mode,
            ggtt_entries: 72,
            ..VgpuConfig::default()
        };
        let mut vgpu = Vgpu::new(memory.clone(), (), (), config);
        for page in 0..72 {
            vgpu.write_ggtt_entry(page, ((u64::from(page) % PAGES) << 12) | 1).unwrap();
        }
        for action in actions {
            let failed = match action {
                Action::Ggtt(index, value) => vgpu.write_ggtt_entry(index, value).err(),
                Action::GgttHalf(index, low, value) => {
                    let half = if low { HalfEntry::Low } else { HalfEntry::High };
                    vgpu.write_ggtt_half(index, half, value).err()
                }
                Action::Mmio(offset, value) => {
                    vgpu.mmio_read(offset);
                    vgpu.mmio_write(offset, value).err()
                }
                Action::Submit(engine, [first, second]) => {
                    [second >> 32, second, first >> 32, first]
                        .into_iter()
                        .find_map(|dword| vgpu.mmio_write(engine.mmio_base() + 0x230, dword as u32).err())
                }
                Action::Memory(at, words) => {
                    for (at, word) in (at..PAGES << 12).step_by(8).zip(words) {
                        memory.write_obj(word, GuestAddress(at)).unwrap();
                        vgpu.page_table_written(GuestAddress(at), 8);
                    }
                    None
                }
                Action::TableWritten(gpa, len) => {
                    vgpu.page_table_written(GuestAddress(gpa), len);
                    None
                }
                Action::ReleasePins(iova, size) => {
                    vgpu.release_pins(iova, size);
                    None
                }
                Action::Run(engine) => vgpu.run_next(engine, &mut SimulatedEngine).err(),
            };
            if let Some(error) = failed {
                prop_assert_ne!(error.errno(), 0);
                prop_assert!(!error.to_string().is_empty());
            }
        }
    }
}

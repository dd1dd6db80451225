// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Contexts, rings, page tables and ELSP writes of a hostile guest: errors, no panic, and no access
//! outside of guest memory (which would be a panic too: it is a plain buffer).

#![no_main]

use arbitrary::Arbitrary;
use gvt_scheduler::{EngineId, Generation, HalfEntry, SimulatedEngine, Vgpu, VgpuConfig};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const PAGES: u64 = 64;
const GGTT_ENTRIES: u32 = 64;

#[derive(Arbitrary, Debug)]
enum Action {
    /// A guest write to its memory.
    Write { page: u8, offset: u16, bytes: Vec<u8> },
    /// A page table entry that points to a page of the guest.
    Entry { table: u8, index: u16, page: u8, flags: u8 },
    /// A ring context that can be used, at a page of the graphics memory.
    Context { lrca: u8, tail: u8, start: u8, root: u8, ctx_ctrl: u16 },
    Ggtt { index: u8, page: u8, valid: bool },
    GgttHalf { index: u8, high: bool, value: u32 },
    Mmio { offset: u16, value: u32 },
    Submit { engine: u8, dwords: [u32; 4] },
    SubmitContext { engine: u8, lrca: u8, addressing: bool },
    Run { engine: u8 },
    Reset { engine: u8 },
    ReleasePins { page: u8, pages: u8 },
}

struct Guest {
    memory: GuestMemoryMmap,
    vgpu: Vgpu<GuestMemoryMmap>,
}

impl Guest {
    fn write(&mut self, gpa: u64, bytes: &[u8]) {
        let written = self.memory.write(bytes, GuestAddress(gpa)).unwrap_or(0);
        self.vgpu.page_table_written(GuestAddress(gpa), written as u64);
    }

    fn submit(&mut self, engine: u8, dwords: [u32; 4]) {
        let base = engine_of(engine).mmio_base();
        for dword in dwords {
            let _refused = self.vgpu.mmio_write(base + 0x230, dword);
        }
    }
}

fn engine_of(number: u8) -> EngineId {
    EngineId::ALL[usize::from(number) % EngineId::ALL.len()]
}

fuzz_target!(|input: (bool, Vec<Action>)| {
    let (gen8, actions) = input;
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), (PAGES * 4096) as usize)]).unwrap();
    let mut config = VgpuConfig::default();
    config.ggtt_entries = GGTT_ENTRIES;
    config.generation = if gen8 { Generation::Gen8 } else { Generation::Gen9 };
    let mut guest = Guest {
        vgpu: Vgpu::new(memory.clone(), (), (), config),
        memory,
    };
    for index in 0..GGTT_ENTRIES {
        guest.vgpu.write_ggtt_entry(index, u64::from(index) << 12 | 1).unwrap();
    }
    let mut hardware = SimulatedEngine::new().step_limit(4096);
    for action in actions.into_iter().take(64) {
        match action {
            Action::Write { page, offset, bytes } => {
                guest.write(u64::from(page) % PAGES * 4096 + u64::from(offset) % 4096, &bytes);
            }
            Action::Entry { table, index, page, flags } => {
                let entry = u64::from(page) % PAGES << 12 | u64::from(flags);
                let gpa = u64::from(table) % PAGES * 4096 + u64::from(index) % 512 * 8;
                guest.write(gpa, &entry.to_le_bytes());
            }
            Action::Context { lrca, tail, start, root, ctx_ctrl } => {
                let ring_context = (u64::from(lrca) + 1) % PAGES * 4096;
                for (offset, value) in [
                    (0x0c, u32::from(ctx_ctrl)),
                    (0x14, 0),
                    (0x1c, u32::from(tail) * 8),
                    (0x24, u32::from(start) % GGTT_ENTRIES * 4096),
                    (0x2c, 1),
                    (0x6c, 0),
                    (0xc4, 0),
                    (0xcc, (u64::from(root) % PAGES * 4096) as u32),
                ] {
                    guest.write(ring_context + offset, &value.to_le_bytes());
                }
            }
            Action::Ggtt { index, page, valid } => {
                let entry = u64::from(page) << 12 | u64::from(valid);
                let _refused = guest.vgpu.write_ggtt_entry(index.into(), entry);
            }
            Action::GgttHalf { index, high, value } => {
                let half = if high { HalfEntry::High } else { HalfEntry::Low };
                let _refused = guest.vgpu.write_ggtt_half(index.into(), half, value);
            }
            Action::Mmio { offset, value } => {
                let _refused = guest.vgpu.mmio_write(offset.into(), value);
                guest.vgpu.mmio_read(offset.into());
            }
            Action::Submit { engine, dwords } => guest.submit(engine, dwords),
            Action::SubmitContext { engine, lrca, addressing } => {
                let mode = if addressing { 3 } else { 1 };
                let lrca = u32::from(lrca) % GGTT_ENTRIES;
                guest.submit(engine, [0, 0, 1, lrca << 12 | 1 << 8 | mode << 3 | 1]);
            }
            Action::Run { engine } => {
                let _failed = guest.vgpu.run_next(engine_of(engine), &mut hardware);
            }
            Action::Reset { engine } => guest.vgpu.reset_engine(engine_of(engine)),
            Action::ReleasePins { page, pages } => {
                guest.vgpu.release_pins(u64::from(page) * 4096, u64::from(pages) * 4096);
            }
        }
    }
});

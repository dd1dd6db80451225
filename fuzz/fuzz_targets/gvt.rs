// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Contexts, rings, batches, page tables and ELSP writes of a hostile guest: errors, no panic, no endless
//! work, and no access outside of guest memory that succeeds.

#![no_main]

use std::io;

use arbitrary::Arbitrary;
use gvt_scheduler::{
    Access, AccessKind, CopyMode, EngineId, ErrorMode, Generation, GmWindow, GmWindows, HalfEntry, MiAuditor, Observer,
    SimulatedEngine, Vgpu, VgpuConfig,
};
use libfuzzer_sys::fuzz_target;
use page_pin::PinPages;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};

const PAGES: u64 = 64;
const GGTT_ENTRIES: u32 = 64;

#[derive(Arbitrary, Debug)]
enum Action {
    /// A guest write to its memory.
    Write { page: u8, offset: u16, bytes: Vec<u8> },
    /// Commands, in a page that may be a ring or a batch.
    Commands { page: u8, commands: Vec<Command> },
    /// A write to a page table that is trapped.
    Trapped { table: u8, index: u16, page: u8, flags: u8, len: u8 },
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

/// A command whose fields are likely to be right.
#[derive(Arbitrary, Debug)]
enum Command {
    Noop,
    UserInterrupt,
    BatchEnd,
    BatchStart { global: bool, second: bool, page: u8 },
    Store { global: bool, qword: bool, page: u8, offset: u16, value: u64 },
    Flush { global: bool, index: bool, operation: u8, page: u8, value: u64 },
    PipeControl { flags: u32, page: u8, value: u64 },
    Load { register: u16, value: u32 },
    Other { header: u32, operands: [u32; 2] },
}

impl Command {
    fn dwords(&self) -> Vec<u32> {
        let address = |page: u8, offset: u16| (u32::from(page) % 80) << 12 | u32::from(offset) & 0xffc;
        match *self {
            Command::Noop => vec![0],
            Command::UserInterrupt => vec![0x0100_0000],
            Command::BatchEnd => vec![0x0500_0000],
            Command::BatchStart { global, second, page } => {
                let flags = u32::from(!global) << 8 | u32::from(second) << 22;
                vec![0x1880_0001 | flags, address(page, 0), 0]
            }
            Command::Store { global, qword, page, offset, value } => {
                let flags = u32::from(global) << 22 | u32::from(qword) << 21 | u32::from(qword);
                let mut dwords = vec![0x1000_0002 | flags, address(page, offset), 0, value as u32];
                dwords.extend(qword.then_some((value >> 32) as u32));
                dwords
            }
            Command::Flush { global, index, operation, page, value } => {
                let flags = u32::from(operation % 4) << 14 | u32::from(index) << 21;
                let to = address(page, 0) | u32::from(global) << 2;
                vec![0x1300_0003 | flags, to, 0, value as u32, (value >> 32) as u32]
            }
            Command::PipeControl { flags, page, value } => {
                vec![0x7a00_0004, flags, address(page, 0), 0, value as u32, (value >> 32) as u32]
            }
            Command::Load { register, value } => vec![0x1100_0001, 0x2000 + u32::from(register), value],
            Command::Other { header, operands: [first, second] } => vec![header, first, second],
        }
    }
}

/// Says which accesses are outside of guest memory: those must fail, and what runs with them. An entry of a page
/// table that fails is not present: it is an error only of those whose tables reach it.
#[derive(Default)]
struct Outside(Option<u64>);

impl Observer for Outside {
    fn access(&mut self, access: &Access) {
        assert!(access.len <= (PAGES * 4096) as usize || access.gpa.0 < PAGES * 4096);
        let end = access.gpa.0.checked_add(access.len as u64);
        if access.kind != AccessKind::PageTable && end.is_none_or(|end| end > PAGES * 4096) {
            self.0 = Some(access.gpa.0);
        }
    }
}

struct Guest {
    memory: GuestMemoryMmap,
    vgpu: Vgpu<GuestMemoryMmap, Pins, Outside>,
}

/// Whoever pins may be refused: a page, and all that are not pinned one by one.
struct Pins {
    refuses: bool,
}

impl PinPages for Pins {
    type Pinned = ();
    type Error = io::Error;

    fn pin_pages(&self, iova: u64, npages: usize, _: Permissions) -> io::Result<()> {
        if self.refuses && (npages > 1 || iova == 13 << 12) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        Ok(())
    }
}

impl Guest {
    fn write(&mut self, gpa: u64, bytes: &[u8]) {
        let written = self.memory.write(bytes, GuestAddress(gpa)).unwrap_or(0);
        self.vgpu.page_table_written(GuestAddress(gpa), written as u64);
    }

    /// Graphics page by guest page.
    fn map(&mut self) {
        for index in 0..GGTT_ENTRIES {
            self.vgpu.write_ggtt_entry(index, u64::from(index) << 12 | 1).unwrap();
        }
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

fuzz_target!(|input: ([u8; 3], Vec<Action>)| {
    // The lowest bits, and the next ones, say what the vGPU is like.
    let (bytes, actions) = input;
    let is_set = |bit: u8| bytes.map(|byte| byte >> bit & 1 == 1);
    let [gen8, audited, windows] = is_set(0);
    let [forgives, refuses, small] = is_set(1);
    let [per_page, upstream, rereads] = is_set(2);
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), (PAGES * 4096) as usize)]).unwrap();
    let mut config = VgpuConfig::default();
    config.ggtt_entries = GGTT_ENTRIES;
    config.generation = if gen8 { Generation::Gen8 } else { Generation::Gen9 };
    config.windows = windows.then_some(GmWindows {
        aperture: GmWindow { base: 0, size: 32 * 4096 },
        hidden: GmWindow { base: 40 * 4096, size: 24 * 4096 },
    });
    config.skip_unchanged = !rereads;
    if forgives {
        config.errors = ErrorMode::Kernel;
    }
    config.copy_mode = match (per_page, upstream) {
        (false, false) => CopyMode::Coalesced,
        (true, false) => CopyMode::PerPage,
        (false, true) => CopyMode::UpstreamTail,
        (true, true) => CopyMode::Scattered,
    };
    if small {
        (config.max_queued, config.max_page_tables) = (3, 6);
    }
    let mut guest = Guest {
        vgpu: Vgpu::new(memory.clone(), Pins { refuses }, Outside::default(), config),
        memory,
    };
    guest.map();
    if !audited {
        guest.vgpu.set_auditor(());
    } else if small {
        guest.vgpu.set_auditor(MiAuditor::new().batch_limit(2 * 4096));
    }
    let mut hardware = SimulatedEngine::new().step_limit(4096);
    for action in actions.into_iter().take(64) {
        match action {
            Action::Write { page, offset, bytes } => {
                guest.write(u64::from(page) % PAGES * 4096 + u64::from(offset) % 4096, &bytes);
            }
            Action::Commands { page, commands } => {
                let dwords = commands.iter().flat_map(Command::dwords);
                let bytes: Vec<u8> = dwords.flat_map(u32::to_le_bytes).collect();
                guest.write(u64::from(page) % PAGES * 4096, &bytes);
            }
            Action::Trapped { table, index, page, flags, len } => {
                let entry = u64::from(page) % PAGES << 12 | u64::from(flags);
                let gpa = GuestAddress(u64::from(table) % PAGES * 4096 + u64::from(index) % 512 * 8);
                guest.memory.write_obj(entry, gpa).unwrap();
                let _refused = guest.vgpu.page_table_trapped(gpa, len.into());
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
                guest.vgpu.observer_mut().0 = None;
                let ran = guest.vgpu.run_next(engine_of(engine), &mut hardware);
                let outside = guest.vgpu.observer().0;
                assert!(forgives || outside.is_none() || ran.is_err(), "{outside:x?}: {ran:?}");
            }
            Action::Reset { engine } => guest.vgpu.reset_engine(engine_of(engine)),
            Action::ReleasePins { page, pages } => {
                guest.vgpu.release_pins(u64::from(page) * 4096, u64::from(pages) * 4096);
            }
        }
        let config = guest.vgpu.config();
        assert!(guest.vgpu.shadowed_tables() <= config.max_page_tables);
        assert!(EngineId::ALL.iter().all(|engine| guest.vgpu.queued(*engine) <= config.max_queued));
        if guest.vgpu.failsafe().is_some() {
            assert_eq!(guest.vgpu.shadowed_tables(), 0);
            guest.vgpu.reset();
            guest.map();
        }
    }
});

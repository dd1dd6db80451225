// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The simulated engine executes a guest's commands on the guest's memory, through the guest's tables.

mod common;

use common::{entry, Context, Guest, HWSP_PAGE, RING_PAGE};
use gvt_scheduler::{
    ring_context, AccessCounts, AccessKind, Completion, EngineId, Error, RecordingEngine,
    SimulatedEngine, VgpuConfig,
};
use vm_memory::{Bytes, GuestAddress};

const BCS: EngineId = EngineId::Bcs;
const RCS: EngineId = EngineId::Rcs;
/// Pages of the page tables; the last one maps graphics page `p` to guest page `DATA + p`.
const PML4: u64 = 0x200;
const DATA: u64 = 0x210;

const NOOP: u32 = 0;
const USER_INTERRUPT: u32 = 0x0100_0000;
const BATCH_END: u32 = 0x0500_0000;
const BATCH_PPGTT: u32 = 0x1880_0101;
const BATCH_GGTT: u32 = 0x1880_0001;
const SECOND_LEVEL: u32 = 1 << 22;
const STORE_PPGTT: u32 = 0x1000_0002;
const STORE_GGTT: u32 = 0x1040_0002;
const QWORD: u32 = 1 << 21 | 1;

struct Test {
    guest: Guest<(), AccessCounts>,
    context: Context,
}

impl Test {
    fn new(engine: EngineId) -> Self {
        let mut guest = Guest::with(VgpuConfig::default(), (), AccessCounts::default());
        // What an engine does with commands that nobody has looked at.
        guest.vgpu.set_auditor(());
        let context = guest.context(engine, 0x40, 1);
        for (table, child) in [(0, 1), (1, 2), (2, 3)] {
            guest.write_u64(PML4 + table, 0, entry(PML4 + child));
        }
        for page in 0..16 {
            guest.write_u64(PML4 + 3, page, entry(DATA + page));
        }
        guest.set_root(&context, PML4 << 12);
        Test { guest, context }
    }

    /// Puts dwords into a page of the context's address space.
    fn batch(&self, page: u64, dwords: &[u32]) {
        self.at(DATA + page, dwords);
    }

    fn at(&self, page: u64, dwords: &[u32]) {
        for (dword, at) in dwords.iter().zip((page << 12..).step_by(4)) {
            self.guest
                .memory
                .write_obj(*dword, GuestAddress(at))
                .unwrap();
        }
    }

    fn run(&mut self, ring: &[u32]) -> Result<Completion, Error> {
        self.run_on(ring, &mut SimulatedEngine::new().step_limit(1000))
    }

    fn run_on(
        &mut self,
        ring: &[u32],
        engine: &mut dyn gvt_scheduler::Engine,
    ) -> Result<Completion, Error> {
        self.at(RING_PAGE.into(), ring);
        if ring.len() % 2 == 1 {
            self.at(RING_PAGE.into(), &[ring, &[NOOP]].concat());
        }
        let tail = (ring.len() as u32 * 4).next_multiple_of(8);
        self.guest.set(&self.context, ring_context::HEAD, 0);
        self.guest.set(&self.context, ring_context::TAIL, tail);
        self.guest.submit(&[self.context]).unwrap();
        let completion = self.guest.vgpu.run_next(self.context.engine, engine)?;
        Ok(completion.expect("one was queued"))
    }

    fn fault(&mut self, ring: &[u32]) -> String {
        let error = self.run(ring).unwrap_err();
        assert_eq!(error.errno(), libc::EIO, "{error}");
        let engine = self.context.engine;
        self.guest.vgpu.reset_engine(engine);
        let source = std::error::Error::source(&error).expect("what the engine said");
        source.to_string()
    }

    fn qword(&self, page: u64, offset: u64) -> u64 {
        let at = GuestAddress(page << 12 | offset);
        self.guest.memory.read_obj(at).unwrap()
    }
}

trait WriteU64 {
    fn write_u64(&self, page: u64, index: u64, value: u64);
}

impl WriteU64 for Guest<(), AccessCounts> {
    fn write_u64(&self, page: u64, index: u64, value: u64) {
        let at = GuestAddress((page << 12) + 8 * index);
        self.memory.write_obj(value, at).unwrap();
    }
}

#[test]
fn a_batch_stores_through_the_page_tables_of_its_context() {
    let mut test = Test::new(BCS);
    test.batch(
        2,
        &[
            STORE_PPGTT,
            0x5010,
            0,
            0x1111, //
            STORE_PPGTT | QWORD,
            0x5018,
            0,
            0x2222,
            0x3333,
            BATCH_END,
        ],
    );
    let ring = [BATCH_PPGTT, 0x2000, 0, STORE_GGTT, 0x12_0008, 0, 0x4444];
    let completion = test.run(&ring).unwrap();
    assert_eq!(test.qword(DATA + 5, 0x10), 0x1111);
    assert_eq!(test.qword(DATA + 5, 0x18), 0x3333_0000_2222);
    assert_eq!(test.qword(0x120, 8), 0x4444);
    assert_eq!(
        (completion.user_interrupts, completion.written_back),
        (0, true)
    );
    // The batch lies in one line of 64 bytes, which is read again behind each of its two stores.
    let counts = test.guest.vgpu.observer().get(AccessKind::Engine);
    assert_eq!((counts.reads, counts.read_bytes), (3, 192));
    assert_eq!((counts.writes, counts.written_bytes), (3, 16));
}

#[test]
fn levels_of_batches_are_entered_and_left() {
    let mut test = Test::new(BCS);
    let store = |address: u32, value| [STORE_PPGTT, address, 0, value];
    // Ring -> 2 -> (second level) 3 -> back in 2 -> jump to 4 -> back in the ring.
    test.batch(
        2,
        &[
            &[BATCH_PPGTT | SECOND_LEVEL, 0x3000, 0][..],
            &store(0x5004, 2),
            &[BATCH_PPGTT, 0x4000, 0],
        ]
        .concat(),
    );
    test.batch(3, &[&store(0x5000, 1)[..], &[BATCH_END]].concat());
    test.batch(4, &[&store(0x5008, 3)[..], &[BATCH_END]].concat());
    let ring = [BATCH_PPGTT, 0x2000, 0, STORE_GGTT, 0x12_0000, 0, 4];
    test.run(&ring).unwrap();
    assert_eq!(test.qword(DATA + 5, 0), 0x2_0000_0001);
    assert_eq!(test.qword(DATA + 5, 8), 3);
    assert_eq!(test.qword(0x120, 0), 4);

    test.batch(3, &[BATCH_PPGTT | SECOND_LEVEL, 0x4000, 0]);
    let fault = test.fault(&ring);
    assert!(
        fault.contains("starts a batch from the second level"),
        "{fault}"
    );
    let fault = test.fault(&[BATCH_PPGTT | SECOND_LEVEL, 0x3000, 0]);
    assert!(fault.contains("starts the second level"), "{fault}");
    let fault = test.fault(&[BATCH_END]);
    assert!(fault.contains("ends no batch"), "{fault}");
}

#[test]
fn the_driver_is_told_by_flushes_and_interrupts() {
    let mut test = Test::new(RCS);
    test.guest
        .set(&test.context, ring_context::TIMESTAMP, 0x777);
    let ring = [
        // PIPE_CONTROL: immediate data to the GGTT, time stamp to the status page.
        0x7a00_0004,
        1 << 24 | 1 << 14,
        0x12_0000,
        0,
        0xabcd,
        0x12, //
        0x7a00_0004,
        1 << 21 | 3 << 14,
        0xd0,
        0,
        0,
        0, //
        // MI_FLUSH_DW: four bytes, eight bytes, nothing.
        0x1300_4002,
        0x12_0008 | 4,
        0,
        0x99, //
        0x1300_4003,
        0x12_0010 | 4,
        0,
        0x77,
        0x66, //
        0x1300_0002,
        0x12_0018 | 4,
        0,
        0x55, //
        USER_INTERRUPT,
        0x0400_0000,
        USER_INTERRUPT,
    ];
    let completion = test.run(&ring).unwrap();
    assert_eq!(test.qword(0x120, 0), 0x12_0000_abcd);
    assert_eq!(test.qword(HWSP_PAGE.into(), 0xd0), 0x777);
    assert_eq!(test.qword(0x120, 0x8), 0x99);
    assert_eq!(test.qword(0x120, 0x10), 0x66_0000_0077);
    assert_eq!(test.qword(0x120, 0x18), 0);
    assert_eq!(completion.user_interrupts, 2);
    let timestamp = test.guest.get(&test.context, ring_context::TIMESTAMP);
    assert_eq!(timestamp, 0x777 + 1000);
}

#[test]
fn a_workload_that_fails_interrupts_nobody() {
    let mut test = Test::new(RCS);
    let fault = test.fault(&[USER_INTERRUPT, 0x0e00_0002, 0, 0, 0]);
    assert!(fault.starts_with("MI_SEMAPHORE_WAIT"), "{fault}");
    // Scheduled in, never out.
    assert_eq!(test.qword(HWSP_PAGE.into(), 0x48), 0);
    // What a fault leaves pending is not injected by the next workload.
    assert_eq!(test.run(&[USER_INTERRUPT]).unwrap().user_interrupts, 1);
}

#[test]
fn workaround_batches_run_before_the_ring() {
    let mut test = Test::new(RCS);
    let context = test.context;
    test.at(
        0x100,
        &[STORE_GGTT, 0x12_0000, 0, 1, STORE_GGTT, 0x12_0004, 0, 1],
    );
    test.at(
        0x101,
        &[
            STORE_GGTT, 0x12_0004, 0, 2, STORE_GGTT, 0x12_0008, 0, 2, BATCH_END,
        ],
    );
    test.guest
        .set(&context, ring_context::INDIRECT_CTX, 0x100 << 12 | 1);
    test.guest
        .set(&context, ring_context::BB_PER_CTX, 0x101 << 12 | 1);
    test.run(&[STORE_GGTT, 0x12_0008, 0, 3]).unwrap();
    assert_eq!(test.qword(0x120, 0), 0x2_0000_0001);
    assert_eq!(test.qword(0x120, 8), 3);
    // Without its valid bit there is none.
    test.at(0x101, &[0xffff_ffff]);
    test.guest
        .set(&context, ring_context::BB_PER_CTX, 0x101 << 12);
    test.run(&[NOOP]).unwrap();
}

#[test]
fn registers_land_in_the_context() {
    let mut test = Test::new(RCS);
    let context = test.context;
    // The engine context has a list of one register behind the ring context.
    test.guest.set(&context, 0x104, 0x1100_0001);
    test.guest.set(&context, 0x108, 0x20c8);
    let ring = [
        0x1100_0007,
        0x20c8,
        0x8888,
        0x2244,
        0x0008_0008,
        0x23a8,
        5000,
        0x2358,
        1,
    ];
    test.run(&ring).unwrap();
    assert_eq!(test.guest.get(&context, 0x10c), 0x8888);
    assert_eq!(test.guest.get(&context, ring_context::CTX_CTRL), 0x8);
    let timestamp = test.guest.get(&context, ring_context::TIMESTAMP);
    assert_eq!(timestamp, 5000 + 1000);
}

#[test]
fn a_loop_ends_at_the_limit() {
    let mut test = Test::new(BCS);
    test.batch(2, &[BATCH_PPGTT, 0x2000, 0]);
    let fault = test.fault(&[BATCH_PPGTT, 0x2000, 0]);
    assert_eq!(fault, "the workload has more than 1000 commands");
    // The limit itself is allowed.
    let mut two = SimulatedEngine::new().step_limit(2);
    assert!(test.run_on(&[NOOP, NOOP], &mut two).is_ok());
    let engine = test.context.engine;
    assert!(test.run_on(&[NOOP; 4], &mut two).is_err());
    test.guest.vgpu.reset_engine(engine);
    // Each register is one, and what follows is beyond.
    let registers = [0x1100_0003, 0x5000, 1, 0x5004, 2];
    assert!(test.run_on(&registers, &mut two).is_err());
    test.guest.vgpu.reset_engine(engine);
    let mut three = SimulatedEngine::new().step_limit(3);
    assert!(test.run_on(&registers, &mut three).is_ok());
}

#[test]
fn what_does_not_translate_is_not_reached() {
    let mut test = Test::new(BCS);
    for (ring, said) in [
        // Beyond what the tables map.
        (
            &[STORE_PPGTT, 0x1_0000, 0, 1][..],
            "PPGTT address 0x10000 does not translate",
        ),
        (
            &[STORE_PPGTT, 0, 0xffff, 1],
            "PPGTT address 0xffff00000000 does not translate",
        ),
        (
            &[BATCH_GGTT, 0x30_0000, 0],
            "GGTT address 0x300000 does not translate",
        ),
        (
            &[STORE_GGTT, 0x1000, 1, 1],
            "GGTT address 0x100001000 does not translate",
        ),
    ] {
        assert_eq!(test.fault(ring), said);
    }
    // A GGTT entry that points beyond guest memory.
    test.guest
        .vgpu
        .write_ggtt_entry(0x120, entry(0x1000))
        .unwrap();
    let fault = test.fault(&[STORE_GGTT, 0x12_0000, 0, 1]);
    assert!(fault.starts_with("cannot write 0x4 bytes"), "{fault}");
}

#[test]
fn a_program_does_not_reach_the_global_table() {
    let mut test = Test::new(BCS);
    test.batch(2, &[STORE_GGTT, 0x12_0000, 0, 1, BATCH_END]);
    test.batch(3, &[BATCH_GGTT, 0x12_0000, 0]);
    for page in [2, 3] {
        let fault = test.fault(&[BATCH_PPGTT, page << 12, 0]);
        assert!(fault.ends_with("uses the GGTT"), "{fault}");
    }
    assert_eq!(test.qword(0x120, 0), 0);
    // A batch of the driver does.
    test.at(0x121, &[STORE_GGTT, 0x12_0000, 0, 1, BATCH_END]);
    test.run(&[BATCH_GGTT, 0x12_1000, 0]).unwrap();
    assert_eq!(test.qword(0x120, 0), 1);
}

#[test]
fn a_command_has_all_its_dwords() {
    let mut test = Test::new(BCS);
    let fault = test.fault(&[NOOP, STORE_GGTT]);
    let expected = "MI_STORE_DATA_IMM (0x10400002) in the ring does not end there";
    assert_eq!(fault, expected);
    // One that crosses a page of its batch is whole.
    let at = 0x3000 - 8;
    let store = [STORE_PPGTT, 0x5000, 0, 0x42, BATCH_END];
    for (dword, at) in store.into_iter().zip(((DATA << 12) + at..).step_by(4)) {
        test.guest
            .memory
            .write_obj(dword, GuestAddress(at))
            .unwrap();
    }
    test.run(&[BATCH_PPGTT, at as u32, 0]).unwrap();
    assert_eq!(test.qword(DATA + 5, 0), 0x42);
}

#[test]
fn a_batch_may_write_the_command_that_follows() {
    let mut test = Test::new(BCS);
    test.batch(2, &[STORE_PPGTT, 0x2010, 0, BATCH_END, 0xffff_ffff]);
    test.run(&[BATCH_PPGTT, 0x2000, 0]).unwrap();
}

#[test]
fn what_was_run_is_recorded() {
    let mut test = Test::new(BCS);
    let mut engine = RecordingEngine::new(SimulatedEngine::new());
    test.run_on(&[USER_INTERRUPT, NOOP], &mut engine).unwrap();
    test.run_on(&[0xffff_ffff, NOOP], &mut engine).unwrap_err();
    let jobs = engine.take();
    assert_eq!(jobs.len(), 2);
    assert_eq!(jobs[0].ring, [0, 0, 0, 1, 0, 0, 0, 0]);
    assert_eq!(jobs[0].result.as_ref().unwrap().user_interrupts, 1);
    assert_eq!(jobs[1].sequence, 1);
    assert!(jobs[1].result.is_err());
    assert!(engine.jobs().is_empty());
}

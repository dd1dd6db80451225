// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the default auditor refuses, and what becomes of a vGPU then.

mod common;

use common::{entry, Context, Guest, RING_PAGE};
use gvt_scheduler::{
    ring_context, AccessCounts, AccessKind, CommandError, CommandPlace, CommandProblem, EngineId,
    Error, FailsafeReason, GmWindow, GmWindows, MiAuditor, RecordingEngine, SimulatedEngine,
    VgpuConfig,
};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

const RCS: EngineId = EngineId::Rcs;
const LRCA: u32 = 0x40;
const NOOP: u32 = 0;
const BATCH_END: u32 = 0x0500_0000;
const BATCH_GGTT: u32 = 0x1880_0001;
const BATCH_PPGTT: u32 = 0x1880_0101;
const SECOND_LEVEL: u32 = 1 << 22;
const STORE_GGTT: u32 = 0x1040_0002;
/// A page for batches.
const BATCH: u32 = 0x120;

struct Test {
    guest: Guest<(), AccessCounts>,
    context: Context,
}

impl Test {
    fn new() -> Self {
        Self::with(VgpuConfig::default())
    }

    fn with(config: VgpuConfig) -> Self {
        let mut guest = Guest::with(config, (), AccessCounts::default());
        let context = guest.context(RCS, LRCA, 1);
        Test { guest, context }
    }

    fn at(&self, page: u32, dwords: &[u32]) {
        for (dword, at) in dwords.iter().zip((u64::from(page) << 12..).step_by(4)) {
            let at = GuestAddress(at);
            self.guest.memory.write_obj(*dword, at).unwrap();
        }
    }

    fn submit(&mut self, ring: &[u32]) -> Result<(), Error> {
        self.at(RING_PAGE, ring);
        self.at(RING_PAGE, &[ring, &[NOOP]].concat());
        let tail = (ring.len() as u32 * 4).next_multiple_of(8);
        self.guest.set(&self.context, ring_context::HEAD, 0);
        self.guest.set(&self.context, ring_context::TAIL, tail);
        self.guest.submit(&[self.context]).map(drop)
    }

    /// The commands are refused; what is said of them. The vGPU is as new afterwards.
    fn refused(&mut self, ring: &[u32]) -> CommandError {
        let Error::Command(error) = self.submit(ring).unwrap_err() else {
            panic!("{ring:x?} is refused for another reason");
        };
        assert_eq!(self.guest.vgpu.failsafe(), Some(FailsafeReason::GuestError));
        assert_eq!(self.guest.vgpu.queued(RCS), 0);
        *self = Test::new();
        error
    }

    /// The errno of an `entry` in the ring.
    fn errno(&mut self, ring: &[u32]) -> i32 {
        self.refused(ring).errno()
    }
}

#[test]
fn what_guests_submit_passes() {
    let mut test = Test::new();
    test.at(BATCH, &[BATCH_PPGTT | SECOND_LEVEL, 0x5000, 0, BATCH_END]);
    let request = [
        0x1040_0002,
        0x12_0000,
        0,
        7, // MI_STORE_DATA_IMM
        0x7a00_0004,
        0x0100_4000,
        0x12_0000,
        0,
        7,
        8, // PIPE_CONTROL
        0x0400_0001,
        BATCH_PPGTT,
        0x5000,
        0x12, // MI_ARB_ON_OFF, a program's batch
        BATCH_GGTT,
        BATCH << 12,
        0, // a driver's batch
        0x1100_0003,
        0x2580,
        1,
        0x7004,
        2, // MI_LOAD_REGISTER_IMM
        0x1240_0002,
        0x2358,
        0x12_0008,
        0, // MI_STORE_REGISTER_MEM
        0x1300_4002,
        0x12_0004,
        0,
        7, // MI_FLUSH_DW
        0x6904_0300,
        0x5400_0001,
        0,
        0, // PIPELINE_SELECT, a command of the blitter
        0x0100_0000,
        0x0280_0000,
        NOOP,
    ];
    test.submit(&request).unwrap();
    assert_eq!(test.guest.vgpu.failsafe(), None);
}

#[test]
fn forbidden_commands() {
    for header in [
        0x0e00_0002, // MI_SEMAPHORE_WAIT
        0x1080_0001, // MI_STORE_DATA_INDEX
        0x1180_0001, // MI_UPDATE_GTT
        0x1380_0001, // MI_CLFLUSH
        0x1400_0002, // MI_REPORT_PERF_COUNT
        0x1700_0003, // MI_COPY_MEM_MEM
        0x1b00_0002, // MI_CONDITIONAL_BATCH_BUFFER_END
    ] {
        let error = Test::new().refused(&[NOOP, header, 0, 0, 0, 0, 0]);
        let expected = CommandError {
            header,
            place: CommandPlace::Ring,
            offset: 4,
            problem: CommandProblem::Forbidden,
        };
        assert_eq!((error, error.errno()), (expected, libc::EBADRQC));
    }
}

#[test]
fn unknown_commands_and_lengths() {
    let mut test = Test::new();
    for ring in [
        &[0x0880_0000][..],                 // no such number
        &[0xe000_0000],                     // no such client
        &[0x1880_0100, 0x5000],             // MI_BATCH_BUFFER_START of two
        &[0x1040_0003, 0x12_0000, 0, 1, 2], // a dword in five
        &[0x1060_0002, 0x12_0000, 0, 1],    // a qword in four
        &[0x1300_0001, 0, 0],               // MI_FLUSH_DW of three
        &[0x7a00_0003, 0, 0, 0, 0],         // PIPE_CONTROL of five
        &[0x1200_0003, 0x2358, 0, 0, 0],    // MI_STORE_REGISTER_MEM of five
    ] {
        assert_eq!(test.errno(ring), libc::EBADRQC, "{ring:x?}");
    }
    // MI_LOAD_REGISTER_IMM is another matter.
    for dwords in [2, 4, 128, 129] {
        let mut ring = vec![0; dwords];
        ring[0] = 0x1100_0000 | (dwords as u32 - 2);
        assert_eq!(test.errno(&ring), libc::EFAULT, "{dwords}");
    }
    for dwords in [3, 127] {
        let mut ring = vec![0; dwords];
        ring[0] = 0x1100_0000 | (dwords as u32 - 2);
        Test::new().submit(&ring).unwrap();
    }
}

#[test]
fn a_command_that_leaves_the_ring() {
    let error = Test::new().refused(&[NOOP, STORE_GGTT]);
    assert_eq!(error.problem, CommandProblem::Truncated);
    assert_eq!(error.errno(), libc::EFAULT);
}

#[test]
fn levels_of_batches() {
    let mut test = Test::new();
    for (ring, batch, place) in [
        (&[BATCH_PPGTT | SECOND_LEVEL, 0, 0][..], &[][..], None),
        (&[BATCH_END], &[], None),
        // From the second level.
        (
            &[BATCH_GGTT, BATCH << 12, 0],
            &[
                BATCH_GGTT | SECOND_LEVEL,
                (BATCH << 12) + 0x40,
                0,
                BATCH_END,
            ],
            Some(0x12_0040),
        ),
    ] {
        test.at(BATCH, batch);
        for (offset, dword) in [BATCH_PPGTT, 0, 0, BATCH_END].into_iter().enumerate() {
            let at = GuestAddress((u64::from(BATCH) << 12) + 0x40 + 4 * offset as u64);
            test.guest.memory.write_obj(dword, at).unwrap();
        }
        let error = test.refused(ring);
        assert_eq!(error.errno(), libc::EFAULT);
        let expected = place.map_or(CommandPlace::Ring, |gma| CommandPlace::Batch { gma });
        assert_eq!(error.place, expected);
    }
}

#[test]
fn addresses_outside_the_graphics_memory() {
    let windows = GmWindows {
        aperture: GmWindow {
            base: 0,
            size: 0x12_0000,
        },
        hidden: GmWindow {
            base: 0x13_0000,
            size: 0x1000,
        },
    };
    let owns = |ring: &[u32]| {
        let mut test = Test::with(VgpuConfig {
            windows: Some(windows),
            ..VgpuConfig::default()
        });
        match test.submit(ring) {
            Ok(()) => true,
            Err(Error::Command(error)) => {
                let address = matches!(error.problem, CommandProblem::Address { .. });
                assert!(address, "{error}");
                assert_eq!(error.errno(), libc::EFAULT);
                false
            }
            Err(error) => panic!("{error}"),
        }
    };
    assert!(owns(&[STORE_GGTT, 0x11_fffc, 0, 1]));
    assert!(!owns(&[STORE_GGTT, 0x12_0000, 0, 1]));
    assert!(!owns(&[STORE_GGTT, 0x11_fffc, 1, 1]));
    // A qword that reaches out.
    assert!(!owns(&[0x1060_0003, 0x11_fffc, 0, 1, 1]));
    assert!(!owns(&[BATCH_GGTT, 0x12_0000, 0]));
    assert!(!owns(&[0x7a00_0004, 0x0100_4000, 0x13_1000, 0, 7, 8]));
    assert!(!owns(&[0x1240_0002, 0x2358, 0x12_0000, 0]));
    assert!(owns(&[0x1240_0002, 0x2358, 0x13_0000, 0]));
    // What goes through the page tables of the context is the context's own.
    assert!(owns(&[0x1000_0002, 0x12_0000, 0xffff, 1]));
    assert!(owns(&[0x1200_0002, 0x2358, 0x12_0000, 0xffff]));
}

#[test]
fn registers_beyond_the_register_space() {
    let error = Test::new().refused(&[0x1100_0003, 0x2358, 0, 0x20_0000, 0]);
    assert_eq!(
        error.problem,
        CommandProblem::Register {
            register: 0x20_0000
        }
    );
    assert_eq!(error.errno(), libc::EFAULT);
}

#[test]
fn the_engine_executes_what_was_audited() {
    let mut test = Test::new();
    test.at(BATCH, &[STORE_GGTT, 0x12_1000, 0, 7, BATCH_END]);
    test.submit(&[BATCH_GGTT, BATCH << 12, 0]).unwrap();
    // The guest thinks better of it.
    test.at(BATCH, &[0x0e00_0002, 0, 0, 0]);
    let mut engine = RecordingEngine::new(SimulatedEngine::new());
    test.guest.vgpu.run_next(RCS, &mut engine).unwrap();
    let stored: u32 = test.guest.memory.read_obj(GuestAddress(0x12_1000)).unwrap();
    assert_eq!(stored, 7);
    let batches = &engine.jobs()[0].batches;
    assert_eq!((batches.len(), batches[0].gma), (1, 0x12_0000));
    assert_eq!(batches[0].bytes.len(), 20);
    // The ring, and the page of the batch.
    let counts = test.guest.vgpu.observer();
    assert_eq!(counts.get(AccessKind::Ring).reads, 2);
    assert_eq!(counts.get(AccessKind::Engine).reads, 0);
}

#[test]
fn batches_are_followed_to_their_end() {
    let mut test = Test::new();
    // A batch over a page boundary that calls a second one and jumps to a third, which is not right.
    let near_end = (BATCH << 12) + 0xff8;
    test.at(BATCH + 2, &[BATCH_END]);
    test.at(BATCH + 3, &[NOOP, 0x0880_0000]);
    let dwords = [
        NOOP,
        BATCH_GGTT | SECOND_LEVEL,
        (BATCH + 2) << 12,
        0,
        BATCH_GGTT,
        (BATCH + 3) << 12,
        0,
    ];
    for (dword, at) in dwords.into_iter().zip((u64::from(near_end)..).step_by(4)) {
        let at = GuestAddress(at);
        test.guest.memory.write_obj(dword, at).unwrap();
    }
    let error = test.refused(&[BATCH_GGTT, near_end, 0]);
    let expected = CommandError {
        header: 0x0880_0000,
        place: CommandPlace::Batch { gma: 0x12_3000 },
        offset: 4,
        problem: CommandProblem::Unknown,
    };
    assert_eq!(error, expected);

    // The per-context batch is one of them.
    test.at(BATCH, &[0x0e00_0002, 0, 0, 0, BATCH_END]);
    test.guest
        .set(&test.context, ring_context::BB_PER_CTX, BATCH << 12 | 1);
    let error = test.refused(&[NOOP]);
    assert_eq!(error.place, CommandPlace::Batch { gma: 0x12_0000 });

    // And the indirect context batch has a place of its own.
    test.at(BATCH, &[NOOP, 0x0e00_0002]);
    test.guest
        .set(&test.context, ring_context::INDIRECT_CTX, BATCH << 12 | 1);
    let error = test.refused(&[NOOP]);
    assert_eq!((error.place, error.offset), (CommandPlace::IndirectCtx, 4));
}

#[test]
fn batches_that_never_end_are_given_up() {
    let mut test = Test::new();
    test.guest
        .vgpu
        .set_auditor(MiAuditor::new().batch_limit(0x2000));
    let error = test.submit(&[BATCH_GGTT, BATCH << 12, 0]).unwrap_err();
    let expected = CommandError {
        header: NOOP,
        place: CommandPlace::Batch { gma: 0x12_0000 },
        offset: 0x2000,
        problem: CommandProblem::TooLong { limit: 0x2000 },
    };
    assert!(
        matches!(error, Error::Command(error) if error == expected),
        "{error}"
    );
    // One that jumps to itself is looked at once.
    let mut test = Test::new();
    test.at(BATCH, &[BATCH_GGTT, BATCH << 12, 0]);
    test.submit(&[BATCH_GGTT, BATCH << 12, 0]).unwrap();
    let mut engine = SimulatedEngine::new().step_limit(100);
    let error = test.guest.vgpu.run_next(RCS, &mut engine).unwrap_err();
    assert_eq!(error.errno(), libc::EIO);
    // That is a hang, and no reason to give the guest up.
    assert_eq!(test.guest.vgpu.failsafe(), None);
}

/// A batch may be one dword at the end of a page, and a ring may start a hundred thousand of them.
#[test]
fn many_short_batches_are_given_up() {
    let mut test = Test::new();
    let ends = [0, 4, 8].map(|offset| BATCH << 12 | offset);
    test.at(BATCH, &[BATCH_END; 3]);
    let starts =
        |ends: &[u32]| -> Vec<u32> { ends.iter().flat_map(|end| [BATCH_GGTT, *end, 0]).collect() };
    let limited = MiAuditor::new().batch_limit(0x2000);
    test.guest.vgpu.set_auditor(limited);
    // The same one again costs nothing.
    let [first, second, _] = ends;
    test.submit(&starts(&[first, second, first, second]))
        .unwrap();
    test.guest.vgpu.reset_engine(RCS);
    let error = test.submit(&starts(&ends)).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Command(CommandError {
                problem: CommandProblem::TooLong { limit: 0x2000 },
                ..
            })
        ),
        "{error}"
    );
}

#[test]
fn a_late_scan_is_refused_too() {
    let mut test = Test::new();
    test.submit(&[NOOP, NOOP]).unwrap();
    // Queued behind the first, so it is scanned when it is its turn.
    test.guest.set(&test.context, ring_context::TAIL, 0x20);
    test.guest.submit(&[test.context]).unwrap();
    test.at(RING_PAGE, &[NOOP, NOOP, 0x0e00_0002]);
    let mut engine = SimulatedEngine::new();
    test.guest.vgpu.run_next(RCS, &mut engine).unwrap();
    let error = test.guest.vgpu.run_next(RCS, &mut engine).unwrap_err();
    assert_eq!(error.errno(), libc::EBADRQC);
    assert_eq!(test.guest.vgpu.failsafe(), Some(FailsafeReason::GuestError));
}

#[test]
fn failsafe_mode_does_nothing_until_the_device_is_reset() {
    let mut test = Test::new();
    let blit = test.guest.context(EngineId::Bcs, 0x80, 2);
    test.guest.submit(&[blit]).unwrap();
    test.submit(&[0x0e00_0002, 0, 0, 0]).unwrap_err();
    let vgpu = &mut test.guest.vgpu;
    // Also what was submitted to another engine is dropped.
    assert_eq!(vgpu.queued(EngineId::Bcs), 0);
    // An engine's reset does not help.
    vgpu.reset_engine(RCS);
    for value in [1, 2, 3, 4] {
        assert_eq!(vgpu.mmio_write(0x2230, value).unwrap(), None);
    }
    assert_eq!(vgpu.mmio_read(0x2230), 4);
    vgpu.mmio_write(0x23a0, 0x55).unwrap();
    assert_eq!(vgpu.mmio_read(0x23a0), 0x55);
    vgpu.write_ggtt_entry(7, 0x1_2001).unwrap();
    assert_eq!(vgpu.ggtt().entry(7), Some(0x1_2001));
    let ran = vgpu.run_next(RCS, &mut SimulatedEngine::new());
    assert_eq!(ran.unwrap(), None);
    vgpu.enter_failsafe(FailsafeReason::InsufficientResource);
    assert_eq!(vgpu.failsafe(), Some(FailsafeReason::GuestError));

    vgpu.reset();
    assert_eq!(vgpu.failsafe(), None);
    assert_eq!(vgpu.ggtt().entry(7), Some(0));
    assert_eq!((vgpu.mmio_read(0x2230), vgpu.mmio_read(0x23a0)), (0, 7));
    for page in 0..512 {
        vgpu.write_ggtt_entry(page, entry(page.into())).unwrap();
    }
    test.submit(&[NOOP, NOOP]).unwrap();
    let completion = test.guest.run(RCS);
    assert_eq!((completion.sequence, completion.events), (0, 2));
}

#[test]
fn other_errors_are_not_the_end() {
    let mut test = Test::new();
    test.guest.set(&test.context, ring_context::START, 0x2008);
    assert_eq!(test.submit(&[NOOP]).unwrap_err().errno(), libc::EINVAL);
    assert_eq!(test.guest.vgpu.failsafe(), None);
}

/// A command, and the errno with which it is refused.
fn command() -> impl Strategy<Value = (Vec<u32>, Option<i32>)> {
    let word = any::<u32>();
    prop_oneof![
        5 => Just((vec![NOOP], None)),
        2 => word.prop_map(|value| (vec![STORE_GGTT, 0x12_0000, 0, value], None)),
        2 => word.prop_map(|value| (vec![0x1000_0002, value, value, value], None)),
        2 => (1..64_usize, word).prop_map(|(pairs, value)| {
            let mut dwords = vec![0x1100_0000 | (2 * pairs as u32 - 1)];
            dwords.extend((0..2 * pairs).map(|_| value & 0x1f_fffc));
            (dwords, None)
        }),
        2 => (0..256_usize, word).prop_map(|(operands, value)| {
            // A command of the blitter with anything behind it.
            let mut dwords = vec![0x5400_0000 | operands as u32];
            dwords.extend((0..operands + 1).map(|_| value));
            (dwords, None)
        }),
        1 => Just((vec![0x0e00_0002, 0, 0, 0], Some(libc::EBADRQC))),
        1 => Just((vec![STORE_GGTT, 0, 1, 0], Some(libc::EFAULT))),
        1 => Just((vec![0x0880_0000], Some(libc::EBADRQC))),
        1 => Just((vec![BATCH_END], Some(libc::EFAULT))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The first command that is wrong is what is found, wherever commands lie.
    #[test]
    fn the_first_wrong_command_is_found(commands in prop::collection::vec(command(), 0..40)) {
        let mut ring = Vec::new();
        let mut first = None;
        for (dwords, errno) in commands {
            if let (None, Some(errno)) = (first, errno) {
                first = Some((ring.len() * 4, errno));
            }
            ring.extend(dwords);
            if ring.len() > 3800 {
                break;
            }
        }
        let mut test = Test::new();
        let found = match test.submit(&ring) {
            Ok(()) => None,
            Err(Error::Command(error)) => Some((error.offset, error.errno())),
            Err(error) => return Err(TestCaseError::fail(error.to_string())),
        };
        prop_assert_eq!(found, first);
    }
}

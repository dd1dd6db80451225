// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The bundled recordings through the whole stack: what they count, and that what must not go
//! unnoticed does not.

use gvt_replay::inject::Fault;
use gvt_replay::replay::{Count, Outcome};
use gvt_replay::{expected, Contiguity, Mode, Model, Plan, ProfileFigures, Replay, Trace};
use gvt_scheduler::AccessKind;

const GLMARK2: &[u8] = include_bytes!("../data/glmark2-skl.aub.xz");
const NCNN: &[u8] = include_bytes!("../data/ncnn-vulkan-skl.aub.xz");
const H264: &[u8] = include_bytes!("../data/h264-vcs-skl.aub.xz");

struct Prepared {
    plan: Plan,
    model: Model,
}

impl Prepared {
    fn new(stored: &[u8], profile: &str) -> Self {
        let trace = Trace::from_bytes(stored).unwrap();
        let profile = Contiguity::bundled(profile).unwrap();
        let plan = Plan::new(&trace, &profile).unwrap();
        let model = Model::after(&plan).unwrap();
        Prepared { plan, model }
    }

    fn replay(&self) -> Replay<'_> {
        Replay::new(&self.plan, &self.model)
    }

    fn run(&self, mode: Mode) -> Outcome {
        self.replay().run(mode, &mut |_| Ok(())).unwrap()
    }
}

fn count(reads: u64, read_bytes: u64, writes: u64, written_bytes: u64) -> Count {
    Count {
        reads,
        read_bytes,
        writes,
        written_bytes,
    }
}

/// The published figures of the recording, digit by digit.
#[test]
fn glmark2_makes_exactly_the_published_accesses() {
    let prepared = Prepared::new(GLMARK2, "consecutive");
    let outcomes = Mode::CORRECT.map(|mode| prepared.run(mode));
    for outcome in &outcomes {
        assert!(outcome.verified(), "{:?}", outcome.verdicts);
        assert_eq!(outcome.workloads, 202);
        for (kind, published) in [
            (AccessKind::ContextDword, count(4040, 16_160, 0, 0)),
            (AccessKind::Ring, count(202, 32_320, 0, 0)),
            (AccessKind::Page1, count(202, 785_376, 202, 785_376)),
            (AccessKind::PageTable, count(22_016 + 2186, 193_616, 0, 0)),
            (AccessKind::Completion, count(0, 0, 606 + 808, 7272)),
        ] {
            assert_eq!(
                outcome.count(kind),
                published,
                "{:?} {kind:?}",
                outcome.mode
            );
        }
        for kind in AccessKind::ALL {
            let computed = expected::bundled(outcome.mode, kind);
            assert_eq!(
                computed,
                Some(outcome.count(kind)),
                "{:?} {kind:?}",
                outcome.mode
            );
        }
    }
    let [page, run, skip] = outcomes.map(|outcome| outcome.context_pages());
    assert_eq!(page, count(3360, 13_762_560, 4040, 16_547_840));
    assert_eq!(run, count(168, 13_762_560, 202, 16_547_840));
    assert_eq!(skip, count(34, 2_785_280, 202, 16_547_840));
}

#[test]
fn the_other_recordings_verify_and_read_their_page_tables() {
    for (stored, workloads, tables_and_updates, copies) in
        [(NCNN, 6, 26_624 + 1480, 6), (H264, 30, 2048 + 224, 0)]
    {
        let prepared = Prepared::new(stored, "consecutive");
        for mode in Mode::CORRECT {
            let outcome = prepared.run(mode);
            assert!(outcome.verified(), "{mode:?}: {:?}", outcome.verdicts);
            assert_eq!(outcome.workloads, workloads);
            assert_eq!(
                outcome.count(AccessKind::PageTable).reads,
                tables_and_updates
            );
            let calls = if mode == Mode::Page {
                20 * copies
            } else {
                copies
            };
            assert_eq!(outcome.context_pages().writes, calls);
        }
    }
}

#[test]
fn every_profile_verifies_in_every_mode() {
    for profile in Contiguity::NAMES {
        let prepared = Prepared::new(GLMARK2, profile);
        for mode in Mode::CORRECT {
            let outcome = prepared.run(mode);
            assert!(
                outcome.verified(),
                "{profile} {mode:?}: {:?}",
                outcome.verdicts
            );
            assert_eq!(outcome.context_pages().written_bytes, 16_547_840);
        }
    }
}

#[test]
fn calls_follow_the_runs_of_the_profile() {
    for name in Contiguity::NAMES {
        let prepared = Prepared::new(NCNN, name);
        let runs = Contiguity::bundled(name).unwrap().runs(0).len() as u64;
        let pages = prepared.run(Mode::Run).context_pages();
        assert_eq!((pages.reads, pages.writes), (5 * runs, 6 * runs), "{name}");
    }
}

#[test]
fn every_fault_is_found_in_every_mode() {
    for (stored, profile) in [
        (GLMARK2, "consecutive"),
        (GLMARK2, "as-found"),
        (NCNN, "recycled"),
    ] {
        let prepared = Prepared::new(stored, profile);
        for fault in Fault::ALL {
            for mode in Mode::CORRECT {
                let replay = prepared.replay().fault(Some(fault));
                let outcome = replay.run(mode, &mut |_| Ok(())).unwrap();
                assert!(!outcome.verified(), "{profile} {fault:?} {mode:?}");
            }
        }
    }
    let no_copies = Prepared::new(H264, "consecutive");
    let replay = no_copies.replay().fault(Some(Fault::LoseTail));
    assert!(replay.run(Mode::Run, &mut |_| Ok(())).is_err());
}

/// At the end nobody could tell: the write-back of a context's last run mends what an earlier one lost.
#[test]
fn a_lost_copy_is_found_when_it_happens() {
    let prepared = Prepared::new(GLMARK2, "consecutive");
    let replay = prepared.replay().fault(Some(Fault::LoseTail));
    let outcome = replay.run(Mode::Skip, &mut |_| Ok(())).unwrap();
    let first = &outcome.verdicts[0].first[0];
    assert_eq!((first.page, first.submission), (Some(21), Some(0)));
}

#[test]
fn the_kernels_loop_loses_pages_of_a_fragmented_guest_only() {
    let trace = Trace::from_bytes(GLMARK2).unwrap();
    let figures = |name| {
        let profile = Contiguity::bundled(name).unwrap();
        ProfileFigures::measure(&trace, &profile, &mut |_| Ok(())).unwrap()
    };
    let consecutive = figures("consecutive");
    assert!(consecutive.memory_as_expected && consecutive.upstream.memory_as_expected);
    assert_eq!(consecutive.pages_per_write, Some(20.0));
    assert_eq!(
        (consecutive.upstream.unread, consecutive.upstream.unwritten),
        (0, 0)
    );

    let as_found = figures("as-found");
    assert!(as_found.memory_as_expected && !as_found.upstream.memory_as_expected);
    assert!(as_found.upstream.unwritten > 0 && as_found.upstream.unread > 0);
    assert_eq!(
        (as_found.upstream.reads, as_found.upstream.writes),
        (3360, 4040)
    );
}

/// glmark2 never comes back to a context. This does, when the recording has ended: contexts 0 and 1
/// in turn, each submitted twice.
#[test]
fn a_context_that_comes_back_is_read_again() {
    let contexts = Prepared::new(GLMARK2, "as-found").plan.contexts()[..2].to_vec();
    let mut file = gvt_replay::decompress::decompress(GLMARK2, 1 << 30).unwrap();
    for context in [0, 0, 1, 1, 0, 0, 1, 1].map(|index| &contexts[index]) {
        let page1 = (context.lrca + 1) << 12;
        for (field, value) in [(0x14, 0), (0x1c, 16)] {
            append(&mut file, 0x06, &[page1 + field, 0, 0, 4, value]);
        }
        for dword in [0, 0, 0, context.lrca << 12 | 0x339] {
            append(&mut file, 0x03, &[0x2230, 2 << 16, u32::MAX, 0, dword]);
        }
    }
    let prepared = Prepared::new(&file, "as-found");
    for (mode, populates) in [
        (Mode::Page, 168 + 8),
        (Mode::Run, 168 + 8),
        (Mode::Skip, 34 + 4),
    ] {
        let outcome = prepared.run(mode);
        assert!(outcome.verified(), "{mode:?}: {:?}", outcome.verdicts);
        assert_eq!(outcome.workloads, 210);
        assert_eq!(outcome.context_pages().read_bytes, populates * 81_920);
    }
}

/// Appends an AUB packet.
fn append(file: &mut Vec<u8>, sub_opcode: u32, dwords: &[u32]) {
    let header = 7 << 29 | 0x2e << 23 | sub_opcode << 16 | dwords.len() as u32;
    for dword in std::iter::once(&header).chain(dwords) {
        file.extend(dword.to_le_bytes());
    }
}

#[test]
fn vgpus_take_turns_and_their_counts_add_up() {
    let prepared = Prepared::new(NCNN, "as-found");
    let mut turns = Vec::new();
    let replay = prepared.replay().vgpus(3).record_accesses(true);
    let outcome = replay
        .run(Mode::Skip, &mut |workload| {
            assert!(!workload.accesses.is_empty());
            turns.push((workload.vgpu, workload.submission));
            Ok(())
        })
        .unwrap();
    assert!(outcome.verified());
    assert_eq!(outcome.verdicts.len(), 3);
    let expected: Vec<_> = (0..6)
        .flat_map(|s| (0..3).map(move |vgpu| (vgpu, s)))
        .collect();
    assert_eq!(turns, expected);

    let alone = prepared.run(Mode::Skip);
    for kind in AccessKind::ALL {
        let (one, three) = (alone.count(kind), outcome.count(kind));
        assert_eq!(
            (3 * one.reads, 3 * one.written_bytes),
            (three.reads, three.written_bytes)
        );
    }
}

#[test]
fn two_vgpus_replay_glmark2() {
    let prepared = Prepared::new(GLMARK2, "churned");
    let replay = prepared.replay().vgpus(2);
    let outcome = replay.run(Mode::Skip, &mut |_| Ok(())).unwrap();
    assert!(outcome.verified());
    assert_eq!((outcome.workloads, outcome.verdicts.len()), (404, 2));
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Traces of accesses: as bytes and back, of a vGPU's workload, and done again.

mod common;

use std::time::Duration;

use common::{memory, Guest};
use gvt_scheduler::policy::VirtualClock;
use gvt_scheduler::trace::{AccessTrace, Recorder, TraceError, TracedAccess, MAX_ACCESS_BYTES};
use gvt_scheduler::{AccessCounts, EngineId, Observer, Step, VgpuConfig};
use proptest::prelude::*;

const STEPS: [Step; 6] = [
    Step::Create,
    Step::Scan,
    Step::Populate,
    Step::Prepare,
    Step::Execute,
    Step::Complete,
];

fn access() -> impl Strategy<Value = TracedAccess> {
    let step = prop::sample::select(&STEPS[..]);
    (
        any::<u64>(),
        any::<u16>(),
        step,
        any::<bool>(),
        any::<u64>(),
        0..=MAX_ACCESS_BYTES,
    )
        .prop_map(|(time, vgpu, step, write, iova, len)| TracedAccess {
            time: Duration::from_nanos(time),
            vgpu,
            step,
            write,
            iova: iova.min(u64::MAX - u64::from(len)),
            len,
        })
}

fn bytes_of(trace: &AccessTrace) -> Vec<u8> {
    let mut bytes = Vec::new();
    trace.write_to(&mut bytes).unwrap();
    bytes
}

fn trace_of(accesses: &[TracedAccess]) -> AccessTrace {
    let mut trace = AccessTrace::default();
    for access in accesses {
        trace.push(*access).unwrap();
    }
    trace
}

proptest! {
    #[test]
    fn what_is_written_is_read_again(accesses in prop::collection::vec(access(), 0..50)) {
        let trace = trace_of(&accesses);
        prop_assert_eq!(trace.accesses(), &accesses[..]);
        let read = AccessTrace::from_bytes(&bytes_of(&trace)).unwrap();
        prop_assert_eq!(trace.first_difference(&read), None);
        prop_assert_eq!(read, trace);
    }

    /// Whatever is read says the same when it is written, so there is one way to say it.
    #[test]
    fn a_damaged_trace_is_another_one_or_refused(
        accesses in prop::collection::vec(access(), 1..8),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = bytes_of(&trace_of(&accesses));
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        match AccessTrace::from_bytes(&bytes) {
            Ok(trace) => prop_assert_eq!(bytes_of(&trace), bytes),
            Err(error) => prop_assert_eq!(error.errno(), libc::EINVAL),
        }
    }

    #[test]
    fn the_first_difference_is_found(
        accesses in prop::collection::vec(access(), 1..20),
        at in any::<prop::sample::Index>(),
    ) {
        let trace = trace_of(&accesses);
        let at = at.index(accesses.len());
        let changed = |change: fn(&mut TracedAccess)| {
            let mut accesses = accesses.clone();
            change(&mut accesses[at]);
            trace_of(&accesses)
        };
        let later = changed(|access| access.time = access.time.saturating_sub(Duration::from_nanos(1)));
        prop_assert_eq!(trace.first_difference(&later), None);
        let changes: [fn(&mut TracedAccess); 4] = [
            |access| access.write ^= true,
            |access| access.iova ^= 1 << 40,
            |access| access.len ^= 1,
            |access| access.vgpu ^= 1,
        ];
        for change in changes {
            prop_assume!(accesses[at].iova < u64::MAX >> 1 && accesses[at].len < MAX_ACCESS_BYTES);
            prop_assert_eq!(trace.first_difference(&changed(change)), Some(at));
        }
        let shorter = trace_of(&accesses[..at]);
        prop_assert_eq!(trace.first_difference(&shorter), Some(at));
        prop_assert_eq!(shorter.first_difference(&trace), Some(at));
    }
}

#[test]
fn headers_that_lie_are_refused() {
    let one = TracedAccess {
        time: Duration::ZERO,
        vgpu: 0,
        step: Step::Create,
        write: false,
        iova: 0,
        len: 4,
    };
    let good = bytes_of(&trace_of(&[one]));
    let with = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        AccessTrace::from_bytes(&bytes).unwrap_err()
    };
    assert!(matches!(with(0, b'g'), TraceError::NotATrace));
    assert!(matches!(with(8, 2), TraceError::Version { version: 2 }));
    assert!(matches!(with(12, 25), TraceError::NotATrace));
    assert!(matches!(with(16, 2), TraceError::Length { .. }));
    assert!(matches!(with(23, 0xff), TraceError::TooMany { .. }));
    assert_eq!(
        with(24 + 22, 6).to_string(),
        "access 0 of the trace: 0x6 is no step"
    );
    assert!(matches!(with(24 + 23, 2), TraceError::Field { .. }));
    assert!(matches!(with(24 + 19, 0xff), TraceError::Range { .. }));
    let wraps = TracedAccess {
        iova: u64::MAX - 2,
        ..one
    };
    assert!(matches!(
        AccessTrace::default().push(wraps),
        Err(TraceError::Range { index: 0, .. })
    ));
    assert!(AccessTrace::default()
        .push(TracedAccess {
            iova: u64::MAX - 3,
            ..one
        })
        .is_ok());
}

/// Two observers in one.
struct Both<'a>(Recorder<&'a VirtualClock>, AccessCounts);

impl Observer for Both<'_> {
    fn access(&mut self, access: &gvt_scheduler::Access) {
        self.0.access(access);
        self.1.access(access);
    }

    fn step(&mut self, sequence: u64, step: Step) {
        self.0.step(sequence, step);
    }
}

#[test]
fn a_workload_is_recorded_step_by_step_and_done_again() {
    let clock = VirtualClock::default();
    let recorder = Recorder::new(7, &clock);
    let observer = Both(recorder, AccessCounts::default());
    let mut guest = Guest::with(VgpuConfig::default(), (), observer);
    let context = guest.context(EngineId::Rcs, 64, 1);
    guest.submit(&[context]).unwrap();
    clock.advance(Duration::from_micros(9));
    guest.run(EngineId::Rcs);
    let Both(recorder, counts) = guest.vgpu.observer_mut();
    let (trace, counts) = (recorder.take().unwrap(), counts.total());
    assert!(recorder.take().unwrap().accesses().is_empty());

    let accesses = trace.accesses();
    assert_eq!(accesses.len() as u64, counts.reads + counts.writes);
    assert!(accesses.iter().all(|access| access.vgpu == 7));
    let steps = accesses.windows(2).all(|pair| pair[0].step <= pair[1].step);
    assert!(steps, "{accesses:?}");
    for access in accesses {
        let early = access.step < Step::Populate;
        let time = if early {
            Duration::ZERO
        } else {
            Duration::from_micros(9)
        };
        assert_eq!(access.time, time, "{access}");
    }

    let driven = trace.drive(&memory(4 << 20)).unwrap();
    assert_eq!(
        (driven.reads, driven.read_bytes),
        (counts.reads, counts.read_bytes)
    );
    assert_eq!(
        (driven.writes, driven.written_bytes),
        (counts.writes, counts.written_bytes)
    );
    let error = trace.drive(&memory(64 << 10)).unwrap_err();
    assert!(matches!(error, TraceError::Access { .. }), "{error}");
    assert_eq!(error.errno(), libc::EFAULT);
}

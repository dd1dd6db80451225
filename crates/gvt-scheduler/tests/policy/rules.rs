// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The rules one by one.

use std::time::Duration;

use gvt_scheduler::policy::{
    Clock, PolicyError, TimeBased, VgpuId, VirtualClock, Weight, BALANCE_PERIOD, STAGES,
    START_PRIORITY, TICK,
};
use gvt_scheduler::EngineId;

const RCS: EngineId = EngineId::Rcs;
const VCS: EngineId = EngineId::Vcs;

/// A policy with vGPUs of these weights, started in this order.
fn policy<'a>(
    clock: &'a VirtualClock,
    weights: &[u8],
) -> (TimeBased<&'a VirtualClock>, Vec<VgpuId>) {
    let mut policy = TimeBased::new(clock);
    let ids: Vec<_> = weights
        .iter()
        .map(|weight| policy.add(Weight::new(*weight).unwrap()))
        .collect();
    for id in &ids {
        policy.start(*id).unwrap();
    }
    (policy, ids)
}

/// The same, no longer new, with the time of the first of ten periods given out just now.
fn seasoned<'a>(
    clock: &'a VirtualClock,
    weights: &[u8],
) -> (TimeBased<&'a VirtualClock>, Vec<VgpuId>) {
    let (mut policy, ids) = policy(clock, weights);
    // Two times ten periods.
    while clock.now() < START_PRIORITY {
        policy.tick();
        clock.advance(TICK);
    }
    policy.tick();
    (policy, ids)
}

fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

fn ns(milliseconds: i64) -> i64 {
    milliseconds * 1_000_000
}

#[test]
fn a_new_vgpu_comes_before_others_for_two_seconds() {
    let clock = VirtualClock::default();
    let (mut policy, ids) = policy(&clock, &[16, 1]);
    policy.queue(ids[0], RCS).unwrap();
    assert_eq!(policy.current(), Some(ids[0]), "the other has nothing yet");
    policy.queue(ids[1], RCS).unwrap();
    policy.tick();
    assert_eq!(policy.current(), Some(ids[1]), "started last, so in front");
    clock.advance(START_PRIORITY - TICK);
    policy.tick();
    assert_eq!(
        policy.current(),
        Some(ids[1]),
        "in debt, and still in front"
    );
    assert!(policy.left(ids[1]).unwrap() < 0);
    clock.advance(TICK);
    policy.tick();
    assert_eq!(policy.current(), Some(ids[0]), "no longer new, and in debt");
}

#[test]
fn a_turn_is_kept_until_a_workload_has_begun_or_the_next_tick() {
    let clock = VirtualClock::default();
    let (mut policy, ids) = seasoned(&clock, &[1, 1]);
    policy.queue(ids[0], RCS).unwrap();
    policy.queue(ids[1], RCS).unwrap();
    assert_eq!(policy.current(), Some(ids[0]), "it has begun nothing yet");
    assert_eq!(policy.begin(RCS), Some(ids[0]));
    policy.queue(ids[1], RCS).unwrap();
    assert!(policy.is_draining(), "it has begun, and the other waits");
    policy.finish(RCS).unwrap();
    policy.queue(ids[0], RCS).unwrap();
    assert_eq!(policy.current(), Some(ids[1]));
    clock.advance(TICK);
    policy.tick();
    assert_eq!(policy.current(), Some(ids[0]), "nothing begun for a tick");
    policy.clear(ids[0], RCS).unwrap();
    policy.queue(ids[1], RCS).unwrap();
    assert_eq!(policy.current(), Some(ids[1]), "nothing to begin any more");
}

#[test]
fn a_vgpu_with_nothing_to_do_is_passed_over() {
    let clock = VirtualClock::default();
    let (mut policy, ids) = seasoned(&clock, &[1, 1, 1]);
    policy.queue(ids[1], VCS).unwrap();
    assert_eq!(policy.current(), Some(ids[1]));
    assert_eq!(
        policy.begin(RCS),
        None,
        "its workload is for another engine"
    );
    assert_eq!(policy.begin(VCS), Some(ids[1]));
    policy.finish(VCS).unwrap();
    policy.tick();
    assert_eq!(policy.current(), None);
}

#[test]
fn turns_go_round() {
    let clock = VirtualClock::default();
    let (mut policy, ids) = seasoned(&clock, &[1, 1, 1]);
    for id in &ids {
        policy.queue(*id, RCS).unwrap();
    }
    let mut turns = Vec::new();
    for _ in 0..6 {
        clock.advance(TICK);
        policy.tick();
        turns.push(policy.current().unwrap());
    }
    assert_eq!(turns[..3], turns[3..]);
    turns[..3].sort_unstable();
    assert_eq!(turns[..3], ids);
}

#[test]
fn nobody_is_charged_while_nobody_has_a_workload() {
    let clock = VirtualClock::default();
    let (mut policy, ids) = seasoned(&clock, &[3, 1]);
    clock.advance(ms(50));
    policy.tick();
    assert_eq!(policy.used(ids[0]), Some(Duration::ZERO));
    assert_eq!(policy.left(ids[0]), Some(ns(75)));

    policy.queue(ids[0], RCS).unwrap();
    assert_eq!(policy.begin(RCS), Some(ids[0]));
    clock.advance(ms(7));
    policy.finish(RCS).unwrap();
    assert_eq!(policy.used(ids[0]), Some(ms(7)));
    policy.tick();
    clock.advance(ms(20));
    policy.tick();
    assert_eq!(policy.used(ids[0]), Some(ms(7)));
    assert_eq!(policy.left(ids[0]), Some(ns(75 - 7)));
}

#[test]
fn a_change_waits_for_what_runs_and_nothing_begins_before() {
    let clock = VirtualClock::default();
    let (mut policy, ids) = seasoned(&clock, &[1, 1]);
    for engine in [RCS, VCS, RCS] {
        policy.queue(ids[0], engine).unwrap();
    }
    assert_eq!(policy.begin(RCS), Some(ids[0]));
    assert_eq!(policy.begin(RCS), None, "the engine is busy");
    assert_eq!(policy.begin(VCS), Some(ids[0]));
    policy.queue(ids[1], RCS).unwrap();
    assert!(policy.is_draining());
    policy.finish(RCS).unwrap();
    assert_eq!((policy.begin(RCS), policy.current()), (None, Some(ids[0])));
    policy.finish(VCS).unwrap();
    assert_eq!(
        (policy.current(), policy.is_draining()),
        (Some(ids[1]), false)
    );
    assert_eq!(policy.begin(RCS), Some(ids[1]));
}

#[test]
fn debt_is_carried_for_ten_periods_and_then_forgotten() {
    let clock = VirtualClock::default();
    let (mut policy, ids) = seasoned(&clock, &[1, 1]);
    policy.queue(ids[0], RCS).unwrap();
    assert_eq!(policy.begin(RCS), Some(ids[0]));
    clock.advance(ms(90));
    policy.tick();
    policy.finish(RCS).unwrap();
    assert_eq!(policy.left(ids[0]), Some(ns(50 - 90)));
    policy.tick();
    for period in 1..i64::from(STAGES) {
        clock.advance(BALANCE_PERIOD);
        policy.tick();
        assert_eq!(policy.left(ids[0]), Some(ns(50 - 90 + 50 * period)));
        assert_eq!(policy.left(ids[1]), Some(ns(50 + 50 * period)));
    }
    clock.advance(BALANCE_PERIOD);
    policy.tick();
    assert_eq!(
        [policy.left(ids[0]), policy.left(ids[1])],
        [Some(ns(50)); 2]
    );
}

#[test]
fn who_has_used_up_its_time_waits_for_more() {
    let clock = VirtualClock::default();
    let (mut policy, ids) = seasoned(&clock, &[1, 1]);
    policy.queue(ids[0], RCS).unwrap();
    policy.queue(ids[0], RCS).unwrap();
    policy.begin(RCS);
    clock.advance(ms(50));
    policy.finish(RCS).unwrap();
    policy.tick();
    assert_eq!(policy.current(), None, "though nobody else wants to");
    clock.advance(ms(49));
    policy.tick();
    assert_eq!(policy.current(), None);
    clock.advance(ms(1));
    policy.tick();
    assert_eq!(policy.current(), Some(ids[0]));
}

#[test]
fn a_vgpu_that_is_stopped_lets_what_runs_run_and_begins_nothing() {
    let clock = VirtualClock::default();
    let (mut policy, ids) = seasoned(&clock, &[1, 1]);
    policy.queue(ids[0], RCS).unwrap();
    policy.queue(ids[0], VCS).unwrap();
    policy.begin(RCS);
    clock.advance(ms(5));
    policy.stop(ids[0]).unwrap();
    assert_eq!(policy.used(ids[0]), Some(ms(5)));
    assert_eq!((policy.current(), policy.begin(VCS)), (None, None));
    policy.queue(ids[1], RCS).unwrap();
    assert_eq!(policy.current(), None, "a workload of the stopped one runs");
    assert_eq!(
        policy.remove(ids[0]),
        Err(PolicyError::InUse { vgpu: ids[0] })
    );
    policy.finish(RCS).unwrap();
    assert_eq!(policy.current(), Some(ids[1]));
    policy.remove(ids[0]).unwrap();
    assert_eq!(
        policy.start(ids[0]),
        Err(PolicyError::NoVgpu { vgpu: ids[0] })
    );
}

/// The kernel stays in need of a reschedule then, and begins nothing until another vGPU is chosen.
#[test]
fn a_change_to_a_vgpu_that_is_stopped_is_taken_back() {
    let clock = VirtualClock::default();
    let (mut policy, ids) = seasoned(&clock, &[1, 1]);
    policy.queue(ids[0], RCS).unwrap();
    policy.queue(ids[0], VCS).unwrap();
    policy.begin(RCS);
    policy.queue(ids[1], RCS).unwrap();
    assert!(policy.is_draining());
    policy.stop(ids[1]).unwrap();
    assert_eq!(policy.begin(VCS), Some(ids[0]));
}

#[test]
fn refusals_say_what_and_why() {
    let clock = VirtualClock::default();
    let (mut policy, ids) = policy(&clock, &[1]);
    for error in [
        policy.remove(ids[0]).unwrap_err(),
        policy.finish(RCS).unwrap_err(),
        Weight::new(0).unwrap_err(),
    ] {
        assert!(error.errno() > 0 && !error.to_string().is_empty());
    }
    assert_eq!(policy.remove(ids[0]).unwrap_err().errno(), libc::EBUSY);
    policy.stop(ids[0]).unwrap();
    policy.stop(ids[0]).unwrap();
    policy.remove(ids[0]).unwrap();
    let gone = policy.queue(ids[0], RCS).unwrap_err();
    assert_eq!(gone.to_string(), "there is no vGPU 0");
    assert_eq!(gone.errno(), libc::ENODEV);
    assert_eq!((policy.used(ids[0]), policy.left(ids[0])), (None, None));
}

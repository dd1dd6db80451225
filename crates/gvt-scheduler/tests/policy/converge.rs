// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! In the long run each vGPU has the part of the time that its weight says, whatever workloads there
//! are.

use std::time::Duration;

use gvt_scheduler::policy::{
    Clock, TimeBased, VgpuId, VirtualClock, Weight, BALANCE_PERIOD, START_PRIORITY, TICK,
};
use gvt_scheduler::EngineId;
use proptest::prelude::*;

const ENGINE: EngineId = EngineId::Rcs;
/// Periods after which debts are forgotten, in all.
const SECOND: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_millis(3);

/// What a guest does over and over: a workload of some length, then nothing for a while.
#[derive(Clone, Debug)]
struct Load {
    weight: u8,
    /// Microseconds, taken in turn.
    lengths: Vec<u64>,
    /// Microseconds between the end of a workload and the next; 0 for a guest that is always busy.
    pause: u64,
}

fn loads() -> impl Strategy<Value = Vec<Load>> {
    let lengths = prop::collection::vec(10..=LONGEST.as_micros() as u64, 1..8);
    let pause = prop_oneof![2 => Just(0), 1 => 1..20_000u64];
    let load = (1..=16u8, lengths, pause).prop_map(|(weight, lengths, pause)| Load {
        weight,
        lengths,
        pause,
    });
    prop::collection::vec(load, 1..6)
}

struct Guest {
    id: VgpuId,
    load: Load,
    workloads: usize,
    /// When it submits next; `None` while it waits for what it has submitted.
    submits: Option<Duration>,
    /// Since when it waits.
    waits: Option<Duration>,
    longest_wait: Duration,
}

/// Lets `guests` play for `seconds` behind the time that is theirs for being new; gives what each has
/// used.
fn play(loads: &[Load], seconds: u32) -> Vec<(Duration, Guest)> {
    let clock = VirtualClock::default();
    let mut policy = TimeBased::new(&clock);
    let begin = START_PRIORITY;
    let end = begin + seconds * SECOND;
    let mut guests: Vec<Guest> = loads
        .iter()
        .map(|load| Guest {
            id: policy.add(Weight::new(load.weight).unwrap()),
            load: load.clone(),
            workloads: 0,
            submits: Some(begin),
            waits: None,
            longest_wait: Duration::ZERO,
        })
        .collect();
    for guest in &guests {
        policy.start(guest.id).unwrap();
    }
    let mut tick = Duration::ZERO;
    let mut finish: Option<(Duration, usize)> = None;
    loop {
        let now = clock.now();
        if now == tick {
            policy.tick();
            tick += TICK;
        }
        if let Some((_, guest)) = finish.filter(|(at, _)| *at == now) {
            finish = None;
            policy.finish(ENGINE).unwrap();
            let guest = &mut guests[guest];
            guest.submits = Some(now + Duration::from_micros(guest.load.pause));
        }
        if now == end {
            break;
        }
        for guest in &mut guests {
            if guest.submits == Some(now) {
                guest.submits = None;
                guest.waits = Some(now);
                policy.queue(guest.id, ENGINE).unwrap();
            }
        }
        if let Some(id) = policy.begin(ENGINE) {
            let at = guests.iter().position(|guest| guest.id == id).unwrap();
            let guest = &mut guests[at];
            let waited = now - guest.waits.take().unwrap();
            guest.longest_wait = guest.longest_wait.max(waited);
            let length = guest.load.lengths[guest.workloads % guest.load.lengths.len()];
            guest.workloads += 1;
            finish = Some((now + Duration::from_micros(length), at));
        }
        let submits = guests.iter().filter_map(|guest| guest.submits);
        let next = submits.chain(finish.map(|(at, _)| at)).chain([tick, end]);
        clock.advance_to(next.min().unwrap());
    }
    let used = |guest: &Guest| policy.used(guest.id).unwrap();
    guests
        .into_iter()
        .map(|guest| (used(&guest), guest))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A second forgets what one vGPU owes the others, which is at most what outlasts its time: the rest
    /// of a workload, and of the tick in which it is noticed. So each has its share but for that much of
    /// every other in each second; one that is not always busy has no more than that.
    #[test]
    fn shares_are_those_of_the_weights(loads in loads()) {
        let seconds = 5;
        let weights: u32 = loads.iter().map(|load| u32::from(load.weight)).sum();
        let owed = (LONGEST + TICK) * loads.len() as u32;
        for (used, guest) in play(&loads, seconds) {
            let share = seconds * SECOND * u32::from(guest.load.weight) / weights;
            prop_assert!(used <= share + owed * seconds, "{used:?} of {share:?}: {:?}", guest.load);
            if guest.load.pause == 0 {
                prop_assert!(used + owed * seconds >= share, "{used:?} of {share:?}: {:?}", guest.load);
            }
        }
    }

    #[test]
    fn nobody_starves(loads in loads()) {
        prop_assert_eq!(starved(&loads), None);
    }
}

/// Who has a workload gets its turn when the others have used up their time, or it has some again:
/// gives one that waited for longer.
fn starved(loads: &[Load]) -> Option<String> {
    let weights: u32 = loads.iter().map(|load| u32::from(load.weight)).sum();
    play(loads, 3).into_iter().find_map(|(_, guest)| {
        // Debt that a workload makes is paid back by periods in which the vGPU gets nothing.
        let allocated = BALANCE_PERIOD * u32::from(guest.load.weight) / weights;
        let periods = 2 + (LONGEST + TICK).as_micros() / allocated.as_micros();
        let limit = BALANCE_PERIOD * periods as u32;
        let starves = guest.workloads == 0 || guest.longest_wait > limit;
        starves.then(|| format!("{:?} of {limit:?}: {:?}", guest.longest_wait, guest.load))
    })
}

fn busy(weight: u8, lengths: &[u64]) -> Load {
    Load {
        weight,
        lengths: lengths.to_vec(),
        pause: 0,
    }
}

/// Here the first lost all its turns of a period: each came as the workload before it ended, and the
/// one that was queued then took it.
#[test]
fn turns_are_not_lost_to_loads_that_keep_in_step() {
    let loads = [
        busy(1, &[269, 2814, 1784, 1054]),
        busy(7, &[1424, 2317, 1690, 2586, 999, 2010, 1345]),
        busy(6, &[2983]),
        busy(5, &[2707, 1004, 2798, 2169]),
    ];
    assert_eq!(starved(&loads), None);
}

#[test]
fn two_to_one_is_two_to_one_within_a_hundredth() {
    let guests = play(&[busy(2, &[700]), busy(1, &[300, 900])], 1);
    let used: Vec<f64> = guests.iter().map(|(used, _)| used.as_secs_f64()).collect();
    assert!((used[0] - 2.0 / 3.0).abs() < 0.01, "{used:?}");
    assert!((used[1] - 1.0 / 3.0).abs() < 0.01, "{used:?}");
}

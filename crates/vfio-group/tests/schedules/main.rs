// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The whole under random schedules: a VMM that maps and unmaps, and a device model of several threads that reads,
//! writes, leases, pins, takes dirty pages and holds the group, on the production code.
//!
//! `ci/shuttle` runs it. A scheduler ([shuttle]) decides which thread goes on, whenever one comes to a lock or an
//! atomic; what the threads do is random too. A schedule that fails is printed, and
//! `SCHEDULE=... ci/shuttle` does it again.
//!
//! Where [loom's models](../../../iommu-type1/src/model) try every interleaving and ordering of one protocol, this tries
//! some of all protocols together. Memory is sequentially consistent here: that orderings are strong enough is for loom.

#![cfg(shuttle)]

mod ledger;
mod memory;
mod threads;

use std::env;
use std::sync::Arc;

use shuttle::scheduler::{PctScheduler, RandomScheduler, ReplayScheduler, Scheduler};
use shuttle::{Config, Runner};

use threads::Machine;

/// Schedules of each scheduler, unless `ITERATIONS` says otherwise.
const ITERATIONS: usize = 1000;

/// Threads that PCT makes wait in favour of all others, in a schedule.
const DEPTHS: [usize; 2] = [3, 8];

fn iterations() -> usize {
    let iterations = env::var("ITERATIONS").map(|number| number.parse().expect("ITERATIONS"));
    iterations.unwrap_or(ITERATIONS)
}

/// Runs a machine under each schedule of `scheduler`, or that of `SCHEDULE` alone.
fn check(scheduler: impl Scheduler + 'static) {
    let mut config = Config::new();
    // That it takes every ordering for the strongest is known.
    config.silence_warnings = true;
    config.stack_size = 0x4_0000;
    match env::var("SCHEDULE") {
        Ok(schedule) => {
            let schedule: String = schedule.split_whitespace().collect();
            let replay = ReplayScheduler::new_from_encoded(&schedule);
            Runner::new(replay, config).run(machine);
        }
        Err(_) => {
            let count = Runner::new(scheduler, config).run(machine);
            println!("{count} schedules");
        }
    }
}

fn machine() {
    Arc::new(Machine::start()).run();
}

#[test]
fn any_thread_goes_on() {
    check(RandomScheduler::new(iterations()));
}

/// Long runs of one thread, and a few changes: what a thread misses that is held up at one place for long.
#[test]
fn one_thread_goes_on_for_long() {
    for depth in DEPTHS {
        check(PctScheduler::new(depth, iterations() / DEPTHS.len()));
    }
}

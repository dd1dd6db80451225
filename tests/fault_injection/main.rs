// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Every allocation of a page and more, and every `mmap`, `ioctl`, `mlock` and `membarrier` of some scenarios fails once.
//! What was asked for then fails and has changed nothing; asked for again it succeeds; and in the end nothing is
//! left of all.

#![cfg(all(target_arch = "x86_64", target_os = "linux", target_env = "gnu"))]

#[path = "../../crates/vfio-user-dma/tests/common/mod.rs"]
mod common;
mod gvt;
mod inject;
mod iotlb;
mod refused;
mod scenarios;
mod session;

use std::fs;

use inject::{arm, disarm, held, Kind, KINDS};
use scenarios::SCENARIOS;

/// What must be as before when everything is dropped: counted blocks and mappings, open files, locked memory.
fn left() -> ([i64; 3], usize, String) {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let locked = status.lines().find(|line| line.starts_with("VmLck"));
    let locked = locked.unwrap_or_default().to_owned();
    let files = fs::read_dir("/proc/self/fd").unwrap().count();
    drop(status);
    (held(), files, locked)
}

/// How many points of a kind there are in a scenario, each of which has failed once.
fn fail_each(name: &str, scenario: fn(), kind: Kind) -> u64 {
    for n in 1.. {
        let before = left();
        arm(kind, n);
        scenario();
        let has_failed = disarm();
        assert_eq!(left(), before, "{name} has left something: {kind:?} {n}");
        if !has_failed {
            return n - 1;
        }
    }
    unreachable!()
}

#[test]
fn every_call_that_can_fail_fails_once_and_leaves_nothing() {
    for (_, scenario) in SCENARIOS {
        // What is made once for the process, and how it is when nothing fails.
        scenario();
    }
    for kind in KINDS {
        let mut sum = 0;
        for (name, scenario) in SCENARIOS {
            let points = fail_each(name, *scenario, kind);
            println!("{kind:?} in {name}: {points} points");
            sum += points;
        }
        println!("{kind:?}: {sum} points");
        assert!(sum > 0, "{kind:?} was never asked for");
    }
}

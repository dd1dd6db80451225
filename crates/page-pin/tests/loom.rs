// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The wait for released pins under every interleaving: `RUSTFLAGS="--cfg loom" cargo test -p
//! page-pin --release --test loom`.
#![cfg(loom)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use page_pin::{clock, Interest, PinTable};

/// Loom's condition variable never times out: a lost wake-up is a deadlock, which loom reports.
fn never() -> Instant {
    clock::now() + 2 * clock::NEVER
}

#[test]
fn a_release_wakes_the_waiter() {
    loom::model(|| {
        let table = PinTable::new(4096);
        let access = table.register("a", Interest::Holder, Arc::new(|_, _| ()));
        let pin = access.pin(0, 1).unwrap();
        let releaser = loom::thread::spawn(move || drop(pin));
        assert_eq!(table.wait_released(0, 4096, never()), Ok(()));
        assert_eq!(table.pins(0), 0);
        releaser.join().unwrap();
    });
}

#[test]
fn the_end_of_an_access_wakes_the_waiter() {
    loom::model(|| {
        let table = PinTable::new(4096);
        let access = table.register("a", Interest::Holder, Arc::new(|_, _| ()));
        access.pin(0, 1).unwrap().keep();
        let ender = loom::thread::spawn(move || drop(access));
        assert_eq!(table.wait_released(0, 4096, never()), Ok(()));
        ender.join().unwrap();
    });
}

#[test]
fn two_waiters_and_two_releases() {
    loom::model(|| {
        let table = PinTable::new(4096);
        let access = table.register("a", Interest::Holder, Arc::new(|_, _| ()));
        let (low, high) = (access.pin(0, 1).unwrap(), access.pin(4096, 1).unwrap());
        let waiter = {
            let table = table.clone();
            loom::thread::spawn(move || {
                assert_eq!(table.wait_released(4096, 4096, never()), Ok(()))
            })
        };
        let releaser = loom::thread::spawn(move || {
            drop(high);
            drop(low);
        });
        assert_eq!(table.wait_released(0, 4096, never()), Ok(()));
        waiter.join().unwrap();
        releaser.join().unwrap();
    });
}

#[test]
fn a_release_against_the_deadline() {
    loom::model(|| {
        let table = PinTable::new(4096);
        let access = table.register("a", Interest::Holder, Arc::new(|_, _| ()));
        let pin = access.pin(0, 1).unwrap();
        let begun = clock::now();
        let releaser = loom::thread::spawn(move || drop(pin));
        let timer = loom::thread::spawn(|| clock::pass(1));
        match table.wait_released(0, 4096, begun + Duration::from_secs(1)) {
            Ok(()) => assert!(!table.is_pinned(0, 4096)),
            Err(holders) => {
                assert_eq!((holders.len(), holders[0].pages), (1, 1));
                assert!(clock::now() > begun, "before the deadline");
            }
        }
        releaser.join().unwrap();
        timer.join().unwrap();
    });
}

#[test]
fn a_pin_that_is_never_released() {
    loom::model(|| {
        let table = PinTable::new(4096);
        let access = table.register("a", Interest::Holder, Arc::new(|_, _| ()));
        let _pin = access.pin(0, 1).unwrap();
        let deadline = clock::now() + Duration::from_secs(1);
        let timer = loom::thread::spawn(|| clock::pass(1));
        assert!(table.wait_released(0, 4096, deadline).is_err());
        timer.join().unwrap();
    });
}

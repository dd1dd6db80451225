// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The wait for released pins under every interleaving: `RUSTFLAGS="--cfg loom" cargo test -p
//! page-pin --release --test loom`.
#![cfg(loom)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use checked_sync::clock;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::sync::Mutex;
use page_pin::{Interest, PinGuard, PinTable};

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

/// As whoever moves an access does: once it is closed its pins only become fewer.
#[test]
fn a_pin_against_a_detach() {
    loom::model(|| {
        let table = PinTable::new(4096);
        let cache: Arc<Mutex<Option<PinGuard>>> = Arc::new(Mutex::new(None));
        let told = cache.clone();
        let notice = move |_, _| drop(told.lock().unwrap().take());
        let access = table.register("a", Interest::Holder, Arc::new(notice));
        let owner = access.clone();
        let user = loom::thread::spawn(move || {
            // The cache is locked over pin and insert, as whoever answers notices must do.
            let mut slot = cache.lock().unwrap();
            match owner.pin(0, 1) {
                Ok(pin) => *slot = Some(pin),
                Err(error) => assert_eq!(error.errno(), libc::ENOENT),
            }
        });
        assert_eq!(access.detach(never()), Ok(()));
        assert_eq!(access.total_pins(), 0);
        assert!(!table.is_pinned(0, 4096));
        user.join().unwrap();
        assert!(!table.is_pinned(0, 4096));
    });
}

/// Whoever has prevented pins, and then sees none, sees none ever after.
#[test]
fn a_pin_against_an_unmap() {
    loom::model(|| {
        let table = PinTable::new(4096);
        let access = table.register("a", Interest::Holder, Arc::new(|_, _| ()));
        let gone = Arc::new(AtomicBool::new(false));
        let seen = gone.clone();
        let user = loom::thread::spawn(move || {
            if let Ok(pin) = access.pin(0, 1) {
                assert!(!seen.load(Ordering::SeqCst), "pinned what is gone");
                drop(pin);
            }
        });
        let prevented = table.prevent(0, 4096);
        table.tell(0, 4096);
        assert_eq!(table.wait_released(0, 4096, never()), Ok(()));
        gone.store(true, Ordering::SeqCst);
        user.join().unwrap();
        drop(prevented);
    });
}

#[test]
fn the_end_of_an_access_against_a_notice() {
    loom::model(|| {
        let table = PinTable::new(4096);
        let ended = Arc::new(AtomicBool::new(false));
        let seen = ended.clone();
        let notice = move |_, _| {
            assert!(!seen.load(Ordering::SeqCst), "told after its end");
            loom::thread::yield_now();
            assert!(!seen.load(Ordering::SeqCst), "still told after its end");
        };
        let access = table.register("a", Interest::All, Arc::new(notice));
        let unmapper = {
            let table = table.clone();
            loom::thread::spawn(move || table.tell(0, 4096))
        };
        access.end(never()).unwrap();
        ended.store(true, Ordering::SeqCst);
        unmapper.join().unwrap();
    });
}

/// Dropping does not wait, but the notice is not gone while it runs.
#[test]
fn the_drop_of_an_access_against_a_notice() {
    struct Alive(AtomicBool);
    impl Drop for Alive {
        fn drop(&mut self) {
            self.0.store(false, Ordering::SeqCst);
        }
    }
    loom::model(|| {
        let table = PinTable::new(4096);
        let alive = Alive(AtomicBool::new(true));
        let notice = move |_, _| assert!(alive.0.load(Ordering::SeqCst));
        let access = table.register("a", Interest::All, Arc::new(notice));
        let unmapper = {
            let table = table.clone();
            loom::thread::spawn(move || table.tell(0, 4096))
        };
        drop(access);
        unmapper.join().unwrap();
        table.tell(0, 4096);
    });
}

#[test]
fn time_passes_while_a_holder_is_told_again() {
    loom::model(|| {
        let table = PinTable::new(4096);
        let cache: Arc<Mutex<Option<PinGuard>>> = Arc::new(Mutex::new(None));
        let told = cache.clone();
        let notice = move |_, _| drop(told.lock().unwrap().take());
        let access = table.register("a", Interest::Holder, Arc::new(notice));
        *cache.lock().unwrap() = Some(access.pin(0, 1).unwrap());
        let deadline = clock::now() + Duration::from_secs(4);
        let timer = loom::thread::spawn(|| {
            clock::pass(2);
            clock::pass(2);
        });
        match table.remind(0, 4096, 1, deadline) {
            Ok(()) => assert!(!table.is_pinned(0, 4096)),
            // All of the time passed at once, before anybody could be told.
            Err(holders) => assert_eq!(holders.len(), 1),
        }
        timer.join().unwrap();
    });
}

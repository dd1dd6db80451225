// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How an access leaves its table.

#[path = "common/deadline.rs"]
mod deadline;

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::Instant;

use deadline::{ended, DEADLINE};
use page_pin::{Access, Error, Interest, PinGuard, PinTable};

const PAGE: u64 = 4096;

fn soon() -> Instant {
    Instant::now() + DEADLINE
}

#[test]
fn a_detached_access_has_let_go_of_everything() {
    let table = PinTable::new(PAGE);
    let slot: Arc<OnceLock<Access>> = Arc::default();
    let cache: Arc<Mutex<Vec<PinGuard>>> = Arc::default();
    // Weak: whoever has an access or a pin has its notice, which would have itself.
    let (owner, told) = (Arc::downgrade(&slot), Arc::downgrade(&cache));
    let notice = move |iova, size| {
        assert_eq!((iova, size), (0, u64::MAX));
        let owner = owner.upgrade().unwrap();
        let access = owner.get().unwrap();
        // Pins are refused while it lets go, unpins are not.
        assert_eq!(access.pin(0, 1).unwrap_err().errno(), libc::ENOENT);
        access.unpin(0, 1).unwrap();
        told.upgrade().unwrap().lock().unwrap().clear();
    };
    let access = table.register("leaving", Interest::Holder, Arc::new(notice));
    let other = table.register("other", Interest::Holder, Arc::new(|_, _| panic!("told")));
    let staying = other.pin(0, 1).unwrap();
    access.pin(0, 1).unwrap().keep();
    cache.lock().unwrap().push(access.pin(4 * PAGE, 4).unwrap());
    slot.set(access.clone()).unwrap();

    access.detach(soon()).unwrap();
    assert_eq!((access.total_pins(), access.is_open()), (0, false));
    assert!(matches!(access.pin(0, 1), Err(Error::Detached { .. })));
    assert_eq!(table.pins(0), 1);
    access.reopen();
    drop(access.pin(0, 1).unwrap());
    access.end(soon()).unwrap();
    access.reopen();
    assert!(!access.is_open());
    drop(staying);
}

#[test]
fn an_access_that_does_not_let_go_stays() {
    let table = PinTable::new(PAGE);
    let access = table.register("stubborn", Interest::Holder, Arc::new(|_, _| ()));
    let pin = access.pin(u64::MAX - PAGE + 1, 1).unwrap();
    let error = access.detach(Instant::now()).unwrap_err();
    assert_eq!(error.errno(), libc::EDEADLK);
    let start =
        "an access still holds pins: stubborn (access 0) has had 1 pages from 0xfffffffffffff000";
    assert!(error.to_string().starts_with(start), "{error}");
    assert!(access.is_open());
    drop(pin);
    access.detach(Instant::now()).unwrap();
}

#[test]
fn an_access_whose_notice_panics_stays() {
    let table = PinTable::new(PAGE);
    let access = table.register(
        "bad",
        Interest::Holder,
        Arc::new(|_, _| panic!("in a notice")),
    );
    catch_unwind(AssertUnwindSafe(|| access.detach(soon()))).unwrap_err();
    assert!(access.is_open());
    // The notice counts as over, too.
    access.end(soon()).unwrap();
}

#[test]
fn the_end_of_an_access_waits_for_its_notice() {
    let table = PinTable::new(PAGE);
    let (begun, has_begun) = channel();
    let (go_on, may_go_on) = channel::<()>();
    let may_go_on = Mutex::new(may_go_on);
    let over = Arc::new(AtomicBool::new(false));
    let calls = Arc::new(AtomicUsize::new(0));
    let (is_over, count) = (over.clone(), calls.clone());
    let notice = move |_, _| {
        count.fetch_add(1, Ordering::SeqCst);
        begun.send(()).unwrap();
        let go_on = may_go_on.lock().unwrap().recv_timeout(DEADLINE);
        go_on.expect("a notice goes on");
        is_over.store(true, Ordering::SeqCst);
    };
    let access = table.register("slow", Interest::All, Arc::new(notice));
    let unmapper = {
        let table = table.clone();
        thread::spawn(move || table.tell(0, PAGE))
    };
    has_begun.recv_timeout(DEADLINE).expect("a notice begins");
    let error = access.end(Instant::now()).unwrap_err();
    assert_eq!(error.errno(), libc::EBUSY);
    assert_eq!(
        error.to_string(),
        "a notice of slow (access 0) is still running"
    );
    // It has ended all the same: no other notice begins.
    table.tell(0, PAGE);
    let ender = thread::spawn(move || access.end(soon()));
    go_on.send(()).unwrap();
    ended("an access ends with its notice", ender).unwrap();
    assert!(over.load(Ordering::SeqCst));
    ended("a notice ends", unmapper);
    table.tell(0, PAGE);
    assert_eq!(calls.load(Ordering::SeqCst), 1);
}

#[test]
fn a_notice_may_end_its_own_access() {
    let table = PinTable::new(PAGE);
    let slot: Arc<OnceLock<Access>> = Arc::default();
    // Weak: whoever has an access has its notice, which would have itself.
    let owner = Arc::downgrade(&slot);
    let notice = move |_, _| owner.upgrade().unwrap().get().unwrap().end(soon()).unwrap();
    let access = table.register("once", Interest::All, Arc::new(notice));
    slot.set(access).unwrap();
    table.tell(0, PAGE);
    assert!(!slot.get().unwrap().is_open());
}

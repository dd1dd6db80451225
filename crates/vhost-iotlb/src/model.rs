// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Misses and answers under every interleaving: `RUSTFLAGS="--cfg loom" cargo test -p vhost-iotlb --release
//! --lib`.
//!
//! What is mapped is a flag here. Loom's condition variables never time out where the deadline is far: an answer
//! that wakes nobody, and a miss that nobody reports, are deadlocks, which loom reports.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use checked_sync::clock;
use loom::sync::{Condvar, Mutex};
use loom::thread::spawn;
use vm_memory::Permissions;

use crate::miss::Misses;
use crate::{Error, Miss};

fn never() -> Instant {
    clock::now() + 2 * clock::NEVER
}

fn miss() -> Miss {
    Miss::new(0x1000, 0x1000, Permissions::Read)
}

/// A page that is there or not, and the misses of it that were reported.
struct Page {
    misses: Misses,
    is_there: Mutex<bool>,
    reports: Mutex<usize>,
    reported: Condvar,
}

impl Page {
    fn new(limit: usize) -> Arc<Self> {
        Arc::new(Page {
            misses: Misses::new(limit),
            is_there: Mutex::new(false),
            reports: Mutex::new(0),
            reported: Condvar::new(),
        })
    }

    fn is_there(&self) -> bool {
        *self.is_there.lock().unwrap()
    }

    fn report(&self) -> io::Result<()> {
        *self.reports.lock().unwrap() += 1;
        self.reported.notify_all();
        Ok(())
    }

    fn update(&self) {
        *self.is_there.lock().unwrap() = true;
        self.misses.answer(0x1000, 0x1fff);
    }

    fn invalidate(&self) {
        *self.is_there.lock().unwrap() = false;
    }

    /// As a front end does: answers the first report.
    fn answer_a_report(&self) {
        let mut reports = self.reports.lock().unwrap();
        while *reports == 0 {
            reports = self.reported.wait(reports).unwrap();
        }
        *reports -= 1;
        drop(reports);
        self.update();
    }

    fn wait(&self, deadline: Instant) -> Result<(), Error> {
        let is_there = || self.is_there();
        self.misses
            .wait(miss(), deadline, is_there, |_| self.report())
    }

    /// As a device does: until the page is there.
    fn access(&self) {
        while !self.is_there() {
            self.wait(never()).unwrap();
        }
    }
}

#[test]
fn an_answer_wakes_who_waits() {
    loom::model(|| {
        let page = Page::new(1);
        let other = page.clone();
        let device = spawn(move || other.access());
        page.answer_a_report();
        device.join().unwrap();
        assert_eq!(page.misses.open(), 0);
    });
}

/// Nobody may ever report it, as it may be there before anybody looks.
#[test]
fn an_update_that_nobody_has_asked_for() {
    loom::model(|| {
        let page = Page::new(1);
        let other = page.clone();
        let device = spawn(move || other.access());
        page.update();
        device.join().unwrap();
        assert_eq!(page.misses.open(), 0);
    });
}

#[test]
fn two_who_miss_the_same_are_one_miss() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let page = Page::new(1);
        let devices = [page.clone(), page.clone()].map(|page| spawn(move || page.access()));
        page.answer_a_report();
        for device in devices {
            device.join().unwrap();
        }
        assert_eq!(page.misses.open(), 0);
        assert_eq!(*page.reports.lock().unwrap(), 0);
    });
}

/// The one whose miss it is finds it there and leaves, while the other finds it gone.
#[test]
fn a_miss_that_is_not_reported_is_the_others() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let page = Page::new(1);
        *page.is_there.lock().unwrap() = true;
        let [one, other] = [page.clone(), page.clone()];
        // It has missed the page before that came.
        let one = spawn(move || one.wait(never()).unwrap());
        let other = spawn(move || {
            other.invalidate();
            other.access();
        });
        page.answer_a_report();
        one.join().unwrap();
        other.join().unwrap();
        assert_eq!(page.misses.open(), 0);
    });
}

#[test]
fn an_answer_against_the_deadline() {
    loom::model(|| {
        let page = Page::new(1);
        let begun = clock::now();
        let other = page.clone();
        let frontend = spawn(move || other.update());
        let timer = spawn(|| clock::pass(1));
        match page.wait(begun + Duration::from_secs(1)) {
            Ok(()) => assert!(page.is_there()),
            Err(Error::MissDeadline { .. }) => assert!(clock::now() > begun),
            Err(error) => panic!("{error}"),
        }
        frontend.join().unwrap();
        timer.join().unwrap();
        assert_eq!(page.misses.open(), 0);
    });
}

#[test]
fn who_waits_when_the_front_end_goes() {
    loom::model(|| {
        let page = Page::new(1);
        let other = page.clone();
        let device = spawn(move || other.wait(never()));
        let mut reports = page.reports.lock().unwrap();
        while *reports == 0 {
            reports = page.reported.wait(reports).unwrap();
        }
        drop(reports);
        page.misses.disconnect();
        assert!(matches!(device.join().unwrap(), Err(Error::Disconnected)));
        assert_eq!(page.misses.open(), 0);
    });
}

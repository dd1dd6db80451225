// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A fault against regions that come and go: the handler runs on one thread, whatever another is doing.

use loom::thread;

use crate::sigbus::watches::Watches;

fn watches() -> &'static Watches {
    // As in production, where they are of the process: freed by nobody.
    Box::leak(Box::new(Watches::new()))
}

#[test]
fn a_fault_against_regions_that_come_and_go() {
    loom::model(|| {
        let watches = watches();
        let other = watches.watch(0x8000, 0x1000, 0x1000, 3);
        let stays = watches.watch(0x1000, 0x1000, 0x1000, 3);
        let changer = thread::spawn(move || {
            drop(other);
            // In the entry of the one before.
            let next = watches.watch(0, 0x1000, 0x1000, 3);
            assert_eq!(next.fault_offset(), None);
            next
        });
        // Nothing that another entry says meanwhile makes this a fault of that, or of nobody.
        let rest = watches.fault(0x1800).map(|rest| (rest.first, rest.len));
        assert_eq!(rest, Some((0x1000, 0x1000)));
        assert_eq!(stays.fault_offset(), Some(0));
        let next = changer.join().unwrap();
        assert_eq!(next.fault_offset(), None);
    });
}

/// The handler has found the entry of a region beside that of the memory that is accessed.
#[test]
fn a_fault_against_an_entry_that_gets_another_region() {
    loom::model(|| {
        let watches = watches();
        let part = watches.watch(0x1000, 0x1000, 0x1000, 3);
        let stays = watches.watch(0x1000, 0x2000, 0x1000, 3);
        let changer = thread::spawn(move || {
            drop(part);
            watches.watch(0x8000, 0x1000, 0x1000, 3)
        });
        assert!(watches.fault(0x1800).is_some());
        assert_eq!(stays.fault_offset(), Some(0));
        // Nothing of that is gone, whatever the part was marked for.
        let next = changer.join().unwrap();
        assert_eq!(next.fault_offset(), None);
    });
}

/// What is behind the fault is replaced, too.
#[test]
fn a_fault_before_an_entry_that_gets_another_region() {
    loom::model(|| {
        let watches = watches();
        let part = watches.watch(0x2000, 0x1000, 0x1000, 3);
        let whole = watches.watch(0x1000, 0x2000, 0x1000, 3);
        let changer = thread::spawn(move || {
            drop(part);
            watches.watch(0x8000, 0x1000, 0x1000, 3)
        });
        assert!(watches.fault(0x1800).is_some());
        assert_eq!(whole.fault_offset(), Some(0));
        let next = changer.join().unwrap();
        assert_eq!(next.fault_offset(), None);
    });
}

/// Memory that is not watched, between what an entry had and what it gets.
#[test]
fn a_fault_of_others_against_regions_that_come_and_go() {
    loom::model(|| {
        let watches = watches();
        let other = watches.watch(0x8000, 0x1000, 0x1000, 3);
        assert!(watches.fault(0x8000).is_some());
        let changer = thread::spawn(move || {
            drop(other);
            watches.watch(0, 0x1000, 0x1000, 3)
        });
        assert_eq!(watches.fault(0x1800), None);
        let next = changer.join().unwrap();
        assert_eq!(next.fault_offset(), None);
    });
}

#[test]
fn a_fault_against_the_first_look_for_it() {
    loom::model(|| {
        let watches = watches();
        let watch = watches.watch(0x1000, 0x2000, 0x1000, 3);
        let handler = thread::spawn(move || watches.fault(0x2000).is_some());
        let seen = watch.fault_offset();
        assert!(seen.is_none() || seen == Some(0x1000));
        assert!(handler.join().unwrap());
        assert_eq!(watch.fault_offset(), Some(0x1000));
    });
}

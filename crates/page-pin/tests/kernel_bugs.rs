// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bugs that Linux had with pins. docs/kernel-bugs.md lists them; `ci/kernel-bugs/run` puts each into the
//! code and expects its test here to fail.

mod common;
#[path = "common/deadline.rs"]
mod deadline;

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use common::Watching;
use deadline::{ended, must_end, within, DEADLINE};
use page_pin::{
    Access, Account, Error, Interest, PinGuard, PinOptions, PinTable, PinnedPage, Quota,
};

const PAGE: u64 = 4096;

fn soon() -> Instant {
    Instant::now() + DEADLINE
}

fn quiet(table: &PinTable, name: &str) -> Access {
    table.register(name, Interest::Holder, Arc::new(|_, _| ()))
}

fn watched() -> (PinTable, Arc<Watching>) {
    let account = Arc::new(Watching::default());
    let options = PinOptions::new().account(account.clone());
    (PinTable::with_options(PAGE, options), account)
}

#[test]
fn b03_refused_pins_keep_no_reference() {
    let (table, account) = watched();
    account.refused.lock().unwrap().insert(PAGE);
    let counted = Arc::new(());
    let held = counted.clone();
    let notice = move |_, _| drop(held.clone());
    let access = table.register("a", Interest::Holder, Arc::new(notice));
    let prevented = table.prevent(8 * PAGE, PAGE);
    let errno = |result: Result<PinGuard, Error>| result.map(drop).unwrap_err().errno();
    assert_eq!(errno(access.pin(0, 0)), libc::EINVAL);
    assert_eq!(errno(access.pin(3, 1)), libc::EINVAL);
    assert_eq!(errno(access.pin(0, 513)), libc::E2BIG);
    assert_eq!(
        errno(access.pin(0u64.wrapping_sub(PAGE), 2)),
        libc::EOVERFLOW
    );
    assert_eq!(errno(access.pin(0, 2)), libc::ENOMEM);
    assert_eq!(errno(access.pin(7 * PAGE, 2)), libc::EBUSY);
    assert_eq!(errno(access.pin_list(&[])), libc::EINVAL);
    assert_eq!(errno(access.pin_list(&[0, 3])), libc::EINVAL);
    assert_eq!(errno(access.pin_list(&[0; 513])), libc::E2BIG);
    assert_eq!(errno(access.pin_list(&[0, PAGE])), libc::ENOMEM);
    assert_eq!(errno(access.pin_list(&[0, 8 * PAGE])), libc::EBUSY);
    access.close();
    assert_eq!(errno(access.pin(0, 1)), libc::ENOENT);
    assert_eq!(
        (access.total_pins(), table.is_pinned(0, u64::MAX)),
        (0, false)
    );
    drop((access, prevented));
    assert_eq!(Arc::strong_count(&counted), 1);
    assert!(account.charged.lock().unwrap().is_empty());
}

#[test]
fn b05_a_refusal_at_any_page_leaves_nothing_pinned_or_charged() {
    let (table, account) = watched();
    let access = quiet(&table, "a");
    // One page is pinned before, and is not charged again.
    let before = access.pin(0, 1).unwrap();
    for failing in 1..5 {
        let iova = failing * PAGE;
        *account.refused.lock().unwrap() = [iova].into();
        let list = [4, 0, 3, 1, 2, 4].map(|page| page * PAGE);
        let refused = Error::Account {
            iova,
            errno: libc::ENOMEM,
        };
        assert_eq!(access.pin(0, 5).unwrap_err(), refused);
        assert_eq!(access.pin_list(&list).unwrap_err(), refused);
        assert_eq!((access.total_pins(), table.pins(0)), (1, 1));
        assert!(!table.is_pinned(PAGE, 8 * PAGE));
        assert_eq!(*account.charged.lock().unwrap(), [0].into());
    }
    drop(before);
    assert!(account.charged.lock().unwrap().is_empty());
}

#[test]
fn b09_a_quota_is_never_exceeded_by_those_who_race_for_it() {
    const LIMIT: u64 = 5;
    let quota = Quota::new(LIMIT);
    let held = Arc::new(AtomicU64::new(0));
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let (quota, held) = (quota.clone(), held.clone());
            thread::spawn(move || {
                let options = PinOptions::new().account(Arc::new(quota));
                let table = PinTable::with_options(PAGE, options);
                let access = quiet(&table, "a");
                for round in 0..2_000 {
                    let npages = round % 4 + 1;
                    let Ok(pin) = access.pin(0, npages) else {
                        continue;
                    };
                    let all = held.fetch_add(npages as u64, Ordering::SeqCst);
                    assert!(all + npages as u64 <= LIMIT);
                    held.fetch_sub(npages as u64, Ordering::SeqCst);
                    drop(pin);
                }
            })
        })
        .collect();
    for thread in threads {
        ended("who races for pins ends", thread);
    }
    assert_eq!(quota.charged(), 0);
}

/// The account itself, where there is next to nothing between two who ask it.
#[test]
fn b09_of_two_who_want_the_last_page_one_gets_it() {
    let quota = Quota::new(1);
    let (held, most) = (AtomicU64::new(0), AtomicU64::new(0));
    let page = [PinnedPage {
        iova: 0,
        host: None,
    }];
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..2_000_000 {
                    within("the page is free", || quota.charge(&page).is_ok());
                    // Whoever gave up here would have the others wait for ever.
                    most.fetch_max(held.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    held.fetch_sub(1, Ordering::SeqCst);
                    quota.uncharge(&page);
                }
            });
        }
    });
    assert_eq!((most.into_inner(), quota.charged()), (1, 0));
}

#[test]
fn b09_a_page_is_charged_once_until_its_last_pin_is_gone() {
    let quota = Quota::new(3);
    let options = PinOptions::new().account(Arc::new(quota.clone()));
    let table = PinTable::with_options(PAGE, options);
    let (one, two) = (quiet(&table, "one"), quiet(&table, "two"));
    let guard = one.pin(0, 2).unwrap();
    one.pin_list(&[0, 0, PAGE]).unwrap().keep();
    let other = two.pin(PAGE, 2).unwrap();
    assert_eq!(quota.charged(), 3);
    let error = two.pin(0, 4).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the page at 0x3000 is not accounted for: Cannot allocate memory (os error 12)"
    );
    drop(guard);
    assert_eq!(quota.charged(), 3);
    one.unpin_list(&[0]).unwrap();
    assert_eq!(quota.charged(), 3);
    one.unpin(0, 1).unwrap();
    assert_eq!(quota.charged(), 2);
    drop(other);
    assert_eq!(quota.charged(), 1);
    // The first for which there is no room is named.
    let error = two.pin(8 * PAGE, 4).unwrap_err();
    assert!(matches!(error, Error::Account { iova, .. } if iova == 10 * PAGE));
    // What was left to an access ends with it.
    drop(one);
    assert_eq!(quota.charged(), 0);
}

#[test]
fn b11_a_holder_that_never_unpins_is_named_and_the_rest_goes_on() {
    let table = PinTable::new(PAGE);
    let calls = Arc::new(AtomicUsize::new(0));
    let count = calls.clone();
    let notice = move |_, _| {
        count.fetch_add(1, Ordering::Relaxed);
    };
    let stubborn = table.register("stubborn", Interest::Holder, Arc::new(notice));
    let _pin = stubborn.pin(0, 2).unwrap();
    let deadline = Instant::now() + Duration::from_millis(50);
    let holders = table.remind(0, 4 * PAGE, 5, deadline).unwrap_err();
    assert_eq!(
        (holders[0].name.as_str(), holders[0].pages),
        ("stubborn", 2)
    );
    assert!(calls.load(Ordering::Relaxed) <= 5);
    let late = Instant::now();
    calls.store(0, Ordering::Relaxed);
    assert!(table.remind(0, 4 * PAGE, 5, late).is_err());
    assert_eq!(calls.load(Ordering::Relaxed), 0);
    drop(stubborn.pin(8 * PAGE, 1).unwrap());
    assert_eq!(table.remind(8 * PAGE, PAGE, 5, soon()), Ok(()));
}

#[test]
fn b11_a_holder_that_lets_go_at_the_third_notice_is_waited_for() {
    let table = PinTable::new(PAGE);
    let cache: Arc<Mutex<(u32, Option<PinGuard>)>> = Arc::default();
    let told = cache.clone();
    let notice = move |iova, size| {
        assert_eq!((iova, size), (0, PAGE));
        let mut told = told.lock().unwrap();
        told.0 += 1;
        if told.0 == 3 {
            told.1 = None;
        }
    };
    let slow = table.register("slow", Interest::Holder, Arc::new(notice));
    let elsewhere = table.register("elsewhere", Interest::All, Arc::new(|_, _| panic!("told")));
    let _pin = elsewhere.pin(PAGE, 1).unwrap();
    cache.lock().unwrap().1 = Some(slow.pin(0, 1).unwrap());
    assert_eq!(table.remind(0, PAGE, 2_000, soon()), Ok(()));
    assert_eq!(cache.lock().unwrap().0, 3);
}

#[test]
fn b11_who_is_told_again_once_is_told_again() {
    let table = PinTable::new(PAGE);
    let cache: Arc<Mutex<Option<PinGuard>>> = Arc::default();
    let told = cache.clone();
    let notice = move |_, _| *told.lock().unwrap() = None;
    let slow = table.register("slow", Interest::Holder, Arc::new(notice));
    *cache.lock().unwrap() = Some(slow.pin(0, 1).unwrap());
    // One whose time is over before it begins tells nobody.
    within("the holder is told in time", || {
        let deadline = Instant::now() + Duration::from_millis(10);
        table.remind(0, PAGE, 1, deadline).is_ok()
    });
}

#[test]
fn b12_those_who_ask_are_told_without_a_pin() {
    let table = PinTable::new(PAGE);
    type Told = Vec<(&'static str, u64, u64)>;
    let told: Arc<Mutex<Told>> = Arc::default();
    let window = Interest::Within {
        iova: 4 * PAGE,
        last: 5 * PAGE - 1,
    };
    let interests = [
        ("holder", Interest::Holder),
        ("window", window),
        ("all", Interest::All),
    ];
    let accesses = interests.map(|(name, interest)| {
        let told = told.clone();
        let notice = move |iova, size| told.lock().unwrap().push((name, iova, size));
        table.register(name, interest, Arc::new(notice))
    });
    table.tell(0, 4 * PAGE);
    table.tell(4 * PAGE, PAGE);
    accesses[0].end(soon()).unwrap();
    accesses[2].end(soon()).unwrap();
    table.tell(4 * PAGE, PAGE);
    let expected = [
        ("all", 0, 4 * PAGE),
        ("window", 4 * PAGE, PAGE),
        ("all", 4 * PAGE, PAGE),
        ("window", 4 * PAGE, PAGE),
    ];
    assert_eq!(*told.lock().unwrap(), expected);
}

#[test]
fn b13_a_notice_may_unpin_on_another_thread_and_wait_for_it() {
    let table = PinTable::new(PAGE);
    let cache: Arc<Mutex<Vec<PinGuard>>> = Arc::default();
    let told = cache.clone();
    let inner = table.clone();
    let notice = move |_, _| {
        let (told, inner) = (told.clone(), inner.clone());
        let unpins = move || {
            told.lock().unwrap().clear();
            // Registering takes the same lock, too.
            drop(quiet(&inner, "another"));
        };
        must_end("an unpin on another thread", unpins);
    };
    let access = table.register("cache", Interest::Holder, Arc::new(notice));
    cache.lock().unwrap().push(access.pin(0, 4).unwrap());
    must_end("a notice", move || {
        table.tell(PAGE, PAGE);
        assert!(!table.is_pinned(0, 4 * PAGE));
    });
}

#[test]
fn a_notice_that_pins_what_is_going_is_refused() {
    let table = PinTable::new(PAGE);
    let pinner: Arc<Mutex<Option<Access>>> = Arc::default();
    let again = pinner.clone();
    let errnos: Arc<Mutex<Vec<i32>>> = Arc::default();
    let seen = errnos.clone();
    let notice = move |iova, _| {
        let access = again.lock().unwrap().clone().unwrap();
        let refused = access.pin(iova, 1).unwrap_err();
        assert_eq!(refused, Error::Prevented { iova });
        seen.lock().unwrap().push(refused.errno());
        drop(access.pin(iova + 8 * PAGE, 1).unwrap());
    };
    let access = table.register("again", Interest::All, Arc::new(notice));
    *pinner.lock().unwrap() = Some(access);
    let prevented = [table.prevent(0, 2 * PAGE), table.prevent(PAGE, PAGE)];
    table.tell(0, 2 * PAGE);
    assert_eq!(*errnos.lock().unwrap(), [libc::EBUSY]);
    let access = pinner.lock().unwrap().take().unwrap();
    // Two of them at a time: each has to go.
    let [one, two] = prevented;
    drop(one);
    let refused = access.pin(PAGE, 1).unwrap_err();
    assert_eq!(refused, Error::Prevented { iova: PAGE });
    drop(two);
    drop(access.pin(PAGE, 1).unwrap());
}

#[test]
fn b18_pins_of_one_page_add_up_and_go_without_a_rest() {
    let (table, account) = watched();
    let access = quiet(&table, "loop");
    let always = access.pin(0, 1).unwrap();
    for _ in 0..100_000 {
        access.pin(0, 1).unwrap().keep();
    }
    assert_eq!((table.pins(0), access.pins(0)), (100_001, 100_001));
    for _ in 0..100_000 {
        access.unpin(0, 1).unwrap();
    }
    assert_eq!((table.pins(0), access.total_pins()), (1, 1));
    assert_eq!(access.unpin(0, 1).unwrap_err().errno(), libc::EINVAL);
    drop(always);
    assert_eq!((table.pins(0), access.total_pins()), (0, 0));
    assert!(account.charged.lock().unwrap().is_empty());
}

#[test]
fn b24_an_unpin_of_what_one_does_not_own_touches_nothing() {
    let table = PinTable::new(PAGE);
    let (one, two) = (quiet(&table, "one"), quiet(&table, "two"));
    one.pin(0, 2).unwrap().keep();
    let guard = two.pin(0, 2).unwrap();
    assert_eq!(two.unpin(0, 1).unwrap_err().errno(), libc::EINVAL);
    let error = one.unpin(0, 3).unwrap_err();
    assert!(matches!(error, Error::NotPinned { iova, .. } if iova == 2 * PAGE));
    let error = one.unpin_list(&[0, PAGE, PAGE]).unwrap_err();
    assert!(matches!(error, Error::NotPinned { iova, .. } if iova == PAGE));
    assert_eq!(
        [0, PAGE].map(|iova| (one.pins(iova), two.pins(iova))),
        [(1, 1); 2]
    );
    drop(guard);
    one.unpin_list(&[PAGE, 0]).unwrap();
    assert!(!table.is_pinned(0, u64::MAX));
}

#[test]
fn b24_an_exact_unpin_names_the_pages_of_one_pin() {
    let table = PinTable::with_options(PAGE, PinOptions::new().exact_unpin(true));
    let access = quiet(&table, "iommufd");
    access.pin(0, 4).unwrap().keep();
    access.pin(0, 4).unwrap().keep();
    access.pin(PAGE, 1).unwrap().keep();
    access
        .pin_list(&[8 * PAGE, 9 * PAGE, 8 * PAGE])
        .unwrap()
        .keep();
    for (iova, npages) in [(0, 1), (0, 3), (PAGE, 3), (8 * PAGE, 2)] {
        let error = access.unpin(iova, npages).unwrap_err();
        let due = format!("exactly the {npages} pages from {iova:#x}");
        assert!(matches!(error, Error::NotExact { .. }), "{error}");
        assert!(error.to_string().ends_with(&due), "{error}");
        assert_eq!(error.errno(), libc::EINVAL);
    }
    assert_eq!(access.total_pins(), 12);
    access.unpin(0, 4).unwrap();
    access.unpin(PAGE, 1).unwrap();
    access.unpin(PAGE, 1).unwrap_err();
    access.unpin_list(&[8 * PAGE; 3]).unwrap_err();
    access.unpin_list(&[8 * PAGE; 2]).unwrap();
    access.unpin(9 * PAGE, 1).unwrap();
    access.unpin(0, 4).unwrap();
    assert_eq!(
        (access.total_pins(), table.is_pinned(0, u64::MAX)),
        (0, false)
    );
    access.unpin(0, 4).unwrap_err();
}

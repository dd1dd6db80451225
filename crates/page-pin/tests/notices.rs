// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Notices, waiting and lifetimes.

#[path = "common/deadline.rs"]
mod deadline;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use deadline::{ended, must_end, DEADLINE};
use page_pin::{Access, Error, Interest, NoAccount, PinGuard, PinOptions, PinTable, Quota};

const PAGE: u64 = 4096;

fn soon() -> Instant {
    Instant::now() + DEADLINE
}

#[test]
fn a_holder_that_answers_the_notice_is_not_waited_for() {
    let table = PinTable::new(PAGE);
    let cache: Arc<Mutex<Option<PinGuard>>> = Arc::default();
    let notified = cache.clone();
    let access = table.register(
        "vgpu",
        Interest::Holder,
        Arc::new(move |_, _| drop(notified.lock().unwrap().take())),
    );
    *cache.lock().unwrap() = Some(access.pin(0, 8).unwrap());

    assert!(table.tell(4 * PAGE, PAGE), "it was pinned");
    assert!(table.wait_released(0, 8 * PAGE, Instant::now()).is_ok());
    assert!(!table.tell(4 * PAGE, PAGE));
}

#[test]
fn waiting_ends_when_another_thread_releases() {
    let table = PinTable::new(PAGE);
    let access = table.register("disk", Interest::Holder, Arc::new(|_, _| ()));
    let pin = access.pin(PAGE, 1).unwrap();
    let elsewhere = access.pin(9 * PAGE, 1).unwrap();
    let waiter = {
        let table = table.clone();
        thread::spawn(move || table.wait_released(0, 4 * PAGE, soon()))
    };
    drop(pin);
    assert_eq!(ended("nobody is waited for", waiter), Ok(()));
    drop(elsewhere);
}

#[test]
fn who_lets_go_in_time_is_not_told_again() {
    let table = PinTable::new(PAGE);
    let access = table.register("nic", Interest::Holder, Arc::new(|_, _| panic!("told")));
    let pin = access.pin(0, 1).unwrap();
    let releaser = thread::spawn(move || {
        // Long enough for whoever does not wait before it tells.
        thread::sleep(Duration::from_millis(50));
        drop(pin);
    });
    assert_eq!(table.remind(0, PAGE, 1, soon()), Ok(()));
    ended("a release", releaser);
}

#[test]
fn a_deadline_names_everyone_who_still_holds() {
    let table = PinTable::new(PAGE);
    let nic = table.register("nic", Interest::Holder, Arc::new(|_, _| ()));
    let gpu = table.register("gpu", Interest::Holder, Arc::new(|_, _| ()));
    let _nic_pin = nic.pin(0, 2).unwrap();
    let _gpu_pin = gpu.pin(PAGE, 3).unwrap();

    let holders = table
        .wait_released(PAGE, 2 * PAGE, Instant::now())
        .unwrap_err();
    let seen: Vec<_> = holders
        .iter()
        .map(|holder| (holder.name.as_str(), holder.iova, holder.pages))
        .collect();
    assert_eq!(seen, [("nic", PAGE, 1), ("gpu", PAGE, 2)]);
    assert!(holders[0]
        .to_string()
        .starts_with("nic (access 0) has had 1 pages from 0x1000"));
}

#[test]
fn a_notice_may_pin_elsewhere_and_end_its_own_access() {
    let table = PinTable::new(PAGE);
    let slot: Arc<OnceLock<Mutex<Option<Access>>>> = Arc::default();
    let seen = slot.clone();
    let access = table.register(
        "cache",
        Interest::All,
        Arc::new(move |_, _| {
            let access = seen.get().unwrap().lock().unwrap().take().unwrap();
            drop(access.pin(100 * PAGE, 1).unwrap());
        }),
    );
    slot.set(Mutex::new(Some(access))).unwrap();
    table.tell(0, PAGE);
    assert!(slot.get().unwrap().lock().unwrap().is_none());
    // Ended: nobody is left to be told, so the empty slot is not touched again.
    table.tell(0, PAGE);
}

#[test]
fn a_registration_lives_as_long_as_its_pins() {
    let table = PinTable::new(PAGE);
    let told = Arc::new(AtomicUsize::new(0));
    let count = told.clone();
    let access = table.register(
        "short",
        Interest::Holder,
        Arc::new(move |_, _| {
            count.fetch_add(1, Ordering::Relaxed);
        }),
    );
    let pin = access.pin(0, 1).unwrap();
    drop(access);
    table.tell(0, PAGE);
    assert_eq!(told.load(Ordering::Relaxed), 1);
    drop(pin);
    table.tell(0, PAGE);
    assert_eq!(told.load(Ordering::Relaxed), 1);
}

#[test]
fn kept_pins_end_with_their_access() {
    let table = PinTable::new(PAGE);
    let access = table.register("kept", Interest::Holder, Arc::new(|_, _| ()));
    access.pin(0, 4).unwrap().keep();
    assert_eq!(table.pins(3 * PAGE), 1);
    let waiter = {
        let table = table.clone();
        thread::spawn(move || table.wait_released(0, 4 * PAGE, soon()))
    };
    drop(access);
    assert_eq!(ended("nobody is waited for", waiter), Ok(()));
}

#[test]
fn an_owner_cannot_unpin_what_a_guard_or_another_owner_holds() {
    let table = PinTable::new(PAGE);
    let one = table.register("one", Interest::Holder, Arc::new(|_, _| ()));
    let two = table.register("two", Interest::Holder, Arc::new(|_, _| ()));
    let guard = one.pin(0, 1).unwrap();
    two.pin(0, 1).unwrap().keep();

    let error = one.unpin(0, 1).unwrap_err();
    assert_eq!(error.errno(), libc::EINVAL);
    assert_eq!(
        error.to_string(),
        "one (access 0) has no kept pin on the page at 0x0"
    );
    assert_eq!(table.pins(0), 2);
    drop(guard);
    two.unpin(0, 1).unwrap();
    assert_eq!(table.pins(0), 0);
}

#[test]
fn bad_ranges_are_refused_with_their_errno() {
    let table = PinTable::new(PAGE);
    let access = table.register("bad", Interest::Holder, Arc::new(|_, _| ()));
    let errno = |iova, npages| access.pin(iova, npages).map(drop).map_err(|e| e.errno());
    assert_eq!((table.page_size(), table.max_pages()), (PAGE, 512));

    assert_eq!(errno(0, 0), Err(libc::EINVAL));
    assert_eq!(errno(1, 1), Err(libc::EINVAL));
    assert_eq!(errno(0, 513), Err(libc::E2BIG));
    assert_eq!(errno(0, usize::MAX), Err(libc::E2BIG));
    assert_eq!(errno(0, 512), Ok(()));
    assert_eq!(errno(u64::MAX - PAGE + 1, 1), Ok(()));
    assert_eq!(errno(u64::MAX - PAGE + 1, 2), Err(libc::EOVERFLOW));
    assert_eq!(
        access.pin(1, 1).unwrap_err(),
        Error::Misaligned {
            iova: 1,
            page_size: PAGE
        }
    );
}

#[test]
fn a_table_may_allow_fewer_or_more_pages_a_call() {
    for max in [3, 1000] {
        let table = PinTable::with_options(PAGE, PinOptions::new().max_pages(max));
        let access = table.register("nic", Interest::Holder, Arc::new(|_, _| ()));
        let too_many = Error::TooMany {
            npages: max + 1,
            max,
        };
        let list: Vec<u64> = (0..=max as u64).map(|page| page * PAGE).collect();
        assert_eq!(access.pin(0, max + 1).unwrap_err(), too_many);
        assert_eq!(access.pin_list(&list).unwrap_err(), too_many);
        drop(access.pin_list(&list[..max]).unwrap());
        access.pin(0, max).unwrap().keep();
        assert_eq!(access.unpin(0, max + 1).unwrap_err(), too_many);
        assert_eq!(too_many.errno(), libc::E2BIG);
        assert_eq!(table.pins(0), 1);
        access.unpin(0, max).unwrap();
        assert_eq!(table.pins(0), 0);
    }
}

/// A quota that is nobody's limit, and none at all, are for code that takes any account.
#[test]
fn what_an_account_allows_is_pinned() {
    let quota = Quota::new(2);
    let pin = |options: PinOptions, npages| {
        let table = PinTable::with_options(PAGE, options);
        let access = table.register("nic", Interest::Holder, Arc::new(|_, _| ()));
        let pinned = access.pin(0, npages).map(drop);
        assert_eq!(quota.charged(), 0, "given back");
        pinned
    };
    let with_quota = || PinOptions::new().account(Arc::new(quota.clone()));
    pin(with_quota(), quota.limit() as usize).unwrap();
    // The first page that is too many is named.
    assert_eq!(
        pin(with_quota(), 5).unwrap_err(),
        Error::Account {
            iova: quota.limit() * PAGE,
            errno: libc::ENOMEM
        }
    );
    pin(PinOptions::new().account(Arc::new(NoAccount)), 512).unwrap();
}

#[test]
fn an_access_is_named_in_its_errors_as_it_was_registered() {
    let table = PinTable::new(PAGE);
    table.register("first", Interest::Holder, Arc::new(|_, _| ()));
    let access = table.register("nic", Interest::Holder, Arc::new(|_, _| ()));
    assert_eq!(access.name(), "nic");
    let error = access.unpin(2 * PAGE, 1).unwrap_err();
    let due = format!(
        "{} (access {}) has no kept pin on the page at 0x2000",
        access.name(),
        access.id()
    );
    assert_eq!(error.to_string(), due);
}

#[test]
fn in_a_range_of_no_bytes_nothing_is_held() {
    let table = PinTable::new(PAGE);
    let access = table.register("nic", Interest::Holder, Arc::new(|_, _| ()));
    let _pin = access.pin(0, 2).unwrap();
    let visit = |size| {
        let mut seen = Vec::new();
        table.for_each_pinned(PAGE, size, |page| seen.push(page));
        seen
    };
    assert_eq!(table.wait_released(PAGE, 0, Instant::now()), Ok(()));
    assert!(table.holders(PAGE, 0).is_empty());
    assert!(visit(0).is_empty());
    // A byte of the page is enough.
    assert!(table.wait_released(PAGE, 1, Instant::now()).is_err());
    assert_eq!(visit(1), [PAGE]);
}

static_assertions::assert_impl_all!(PinTable: Send, Sync, Clone);
static_assertions::assert_impl_all!(Access: Send, Sync, Clone);
static_assertions::assert_impl_all!(PinGuard: Send, Sync);
static_assertions::assert_not_impl_any!(PinGuard: Clone);

#[test]
fn pins_have_a_limit_which_is_of_pages_and_owners() {
    let table = PinTable::with_options(PAGE, PinOptions::new().pin_limit(3));
    let [one, other] =
        ["one", "other"].map(|name| table.register(name, Interest::Holder, Arc::new(|_, _| ())));
    let two = one.pin(0, 2).unwrap();
    let error = other.pin(0, 2).unwrap_err();
    assert_eq!(error, Error::PinLimit { limit: 3 });
    assert_eq!(error.errno(), libc::ENOSPC);
    assert_eq!(table.pins(0), 1, "nothing of it is pinned");
    let _third = other.pin(0, 1).unwrap();
    drop(two);
    assert!(one.pin(PAGE, 2).is_ok());
}

#[test]
fn more_pages_than_can_be_pinned_are_not_counted() {
    let options = PinOptions::new().max_pages(usize::MAX).pin_limit(3);
    let table = PinTable::with_options(PAGE, options);
    let owner = table.register("owner", Interest::Holder, Arc::new(|_, _| ()));
    let _two = owner.pin(PAGE, 2).unwrap();
    let all = u64::MAX / PAGE + 1;
    let refused = must_end("a pin of all addresses", move || owner.pin(0, all as usize));
    assert_eq!(refused.unwrap_err(), Error::PinLimit { limit: 3 });
}

#[test]
fn what_is_pinned_already_is_not_new_at_the_limit() {
    for options in [
        PinOptions::new().pin_limit(3),
        PinOptions::new()
            .pin_limit(3)
            .account(Arc::new(Quota::new(3))),
    ] {
        let table = PinTable::with_options(PAGE, options);
        let [one, other] = ["one", "other"]
            .map(|name| table.register(name, Interest::Holder, Arc::new(|_, _| ())));
        let all = one.pin(0, 3).unwrap();
        // As the kernel counts a pin more of a page that it has pinned.
        let again = one.pin(0, 3).unwrap();
        let listed = one.pin_list(&[PAGE, 0, PAGE]).unwrap();
        assert_eq!([0, PAGE, 2 * PAGE].map(|iova| one.pins(iova)), [3, 4, 2]);
        let full = Err(Error::PinLimit { limit: 3 });
        for refused in [
            one.pin(2 * PAGE, 2),
            one.pin_list(&[0, 3 * PAGE]),
            other.pin(0, 1),
        ] {
            assert_eq!(refused.map(drop), full);
        }
        assert_eq!((one.total_pins(), other.total_pins()), (9, 0));
        drop((all, again));
        // Two pages of one, and one that is named twice.
        drop(one.pin_list(&[3 * PAGE, PAGE, 3 * PAGE]).unwrap());
        assert_eq!(one.pin_list(&[3 * PAGE, 4 * PAGE]).map(drop), full);
        drop(listed);
        other.pin(0, 3).unwrap().keep();
        other.pin(0, 3).unwrap().keep();
        for _ in 0..2 {
            assert_eq!(one.pin(0, 1).map(drop), full);
            other.unpin(0, 3).unwrap();
        }
        drop(one.pin(0, 3).unwrap());
    }
}

#[test]
fn ranges_that_unpins_have_to_name_have_a_limit() {
    let options = PinOptions::new().pin_limit(4).exact_unpin(true);
    let table = PinTable::with_options(PAGE, options);
    let access = table.register("one", Interest::Holder, Arc::new(|_, _| ()));
    let full = Err(Error::PinLimit { limit: 4 });
    // All of them are of the same three pages.
    let ranges = [(0, 1), (0, 2), (0, 3), (PAGE, 2)];
    for (iova, npages) in ranges {
        access.pin(iova, npages).unwrap().keep();
    }
    assert_eq!(access.pin(PAGE, 1).map(drop), full);
    assert_eq!(access.pin_list(&[0, 0]).map(drop), full);
    access.unpin(0, 2).unwrap();
    // Kept a second time it takes no more of them, but a guard has one of its own.
    access.pin(0, 3).unwrap().keep();
    let guard = access.pin(0, 1).unwrap();
    assert_eq!(access.pin(0, 1).map(drop), full);
    drop(guard);
    access.unpin(0, 3).unwrap();
    access.pin(0, 2).unwrap().keep();
    assert_eq!(access.pin(0, 2).map(drop), full);
    drop(access);
    let access = table.register("other", Interest::Holder, Arc::new(|_, _| ()));
    for page in 0..4 {
        access.pin(page * PAGE, 1).map(|pin| pin.keep()).unwrap();
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bugs that Linux had with pins, where a pin needs a mapping. docs/kernel-bugs.md lists them.

mod common;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::Duration;

use common::deadline::{ended, must_end};
use common::{at_once, patient};
use iommu_type1::{
    page_size, Backing, Error, Interest, IoAddressSpace, PinOptions, PinnedPages, Pinner,
    UnmapOptions,
};
use page_pin::Quota;
use vm_memory::{Bytes, Permissions};

use Permissions::{Read, ReadWrite};

fn map(space: &IoAddressSpace, page: u64, npages: u64, prot: Permissions) {
    let backing = Backing::anonymous((npages * page_size()) as usize).unwrap();
    space.map(page * page_size(), backing, prot).unwrap();
}

/// Four mappings of a page each: three to read and write, one to read.
fn space(quota: &Quota) -> IoAddressSpace {
    let options = PinOptions::new().account(Arc::new(quota.clone()));
    let space = IoAddressSpace::builder().pin_options(options).build();
    (0..3).for_each(|page| map(&space, page, 1, ReadWrite));
    map(&space, 3, 1, Read);
    space
}

fn quiet(space: &IoAddressSpace) -> Pinner {
    space.pinner("quiet", Interest::Holder, Arc::new(|_, _| ()))
}

#[test]
fn b03_refused_pins_keep_no_reference() {
    let p = page_size();
    let space = space(&Quota::new(2));
    let owner = Arc::new(());
    let pinner = quiet(&space.held_by(owner.clone()));
    let before = Arc::strong_count(&owner);
    let errno = |iovas: &[u64], prot| pinner.pin_list(iovas, prot).map(drop).unwrap_err().errno();
    assert_eq!(errno(&[], Read), libc::EINVAL);
    assert_eq!(errno(&[0, 1], Read), libc::EINVAL);
    assert_eq!(
        errno(&vec![0; space.max_pin_pages() + 1], Read),
        libc::E2BIG
    );
    assert_eq!(errno(&[0, 9 * p], Read), libc::EINVAL);
    assert_eq!(errno(&[0, 3 * p], ReadWrite), libc::EPERM);
    assert_eq!(errno(&[0, p, 2 * p], ReadWrite), libc::ENOMEM);
    assert_eq!(
        pinner.pin_pages(0, 3, Read).unwrap_err().errno(),
        libc::ENOMEM
    );
    assert_eq!(Arc::strong_count(&owner), before);
    assert_eq!(space.unmap_with(0, 4 * p, at_once()).unwrap(), 4 * p);
    drop(pinner);
    assert_eq!(Arc::strong_count(&owner), 1);
}

#[test]
fn b05_a_failure_at_any_page_leaves_nothing_pinned_or_charged() {
    let p = page_size();
    let quota = Quota::new(3);
    let space = space(&quota);
    let pinner = quiet(&space);
    for at in 0..3 {
        let mut iovas = [0, p, 2 * p];
        iovas[at] = 7 * p;
        match pinner.pin_list(&iovas, ReadWrite).unwrap_err() {
            Error::NotMapped { iova, .. } => assert_eq!(iova, 7 * p),
            other => panic!("{other}"),
        }
        iovas[at] = 3 * p;
        match pinner.pin_list(&iovas, ReadWrite).unwrap_err() {
            Error::Permission { iova, .. } => assert_eq!(iova, 3 * p),
            other => panic!("{other}"),
        }
        assert_eq!(quota.charged(), 0);
    }
    let held = pinner.pin_pages(2 * p, 1, Read).unwrap();
    match pinner.pin_list(&[3 * p, 2 * p, 0, p], Read).unwrap_err() {
        // The account is asked in the order of addresses.
        Error::Pin(page_pin::Error::Account { iova, errno }) => {
            assert_eq!((iova, errno), (3 * p, libc::ENOMEM));
        }
        other => panic!("{other}"),
    }
    assert_eq!(quota.charged(), 1);
    drop(held);
    assert_eq!(quota.charged(), 0);
    assert_eq!(space.unmap_with(0, 4 * p, at_once()).unwrap(), 4 * p);
}

#[test]
fn a_list_pins_each_page_as_often_as_it_names_it() {
    let p = page_size();
    let quota = Quota::new(4);
    let space = space(&quota);
    let pinner = quiet(&space);
    let bytes = |page: u64| [page as u8 + 1; 4];
    (0..3).for_each(|page| space.write(page * p, &bytes(page)).unwrap());
    let iovas = [2 * p, 0, 2 * p, p];
    let pinned = pinner.pin_list(&iovas, Read).unwrap();
    assert_eq!((pinned.npages(), quota.charged()), (4, 3));
    for (index, iova) in iovas.into_iter().enumerate() {
        let mut found = [0; 4];
        pinned
            .page(index)
            .unwrap()
            .read_slice(&mut found, 0)
            .unwrap();
        assert_eq!(
            (pinned.iova_of(index), found),
            (Some(iova), bytes(iova / p))
        );
    }
    assert!(pinned.page(4).is_none());
    pinned.keep();
    pinner.unpin_list(&[0, p, 2 * p]).unwrap();
    assert_eq!(
        pinner.unpin_list(&[0, 2 * p]).unwrap_err().errno(),
        libc::EINVAL
    );
    assert_eq!(quota.charged(), 1);
    pinner.unpin_pages(2 * p, 1).unwrap();
    assert_eq!(quota.charged(), 0);
}

#[test]
fn b09_spaces_share_a_quota_and_an_unmap_gives_it_back() {
    let p = page_size();
    let quota = Quota::new(4);
    let spaces = [space(&quota), space(&quota)];
    let cache: Arc<Mutex<Vec<PinnedPages>>> = Arc::default();
    let told = cache.clone();
    let notice = move |_, _| told.lock().unwrap().clear();
    let one = spaces[0].pinner("one", Interest::Holder, Arc::new(notice));
    let two = quiet(&spaces[1]);
    for _ in 0..3 {
        let pinned = one.pin_pages(0, 3, Read).unwrap();
        cache.lock().unwrap().push(pinned);
    }
    assert_eq!(quota.charged(), 3);
    assert_eq!(two.pin_pages(0, 2, Read).unwrap_err().errno(), libc::ENOMEM);
    drop(two.pin_pages(0, 1, Read).unwrap());
    assert_eq!(spaces[0].unmap_with(0, p, patient()).unwrap(), p);
    assert_eq!(quota.charged(), 0);
    drop(two.pin_pages(0, 4, Read).unwrap());
}

/// Told again within the deadline, and no more than that.
#[test]
fn b11_a_holder_is_told_again_before_it_is_an_error() {
    let p = page_size();
    // Often, so that the third is soon, of a time that does not run out before.
    let space = IoAddressSpace::builder().unmap_reminders(2_000).build();
    map(&space, 0, 2, ReadWrite);
    let told: Arc<Mutex<(u32, Vec<PinnedPages>)>> = Arc::default();
    let cache = told.clone();
    let notice = move |iova, size| {
        assert_eq!((iova, size), (0, 2 * page_size()));
        let mut cache = cache.lock().unwrap();
        cache.0 += 1;
        if cache.0 == 3 {
            cache.1.clear();
        }
    };
    let slow = space.pinner("slow", Interest::Holder, Arc::new(notice));
    told.lock()
        .unwrap()
        .1
        .push(slow.pin_pages(0, 1, Read).unwrap());
    assert_eq!(space.unmap_with(0, 2 * p, patient()).unwrap(), 2 * p);
    assert_eq!(told.lock().unwrap().0, 3);

    let space = IoAddressSpace::builder().unmap_reminders(4).build();
    map(&space, 0, 2, ReadWrite);
    map(&space, 8, 1, ReadWrite);
    let told = Arc::new(AtomicU32::new(0));
    let count = told.clone();
    let notice = move |_, _| {
        count.fetch_add(1, Ordering::Relaxed);
    };
    let slow = space.pinner("slow", Interest::Holder, Arc::new(notice));
    let pinned = slow.pin_pages(p, 1, Read).unwrap();
    let deadline = UnmapOptions::new().deadline(Duration::from_millis(50));
    let error = space.unmap_with(0, 2 * p, deadline).unwrap_err();
    assert_eq!(error.errno(), libc::EDEADLK);
    assert!(error.to_string().contains("slow pins"), "{error}");
    assert!((1..=5).contains(&told.load(Ordering::Relaxed)));
    space.write(8 * p, b"others go on").unwrap();
    drop(slow.pin_pages(8 * p, 1, Read).unwrap());
    drop(pinned);
    assert_eq!(space.unmap(0, 2 * p).unwrap(), 2 * p);
}

#[test]
fn b12_whoever_asks_is_told_of_mappings_without_pins() {
    let p = page_size();
    let space = space(&Quota::new(0));
    let told: Arc<Mutex<Vec<(u64, u64)>>> = Arc::default();
    let all = told.clone();
    let notice = move |iova, size| all.lock().unwrap().push((iova, size));
    let _watcher = space.pinner("watcher", Interest::All, Arc::new(notice));
    let silent = Arc::new(|_, _| panic!("told without a pin"));
    let _holder = space.pinner("holder", Interest::Holder, silent);
    assert_eq!(space.unmap(0, 2 * p).unwrap(), 2 * p);
    assert_eq!(*told.lock().unwrap(), [(0, p), (p, p)]);
}

#[test]
fn b13_a_notice_may_unpin_on_another_thread_and_wait_for_it() {
    let p = page_size();
    let space = space(&Quota::new(4));
    let cache: Arc<Mutex<Vec<PinnedPages>>> = Arc::default();
    let (told, inner) = (cache.clone(), space.clone());
    let notice = move |_, _| {
        let (told, inner) = (told.clone(), inner.clone());
        let unpins = move || {
            told.lock().unwrap().clear();
            let another = quiet(&inner);
            drop(another.pin_pages(2 * page_size(), 1, Read).unwrap());
        };
        must_end("an unpin on another thread", unpins);
    };
    let pinner = space.pinner("cache", Interest::Holder, Arc::new(notice));
    let pinned = pinner.pin_pages(0, 2, Read).unwrap();
    cache.lock().unwrap().push(pinned);
    let unmapped = must_end("an unmap", move || space.unmap_with(0, p, at_once()));
    assert_eq!(unmapped.unwrap(), p);
}

#[test]
fn a_notice_that_pins_what_is_going_gets_ebusy() {
    let p = page_size();
    let space = space(&Quota::new(4));
    let other = quiet(&space);
    let errnos: Arc<Mutex<Vec<i32>>> = Arc::default();
    let seen = errnos.clone();
    let notice = move |iova, _| {
        let mut seen = seen.lock().unwrap();
        seen.push(other.pin_pages(iova, 1, Read).unwrap_err().errno());
        seen.push(
            other
                .pin_list(&[2 * page_size(), iova], Read)
                .unwrap_err()
                .errno(),
        );
    };
    let _watcher = space.pinner("again", Interest::All, Arc::new(notice));
    assert_eq!(space.unmap_with(0, p, at_once()).unwrap(), p);
    assert_eq!(*errnos.lock().unwrap(), [libc::EBUSY; 2]);
    assert_eq!(space.unmap_with(p, 3 * p, at_once()).unwrap(), 3 * p);
}

#[test]
fn b18_a_pin_follows_what_the_mapping_allows_and_adds_up() {
    let p = page_size();
    let quota = Quota::new(1);
    let space = space(&quota);
    let pinner = quiet(&space);
    for _ in 0..10_000 {
        pinner.pin_pages(3 * p, 1, Read).unwrap().keep();
        assert_eq!(
            pinner.pin_pages(3 * p, 1, ReadWrite).unwrap_err().errno(),
            libc::EPERM
        );
        pinner.unpin_pages(3 * p, 1).unwrap();
    }
    assert_eq!(quota.charged(), 0);
    assert_eq!(space.unmap_with(3 * p, p, at_once()).unwrap(), p);
}

#[test]
fn b24_misplaced_pins_and_unpins_touch_nothing() {
    let p = page_size();
    let space = IoAddressSpace::builder()
        .pin_options(PinOptions::new().exact_unpin(true))
        .build();
    map(&space, 8, 4, ReadWrite);
    let (one, two) = (quiet(&space), quiet(&space));
    let errno = |result: Result<(), Error>| result.unwrap_err().errno();
    // Below a mapping, in a page that touches it.
    assert_eq!(
        errno(one.pin_pages(8 * p - 1, 1, Read).map(drop)),
        libc::EINVAL
    );
    assert_eq!(errno(one.pin_pages(7 * p, 2, Read).map(drop)), libc::EINVAL);
    one.pin_pages(8 * p, 4, Read).unwrap().keep();
    assert_eq!(errno(two.unpin_pages(8 * p, 4)), libc::EINVAL);
    // Mapped and not pinned, and pinned otherwise.
    assert_eq!(errno(two.unpin_pages(8 * p, 1)), libc::EINVAL);
    assert_eq!(errno(one.unpin_pages(8 * p, 3)), libc::EINVAL);
    assert_eq!(errno(one.unpin_pages(8 * p, 0)), libc::EINVAL);
    assert!(space.unmap_with(8 * p, 4 * p, at_once()).is_err());
    one.unpin_pages(8 * p, 4).unwrap();
    assert_eq!(space.unmap(8 * p, 4 * p).unwrap(), 4 * p);
}

#[test]
fn a_pin_of_all_addresses_meets_the_first_that_is_not_mapped() {
    let options = PinOptions::new().max_pages(usize::MAX);
    let space = IoAddressSpace::builder().pin_options(options).build();
    map(&space, 0, 4, ReadWrite);
    let pinner = quiet(&space);
    let all = u64::MAX / page_size() + 1;
    let pin = move || pinner.pin_pages(0, all as usize, Read).map(drop);
    let refused = must_end("a pin of all addresses", pin).unwrap_err();
    assert!(
        matches!(refused, Error::NotMapped { iova, .. } if iova == 4 * page_size()),
        "{refused}"
    );
}

/// Pins and unmaps race: whatever is pinned is there until it is unpinned.
#[test]
fn b05_pins_beside_unmaps_leave_nothing_charged() {
    let p = page_size();
    let quota = Quota::new(3);
    let space = space(&quota);
    let begin = Arc::new(Barrier::new(2));
    let user = {
        let (space, begin) = (space.clone(), begin.clone());
        thread::spawn(move || {
            begin.wait();
            let pinner = quiet(&space);
            for _ in 0..2_000 {
                match pinner.pin_list(&[p, 0], ReadWrite) {
                    Ok(pinned) => pinned.page(0).unwrap().write_slice(&[1], 0).unwrap(),
                    Err(error) => assert!([libc::EINVAL, libc::EBUSY].contains(&error.errno())),
                }
            }
        })
    };
    begin.wait();
    for _ in 0..500 {
        assert_eq!(space.unmap_with(p, p, patient()).unwrap(), p);
        map(&space, 1, 1, ReadWrite);
    }
    ended("pins end beside unmaps", user);
    assert_eq!(quota.charged(), 0);
}

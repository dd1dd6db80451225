// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pinners that are attached, moved and detached.

mod common;

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::Duration;

use common::deadline::{ended, DEADLINE as LONG};
use common::{at_once, log};
use iommu_type1::{
    page_size, Backing, Error, Interest, IoAddressSpace, PinnedPages, Pinner, Transfer,
};
use vm_memory::Permissions::ReadWrite;

fn spaces() -> [IoAddressSpace; 2] {
    ["old", "new"].map(|name| {
        let space = IoAddressSpace::new();
        let backing = Backing::anonymous(4 * page_size() as usize).unwrap();
        space.map(0, backing, ReadWrite).unwrap();
        space.write(0, name.as_bytes()).unwrap();
        space
    })
}

fn who(pinner: &Pinner) -> Result<[u8; 3], Error> {
    let mut found = [0; 3];
    pinner.dma_rw(0, Transfer::Read(&mut found)).map(|()| found)
}

fn quiet(space: &IoAddressSpace) -> Pinner {
    space.pinner("quiet", Interest::Holder, Arc::new(|_, _| ()))
}

#[test]
fn during_a_move_pins_and_accesses_are_refused_and_unpins_go_on() {
    let [old, new] = spaces();
    let slot: Arc<OnceLock<Pinner>> = Arc::default();
    let cache: Arc<Mutex<Vec<PinnedPages>>> = Arc::default();
    let calls = Arc::new(AtomicUsize::new(0));
    // Weak: whoever has a pinner or pages has its notice, which would have itself.
    let (owner, told) = (Arc::downgrade(&slot), Arc::downgrade(&cache));
    let (count, other) = (calls.clone(), new.clone());
    let notice = move |iova, size| {
        assert_eq!((iova, size), (0, u64::MAX));
        count.fetch_add(1, Ordering::SeqCst);
        let owner = owner.upgrade().unwrap();
        let pinner = owner.get().unwrap();
        let refused = [
            pinner.pin_pages(0, 1, ReadWrite).map(drop),
            pinner.pin_list(&[0], ReadWrite).map(drop),
            who(pinner).map(drop),
        ];
        for refused in refused.map(Result::unwrap_err) {
            assert!(matches!(refused, Error::NotAttached { .. }), "{refused}");
            assert_eq!(refused.errno(), libc::ENOENT);
        }
        let again = pinner.replace(&other, LONG).unwrap_err();
        assert_eq!(
            (again.errno(), pinner.detach(LONG).unwrap_err().errno()),
            (libc::EBUSY, libc::EBUSY)
        );
        assert_eq!(pinner.attach(&other).unwrap_err().errno(), libc::EINVAL);
        pinner.unpin_pages(0, 2).unwrap();
        told.upgrade().unwrap().lock().unwrap().clear();
    };
    let pinner = old.pinner("moving", Interest::Holder, Arc::new(notice));
    slot.set(pinner.clone()).unwrap();
    pinner.pin_pages(0, 2, ReadWrite).unwrap().keep();
    let pinned = pinner.pin_list(&[page_size()], ReadWrite).unwrap();
    cache.lock().unwrap().push(pinned);

    // Nothing moves to where it is, also by another name.
    pinner.replace(&old.named("the same"), LONG).unwrap();
    assert_eq!(
        (calls.load(Ordering::SeqCst), who(&pinner).unwrap()),
        (0, *b"old")
    );

    pinner.replace(&new, LONG).unwrap();
    assert_eq!(
        (calls.load(Ordering::SeqCst), who(&pinner).unwrap()),
        (1, *b"new")
    );
    // Of the old space it holds nothing, and is not told.
    assert_eq!(old.unmap(0, 4 * page_size()).unwrap(), 4 * page_size());
    assert_eq!(calls.load(Ordering::SeqCst), 1);
    let pinned = pinner.clone().pin_pages(0, 1, ReadWrite).unwrap();
    let at_once = iommu_type1::UnmapOptions::new().deadline(Duration::ZERO);
    // The notice would panic with this address.
    let unmap = || new.unmap_with(0, 4 * page_size(), at_once);
    catch_unwind(AssertUnwindSafe(unmap)).unwrap_err();
    drop(pinned);
}

#[test]
fn whoever_does_not_let_go_stays_where_it_was() {
    let [old, new] = spaces();
    let pinner = quiet(&old);
    let pinned = pinner.pin_pages(0, 1, ReadWrite).unwrap();
    let none = Duration::ZERO;
    for result in [pinner.replace(&new, none), pinner.detach(none)] {
        let error = result.unwrap_err();
        assert_eq!(error.errno(), libc::EDEADLK);
        assert!(error.to_string().contains("quiet (access 0)"), "{error}");
        assert_eq!(who(&pinner).unwrap(), *b"old");
        drop(pinner.pin_pages(0, 1, ReadWrite).unwrap());
    }
    // Nothing of it is left in the new space.
    assert_eq!(new.unmap(0, 4 * page_size()).unwrap(), 4 * page_size());
    drop(pinned);
    pinner.replace(&new, LONG).unwrap();
    assert_eq!(who(&pinner).unwrap_err().errno(), libc::EINVAL);
}

/// Nobody leaves a space in which an access of it may run.
#[test]
fn an_access_that_does_not_end_keeps_the_pinner_where_it_is() {
    let [old, new] = spaces();
    let at = 0x100 * page_size();
    let pinner = quiet(&old);
    let writer = pinner.clone();
    let write = move || writer.dma_rw(at, Transfer::Write(&[1])).unwrap();
    log::beside_a_write(&old, at, write, || {
        let soon = Duration::from_millis(1);
        for result in [pinner.replace(&new, soon), pinner.detach(soon)] {
            let error = result.unwrap_err();
            assert!(matches!(error, Error::AccessRuns { .. }), "{error}");
            assert_eq!(error.errno(), libc::EBUSY);
            drop(pinner.pin_pages(0, 1, ReadWrite).unwrap());
            assert_eq!(who(&pinner).unwrap(), *b"old");
        }
    });
    pinner.replace(&new, LONG).unwrap();
    assert_eq!(who(&pinner).unwrap(), *b"new");
}

/// Also where it was to be told, and somebody who was told before has moved it.
#[test]
fn who_has_left_is_not_told_of_the_space_it_was_in() {
    let [old, new] = spaces();
    let slot: Arc<OnceLock<Pinner>> = Arc::default();
    let moving = slot.clone();
    let notice = move |_, _| moving.get().unwrap().replace(&new, LONG).unwrap();
    let _mover = old.pinner("mover", Interest::All, Arc::new(notice));
    let told: Arc<Mutex<Vec<(u64, u64)>>> = Arc::default();
    let all = told.clone();
    let notice = move |iova, size| all.lock().unwrap().push((iova, size));
    let pinner = old.pinner("moved", Interest::All, Arc::new(notice));
    slot.set(pinner).unwrap();
    let size = 4 * page_size();
    assert_eq!(old.unmap(0, size).unwrap(), size);
    assert_eq!(*told.lock().unwrap(), [(0, u64::MAX)]);
}

#[test]
fn a_notice_that_panics_leaves_the_pinner_where_it_was() {
    let [old, new] = spaces();
    let pinner = old.pinner(
        "bad",
        Interest::Holder,
        Arc::new(|_, _| panic!("in a notice")),
    );
    let replace = || pinner.replace(&new, LONG);
    catch_unwind(AssertUnwindSafe(replace)).unwrap_err();
    assert_eq!(who(&pinner).unwrap(), *b"old");
    drop(pinner.pin_pages(0, 1, ReadWrite).unwrap());
}

#[test]
fn a_detached_pinner_can_be_attached_again() {
    let [old, new] = spaces();
    let pinner = quiet(&old);
    assert_eq!(pinner.attach(&new).unwrap_err().errno(), libc::EINVAL);
    pinner.detach(LONG).unwrap();
    let errnos = [
        pinner.pin_pages(0, 1, ReadWrite).map(drop),
        pinner.pin_list(&[0], ReadWrite).map(drop),
        pinner.unpin_pages(0, 1),
        who(&pinner).map(drop),
        pinner.replace(&new, LONG),
        pinner.detach(LONG),
    ]
    .map(|result| result.unwrap_err().errno());
    assert_eq!(errnos, [libc::ENOENT; 6]);
    // What is wrong in itself is said first.
    let top = 0_u64.wrapping_sub(page_size());
    let errnos = [
        pinner.pin_pages(0, 0, ReadWrite).map(drop),
        pinner.dma_rw(0, Transfer::Write(&[])),
        pinner.pin_pages(top, 2, ReadWrite).map(drop),
        pinner.dma_rw(u64::MAX, Transfer::Write(&[1, 2])),
    ]
    .map(|result| result.unwrap_err().errno());
    let expected = [libc::EINVAL; 2].into_iter().chain([libc::EOVERFLOW; 2]);
    assert!(errnos.into_iter().eq(expected), "{errnos:?}");
    pinner.attach(&new).unwrap();
    assert_eq!(who(&pinner).unwrap(), *b"new");
}

#[test]
fn detaching_waits_for_a_notice_that_runs_and_none_runs_after() {
    let [old, _] = spaces();
    let (begun, has_begun) = channel();
    let (go_on, may_go_on) = channel::<()>();
    let may_go_on = Mutex::new(may_go_on);
    let running = Arc::new(AtomicUsize::new(0));
    let inside = running.clone();
    let notice = move |_, size| {
        if size == u64::MAX {
            return;
        }
        inside.fetch_add(1, Ordering::SeqCst);
        begun.send(()).unwrap();
        let go_on = may_go_on.lock().unwrap().recv_timeout(LONG);
        go_on.expect("a notice goes on");
        inside.fetch_sub(1, Ordering::SeqCst);
    };
    let pinner = old.pinner("slow", Interest::All, Arc::new(notice));
    let unmapper = {
        let old = old.clone();
        thread::spawn(move || old.unmap(0, 4 * page_size()).unwrap())
    };
    has_begun.recv_timeout(LONG).expect("a notice begins");
    let detacher = thread::spawn(move || {
        pinner.detach(LONG).unwrap();
        assert_eq!(running.load(Ordering::SeqCst), 0);
        // Not told from here on: it would wait for somebody to let it go on.
        let backing = Backing::anonymous(page_size() as usize).unwrap();
        old.map(0x100 * page_size(), backing, ReadWrite).unwrap();
        old.unmap(0x100 * page_size(), page_size()).unwrap();
    });
    go_on.send(()).unwrap();
    ended("detaching ends with the notice", detacher);
    ended("an unmap ends with its notice", unmapper);
}

/// A pin is of the space the pinner is in, and none is left in one it has left.
#[test]
fn pins_beside_moves() {
    let [old, new] = spaces();
    let cache: Arc<Mutex<Vec<PinnedPages>>> = Arc::default();
    let told = cache.clone();
    let notice = move |_, _| told.lock().unwrap().clear();
    let pinner = old.pinner("moving", Interest::Holder, Arc::new(notice));
    let user = {
        let pinner = pinner.clone();
        thread::spawn(move || {
            for _ in 0..5_000 {
                let mut cache = cache.lock().unwrap();
                match pinner.pin_pages(0, 1, ReadWrite) {
                    Ok(pinned) => cache.push(pinned),
                    Err(error) => assert_eq!(error.errno(), libc::ENOENT),
                }
                if cache.len() > 8 {
                    cache.clear();
                }
            }
            cache.lock().unwrap().clear();
        })
    };
    for _ in 0..200 {
        for (to, from) in [(&new, &old), (&old, &new)] {
            pinner.replace(to, LONG).unwrap();
            assert_eq!(
                from.unmap_with(0, 4 * page_size(), at_once()).unwrap(),
                4 * page_size()
            );
            let backing = Backing::anonymous(4 * page_size() as usize).unwrap();
            from.map(0, backing, ReadWrite).unwrap();
        }
    }
    ended("pins end beside moves", user);
}

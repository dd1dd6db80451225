// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Leases, pins and notices against unmaps.

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;

use common::deadline::{ended, within};
use common::{at_once, patient};
use iommu_type1::{
    page_size, Backing, DmaGuard, DmaHandle, Error, Holder, HolderKind, Interest, IoAddressSpace,
    PinnedPages, Pinner, ScatterList, UnmapPolicy,
};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemory, Permissions, VolatileSlice};

use Permissions::{Read, ReadWrite, Write};

static_assertions::assert_impl_all!(IoAddressSpace: Send, Sync, Clone);
static_assertions::assert_impl_all!(Backing: Send, Sync, Clone);
static_assertions::assert_impl_all!(DmaHandle: Send);
static_assertions::assert_not_impl_any!(DmaHandle: Sync, Clone);
static_assertions::assert_impl_all!(DmaGuard: Send, Clone);
static_assertions::assert_not_impl_any!(DmaGuard: Sync);
static_assertions::assert_impl_all!(ScatterList: Send, Sync);
static_assertions::assert_impl_all!(Pinner: Send, Sync, Clone);
static_assertions::assert_impl_all!(PinnedPages: Send, Sync);
static_assertions::assert_impl_all!(Error: Send, Sync);

/// Two mappings of two pages each, at pages 0 and 8.
fn space() -> IoAddressSpace {
    let space = IoAddressSpace::new();
    for iova in [0, 8 * page_size()] {
        let backing = Backing::anonymous(2 * page_size() as usize).unwrap();
        space.map(iova, backing, ReadWrite).unwrap();
    }
    space
}

fn held(result: Result<u64, Error>) -> (u64, u64, Vec<Holder>) {
    match result.unwrap_err() {
        Error::Deadline {
            unmapped,
            left,
            holders,
        } => (unmapped, left, holders),
        other => panic!("{other}"),
    }
}

#[test]
fn a_lent_slice_holds_its_own_mapping_and_no_other() {
    let p = page_size();
    let space = space().named("queue 3");
    let guard = space.memory();
    guard.read_obj::<u64>(GuestAddress(16)).unwrap();

    assert_eq!(space.unmap_with(8 * p, 2 * p, at_once()).unwrap(), 2 * p);
    let (unmapped, left, holders) = held(space.unmap_with(0, 16 * p, at_once()));
    assert_eq!((unmapped, left, holders.len()), (0, 2 * p, 1));
    assert_eq!(
        (holders[0].kind, holders[0].name.as_str()),
        (HolderKind::Lease, "queue 3")
    );

    drop(guard);
    assert_eq!(space.unmap(0, 16 * p).unwrap(), 2 * p);
}

#[test]
fn what_an_unmap_has_left_is_told_from_what_has_gone() {
    let p = page_size();
    let space = space();
    let is_unmapped = |page: u64, pages: u64| space.is_unmapped(page * p, pages * p).unwrap();
    assert_eq!([is_unmapped(0, 1), is_unmapped(9, 1)], [false, false]);
    assert_eq!([is_unmapped(2, 6), is_unmapped(2, 7)], [true, false]);
    let guard = space.memory();
    guard.read_obj::<u64>(GuestAddress(16)).unwrap();
    held(space.unmap_with(0, 16 * p, at_once().policy(UnmapPolicy::Revoked)));
    // Not in the table, but waited for.
    assert_eq!([is_unmapped(1, 1), is_unmapped(8, 2)], [false, true]);
    drop(guard);
    space.unmap(0, 2 * p).unwrap();
    assert!(space.is_unmapped(0, u64::MAX).unwrap());

    let error = space.is_unmapped(p, 0).unwrap_err();
    assert!(
        matches!(error, Error::Empty { iova } if iova == p),
        "{error}"
    );
    let error = space.is_unmapped(p, u64::MAX).unwrap_err();
    assert!(matches!(error, Error::Overflow { .. }), "{error}");
}

#[test]
fn an_unmap_waits_for_the_guard_to_be_dropped() {
    let p = page_size();
    let space = space();
    let guard = space.memory();
    guard.read_obj::<u64>(GuestAddress(16)).unwrap();
    let unmapping = space.clone();
    let unmapper = thread::spawn(move || unmapping.unmap_with(0, 2 * p, patient()));
    // From here on the range is being unmapped: new accesses fail, the lent memory stays.
    within("nobody finds what is being unmapped", || {
        space.read(0, &mut [0]).is_err()
    });
    assert_eq!(space.read(0, &mut [0]).unwrap_err().errno(), libc::EBUSY);
    assert!(!unmapper.is_finished());
    let elsewhere = space.unmap_with(8 * p, 2 * p, at_once());
    assert_eq!(elsewhere.unwrap(), 2 * p);
    let again = space.unmap_with(0, 2 * p, at_once());
    assert_eq!(again.unwrap_err().errno(), libc::EBUSY);
    let over = Backing::anonymous(p as usize).unwrap();
    assert_eq!(
        space.map(p, over, ReadWrite).unwrap_err().errno(),
        libc::EBUSY
    );

    drop(guard);
    let unmapped = ended("an unmap ends when the guard is dropped", unmapper);
    assert_eq!(unmapped.unwrap(), 2 * p);
}

#[test]
fn the_revoked_policy_keeps_the_range_until_it_is_retried() {
    let p = page_size();
    let space = space();
    let list = space.scatter(p - 4, 8, ReadWrite).unwrap();
    let (unmapped, left, _) = held(space.unmap_with(0, 16 * p, at_once()));
    assert_eq!((unmapped, left), (2 * p, 2 * p));

    assert_eq!(space.read(0, &mut [0]).unwrap_err().errno(), libc::EBUSY);
    let over = Backing::anonymous(p as usize).unwrap();
    assert_eq!(space.map(0, over, Read).unwrap_err().errno(), libc::EBUSY);
    // The memory itself stays with its holder.
    list.iter()
        .for_each(|slice| slice.write_slice(&[1; 8][..slice.len()], 0).unwrap());
    drop(list);
    assert_eq!(space.read(0, &mut [0]).unwrap_err().errno(), libc::EBUSY);
    assert_eq!(space.unmap(0, 2 * p).unwrap(), 2 * p);
    assert_eq!(space.mappings(), 0);
}

#[test]
fn whatever_leaves_is_found_however_many_leave_at_once() {
    let p = page_size();
    let space = IoAddressSpace::new();
    // The later ones leave below, between and above those that have left.
    let leave = [200..300, 0..100, 100..101, 300..400, 101..200];
    let mut lists = Vec::new();
    for (done, pages) in leave.iter().enumerate() {
        let page = |page| (page * p, Backing::anonymous(p as usize).unwrap(), ReadWrite);
        space.map_batch(pages.clone().map(page)).unwrap();
        let (iova, size) = (pages.start * p, (pages.end - pages.start) * p);
        lists.push(space.scatter(iova, size as usize, Read).unwrap());
        held(space.unmap_with(iova, size, at_once()));
        for page in 0..=400 {
            let has_left = leave[..=done].iter().any(|pages| pages.contains(&page));
            let error = space.read(page * p, &mut [0]).unwrap_err();
            assert_eq!(error.errno() == libc::EBUSY, has_left, "{page}: {error}");
        }
    }
    drop(lists);
    assert_eq!(space.unmap(0, 400 * p).unwrap(), 400 * p);
}

#[test]
fn the_restore_policy_publishes_the_range_again() {
    let p = page_size();
    let space = space();
    let list = space.scatter(0, 4, Read).unwrap();
    held(space.unmap_with(0, 2 * p, at_once().policy(UnmapPolicy::Restore)));
    space.write(0, b"back").unwrap();
    drop(list);
    assert_eq!(space.unmap(0, 2 * p).unwrap(), 2 * p);
}

#[test]
fn a_scatter_list_is_all_or_nothing() {
    let p = page_size();
    let space = space();
    assert_eq!(
        space
            .scatter(p, 2 * p as usize, Read)
            .unwrap_err()
            .completed(),
        p as usize
    );
    assert_eq!(space.scatter(0, 0, Read).unwrap().iter().len(), 0);
    // Nothing was left leased by the failure.
    assert_eq!(space.unmap_with(0, 2 * p, at_once()).unwrap(), 2 * p);
}

#[test]
fn pins_are_told_and_waited_for() {
    let p = page_size();
    let space = space();
    let told: Arc<Mutex<Vec<(u64, u64)>>> = Arc::default();
    let cache: Arc<Mutex<Vec<PinnedPages>>> = Arc::default();
    let pinner = {
        let (told, cache) = (told.clone(), cache.clone());
        space.pinner(
            "vgpu",
            Interest::Holder,
            Arc::new(move |iova, size| {
                told.lock().unwrap().push((iova, size));
                cache.lock().unwrap().clear();
            }),
        )
    };
    let pinned = pinner.pin_pages(p, 1, ReadWrite).unwrap();
    pinned.page(0).unwrap().write_slice(b"pin", 0).unwrap();
    assert!(pinned.page(1).is_none());
    cache.lock().unwrap().push(pinned);
    let mut found = [0; 3];
    space.read(p, &mut found).unwrap();
    assert_eq!(&found, b"pin");

    assert_eq!(space.unmap_with(0, 16 * p, at_once()).unwrap(), 4 * p);
    // The whole mapping is named, as the kernel does, and only the one with pins.
    assert_eq!(*told.lock().unwrap(), [(0, 2 * p)]);
}

#[test]
fn b11_a_holder_that_never_unpins_is_an_error_and_nothing_worse() {
    let p = page_size();
    let space = space();
    let stubborn = space.pinner("stubborn", Interest::Holder, Arc::new(|_, _| ()));
    let pinned = stubborn.pin_pages(0, 2, Read).unwrap();
    let error = space.unmap_with(0, 16 * p, at_once()).unwrap_err();
    assert_eq!(error.errno(), libc::EDEADLK);
    let start = format!("{:#x} bytes were unmapped, {:#x} bytes are still held: stubborn pins {:#x} bytes at 0x0 for ", 2 * p, 2 * p, 2 * p);
    assert!(error.to_string().starts_with(&start), "{error}");
    drop(pinned);
    assert_eq!(space.unmap(0, 16 * p).unwrap(), 2 * p);
}

#[test]
fn kept_pins_are_their_owners_alone() {
    let p = page_size();
    let space = space();
    let one = space.pinner("one", Interest::Holder, Arc::new(|_, _| ()));
    let two = space.pinner("two", Interest::Holder, Arc::new(|_, _| ()));
    one.pin_pages(0, 2, Read).unwrap().keep();
    assert_eq!(two.unpin_pages(0, 2).unwrap_err().errno(), libc::EINVAL);
    assert_eq!(one.unpin_pages(p, 2).unwrap_err().errno(), libc::EINVAL);
    assert_eq!(held(space.unmap_with(0, 2 * p, at_once())).2[0].name, "one");
    one.unpin_pages(0, 2).unwrap();
    assert_eq!(space.unmap(0, 2 * p).unwrap(), 2 * p);
}

#[test]
fn pins_are_refused_like_accesses() {
    let p = page_size();
    let space = space();
    let read_only = Backing::anonymous(p as usize).unwrap();
    space.map(2 * p, read_only, Read).unwrap();
    let pinner = space.pinner("vgpu", Interest::Holder, Arc::new(|_, _| ()));
    let errno = |iova, npages, prot| {
        pinner
            .pin_pages(iova, npages, prot)
            .map(drop)
            .map_err(|e| e.errno())
    };
    assert_eq!(errno(0, 0, Read), Err(libc::EINVAL));
    assert_eq!(errno(1, 1, Read), Err(libc::EINVAL));
    assert_eq!(errno(0, space.max_pin_pages() + 1, Read), Err(libc::E2BIG));
    assert_eq!(errno(0u64.wrapping_sub(p), 2, Read), Err(libc::EOVERFLOW));
    assert_eq!(errno(0, 4, Read), Err(libc::EINVAL));
    assert_eq!(errno(0, 3, ReadWrite), Err(libc::EPERM));
    // A pin needs what it asks for, unlike a write.
    let write_only = Backing::anonymous(p as usize).unwrap();
    space.map(32 * p, write_only, Write).unwrap();
    assert_eq!(errno(32 * p, 1, Write), Ok(()));
    assert_eq!(errno(32 * p, 1, Read), Err(libc::EPERM));
    // Across two mappings, and nothing of the refused ones is left.
    assert_eq!(errno(p, 2, Read), Ok(()));
    assert_eq!(space.unmap_with(0, 16 * p, at_once()).unwrap(), 5 * p);
}

#[test]
fn a_notice_may_use_the_rest_of_the_space() {
    let p = page_size();
    let space = space();
    let inner = space.clone();
    let _watcher = space.pinner(
        "watcher",
        Interest::All,
        Arc::new(move |iova, _| {
            if iova == 0 {
                inner.write(8 * page_size(), b"told").unwrap();
                assert_eq!(inner.read(0, &mut [0]).unwrap_err().errno(), libc::EBUSY);
                assert_eq!(
                    inner.unmap(8 * page_size(), 2 * page_size()).unwrap(),
                    2 * page_size()
                );
                assert_eq!(
                    inner.unmap(0, 2 * page_size()).unwrap_err().errno(),
                    libc::EBUSY
                );
            }
        }),
    );
    assert_eq!(space.unmap(0, 2 * p).unwrap(), 2 * p);
    assert_eq!(space.mappings(), 0);
}

#[test]
fn a_notice_that_panics_leaves_the_range_to_the_policy() {
    let p = page_size();
    let space = space();
    let watcher = space.pinner("bad", Interest::All, Arc::new(|_, _| panic!("in a notice")));
    let panicking = space.clone();
    let unmapper = thread::spawn(move || panicking.unmap(0, 2 * p));
    within("an unmap ends with a panic", || unmapper.is_finished());
    unmapper.join().unwrap_err();
    assert_eq!(space.read(0, &mut [0]).unwrap_err().errno(), libc::EBUSY);
    drop(watcher);
    assert_eq!(space.unmap(0, 2 * p).unwrap(), 2 * p);
}

#[test]
fn unmapping_everything_leaves_to_another_unmap_what_it_is_removing() {
    let p = page_size();
    let space = space();
    let inner = space.clone();
    let _watcher = space.pinner(
        "watcher",
        Interest::All,
        Arc::new(move |iova, _| {
            if iova == 0 {
                assert_eq!(inner.unmap_all().unwrap(), 2 * page_size());
            }
        }),
    );
    assert_eq!(space.unmap(0, 2 * p).unwrap(), 2 * p);
    assert_eq!(space.mappings(), 0);
}

#[test]
fn a_view_of_a_view_keeps_both_owners() {
    let (one, two) = (Arc::new(1), Arc::new(2));
    let view = space().held_by(one.clone()).held_by(two.clone());
    let handle = view.handle();
    drop(view);
    assert_eq!((Arc::strong_count(&one), Arc::strong_count(&two)), (2, 2));
    drop(handle);
    assert_eq!((Arc::strong_count(&one), Arc::strong_count(&two)), (1, 1));
}

#[test]
fn what_is_held_keeps_the_owner_of_the_view() {
    let space = space();
    let owner = Arc::new(());
    let view = space.held_by(owner.clone());
    let pinner = view.pinner("p", Interest::Holder, Arc::new(|_, _| ()));
    let users: Vec<Box<dyn Send>> = vec![
        Box::new(view.handle()),
        Box::new(view.memory().clone()),
        Box::new(view.scatter(0, 8, Read).unwrap()),
        Box::new(pinner.pin_pages(0, 1, Read).unwrap()),
        Box::new(view.named("n")),
    ];
    drop((view, pinner));
    for user in users {
        assert!(Arc::strong_count(&owner) > 1);
        drop(user);
    }
    assert_eq!(Arc::strong_count(&owner), 1);
}

/// The owner of a view may wait for what was pinned through it, so the pins go first.
#[test]
fn kept_pins_go_before_the_owner_of_their_view() {
    struct Owner(IoAddressSpace, Arc<Mutex<Option<Result<u64, Error>>>>);
    impl Drop for Owner {
        fn drop(&mut self) {
            *self.1.lock().unwrap() = Some(self.0.unmap_with(0, 16 * page_size(), at_once()));
        }
    }
    let space = space();
    let result = Arc::default();
    let view = space.held_by(Arc::new(Owner(space.clone(), Arc::clone(&result))));
    let pinner = view.pinner("p", Interest::Holder, Arc::new(|_, _| ()));
    drop(view);
    pinner.pin_pages(0, 1, Read).unwrap().keep();
    drop(pinner);
    let unmapped = result.lock().unwrap().take().unwrap();
    assert_eq!(unmapped.unwrap(), 4 * page_size());
}

/// A reader sees all of one mapping's bytes or is refused: never memory that is gone, never a mix.
#[test]
fn readers_beside_a_thread_that_maps_and_unmaps() {
    const ROUNDS: u64 = 2_000;
    let p = page_size();
    let space = IoAddressSpace::new();
    let stop = Arc::new(AtomicBool::new(false));
    let reads = Arc::new(AtomicU64::new(0));
    let begin = Arc::new(Barrier::new(3));
    let readers: Vec<_> = (0..2)
        .map(|reader| {
            let (space, stop, reads, begin) =
                (space.clone(), stop.clone(), reads.clone(), begin.clone());
            thread::spawn(move || {
                begin.wait();
                let handle = space.handle();
                let mut buf = vec![0; p as usize];
                while !stop.load(Ordering::Relaxed) {
                    let result = if reader == 0 {
                        handle.read(0, &mut buf)
                    } else {
                        let guard = space.memory();
                        let slices = guard.get_slices(GuestAddress(0), p as usize, Read).unwrap();
                        let slices: Result<Vec<VolatileSlice<_>>, _> = slices.collect();
                        match slices {
                            Ok(slices) => {
                                slices[0].read_slice(&mut buf, 0).unwrap();
                                Ok(())
                            }
                            Err(_) => continue,
                        }
                    };
                    if result.is_ok() {
                        assert!(buf.iter().all(|byte| *byte == buf[0] && *byte != 0));
                        reads.fetch_add(1, Ordering::Relaxed);
                    }
                }
            })
        })
        .collect();
    begin.wait();
    for round in 0..ROUNDS {
        let backing = Backing::anonymous(p as usize).unwrap();
        let filled = vec![(round % 255) as u8 + 1; p as usize];
        let staging = IoAddressSpace::new();
        staging.map(0, backing.clone(), ReadWrite).unwrap();
        staging.write(0, &filled).unwrap();
        space.map(0, backing, ReadWrite).unwrap();
        within("what is mapped is read", || {
            reads.load(Ordering::Relaxed) >= round
        });
        assert_eq!(space.unmap_with(0, p, patient()).unwrap(), p);
    }
    stop.store(true, Ordering::Relaxed);
    for reader in readers {
        ended("a reader ends when it is told to", reader);
    }
    assert!(reads.load(Ordering::Relaxed) >= ROUNDS - 1);
    assert_eq!(space.write(0, &[1]).unwrap_err().errno(), libc::EINVAL);
}

#[test]
fn pinned_pages_say_where_they_are() {
    let p = page_size();
    let space = space();
    let pinner = space.pinner("nic", Interest::Holder, Arc::new(|_, _| ()));
    let pinned = pinner.pin_list(&[9 * p, p, 9 * p], Read).unwrap();
    assert_eq!((pinned.iova(), pinned.npages()), (9 * p, 3));
    let one_by_one = [0, 1, 2, 3].map(|index| pinned.iova_of(index));
    assert_eq!(one_by_one, [Some(9 * p), Some(p), Some(9 * p), None]);
    assert!(pinned.page(2).is_some() && pinned.page(3).is_none());
}

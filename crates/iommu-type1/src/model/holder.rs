// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Leases and pins against an unmap that waits as long as it takes.

use std::sync::Arc;

use loom::sync::Mutex;
use loom::thread::spawn;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, Permissions};

use super::{
    bounded, bounded_by, exhaustively, is_refusal, join, map, patient, space, unmap, Memory,
};
use crate::range::page_size;
use crate::{Interest, PinnedPages, ScatterList};

#[test]
fn a_lease_against_an_unmap() {
    exhaustively(|| {
        let (space, owner) = space();
        let guard = space.memory();
        let user = spawn(move || {
            let _refused = guard.write_slice(&[1], GuestAddress(8));
        });
        unmap(&space, &owner);
        join([user]);
    });
}

/// The first access of a holder begins with the claim of its place, a later one without.
#[test]
fn a_later_lease_against_an_unmap() {
    exhaustively(|| {
        let (space, owner) = space();
        map(&space, 1, &Memory::new()).unwrap();
        let guard = space.memory();
        // The page at 0 is the second.
        guard.write_slice(&[1], GuestAddress(page_size())).unwrap();
        let user = spawn(move || {
            let _refused = guard.write_slice(&[1], GuestAddress(8));
        });
        unmap(&space, &owner);
        join([user]);
    });
}

pub(super) fn use_up(list: ScatterList) {
    for slice in list.iter() {
        slice.write_slice(&[1; 8], 0).unwrap();
    }
}

/// The unmap certainly finds a lease, and sleeps until it is returned.
#[test]
fn a_lease_that_was_there_before_is_waited_for() {
    exhaustively(|| {
        let (space, owner) = space();
        let list = space.scatter(0, 8, Permissions::ReadWrite).unwrap();
        let user = spawn(move || use_up(list));
        unmap(&space, &owner);
        join([user]);
    });
}

#[test]
fn two_leases_against_an_unmap() {
    bounded(|| {
        let (space, owner) = space();
        let users = [(); 2].map(|()| {
            let list = space.scatter(0, 8, Permissions::ReadWrite).unwrap();
            spawn(move || use_up(list))
        });
        unmap(&space, &owner);
        join(users);
    });
}

/// A model has room for one lease that is written without a lock, and for one holder that makes no place
/// of its own.
#[test]
fn more_leases_than_have_room_in_a_place() {
    exhaustively(|| {
        let (space, owner) = space();
        map(&space, 1, &Memory::new()).unwrap();
        // The page at 0 is the second.
        let guard = space.memory();
        guard.write_slice(&[1], GuestAddress(page_size())).unwrap();
        guard.write_slice(&[1], GuestAddress(0)).unwrap();
        let user = spawn(move || {
            guard.write_slice(&[1], GuestAddress(8)).unwrap();
            drop(guard);
        });
        unmap(&space, &owner);
        join([user]);
    });
}

#[test]
fn a_list_with_more_leases_than_have_room() {
    exhaustively(|| {
        let (space, _owner) = space();
        let second = Memory::new();
        map(&space, 1, &second).unwrap();
        let list = space.scatter(page_size() - 8, 16, Permissions::ReadWrite);
        let user = spawn(move || {
            for slice in list.unwrap().iter() {
                slice.write_slice(&[1; 8], 0).unwrap();
            }
        });
        let bytes = space.unmap_with(page_size(), page_size(), patient());
        assert_eq!(bytes.unwrap(), page_size());
        second.gone();
        join([user]);
    });
}

/// The second holder may come into the place that the first is leaving.
#[test]
fn a_place_changes_hands_during_an_unmap() {
    bounded_by(3, || {
        let (space, owner) = space();
        let list = space.scatter(0, 8, Permissions::ReadWrite).unwrap();
        let other = space.clone();
        let first = spawn(move || use_up(list));
        let second = spawn(move || match other.scatter(0, 8, Permissions::ReadWrite) {
            Ok(list) => use_up(list),
            Err(error) => assert!(is_refusal(&error)),
        });
        unmap(&space, &owner);
        join([first, second]);
    });
}

/// Who comes second makes a place of its own, or has that of the first when it is free again.
#[test]
fn two_holders_claim_a_place() {
    bounded_by(3, || {
        let (space, owner) = space();
        let guard = space.memory();
        let user = spawn(move || {
            let _refused = guard.write_slice(&[1], GuestAddress(8));
            let _refused = guard.write_slice(&[1], GuestAddress(8));
        });
        let guard = space.memory();
        guard.write_slice(&[1], GuestAddress(8)).unwrap();
        drop(guard);
        unmap(&space, &owner);
        join([user]);
    });
}

#[test]
fn a_pin_against_an_unmap() {
    exhaustively(|| {
        let (space, owner) = space();
        let cache: Arc<Mutex<Option<PinnedPages>>> = Arc::new(Mutex::new(None));
        let notified = cache.clone();
        let notice = Arc::new(move |_, _| drop(notified.lock().unwrap().take()));
        let pinner = space.pinner("cache", Interest::Holder, notice);
        let user = spawn(move || {
            // The cache is locked over pin and insert, as whoever answers notices must do.
            let mut slot = cache.lock().unwrap();
            match pinner.pin_pages(0, 1, Permissions::ReadWrite) {
                Ok(pinned) => {
                    pinned.page(0).unwrap().write_slice(&[1], 0).unwrap();
                    *slot = Some(pinned);
                }
                Err(error) => assert!(is_refusal(&error)),
            }
        });
        unmap(&space, &owner);
        join([user]);
    });
}

/// Nobody answers the notice: the pin ends when its user is done.
#[test]
fn a_pin_that_was_there_before_is_waited_for() {
    exhaustively(|| {
        let (space, owner) = space();
        let pinner = space.pinner("user", Interest::Holder, Arc::new(|_, _| ()));
        let pinned = pinner.pin_pages(0, 1, Permissions::ReadWrite).unwrap();
        let user = spawn(move || {
            pinned.page(0).unwrap().write_slice(&[1], 0).unwrap();
            drop(pinned);
        });
        unmap(&space, &owner);
        join([user]);
    });
}

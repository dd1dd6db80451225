// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Inline accesses against an unmap: the grace period.

use loom::thread::spawn;

use super::{bounded, exhaustively, join, map, patient, refused, space, unmap, write, Memory};
use crate::range::page_size;

#[test]
fn an_access_against_an_unmap() {
    exhaustively(|| {
        let (space, owner) = space();
        let handle = space.handle();
        let reader = spawn(move || refused(handle.write(8, &[1])));
        unmap(&space, &owner);
        join([reader]);
    });
}

#[test]
fn a_shared_access_against_an_unmap() {
    exhaustively(|| {
        let (space, owner) = space();
        let other = space.clone();
        let reader = spawn(move || write(&other, 0));
        unmap(&space, &owner);
        join([reader]);
    });
}

/// The counter of a slot goes on: a second access is no reason to wait, nor is it taken for the
/// first.
#[test]
fn two_accesses_of_a_handle_against_an_unmap() {
    exhaustively(|| {
        let (space, owner) = space();
        let handle = space.handle();
        let reader = spawn(move || {
            refused(handle.write(8, &[1]));
            refused(handle.write(16, &[1]));
        });
        unmap(&space, &owner);
        join([reader]);
    });
}

#[test]
fn two_handles_against_an_unmap() {
    bounded(|| {
        let (space, owner) = space();
        let readers = [space.handle(), space.handle()]
            .map(|handle| spawn(move || refused(handle.write(8, &[1]))));
        unmap(&space, &owner);
        join(readers);
    });
}

/// There is one shared slot in a model: the access that finds it in use makes one for itself.
#[test]
fn two_shared_accesses_against_an_unmap() {
    bounded(|| {
        let (space, owner) = space();
        let readers = [space.clone(), space.clone()].map(|space| spawn(move || write(&space, 0)));
        unmap(&space, &owner);
        join(readers);
    });
}

/// Two pages need a node to be told apart; when one goes, so does the node, under the reader's feet.
#[test]
fn an_access_to_the_neighbour_of_an_unmap() {
    exhaustively(|| {
        let (space, _owner) = space();
        let leaving = Memory::new();
        map(&space, 1, &leaving).unwrap();
        let handle = space.handle();
        let reader = spawn(move || handle.write(8, &[1]).unwrap());
        space
            .unmap_with(page_size(), page_size(), patient())
            .unwrap();
        leaving.gone();
        join([reader]);
    });
}

/// The reader may be in the page that goes or in the one that stays.
#[test]
fn an_access_over_both_pages_against_an_unmap() {
    exhaustively(|| {
        let (space, _owner) = space();
        let leaving = Memory::new();
        map(&space, 1, &leaving).unwrap();
        let handle = space.handle();
        let reader = spawn(move || {
            let written = handle.write(page_size() - 1, &[1, 1]);
            let done = written
                .as_ref()
                .map_or_else(|error| error.completed(), |()| 2);
            assert!(done >= 1, "the page that stays");
            refused(written);
        });
        space
            .unmap_with(page_size(), page_size(), patient())
            .unwrap();
        leaving.gone();
        join([reader]);
    });
}

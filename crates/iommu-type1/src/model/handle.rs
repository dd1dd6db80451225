// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Handles that come and go while others access and unmap.

use loom::thread::spawn;

use super::{bounded, exhaustively, join, refused, space, unmap};

#[test]
fn a_handle_is_made_used_and_dropped_during_an_unmap() {
    exhaustively(|| {
        let (space, owner) = space();
        let other = space.clone();
        let user = spawn(move || {
            let handle = other.handle();
            refused(handle.write(8, &[1]));
        });
        unmap(&space, &owner);
        join([user]);
    });
}

/// Dropping a handle changes the list of slots that the unmap looks through.
#[test]
fn a_handle_is_dropped_while_another_accesses() {
    bounded(|| {
        let (space, owner) = space();
        let (idle, handle) = (space.handle(), space.handle());
        let dropper = spawn(move || drop(idle));
        let reader = spawn(move || refused(handle.write(8, &[1])));
        unmap(&space, &owner);
        join([dropper, reader]);
    });
}

#[test]
fn a_handle_outlives_its_older_and_its_newer_neighbour() {
    exhaustively(|| {
        let (space, owner) = space();
        let [older, handle, newer] = [space.handle(), space.handle(), space.handle()];
        let user = spawn(move || {
            drop(older);
            drop(newer);
            refused(handle.write(8, &[1]));
        });
        unmap(&space, &owner);
        join([user]);
    });
}

#[test]
fn a_handle_is_made_while_another_accesses() {
    bounded(|| {
        let (space, owner) = space();
        let (handle, other) = (space.handle(), space.clone());
        let reader = spawn(move || refused(handle.write(8, &[1])));
        let user = spawn(move || refused(other.handle().write(8, &[1])));
        unmap(&space, &owner);
        join([reader, user]);
    });
}

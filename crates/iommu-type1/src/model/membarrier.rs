// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Accesses without a barrier of their own, against unmaps that have the kernel put one there.

use loom::thread::spawn;

use super::deadline::at_once;
use super::kernel::{away, look_out, user};
use super::{
    bounded, bounded_by, exhaustively, join, map, patient, refused, space_with, unmap, Memory,
    Owner,
};
use crate::range::page_size;
use crate::{DmaHandle, IoAddressSpace, ReaderBarrier};

/// A space with a page at 0 and a handle for it whose next access is fenced, and no other after that.
fn space() -> (IoAddressSpace, Owner, DmaHandle) {
    let builder = IoAddressSpace::builder().reader_barrier(ReaderBarrier::Membarrier);
    let (space, owner) = space_with(builder);
    let handle = space.handle();
    (space, owner, handle)
}

/// As `space`, with a handle that goes without barriers.
fn unfenced() -> (IoAddressSpace, Owner, DmaHandle) {
    let (space, owner, handle) = space();
    handle.write(0, &[0]).unwrap();
    (space, owner, handle)
}

fn access(handle: &DmaHandle) {
    refused(handle.write(8, &[1]));
    look_out();
}

#[test]
fn an_unfenced_access_against_an_unmap() {
    exhaustively(|| {
        let (space, owner, handle) = unfenced();
        let reader = user(move || {
            access(&handle);
            handle
        });
        unmap(&space, &owner);
        join([reader]);
    });
}

#[test]
fn a_slot_goes_unfenced_during_an_unmap() {
    exhaustively(|| {
        let (space, owner, handle) = space();
        let reader = user(move || {
            access(&handle);
            access(&handle);
            handle
        });
        unmap(&space, &owner);
        join([reader]);
    });
}

/// The first unmap makes the slot fenced for one access; the second meets it as it goes unfenced again.
#[test]
fn a_slot_goes_fenced_and_unfenced_between_unmaps() {
    bounded(|| {
        let (space, owner, handle) = unfenced();
        let other = Memory::new();
        map(&space, 1, &other).unwrap();
        let reader = user(move || {
            access(&handle);
            access(&handle);
            handle
        });
        space
            .unmap_with(page_size(), page_size(), patient())
            .unwrap();
        other.gone();
        unmap(&space, &owner);
        join([reader]);
    });
}

/// The unmap that finds the slot fenced by the other must not rely on a barrier that is still to come.
/// (Loom does not end where two threads wait for a third in turns: so these do not wait for the access.)
#[test]
fn an_unfenced_access_against_two_unmaps() {
    bounded_by(2, || {
        let (space, owner, handle) = unfenced();
        map(&space, 1, &Memory::new()).unwrap();
        let other = space.clone();
        let reader = user(move || {
            access(&handle);
            handle
        });
        let unmapper = spawn(move || drop(other.unmap_with(page_size(), page_size(), at_once())));
        if space.unmap_with(0, page_size(), at_once()).is_ok() {
            owner.gone();
        }
        join([reader]);
        join([unmapper]);
    });
}

#[test]
fn a_handle_is_made_used_and_dropped_during_an_unmap() {
    exhaustively(|| {
        let (space, owner, _idle) = unfenced();
        let other = space.clone();
        let reader = user(move || {
            let handle = away(|| other.handle());
            access(&handle);
            access(&handle);
            away(|| drop(handle));
        });
        unmap(&space, &owner);
        join([reader]);
    });
}

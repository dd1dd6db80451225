// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Batches: mappings that come and go together.

use loom::thread::spawn;
use vm_memory::Permissions::ReadWrite;

use super::holder::use_up;
use super::{
    bounded, exhaustively, is_refusal, join, map, patient, refused, space, watched, Memory,
};
use crate::range::page_size;
use crate::{Error, IoAddressSpace};

/// The pages at 0 and behind it.
fn both() -> [(u64, u64); 2] {
    [(0, page_size()), (page_size(), page_size())]
}

/// The pages at 1 and 2: with the first a node, or a mapping and a node, or none of that.
fn pages(space: &IoAddressSpace) {
    let mappings = [1, 2].map(|page| (page * page_size(), watched(&[Memory::new()]), ReadWrite));
    space.map_batch(mappings).unwrap();
}

#[test]
fn who_finds_one_finds_all_before_it() {
    for empty in [true, false] {
        exhaustively(move || {
            let (space, _owner) = space();
            if empty {
                space.unmap(0, page_size()).unwrap();
            }
            let handle = space.handle();
            let reader = spawn(move || match handle.write(2 * page_size(), &[1]) {
                Ok(()) => handle.write(page_size(), &[1]).unwrap(),
                early => refused(early),
            });
            pages(&space);
            join([reader]);
        });
    }
}

#[test]
fn an_access_over_both_sees_none_or_the_first_or_both() {
    exhaustively(|| {
        let (space, _owner) = space();
        space.unmap(0, page_size()).unwrap();
        let handle = space.handle();
        let reader = spawn(move || {
            refused(handle.write(2 * page_size() - 1, &[1, 1]));
            handle
        });
        pages(&space);
        let handle = reader.join().unwrap();
        handle.write(2 * page_size() - 1, &[1, 1]).unwrap();
    });
}

#[test]
fn an_access_over_both_against_their_unmap() {
    exhaustively(|| {
        let (space, owner) = space();
        let second = Memory::new();
        map(&space, 1, &second).unwrap();
        let handle = space.handle();
        let reader = spawn(move || refused(handle.write(page_size() - 1, &[1, 1])));
        let bytes = space.unmap_batch_with(&both(), patient());
        assert_eq!(bytes.unwrap(), 2 * page_size());
        owner.gone();
        second.gone();
        join([reader]);
    });
}

/// One holder of each range.
#[test]
fn leases_against_the_unmap_of_both() {
    bounded(|| {
        let (space, owner) = space();
        let second = Memory::new();
        map(&space, 1, &second).unwrap();
        let holders = [0, page_size()].map(|iova| {
            let list = space.scatter(iova, 8, ReadWrite).unwrap();
            spawn(move || use_up(list))
        });
        space.unmap_batch_with(&both(), patient()).unwrap();
        owner.gone();
        second.gone();
        join(holders);
    });
}

/// Whichever unmap returns without an error, no access to what it was asked for runs then.
#[test]
fn an_unmap_of_both_and_of_the_second_against_an_access() {
    bounded(|| {
        let (space, _owner) = space();
        let [here, there] = [Memory::new(), Memory::new()];
        let backing = watched(&[here.clone(), there.clone()]);
        space.map(page_size(), backing, ReadWrite).unwrap();
        let (handle, other) = (space.handle(), space.clone());
        let reader = spawn(move || refused(handle.write(page_size() + 8, &[1])));
        let unmapper = spawn(move || {
            let removed = other.unmap_with(page_size(), page_size(), patient());
            if is_done(removed) {
                there.gone();
            }
        });
        if is_done(space.unmap_batch_with(&both(), patient())) {
            here.gone();
        }
        join([reader, unmapper]);
    });
}

fn is_done(removed: Result<u64, Error>) -> bool {
    removed
        .inspect_err(|error| assert!(is_refusal(error), "{error}"))
        .is_ok()
}

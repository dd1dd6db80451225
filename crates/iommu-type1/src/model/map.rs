// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Mappings that are made: what an access finds is complete. Who maps is the first thread: loom looks for
//! other orders where a thread reads what another has written before.

use loom::thread::spawn;
use vm_memory::Permissions;

use super::{exhaustively, join, map, refused, space, Memory};
use crate::range::page_size;

#[test]
fn an_access_against_the_first_map() {
    exhaustively(|| {
        let (space, _owner) = space();
        space.unmap(0, page_size()).unwrap();
        let handle = space.handle();
        let reader = spawn(move || refused(handle.write(8, &[1])));
        map(&space, 0, &Memory::new()).unwrap();
        join([reader]);
        space.write(0, &[1]).unwrap();
    });
}

/// The second mapping needs a node, which refers to the first, too.
#[test]
fn accesses_against_the_second_map() {
    exhaustively(|| {
        let (space, _owner) = space();
        let handle = space.handle();
        let reader = spawn(move || {
            handle.write(0, &[1]).unwrap();
            refused(handle.write(page_size() + 8, &[1]));
        });
        map(&space, 1, &Memory::new()).unwrap();
        join([reader]);
        space.write(page_size(), &[1]).unwrap();
    });
}

#[test]
fn a_lease_against_a_map() {
    exhaustively(|| {
        let (space, _owner) = space();
        let other = space.clone();
        let holder = spawn(move || drop(other.scatter(page_size(), 8, Permissions::Read)));
        map(&space, 1, &Memory::new()).unwrap();
        join([holder]);
    });
}

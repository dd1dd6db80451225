// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Mappings that are made: what an access finds is complete.

use loom::thread::spawn;
use vm_memory::Permissions;

use super::{exhaustively, join, map, space, write, Memory};
use crate::range::page_size;

#[test]
fn an_access_against_the_first_map() {
    exhaustively(|| {
        let (space, _owner) = space();
        space.unmap(0, page_size()).unwrap();
        let other = space.clone();
        let mapper = spawn(move || map(&other, 0, &Memory::new()).unwrap());
        write(&space, 0);
        join([mapper]);
        space.write(0, &[1]).unwrap();
    });
}

/// The second mapping needs a node, which refers to the first, too.
#[test]
fn accesses_against_the_second_map() {
    exhaustively(|| {
        let (space, _owner) = space();
        let other = space.clone();
        let mapper = spawn(move || map(&other, 1, &Memory::new()).unwrap());
        space.write(0, &[1]).unwrap();
        write(&space, 1);
        join([mapper]);
        space.write(page_size(), &[1]).unwrap();
    });
}

#[test]
fn a_lease_against_a_map() {
    exhaustively(|| {
        let (space, _owner) = space();
        let other = space.clone();
        let mapper = spawn(move || map(&other, 1, &Memory::new()).unwrap());
        drop(space.scatter(page_size(), 8, Permissions::Read));
        join([mapper]);
    });
}

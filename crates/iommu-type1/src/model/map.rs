// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Mappings that are made: what an access finds is complete.

use loom::thread::spawn;
use vm_memory::Permissions;

use super::{exhaustively, join, map, refused, space, write, Memory};
use crate::range::page_size;

/// The first mapping becomes the root of the table, the second needs a node.
#[test]
fn an_access_against_a_map() {
    for page in [0, 1] {
        exhaustively(move || {
            let (space, _owner) = space();
            if page == 0 {
                space.unmap(0, page_size()).unwrap();
            }
            let handle = space.handle();
            let other = space.clone();
            let mapper = spawn(move || map(&other, page, &Memory::new()).unwrap());
            refused(handle.write(page * page_size(), &[1]));
            if page == 1 {
                write(&space, 0);
            }
            join([mapper]);
            handle.write(page * page_size(), &[1]).unwrap();
        });
    }
}

/// A lease counts in the mapping that it finds.
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

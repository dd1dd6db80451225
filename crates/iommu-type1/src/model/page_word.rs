// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Accesses that find a page's host address in the table and do not look at the mapping. Nobody is told of
//! those: the owner fills the memory after the unmap, and sees who reads or changes it.

use loom::thread::spawn;

use super::{exhaustively, join, patient, Plain, OTHERS};
use crate::range::page_size;
use crate::{Error, IoAddressSpace};

/// A space with `pages` pages, of which the second will be unmapped. With three of them the node stays.
fn space(pages: u64) -> (IoAddressSpace, Plain) {
    checked_sync::clock::now();
    let space = IoAddressSpace::new();
    let memory: Vec<_> = (0..pages).map(|_| Plain::new()).collect();
    for (page, memory) in (0..).zip(&memory) {
        memory.map(&space, page);
    }
    (space, memory[1].clone())
}

fn unmap(space: &IoAddressSpace, memory: &Plain) {
    space
        .unmap_with(page_size(), page_size(), patient())
        .unwrap();
    memory.gone();
}

#[test]
fn a_read_of_a_page_against_its_unmap() {
    for pages in [2, 3] {
        exhaustively(move || {
            let (space, memory) = space(pages);
            let handle = space.handle();
            let reader = spawn(move || {
                let mut byte = [0];
                let read = handle.read(page_size() + 8, &mut byte);
                assert_eq!(byte, [0], "read after the unmap");
                super::refused(read);
            });
            unmap(&space, &memory);
            join([reader]);
        });
    }
}

#[test]
fn a_write_of_a_page_against_its_unmap() {
    for pages in [2, 3] {
        exhaustively(move || {
            let (space, memory) = space(pages);
            let handle = space.handle();
            let writer = spawn(move || super::refused(handle.write(page_size() + 8, &[1])));
            unmap(&space, &memory);
            join([writer]);
            assert_eq!(memory.byte(), OTHERS, "written after the unmap");
        });
    }
}

/// A page is there all the time, whatever comes and goes beside it.
#[test]
fn a_page_that_stays_against_a_map_and_an_unmap() {
    exhaustively(|| {
        let (space, memory) = space(2);
        let handle = space.handle();
        let reader = spawn(move || {
            handle.read(8, &mut [0]).unwrap();
            // Of another block, whose level was left out.
            let beyond = handle.read(5 * page_size() + 8, &mut [0]);
            assert!(matches!(beyond, Err(Error::NotMapped { .. })));
        });
        Plain::new().map(&space, 2);
        unmap(&space, &memory);
        join([reader]);
    });
}

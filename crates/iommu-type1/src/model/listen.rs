// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who listens late, against those who map and unmap: what it is given and told adds up to what there is.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex};

use loom::thread::spawn;

use super::{bounded, exhaustively, join, map, patient, space, Memory};
use crate::range::page_size;
use crate::{IoAddressSpace, Listener, Listening, MappingInfo};

/// The pages that it has, and whether it was ever told what cannot be. What it keeps is of std: it orders
/// nothing for loom.
#[derive(Default)]
struct Mirror(Mutex<(BTreeSet<u64>, bool)>);

impl Listener for Mirror {
    fn map(&self, mapping: &MappingInfo) -> io::Result<()> {
        let mut mirror = self.0.lock().unwrap();
        let is_new = mirror.0.insert(mapping.iova / page_size());
        mirror.1 |= !is_new;
        Ok(())
    }

    fn unmap(&self, iova: u64, _size: u64) {
        let mut mirror = self.0.lock().unwrap();
        let was_there = mirror.0.remove(&(iova / page_size()));
        mirror.1 |= !was_there;
    }
}

impl Mirror {
    fn assert_has(&self, pages: &[u64]) {
        let mirror = self.0.lock().unwrap();
        assert!(!mirror.1, "told what cannot be");
        assert!(
            mirror.0.iter().eq(pages),
            "{:?} and not {pages:?}",
            mirror.0
        );
    }
}

fn listen(space: &IoAddressSpace) -> (Arc<Mirror>, Listening) {
    let mirror = Arc::new(Mirror::default());
    let listening = space.listen(mirror.clone()).unwrap();
    (mirror, listening)
}

#[test]
fn who_comes_late_against_a_map() {
    exhaustively(|| {
        let (space, _owner) = space();
        let other = space.clone();
        let mapper = spawn(move || map(&other, 1, &Memory::new()).unwrap());
        let (mirror, _listening) = listen(&space);
        join([mapper]);
        mirror.assert_has(&[0, 1]);
    });
}

#[test]
fn who_comes_late_against_an_unmap() {
    exhaustively(|| {
        let (space, _owner) = space();
        let other = space.clone();
        let unmapper = spawn(move || {
            other.unmap_with(0, page_size(), patient()).unwrap();
        });
        let (mirror, _listening) = listen(&space);
        join([unmapper]);
        mirror.assert_has(&[]);
    });
}

#[test]
fn who_leaves_against_a_map() {
    exhaustively(|| {
        let (space, _owner) = space();
        let (mirror, listening) = listen(&space);
        let other = space.clone();
        let mapper = spawn(move || map(&other, 1, &Memory::new()).unwrap());
        drop(listening);
        mirror.assert_has(&[]);
        join([mapper]);
        mirror.assert_has(&[]);
    });
}

#[test]
fn who_comes_late_against_a_map_and_an_unmap() {
    bounded(|| {
        let (space, _owner) = space();
        let (first, second) = (space.clone(), space.clone());
        let mapper = spawn(move || map(&first, 1, &Memory::new()).unwrap());
        let unmapper = spawn(move || {
            second.unmap_with(0, page_size(), patient()).unwrap();
        });
        let (mirror, _listening) = listen(&space);
        join([mapper, unmapper]);
        mirror.assert_has(&[1]);
    });
}

/// As soon as an unmap has returned, who listens has nothing of it any more.
#[test]
fn an_unmap_that_has_returned_was_told() {
    exhaustively(|| {
        let (space, _owner) = space();
        let other = space.clone();
        let joiner = spawn(move || listen(&other));
        space.unmap_with(0, page_size(), patient()).unwrap();
        let (mirror, _listening) = joiner.join().unwrap();
        mirror.assert_has(&[]);
    });
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Unmaps against each other and against a map.

use loom::thread::spawn;
use vm_memory::Permissions;

use super::{
    bounded, exhaustively, is_refusal, join, map, patient, refused, space, watched, Memory,
};
use crate::range::page_size;
use crate::{Error, IoAddressSpace};

/// Bytes removed; who comes second may be told that it is under way.
fn removed(space: &IoAddressSpace) -> Option<u64> {
    match space.unmap_with(0, page_size(), patient()) {
        Ok(bytes) => Some(bytes),
        Err(error) => {
            assert!(is_refusal(&error), "{error}");
            None
        }
    }
}

#[test]
fn of_two_unmaps_one_removes() {
    exhaustively(|| {
        let (space, _owner) = space();
        let other = space.clone();
        let unmapper = spawn(move || removed(&other).unwrap_or(0));
        let here = removed(&space).unwrap_or(0);
        assert_eq!(here + unmapper.join().unwrap(), page_size());
        assert_eq!(space.mappings(), 0);
    });
}

/// Whichever unmap returns without an error, no access runs then: not even if it removed nothing.
#[test]
fn two_unmaps_against_an_access() {
    bounded(|| {
        let (space, _owner) = space();
        space.unmap(0, page_size()).unwrap();
        let [here, there] = [Memory::new(), Memory::new()];
        let backing = watched(&[here.clone(), there.clone()]);
        space.map(0, backing, Permissions::ReadWrite).unwrap();
        let (handle, other) = (space.handle(), space.clone());
        let reader = spawn(move || refused(handle.write(8, &[1])));
        let unmapper = spawn(move || {
            if removed(&other).is_some() {
                there.gone();
            }
        });
        if removed(&space).is_some() {
            here.gone();
        }
        join([reader, unmapper]);
    });
}

/// Addresses are free again when the unmap is over, and not before.
#[test]
fn a_map_against_an_unmap_of_the_same_page() {
    bounded(|| {
        let (space, owner) = space();
        let (handle, other) = (space.handle(), space.clone());
        let reader = spawn(move || refused(handle.write(8, &[1])));
        let unmapper = spawn(move || {
            removed(&other).unwrap();
        });
        match map(&space, 0, &Memory::new()) {
            Ok(()) => owner.gone(),
            Err(error) => assert!(matches!(
                error,
                Error::Overlap { .. } | Error::Unmapping { .. }
            )),
        }
        join([reader, unmapper]);
    });
}

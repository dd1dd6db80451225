// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What was revoked in vain, because somebody used it, goes with a list that is about all of it.

use iommu_type1::{Change, Error, UnmapPolicy};
use vm_memory::Permissions::ReadWrite;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemory};

use crate::common::deadline::must_end;
use crate::common::{at_once, inside_an_access};
use crate::{byte, iotlb, map, p, revoke, unmap};

#[test]
fn everything_includes_what_was_revoked_in_vain() {
    let space = iotlb();
    space.change([map(0, 1, 1)]).unwrap();
    let guard = space.memory();
    let slice = guard.get_slices(GuestAddress(0), 8, ReadWrite).unwrap();
    let slice = slice.map(Result::unwrap).next().unwrap();
    let refused = space.unmap_with(0, p(1), at_once());
    assert_eq!(refused.unwrap_err().errno(), libc::EDEADLK);
    let refused = space.change_with([Change::UnmapAll], at_once());
    assert_eq!(refused.unwrap_err().errno(), libc::EDEADLK);
    assert_eq!(slice.len(), 8);
    drop(guard);
    space.change([Change::UnmapAll]).unwrap();
    assert_eq!(space.mappings(), 0);
    space.change([map(0, 1, 2)]).unwrap();
}

#[test]
fn a_list_completes_what_was_revoked_in_vain() {
    for policy in [UnmapPolicy::Revoked, UnmapPolicy::Restore] {
        for changes in [
            vec![unmap(4, 2)],
            vec![unmap(3, 2), unmap(5, 9)],
            vec![unmap(4, 2), map(4, 3, 9)],
            vec![Change::UnmapAll, map(5, 1, 9)],
            vec![map(0, 1, 9), Change::UnmapAll],
        ] {
            let space = iotlb();
            let list = revoke(&space, 4, 2);
            assert_eq!(byte(&space, 4), Err(libc::EBUSY));
            let options = at_once().policy(policy);
            let refused = space.change_with(changes.clone(), options);
            let Err(Error::Deadline { left, holders, .. }) = refused else {
                panic!("{refused:?}");
            };
            assert_eq!((left, holders.len()), (p(2), 1));
            drop(list);
            space.change_with(changes.clone(), options).unwrap();
            assert_eq!(space.stats().leaving, 0);
            let is_mapped = |page| {
                let of = |change: &Change| matches!(change, Change::Map { iova, backing, .. } if (*iova..*iova + backing.len() as u64).contains(&p(page)));
                matches!(changes.last(), Some(last) if of(last))
            };
            for page in 0..8 {
                let found = byte(&space, page);
                assert_eq!(found.is_ok(), is_mapped(page), "{page} {found:?}");
                assert!(found.is_ok() || found == Err(libc::EAGAIN));
            }
            space.change([map(4, 2, 1)]).unwrap();
        }
    }
}

#[test]
fn what_was_revoked_stays_where_a_list_does_not_unmap_all_of_it() {
    let space = iotlb();
    drop(revoke(&space, 4, 4));
    for changes in [
        vec![unmap(4, 3)],
        vec![map(4, 4, 9)],
        vec![unmap(4, 2), map(6, 2, 9)],
        vec![unmap(4, 3), unmap(8, 9), map(20, 1, 9)],
    ] {
        let error = space.change(changes).unwrap_err();
        assert!(matches!(error, Error::Unmapping { .. }), "{error}");
        assert_eq!((space.mappings(), space.stats().leaving), (1, 1));
    }
    space.change([unmap(4, 2), unmap(6, 2)]).unwrap();
    assert_eq!(space.stats().leaving, 0);
}

#[test]
fn what_was_revoked_in_vain_is_not_waited_for_from_inside_an_access() {
    let space = iotlb();
    space.change([map(0, 1, 0)]).unwrap();
    inside_an_access(&space, 0, || {
        let other = space.clone();
        let unmap = move || other.unmap_with(0, p(1), at_once());
        let refused = must_end("an unmap beside an access", unmap).unwrap_err();
        assert_eq!(refused.errno(), libc::EDEADLK);
        let error = space.change([Change::UnmapAll]).unwrap_err();
        assert!(matches!(error, Error::InsideAccess { .. }), "{error}");
    });
    space.change([Change::UnmapAll]).unwrap();
    assert_eq!(space.mappings(), 0);
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Deadlines that pass before, while and after the unmap waits, under both policies.

use std::sync::Arc;
use std::time::Duration;

use checked_sync::clock;
use loom::thread::{spawn, yield_now, JoinHandle};
use vm_memory::{Bytes, Permissions};

use super::holder::use_up;
use super::{
    bounded, exhaustively, join, map, refused, soon, space, time_passes, unmap, Memory, Owner,
};
use crate::range::page_size;
use crate::{Error, HolderKind, Interest, IoAddressSpace, UnmapOptions, UnmapPolicy};

const POLICIES: [UnmapPolicy; 2] = [UnmapPolicy::Revoked, UnmapPolicy::Restore];

/// Unmaps the page at 0 while somebody has it; if that was in vain the policy holds, and a second
/// unmap waits as long as it takes.
fn unmap_in_time(
    space: &IoAddressSpace,
    owner: &Owner,
    options: UnmapOptions,
    policy: UnmapPolicy,
    kind: HolderKind,
) {
    let begun = clock::now();
    match space.unmap_with(0, page_size(), options.policy(policy)) {
        Ok(bytes) => {
            assert_eq!(bytes, page_size());
            owner.gone();
        }
        Err(Error::Deadline { left, holders, .. }) => {
            assert_eq!(left, page_size());
            assert!(holders.iter().all(|holder| holder.kind == kind));
            assert!(!holders.is_empty());
            assert!(
                options == at_once() || clock::now() > begun,
                "before the deadline"
            );
            assert_eq!(space.write(0, &[2]).is_ok(), policy == UnmapPolicy::Restore);
            unmap(space, owner);
        }
        Err(other) => panic!("{other}"),
    }
}

pub(super) fn at_once() -> UnmapOptions {
    UnmapOptions::new().deadline(Duration::ZERO)
}

fn lessee(space: &IoAddressSpace) -> JoinHandle<()> {
    let list = space.scatter(0, 8, Permissions::ReadWrite).unwrap();
    spawn(move || use_up(list))
}

#[test]
fn no_time_at_all_against_a_lease() {
    for policy in POLICIES {
        exhaustively(move || {
            let (space, owner) = space();
            let holder = lessee(&space);
            unmap_in_time(&space, &owner, at_once(), policy, HolderKind::Lease);
            join([holder]);
        });
    }
}

#[test]
fn time_passes_while_a_lease_is_waited_for() {
    for policy in POLICIES {
        bounded(move || {
            let (space, owner) = space();
            let threads = [lessee(&space), time_passes()];
            unmap_in_time(&space, &owner, soon(), policy, HolderKind::Lease);
            join(threads);
        });
    }
}

#[test]
fn time_passes_while_a_pin_is_waited_for() {
    for policy in POLICIES {
        bounded(move || {
            let (space, owner) = space();
            let pinner = space.pinner("user", Interest::Holder, Arc::new(|_, _| ()));
            let pinned = pinner.pin_pages(0, 1, Permissions::ReadWrite).unwrap();
            let holder = spawn(move || {
                pinned.page(0).unwrap().write_slice(&[1], 0).unwrap();
                drop(pinned);
            });
            let timer = time_passes();
            unmap_in_time(&space, &owner, soon(), policy, HolderKind::Pin);
            join([holder, timer]);
        });
    }
}

/// Even an access may outlast the deadline: what it may still see stays until a later grace period.
#[test]
fn time_passes_while_an_access_runs() {
    for policy in POLICIES {
        bounded(move || {
            let (space, owner) = space();
            // A node that goes with the page, and one that comes with it again.
            map(&space, 1, &Memory::new()).unwrap();
            let handle = space.handle();
            let reader = spawn(move || refused(handle.write(8, &[1])));
            let timer = time_passes();
            unmap_in_time(&space, &owner, soon(), policy, HolderKind::Access);
            join([reader, timer]);
        });
    }
}

/// What was late is freed by the next unmap of anything, not before the access has ended.
#[test]
fn an_access_outlasts_the_deadline_of_its_neighbour() {
    for policy in POLICIES {
        exhaustively(move || {
            let (space, owner) = space();
            map(&space, 1, &Memory::new()).unwrap();
            let handle = space.handle();
            let reader = spawn(move || handle.write(page_size(), &[1]).unwrap());
            unmap_in_time(&space, &owner, at_once(), policy, HolderKind::Access);
            join([reader]);
        });
    }
}

/// An unmap that removes nothing waits for nobody, and so must not free what was late.
#[test]
fn an_unmap_of_nothing_frees_nothing() {
    exhaustively(|| {
        let (space, _owner) = space();
        map(&space, 1, &Memory::new()).unwrap();
        let handle = space.handle();
        let reader = spawn(move || handle.write(page_size(), &[1]).unwrap());
        let _in_vain = space.unmap_with(0, page_size(), at_once());
        assert_eq!(space.unmap(8 * page_size(), page_size()).unwrap(), 0);
        join([reader]);
    });
}

/// Runs an unmap that somebody never lets finish until it has given up.
fn give_up_because_of(kind: HolderKind, space: &IoAddressSpace) {
    let other = space.clone();
    let unmapper = spawn(move || {
        match other.unmap_with(0, page_size(), soon().policy(UnmapPolicy::Restore)) {
            Err(Error::Deadline { holders, .. }) => {
                assert!(holders.iter().any(|holder| holder.kind == kind));
            }
            other => panic!("{other:?}"),
        }
    });
    // Not before the unmap has begun, or its deadline would be later still.
    while space.write(0, &[1]).is_ok() {
        yield_now();
    }
    clock::pass(1);
    join([unmapper]);
}

#[test]
fn a_lease_that_is_never_returned() {
    exhaustively(|| {
        let (space, _owner) = space();
        let list = space.scatter(0, 8, Permissions::ReadWrite).unwrap();
        give_up_because_of(HolderKind::Lease, &space);
        use_up(list);
    });
}

#[test]
fn a_pin_that_is_never_released() {
    exhaustively(|| {
        let (space, _owner) = space();
        let pinner = space.pinner("user", Interest::Holder, Arc::new(|_, _| ()));
        let _pinned = pinner.pin_pages(0, 1, Permissions::Read).unwrap();
        give_up_because_of(HolderKind::Pin, &space);
    });
}

#[test]
fn an_access_that_does_not_end() {
    exhaustively(|| {
        let (space, _owner) = space();
        let grace = &space.view.space.grace;
        grace.enter_shared(|_inside| give_up_because_of(HolderKind::Access, &space));
    });
}

/// What is restored at the deadline is there for accesses that begin then, and its addresses are
/// never free in between.
#[test]
fn a_restored_mapping_against_a_map() {
    exhaustively(|| {
        let (space, _owner) = space();
        let list = space.scatter(0, 8, Permissions::ReadWrite).unwrap();
        let other = space.clone();
        let unmapper = spawn(move || {
            let options = at_once().policy(UnmapPolicy::Restore);
            let error = other.unmap_with(0, page_size(), options).unwrap_err();
            assert!(matches!(error, Error::Deadline { .. }));
        });
        assert!(map(&space, 0, &Memory::new()).is_err());
        join([unmapper]);
        space.write(0, &[1]).unwrap();
        drop(list);
    });
}

/// Accesses that run while a mapping comes back find it, or are refused.
#[test]
fn a_restored_mapping_against_an_access() {
    exhaustively(|| {
        let (space, owner) = space();
        let list = space.scatter(0, 8, Permissions::ReadWrite).unwrap();
        let handle = space.handle();
        let reader = spawn(move || refused(handle.write(8, &[1])));
        let options = at_once().policy(UnmapPolicy::Restore);
        space.unmap_with(0, page_size(), options).unwrap_err();
        drop(list);
        unmap(&space, &owner);
        join([reader]);
    });
}

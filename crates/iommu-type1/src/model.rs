// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The protocols of this crate under every interleaving, on the production code:
//! `RUSTFLAGS="--cfg loom" cargo test -p iommu-type1 --release --lib`.
//!
//! Each model maps memory that knows when it is gone: its owner marks it so as soon as an unmap has
//! returned, and any write that arrives later fails the model. Loom's condition variables never
//! time out, so a wake-up that is lost is reported as a deadlock.

use std::sync::Arc;
use std::time::Duration;

use loom::sync::atomic::{AtomicBool, Ordering};
use loom::sync::Mutex;
use loom::thread;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, MmapRegion, Permissions};

use crate::backing::Region;
use crate::range::page_size;
use crate::{Backing, Error, Interest, IoAddressSpace, PinnedPages, UnmapOptions, UnmapPolicy};

struct Watched {
    memory: MmapRegion<()>,
    gone: Arc<AtomicBool>,
}

// SAFETY: everything is the wrapped region's, which upholds the same contract.
unsafe impl Region for Watched {
    fn host_address(&self) -> *mut u8 {
        self.memory.as_ptr()
    }

    fn size(&self) -> usize {
        self.memory.size()
    }

    fn access(&self) -> Permissions {
        Permissions::ReadWrite
    }

    fn tracks(&self) -> bool {
        true
    }

    fn mark_dirty(&self, _offset: usize, _len: usize) {
        assert!(
            !self.gone.load(Ordering::Relaxed),
            "a write after the unmap"
        );
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }
}

fn space() -> (IoAddressSpace, Arc<AtomicBool>) {
    let gone = Arc::new(AtomicBool::new(false));
    let backing = Backing::for_model(Watched {
        memory: MmapRegion::new(page_size() as usize).unwrap(),
        gone: gone.clone(),
    });
    let space = IoAddressSpace::new();
    space.map(0, backing, Permissions::ReadWrite).unwrap();
    (space, gone)
}

fn patient() -> UnmapOptions {
    UnmapOptions::new().deadline(Duration::from_secs(3600))
}

/// Unmaps the watched page; nobody may touch it from then on.
fn unmap(space: &IoAddressSpace, gone: &AtomicBool) {
    let bytes = space.unmap_with(0, page_size(), patient());
    assert_eq!(bytes.unwrap(), page_size());
    gone.store(true, Ordering::Relaxed);
}

/// What a device model is told when it comes too late.
fn is_refusal(error: &Error) -> bool {
    matches!(
        error,
        Error::NotMapped { .. } | Error::Revoked { .. } | Error::Unmapping { .. }
    )
}

#[test]
fn an_inline_access_against_an_unmap() {
    loom::model(|| {
        let (space, gone) = space();
        let handle = space.handle();
        let reader = thread::spawn(move || {
            if let Err(error) = handle.write(8, &[1]) {
                assert!(is_refusal(&error));
            }
        });
        unmap(&space, &gone);
        reader.join().unwrap();
    });
}

/// Two pages need a node to be told apart; when one goes, so does the node, under the reader's feet.
#[test]
fn an_access_to_the_neighbour_of_an_unmap() {
    loom::model(|| {
        let (space, _) = space();
        let backing = Backing::anonymous(page_size() as usize).unwrap();
        space
            .map(page_size(), backing, Permissions::ReadWrite)
            .unwrap();
        let handle = space.handle();
        let reader = thread::spawn(move || handle.write(8, &[1]).unwrap());
        space
            .unmap_with(page_size(), page_size(), patient())
            .unwrap();
        reader.join().unwrap();
    });
}

/// A second reader needs a slot while the first has the only shared one.
#[test]
fn two_shared_accesses_against_an_unmap() {
    // Three threads: every interleaving with up to two preemptions.
    let mut bounded = loom::model::Builder::new();
    bounded.preemption_bound = Some(2);
    bounded.check(|| {
        let (space, gone) = space();
        let other = space.clone();
        let reader = thread::spawn(move || {
            let refused = other.write(8, &[1]).err();
            assert!(refused.as_ref().is_none_or(is_refusal));
        });
        let third = space.clone();
        let second = thread::spawn(move || {
            let refused = third.write(16, &[1]).err();
            assert!(refused.as_ref().is_none_or(is_refusal));
        });
        unmap(&space, &gone);
        reader.join().unwrap();
        second.join().unwrap();
    });
}

#[test]
fn a_lease_against_an_unmap() {
    loom::model(|| {
        let (space, gone) = space();
        let guard = space.memory();
        let reader = thread::spawn(move || {
            let _refused = guard.write_slice(&[1], GuestAddress(8));
            drop(guard);
        });
        unmap(&space, &gone);
        reader.join().unwrap();
    });
}

#[test]
fn a_pin_against_an_unmap() {
    loom::model(|| {
        let (space, gone) = space();
        let cache: Arc<Mutex<Option<PinnedPages>>> = Arc::new(Mutex::new(None));
        let notified = cache.clone();
        let notice = Arc::new(move |_, _| drop(notified.lock().unwrap().take()));
        let pinner = space.pinner("cache", Interest::Holder, notice);
        let user = thread::spawn(move || {
            // The cache is locked over pin and insert, as whoever answers notices must do.
            let mut slot = cache.lock().unwrap();
            match pinner.pin_pages(0, 1, Permissions::ReadWrite) {
                Ok(pinned) => {
                    pinned.page(0).unwrap().write_slice(&[1], 0).unwrap();
                    *slot = Some(pinned);
                }
                Err(error) => assert!(is_refusal(&error)),
            }
        });
        unmap(&space, &gone);
        user.join().unwrap();
    });
}

#[test]
fn of_two_unmaps_one_removes() {
    loom::model(|| {
        let (space, _) = space();
        let other = space.clone();
        let removed = |result: Result<u64, Error>| match result {
            Ok(bytes) => bytes,
            Err(error) => {
                assert!(is_refusal(&error));
                0
            }
        };
        let unmapper = thread::spawn(move || removed(other.unmap_with(0, page_size(), patient())));
        let here = removed(space.unmap_with(0, page_size(), patient()));
        assert_eq!(here + unmapper.join().unwrap(), page_size());
        assert_eq!(space.mappings(), 0);
    });
}

#[test]
fn a_deadline_against_a_holder_under_both_policies() {
    for policy in [UnmapPolicy::Revoked, UnmapPolicy::Restore] {
        loom::model(move || {
            let (space, gone) = space();
            let list = space.scatter(0, 8, Permissions::ReadWrite).unwrap();
            let holder = thread::spawn(move || {
                list.iter()
                    .for_each(|slice| slice.write_slice(&[1; 8], 0).unwrap());
                drop(list);
            });
            let at_once = UnmapOptions::new().deadline(Duration::ZERO).policy(policy);
            match space.unmap_with(0, page_size(), at_once) {
                Ok(_) => gone.store(true, Ordering::Relaxed),
                Err(Error::Deadline { left, .. }) => {
                    assert_eq!(left, page_size());
                    assert_eq!(space.write(0, &[2]).is_ok(), policy == UnmapPolicy::Restore);
                    space.unmap_with(0, page_size(), patient()).unwrap();
                    gone.store(true, Ordering::Relaxed);
                }
                Err(other) => panic!("{other}"),
            }
            holder.join().unwrap();
        });
    }
}

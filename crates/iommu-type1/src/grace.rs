// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The grace period: waiting for the inline accesses that run now, and for no later ones.
//!
//! Each user of the memory has a slot of its own with a counter: odd while an access runs, even
//! otherwise. Whoever has made something unreachable looks at every slot once, and waits until each
//! counter that was odd has moved on. An access writes its own slot only, and no word that an unmap
//! writes is read by accesses elsewhere.
//!
//! # Why nothing is missed
//!
//! An access *announces* itself (store to its slot), then a full barrier, then looks up. An unmap
//! *unlinks* (stores to the table), then a full barrier, then reads the slots. Of two stores each
//! followed by a barrier and a load of the other's, at least one load sees the other's store: either
//! the look-up finds the table without what was unlinked, or the unmap sees the access and waits for
//! it.

use std::sync::Arc;
use std::time::Instant;

use crate::sync::{fence, lock, now, yield_now, AtomicU64, Mutex, Ordering};

/// Slots that callers without one of their own share, by trial; more are made when all are taken.
const SHARED_SLOTS: usize = if cfg!(loom) { 1 } else { 16 };

/// Turns of the processor before it is given to somebody else, who may be the one waited for.
const SPINS: u32 = if cfg!(loom) { 0 } else { 200 };

#[derive(Debug)]
pub(crate) struct Grace {
    slots: Mutex<Vec<Arc<Slot>>>,
    shared: [Arc<Slot>; SHARED_SLOTS],
}

/// On a cache line of its own, and on one the prefetcher does not pair with another's.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Slot {
    /// Odd while an access runs.
    count: AtomicU64,
}

impl Grace {
    pub(crate) fn new() -> Self {
        let shared = std::array::from_fn(|_| Slot::new());
        Grace {
            slots: Mutex::new(shared.to_vec()),
            shared,
        }
    }

    /// A slot for one user.
    pub(crate) fn register(&self) -> Arc<Slot> {
        let slot = Slot::new();
        lock(&self.slots).push(slot.clone());
        slot
    }

    pub(crate) fn unregister(&self, slot: &Arc<Slot>) {
        let mut slots = lock(&self.slots);
        if let Some(at) = slots.iter().position(|other| Arc::ptr_eq(other, slot)) {
            slots.swap_remove(at);
        }
    }

    /// Runs `access` under a slot that nobody else uses at the moment.
    pub(crate) fn enter_shared<R>(&self, access: impl FnOnce(&Inside<'_>) -> R) -> R {
        let first = thread_number();
        for i in 0..SHARED_SLOTS {
            let slot = &self.shared[(first + i) % SHARED_SLOTS];
            if let Some(inside) = slot.try_enter() {
                return access(&inside);
            }
        }
        let slot = self.register();
        let result = access(&slot.enter());
        self.unregister(&slot);
        result
    }

    /// Waits for every access that runs now; `false` if one still does at the deadline.
    pub(crate) fn synchronize(&self, deadline: Instant) -> bool {
        // See above: between what the caller has unlinked and the look at the slots.
        fence(Ordering::SeqCst);
        let running: Vec<(Arc<Slot>, u64)> = lock(&self.slots)
            .iter()
            .map(|slot| (slot, slot.count.load(Ordering::Acquire)))
            .filter(|(_, count)| count % 2 == 1)
            .map(|(slot, count)| (slot.clone(), count))
            .collect();
        running
            .iter()
            .all(|(slot, count)| slot.wait_beyond(*count, deadline))
    }
}

impl Slot {
    fn new() -> Arc<Self> {
        Arc::new(Slot {
            count: AtomicU64::new(0),
        })
    }

    /// Announces an access. The slot has one user, which runs one access at a time.
    #[inline]
    pub(crate) fn enter(&self) -> Inside<'_> {
        let count = self.count.load(Ordering::Relaxed) + 1;
        announce(&self.count, count);
        Inside { slot: self, count }
    }

    fn try_enter(&self) -> Option<Inside<'_>> {
        let count = self.count.load(Ordering::Relaxed);
        if count % 2 == 1 {
            return None;
        }
        self.count
            .compare_exchange(count, count + 1, Ordering::SeqCst, Ordering::Relaxed)
            .ok()?;
        fence(Ordering::SeqCst);
        Some(Inside {
            slot: self,
            count: count + 1,
        })
    }

    fn wait_beyond(&self, count: u64, deadline: Instant) -> bool {
        let mut turns = 0;
        while self.count.load(Ordering::Acquire) == count {
            if turns < SPINS {
                turns += 1;
                std::hint::spin_loop();
            } else if now() < deadline {
                yield_now();
            } else {
                return false;
            }
        }
        true
    }
}

/// The store and the full barrier behind it. An exchange is both on x86-64, and cheaper there than
/// a store and a fence.
#[inline]
fn announce(count: &AtomicU64, value: u64) {
    if cfg!(all(target_arch = "x86_64", not(loom))) {
        count.swap(value, Ordering::SeqCst);
    } else {
        // Release: who waits for the access before may see the end of it only in this count.
        count.store(value, Ordering::Release);
        fence(Ordering::SeqCst);
    }
}

/// A running access: what it finds in the table stays while this lives.
#[derive(Debug)]
pub(crate) struct Inside<'a> {
    slot: &'a Slot,
    count: u64,
}

impl Drop for Inside<'_> {
    #[inline]
    fn drop(&mut self) {
        // Everything the access did comes before whoever waited goes on.
        self.slot.count.store(self.count + 1, Ordering::Release);
    }
}

/// A number that differs between most threads.
fn thread_number() -> usize {
    use std::cell::Cell;
    use std::sync::atomic::AtomicUsize;
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static NUMBER: Cell<Option<usize>> = const { Cell::new(None) };
    }
    NUMBER.with(|number| {
        number.get().unwrap_or_else(|| {
            let fresh = NEXT.fetch_add(1, Ordering::Relaxed);
            number.set(Some(fresh));
            fresh
        })
    })
}

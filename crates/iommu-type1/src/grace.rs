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
//!
//! # Without the barrier of the access
//!
//! The barrier is most of what a short access costs. With [`ReaderBarrier::Membarrier`] a slot that
//! sees no unmap goes without: it is *unfenced*. An unmap that finds such a slot makes it fenced, and
//! has the kernel put a barrier into every running thread: what a thread announced before is seen
//! after. An access that found its slot unfenced looks once more when it has announced itself: if the
//! slot is fenced now, the barrier may lie behind it, and it passes one of its own. So after the kernel's
//! barrier every announcement is followed by one, as if the slot had been fenced all along. A slot
//! becomes unfenced again by its own user, after many accesses, and passes a barrier then: an unmap
//! that still sees it fenced has unlinked before anything that goes without.

use std::marker::PhantomData;
use std::sync::Arc;

use checked_sync::{fence, lock, now, yield_now, AtomicU32, AtomicU64, Mutex, Ordering, CHECKED};

use crate::deadline::Deadline;
use crate::membarrier::{self, ReaderBarrier};
use crate::stats::Counter;

/// Slots that callers without one of their own share, by trial; more are made when all are taken.
const SHARED_SLOTS: usize = if CHECKED { 1 } else { 16 };

/// Turns of the processor before it is given to somebody else, who may be the one waited for.
const SPINS: u32 = if CHECKED { 0 } else { 200 };

/// Accesses of a slot from an unmap until it goes without barriers. Barriers for so many cost as much as a
/// few hundred interruptions by the kernel's, so that an unmap is rarely the one that needs it.
const FENCED_ACCESSES: u32 = if CHECKED { 1 } else { 1 << 16 };

/// Instead of a number of accesses: the slot never goes without barriers.
const ALWAYS_FENCED: u32 = u32::MAX;

#[derive(Debug)]
pub(crate) struct Grace {
    slots: Mutex<Vec<Arc<Slot>>>,
    shared: [Arc<Slot>; SHARED_SLOTS],
    barrier: ReaderBarrier,
    /// How often the kernel was asked.
    pub(crate) membarriers: Counter,
}

/// On a cache line of its own, and on one the prefetcher does not pair with another's.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Slot {
    /// Odd while an access runs.
    count: AtomicU64,
    /// How many more accesses are fenced.
    ///
    /// Set to more than 0 by unmaps that find it at 0, one at a time. Lowered by the user of the slot,
    /// who leaves it alone at 0.
    fenced: AtomicU32,
}

impl Grace {
    pub(crate) fn new(barrier: ReaderBarrier) -> Self {
        // These pass a barrier when they are claimed: they are never without.
        let shared = std::array::from_fn(|_| Slot::new(ALWAYS_FENCED));
        Grace {
            slots: Mutex::new(shared.to_vec()),
            shared,
            barrier,
            membarriers: Counter::default(),
        }
    }

    pub(crate) fn barrier(&self) -> ReaderBarrier {
        self.barrier
    }

    /// A slot for one user.
    pub(crate) fn register(&self) -> Arc<Slot> {
        let slot = Slot::new(match self.barrier {
            ReaderBarrier::Fence => ALWAYS_FENCED,
            ReaderBarrier::Membarrier => FENCED_ACCESSES,
        });
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
    pub(crate) fn enter_shared<R>(&self, access: impl FnOnce(Inside<'_>) -> R) -> R {
        let first = thread_number();
        for i in 0..SHARED_SLOTS {
            let slot = &self.shared[(first + i) % SHARED_SLOTS];
            if let Some(running) = slot.try_enter() {
                return access(running.inside());
            }
        }
        let slot = self.register();
        let listed = Listed(self, slot);
        let running = listed.1.enter();
        let result = access(running.inside());
        drop(running);
        result
    }

    /// Waits for every access that runs now; `false` if one still does at the deadline, or if the
    /// kernel refuses its barrier.
    pub(crate) fn synchronize(&self, deadline: &Deadline) -> bool {
        // See above: between what the caller has unlinked and the look at the slots.
        fence(Ordering::SeqCst);
        let slots = lock(&self.slots);
        // With the lock held, so that no other unmap takes a slot for fenced before it is.
        if self.barrier == ReaderBarrier::Membarrier && !self.fence_all(&slots) {
            return false;
        }
        let mut running = Vec::new();
        for slot in slots.iter() {
            let count = slot.count.load(Ordering::Acquire);
            if count % 2 == 1 {
                running.push((slot.clone(), count));
            }
        }
        drop(slots);
        running
            .iter()
            .all(|(slot, count)| slot.wait_beyond(*count, deadline))
    }

    /// Makes every slot fenced; `false` where the kernel does not help.
    fn fence_all(&self, slots: &[Arc<Slot>]) -> bool {
        let is_unfenced = |slot: &&Arc<Slot>| slot.fenced.load(Ordering::Relaxed) == 0;
        let unfenced: Vec<_> = slots.iter().filter(is_unfenced).collect();
        let set = |accesses| {
            for slot in &unfenced {
                slot.fenced.store(accesses, Ordering::Relaxed);
            }
        };
        if unfenced.is_empty() {
            return true;
        }
        set(FENCED_ACCESSES);
        self.membarriers.add(1);
        match membarrier::everywhere() {
            Ok(()) => true,
            Err(error) => {
                log::error!("no grace period, as membarrier is refused: {error}");
                // Their users may not know of it yet.
                set(0);
                false
            }
        }
    }
}

impl Slot {
    fn new(fenced: u32) -> Arc<Self> {
        Arc::new(Slot {
            count: AtomicU64::new(0),
            fenced: AtomicU32::new(fenced),
        })
    }

    /// Announces an access. The slot has one user.
    #[inline]
    pub(crate) fn enter(&self) -> Running<'_> {
        let before = self.count.load(Ordering::Relaxed);
        // A bitmap of the user's may access again from inside an access: it is announced already, and
        // ends with the outer.
        if before % 2 == 1 {
            return Running {
                slot: self,
                after: before,
            };
        }
        let (count, after) = (before + 1, before + 2);
        let fenced = self.fenced.load(Ordering::Relaxed);
        if fenced == ALWAYS_FENCED {
            announce(&self.count, count);
        } else if fenced > 0 {
            unlikely();
            // Before the barrier: who sees the slot fenced has unlinked before it.
            self.fenced.store(fenced - 1, Ordering::Relaxed);
            announce(&self.count, count);
        } else {
            unlikely();
            // The kernel's barrier may come here as well as behind the announcement.
            membarrier::here();
            // Release as in `announce`.
            self.count.store(count, Ordering::Release);
            membarrier::here();
            if self.fenced.load(Ordering::Relaxed) != 0 {
                // An unmap has come since the first look. Its barrier may have been passed before the
                // announcement, which a later unmap then takes for fenced.
                fence(Ordering::SeqCst);
            }
        }
        Running { slot: self, after }
    }

    fn try_enter(&self) -> Option<Running<'_>> {
        self.enter_if(self.idle()?)
    }

    /// The count, if no access runs.
    #[inline]
    pub(crate) fn idle(&self) -> Option<Idle> {
        // Acquire for who looks at more than the slot before they enter.
        let count = self.count.load(Ordering::Acquire);
        (count % 2 == 0).then_some(Idle(count))
    }

    /// Announces an access if none has been announced since.
    #[inline]
    pub(crate) fn enter_if(&self, Idle(count): Idle) -> Option<Running<'_>> {
        self.count
            .compare_exchange(count, count + 1, Ordering::SeqCst, Ordering::Relaxed)
            .ok()?;
        if !EXCHANGE_IS_BARRIER {
            fence(Ordering::SeqCst);
        }
        Some(Running {
            slot: self,
            after: count + 2,
        })
    }

    fn wait_beyond(&self, count: u64, deadline: &Deadline) -> bool {
        let mut turns = 0;
        while self.count.load(Ordering::Acquire) == count {
            if turns < SPINS {
                turns += 1;
                std::hint::spin_loop();
            } else if now() < deadline.instant() {
                yield_now();
            } else {
                return false;
            }
        }
        true
    }
}

/// Whether an exchange is a full barrier too, and cheaper than a store and a fence.
pub(crate) const EXCHANGE_IS_BARRIER: bool = cfg!(target_arch = "x86_64") && !CHECKED;

/// Says of the branch that calls it that it is to lie apart: what an access does by default is in a row.
#[cold]
#[inline]
fn unlikely() {}

/// The store and the full barrier behind it.
#[inline]
fn announce(count: &AtomicU64, value: u64) {
    if EXCHANGE_IS_BARRIER {
        count.swap(value, Ordering::SeqCst);
    } else {
        // Release: who waits for the access before may see the end of it only in this count.
        count.store(value, Ordering::Release);
        fence(Ordering::SeqCst);
    }
}

/// The count of a slot whose access does not run.
pub(crate) struct Idle(u64);

/// A slot that is listed until this is dropped.
struct Listed<'a>(&'a Grace, Arc<Slot>);

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        self.0.unregister(&self.1);
    }
}

/// A running access, until it is dropped.
#[derive(Debug)]
pub(crate) struct Running<'a> {
    slot: &'a Slot,
    /// The count when it ends.
    after: u64,
}

impl Running<'_> {
    #[inline]
    pub(crate) fn inside(&self) -> Inside<'_> {
        Inside(PhantomData)
    }
}

impl Drop for Running<'_> {
    #[inline]
    fn drop(&mut self) {
        // Everything the access did comes before whoever waited goes on.
        self.slot.count.store(self.after, Ordering::Release);
    }
}

/// Proof that an access runs: what is found in the table stays for this lifetime.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Inside<'a>(PhantomData<&'a Slot>);

/// A number that differs between most threads.
pub(crate) fn thread_number() -> usize {
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

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where a holder writes what it leases.

use std::collections::BTreeSet;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::time::Duration;

use checked_sync::{
    lock, yield_now, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Mutex, Ordering, CHECKED,
};

use super::Leased;
use crate::grace::{Grace, Inside, Running, Slot};
use crate::holder::HolderKind;
use crate::mapping::Mapping;
use crate::space::View;
use crate::Holder;

/// Leases of one holder that are written without a lock.
const FEW: usize = if CHECKED { 1 } else { 12 };

/// Where one holder at a time writes what it leases.
#[repr(align(128))]
pub(super) struct Place {
    state: AtomicU32,
    /// How many of `few` count.
    pub(super) len: AtomicUsize,
    few: [AtomicPtr<Mapping>; FEW],
    /// What found no room there.
    more: Mutex<BTreeSet<usize>>,
    /// Whether it is one that holders share, and not one that goes with its holder.
    pub(super) shared: bool,
    /// Whose they are: good while the place is not free.
    view: AtomicPtr<View>,
    /// Since when, in nanoseconds of the coarse clock.
    since: AtomicU64,
    /// Announces the accesses that write leases here.
    pub(super) slot: Arc<Slot>,
}

/// Nobody has the place.
const FREE: u32 = 0;
/// A holder has it.
const TAKEN: u32 = 1;
/// An unmap reads who the holder is; it cannot leave meanwhile.
const READ: u32 = 2;

impl Place {
    pub(super) fn new(grace: &Grace, shared: bool) -> Self {
        Place {
            state: AtomicU32::new(if shared { FREE } else { TAKEN }),
            shared,
            len: AtomicUsize::new(0),
            few: std::array::from_fn(|_| AtomicPtr::new(ptr::null_mut())),
            more: Mutex::new(BTreeSet::new()),
            view: AtomicPtr::new(ptr::null_mut()),
            since: AtomicU64::new(0),
            slot: grace.register(),
        }
    }

    /// Begins the holder's first access, if the place is free.
    ///
    /// That access is what claims it: the count of accesses is read before the state and is as it was
    /// afterwards, so nobody has claimed the place since it was seen to be free.
    #[inline]
    pub(super) fn claim(&self) -> Option<Running<'_>> {
        let idle = self.slot.idle()?;
        if self.state.load(Ordering::Acquire) != FREE {
            return None;
        }
        let running = self.slot.enter_if(idle)?;
        // Release: who reads the signature must not see leases of the holder before.
        self.state.store(TAKEN, Ordering::Release);
        Some(running)
    }

    pub(super) fn sign(&self, view: &Arc<View>) {
        self.view
            .store(Arc::as_ptr(view).cast_mut(), Ordering::Relaxed);
        self.since.store(coarse_nanos(), Ordering::Relaxed);
    }

    /// Writes a lease. Only for the holder, inside of the access that found the mapping.
    ///
    /// While there is room nobody looks whether the mapping is there already.
    #[inline]
    pub(super) fn add(&self, mapping: &Mapping, _inside: Inside<'_>) -> Leased {
        let raw = ptr::from_ref(mapping).cast_mut();
        let len = self.len.load(Ordering::Relaxed);
        match self.few.get(len) {
            Some(free) => {
                free.store(raw, Ordering::Release);
                self.len.store(len + 1, Ordering::Release);
            }
            None => self.add_to_more(raw),
        }
        Leased(NonNull::from(mapping))
    }

    #[cold]
    #[inline(never)]
    fn add_to_more(&self, raw: *mut Mapping) {
        let mut few = self.few.iter();
        if !few.any(|leased| ptr::eq(leased.load(Ordering::Relaxed), raw)) {
            lock(&self.more).insert(raw.addr());
        }
    }

    pub(super) fn has(&self, mapping: &Mapping) -> bool {
        let raw = ptr::from_ref(mapping);
        let len = self.len.load(Ordering::Acquire);
        let mut few = self.few[..len].iter();
        // Acquire, as another holder may have the place since `len` was read: the one before is done then.
        few.any(|leased| ptr::eq(leased.load(Ordering::Acquire), raw))
            || len == FEW && lock(&self.more).contains(&raw.addr())
    }

    /// Visits the address of every mapping leased here, of some more than once.
    pub(super) fn each(&self, mut visit: impl FnMut(usize)) {
        let len = self.len.load(Ordering::Acquire);
        for leased in &self.few[..len] {
            visit(leased.load(Ordering::Acquire).addr());
        }
        if len == FEW {
            lock(&self.more).iter().copied().for_each(visit);
        }
    }

    pub(super) fn count(&self) -> usize {
        let mut leased = BTreeSet::new();
        self.each(|addr| {
            leased.insert(addr);
        });
        leased.len()
    }

    /// Returns all leases, and the place.
    pub(super) fn leave(&self) {
        if self.len.load(Ordering::Relaxed) == FEW {
            lock(&self.more).clear();
        }
        self.len.store(0, Ordering::Release);
        while self
            .state
            .compare_exchange(TAKEN, FREE, Ordering::SeqCst, Ordering::Relaxed)
            .is_err()
        {
            yield_now();
        }
    }

    /// The holder, if it leases the mapping.
    pub(super) fn holder(&self, mapping: &Mapping) -> Option<Holder> {
        let state = &self.state;
        // Acquire also where it fails: a holder that has just left has used the memory before.
        while let Err(now) =
            state.compare_exchange(TAKEN, READ, Ordering::Acquire, Ordering::Acquire)
        {
            if now == FREE {
                return None;
            }
            yield_now();
        }
        let holder = self.has(mapping).then(|| {
            // SAFETY: the holder keeps the view, and cannot leave in this state. It has signed before
            // it took its first lease, which an unmap sees only after that.
            let view = unsafe { &*self.view.load(Ordering::Relaxed) };
            let age = coarse_nanos().saturating_sub(self.since.load(Ordering::Relaxed));
            Holder {
                kind: HolderKind::Lease,
                name: view.name.clone(),
                iova: mapping.range.first,
                size: mapping.range.size(),
                age: Duration::from_nanos(age),
            }
        });
        state.store(TAKEN, Ordering::Release);
        holder
    }
}

/// A clock that is read faster than the exact one, and as good for ages: nanoseconds, some milliseconds
/// coarse. In a model nothing gets older.
fn coarse_nanos() -> u64 {
    if CHECKED {
        return 0;
    }
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the structure can be written.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

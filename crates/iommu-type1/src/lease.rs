// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Leases: what keeps an unmap waiting while slices of a mapping are outside of a call.
//!
//! Every holder (a guard, a scatter list, a stream) writes the mappings it leases into a place of its
//! own; an unmap looks through all places. So taking a lease costs a store and no shared counter.
//!
//! # Why nothing is missed
//!
//! A lease is written by a running access that has found the mapping in the table. An unmap reads the
//! places after it has waited for such accesses: it sees every lease there is, and there will be no
//! more. A holder that returns its leases passes a barrier before it looks whether anybody waits; an
//! unmap says that it waits, passes one, and looks again before it sleeps.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::fmt;
use std::ops::Deref;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::time::Duration;

use crate::deadline::Deadline;
use crate::grace::{thread_number, Grace, Inside, Slot, EXCHANGE_IS_BARRIER};
use crate::holder::HolderKind;
use crate::mapping::{Mapping, Need};
use crate::space::{Space, View};
use crate::sync::{
    coarse_now, fence, lock, wait_until, yield_now, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize,
    Condvar, Mutex, Ordering,
};
use crate::{Holder, Result};

/// Places that holders share, one at a time; more are made when all are taken.
const PLACES: usize = if cfg!(loom) { 1 } else { 16 };

/// Leases of one holder that are written without a lock.
const FEW: usize = if cfg!(loom) { 1 } else { 12 };

/// A mapping that somebody leases.
///
/// # Invariants
///
/// It is alive as long as it is leased: an unmap keeps what it could not wait for among the mappings
/// that leave, and a holder keeps the space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leased(NonNull<Mapping>);

// SAFETY: stands for a `&Mapping`, which can be sent and shared.
unsafe impl Send for Leased {}
// SAFETY: as above.
unsafe impl Sync for Leased {}

impl Leased {
    /// The mapping.
    ///
    /// # Safety
    ///
    /// It is leased for all of the lifetime.
    #[inline]
    pub(crate) unsafe fn get<'a>(self) -> &'a Mapping {
        // SAFETY: by the invariant and the caller's promise.
        unsafe { self.0.as_ref() }
    }
}

/// Every place in a space, and those who wait.
pub(crate) struct Ledger {
    shared: [Place; PLACES],
    further: Mutex<Vec<Arc<Place>>>,
    /// How many unmaps wait, so that whoever returns leases need not look further when none does.
    waiting: AtomicUsize,
    gate: Mutex<()>,
    returned: Condvar,
}

/// Where one holder at a time writes what it leases.
#[repr(align(128))]
struct Place {
    state: AtomicU32,
    /// How many of `few` count.
    len: AtomicUsize,
    few: [AtomicPtr<Mapping>; FEW],
    /// What found no room there.
    more: Mutex<BTreeSet<usize>>,
    /// Whose they are: good while the place is not free.
    view: AtomicPtr<View>,
    /// Since when, in nanoseconds of the coarse clock.
    since: AtomicU64,
    /// Announces the accesses that write leases here.
    slot: Arc<Slot>,
}

/// Nobody has the place.
const FREE: u32 = 0;
/// A holder has it.
const TAKEN: u32 = 1;
/// An unmap reads who the holder is; it cannot leave meanwhile.
const READ: u32 = 2;

impl Place {
    fn new(grace: &Grace, state: u32) -> Self {
        Place {
            state: AtomicU32::new(state),
            len: AtomicUsize::new(0),
            few: std::array::from_fn(|_| AtomicPtr::new(ptr::null_mut())),
            more: Mutex::new(BTreeSet::new()),
            view: AtomicPtr::new(ptr::null_mut()),
            since: AtomicU64::new(0),
            slot: grace.register(),
        }
    }

    fn claim(&self) -> bool {
        self.state.load(Ordering::Relaxed) == FREE
            && self
                .state
                .compare_exchange(FREE, TAKEN, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
    }

    fn sign(&self, view: &Arc<View>) {
        self.view
            .store(Arc::as_ptr(view).cast_mut(), Ordering::Relaxed);
        let since = coarse_now().as_nanos() as u64;
        self.since.store(since, Ordering::Relaxed);
    }

    /// Writes a lease, once a mapping. Only for the holder, inside of the access that found it.
    fn add(&self, mapping: &Mapping, _inside: Inside<'_>) -> Leased {
        let raw = ptr::from_ref(mapping).cast_mut();
        let len = self.len.load(Ordering::Relaxed);
        let mut few = self.few[..len].iter();
        if !few.any(|leased| ptr::eq(leased.load(Ordering::Relaxed), raw)) {
            match self.few.get(len) {
                Some(free) => {
                    free.store(raw, Ordering::Release);
                    self.len.store(len + 1, Ordering::Release);
                }
                None => {
                    lock(&self.more).insert(raw.addr());
                }
            }
        }
        Leased(NonNull::from(mapping))
    }

    fn has(&self, mapping: &Mapping) -> bool {
        let raw = ptr::from_ref(mapping);
        let len = self.len.load(Ordering::Acquire);
        let mut few = self.few[..len].iter();
        // Acquire, as another holder may have the place since `len` was read: the one before is done then.
        few.any(|leased| ptr::eq(leased.load(Ordering::Acquire), raw))
            || len == FEW && lock(&self.more).contains(&raw.addr())
    }

    /// Visits the address of every mapping leased here.
    fn each(&self, mut visit: impl FnMut(usize)) {
        let len = self.len.load(Ordering::Acquire);
        for leased in &self.few[..len] {
            visit(leased.load(Ordering::Acquire).addr());
        }
        if len == FEW {
            lock(&self.more).iter().copied().for_each(visit);
        }
    }

    fn count(&self) -> usize {
        match self.len.load(Ordering::Acquire) {
            FEW => FEW + lock(&self.more).len(),
            len => len,
        }
    }

    /// Returns all leases, and the place.
    fn leave(&self) {
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
    fn holder(&self, mapping: &Mapping) -> Option<Holder> {
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
            let since = Duration::from_nanos(self.since.load(Ordering::Relaxed));
            Holder {
                kind: HolderKind::Lease,
                name: view.name.clone(),
                iova: mapping.range.first,
                size: mapping.range.size(),
                age: coarse_now().saturating_sub(since),
            }
        });
        state.store(TAKEN, Ordering::Release);
        holder
    }
}

impl Ledger {
    pub(crate) fn new(grace: &Grace) -> Self {
        Ledger {
            shared: std::array::from_fn(|_| Place::new(grace, FREE)),
            further: Mutex::new(Vec::new()),
            waiting: AtomicUsize::new(0),
            gate: Mutex::new(()),
            returned: Condvar::new(),
        }
    }

    /// Waits until nobody leases any of the mappings; those that are still leased at the deadline.
    ///
    /// They are out of the table and a grace period has passed: no lease can be added.
    pub(crate) fn wait_released(
        &self,
        mappings: &[Arc<Mapping>],
        deadline: &Deadline,
    ) -> Vec<Arc<Mapping>> {
        let mut left = self.leased_of(mappings);
        if left.is_empty() {
            return left;
        }
        self.waiting.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let mut gate = lock(&self.gate);
        // What was seen free stays free: only the rest is looked for again.
        left = self.leased_of(&left);
        while !left.is_empty() {
            match wait_until(&self.returned, &self.gate, gate, deadline.instant()) {
                Some(guard) => gate = guard,
                None => break,
            }
            left = self.leased_of(&left);
        }
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        left
    }

    /// Who leases the mapping.
    pub(crate) fn holders(&self, mapping: &Mapping) -> Vec<Holder> {
        let further = lock(&self.further);
        self.places(&further)
            .filter(|place| place.has(mapping))
            .filter_map(|place| place.holder(mapping))
            .collect()
    }

    /// Which of the mappings are leased. However many there are, each lease is looked for once.
    fn leased_of(&self, mappings: &[Arc<Mapping>]) -> Vec<Arc<Mapping>> {
        let further = lock(&self.further);
        let mut used = self
            .places(&further)
            .filter(|place| place.len.load(Ordering::Acquire) > 0)
            .peekable();
        if used.peek().is_none() {
            return Vec::new();
        }
        let mut sorted: Vec<_> = mappings
            .iter()
            .map(|mapping| Arc::as_ptr(mapping).addr())
            .collect();
        sorted.sort_unstable();
        let mut leased = BTreeSet::new();
        for place in used {
            place.each(|addr| {
                if sorted.binary_search(&addr).is_ok() {
                    leased.insert(addr);
                }
            });
        }
        let is_leased = |mapping: &&Arc<Mapping>| leased.contains(&Arc::as_ptr(mapping).addr());
        mappings.iter().filter(is_leased).cloned().collect()
    }

    /// Leases there are.
    pub(crate) fn count(&self) -> usize {
        let further = lock(&self.further);
        self.places(&further).map(Place::count).sum()
    }

    fn places<'a>(&'a self, further: &'a [Arc<Place>]) -> impl Iterator<Item = &'a Place> {
        self.shared.iter().chain(further.iter().map(Arc::deref))
    }

    fn tell_those_who_wait(&self) {
        // Between the return of the leases and the look at who waits.
        if !EXCHANGE_IS_BARRIER {
            fence(Ordering::SeqCst);
        }
        if self.waiting.load(Ordering::SeqCst) > 0 {
            // Whoever has looked at the leases but does not sleep yet has the gate.
            drop(lock(&self.gate));
            self.returned.notify_all();
        }
    }
}

/// A place that a holder has. It must be [left](Claim::leave): whoever has it does so when dropped.
enum Claim {
    /// One of the shared ones.
    Shared(usize),
    Own(Arc<Place>),
}

impl Claim {
    fn new(view: &Arc<View>) -> Self {
        let ledger = &view.space.leases;
        let first = thread_number();
        let shared = (0..PLACES)
            .map(|i| (first + i) % PLACES)
            .find(|index| ledger.shared[*index].claim());
        let claim = match shared {
            Some(index) => Claim::Shared(index),
            None => {
                let place = Arc::new(Place::new(&view.space.grace, TAKEN));
                lock(&ledger.further).push(place.clone());
                Claim::Own(place)
            }
        };
        claim.place(&view.space).sign(view);
        claim
    }

    #[inline]
    fn place<'a>(&'a self, space: &'a Space) -> &'a Place {
        match self {
            Claim::Shared(index) => &space.leases.shared[*index],
            Claim::Own(place) => place,
        }
    }

    /// Runs an access that may lease what it finds. `&mut`, because the place has one user.
    #[inline]
    fn access<R>(&mut self, space: &Space, access: impl FnOnce(Leasing<'_>) -> R) -> R {
        let place = self.place(space);
        let running = place.slot.enter();
        access(Leasing {
            place,
            inside: running.inside(),
        })
    }

    /// Returns the leases and the place, which is not used after.
    fn leave(&self, space: &Space) {
        self.place(space).leave();
        if let Claim::Own(place) = self {
            lock(&space.leases.further).retain(|other| !Arc::ptr_eq(other, place));
            space.grace.unregister(&place.slot);
        }
        space.leases.tell_those_who_wait();
    }
}

/// Leases that were taken by one access; dropping it returns them.
pub(crate) struct Leases {
    view: Arc<View>,
    claim: Claim,
}

impl Leases {
    /// Runs an access that may lease what it finds.
    pub(crate) fn taken_by<R>(
        view: Arc<View>,
        access: impl FnOnce(&Space, Leasing<'_>) -> Result<R>,
    ) -> Result<(Self, R)> {
        let claim = Claim::new(&view);
        let mut leases = Leases { view, claim };
        let space = &leases.view.space;
        let result = leases
            .claim
            .access(space, |leasing| access(space, leasing))?;
        Ok((leases, result))
    }

    pub(crate) fn view(&self) -> &View {
        &self.view
    }
}

impl Drop for Leases {
    fn drop(&mut self) {
        self.claim.leave(&self.view.space);
    }
}

/// A running access that may lease what it finds.
#[derive(Clone, Copy)]
pub(crate) struct Leasing<'a> {
    place: &'a Place,
    pub(crate) inside: Inside<'a>,
}

impl Leasing<'_> {
    pub(crate) fn lease(&self, mapping: &Mapping) -> Leased {
        self.place.add(mapping, self.inside)
    }
}

/// The leases of one holder that takes them as it goes, at most one a mapping; dropping it returns them.
///
/// # Invariants
///
/// What `first` and `newest` hold is leased until this is dropped.
pub(crate) struct LeaseSet {
    view: Arc<View>,
    /// Made with the first lease: a guard that lends nothing costs nothing.
    claim: RefCell<Option<Claim>>,
    /// The mapping leased first (a queue's rings lie there) and the one leased last: further slices of
    /// these need no look-up.
    first: Cell<Option<Leased>>,
    newest: Cell<Option<Leased>>,
}

impl LeaseSet {
    #[inline]
    pub(crate) fn new(view: Arc<View>) -> Self {
        LeaseSet {
            view,
            claim: RefCell::new(None),
            first: Cell::new(None),
            newest: Cell::new(None),
        }
    }

    pub(crate) fn view(&self) -> &Arc<View> {
        &self.view
    }

    /// Leases the mapping that contains `iova`.
    ///
    /// A mapping that is leased already is not looked up again, also while it is being unmapped:
    /// the unmap waits for this holder anyway, and a request that has begun can end.
    #[inline]
    pub(crate) fn lease(&self, iova: u64, need: Need) -> Result<&Mapping> {
        match self.known(iova, need) {
            Some(mapping) => Ok(mapping),
            None => self.look_up(iova, need),
        }
    }

    /// As [`lease`](LeaseSet::lease), of the mappings that are remembered only.
    #[inline(always)]
    pub(crate) fn known(&self, iova: u64, need: Need) -> Option<&Mapping> {
        for leased in [&self.newest, &self.first] {
            if let Some(leased) = leased.get() {
                // SAFETY: by the invariant leased as long as `self`.
                let mapping = unsafe { leased.get() };
                if mapping.range.contains(iova) && mapping.allows(need) {
                    return Some(mapping);
                }
            }
        }
        None
    }

    /// As [`lease`](LeaseSet::lease), where it is not one of those that are remembered.
    #[inline(never)]
    pub(crate) fn look_up(&self, iova: u64, need: Need) -> Result<&Mapping> {
        let space = &self.view.space;
        let mut claim = self.claim.borrow_mut();
        let claim = claim.get_or_insert_with(|| Claim::new(&self.view));
        let leased = claim.access(space, |leasing| {
            let mapping = space.usable(leasing.inside, iova, need, 0)?;
            Ok::<_, crate::Error>(leasing.lease(mapping))
        })?;
        if self.first.get().is_none() {
            self.first.set(Some(leased));
        }
        self.newest.set(Some(leased));
        // SAFETY: just leased, until `self` is dropped.
        Ok(unsafe { leased.get() })
    }

    fn len(&self) -> usize {
        let claim = self.claim.borrow();
        let place = claim.as_ref().map(|claim| claim.place(&self.view.space));
        place.map_or(0, Place::count)
    }
}

impl Drop for LeaseSet {
    #[inline]
    fn drop(&mut self) {
        if let Some(claim) = self.claim.get_mut() {
            claim.leave(&self.view.space);
        }
    }
}

impl fmt::Debug for LeaseSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeaseSet")
            .field("view", &self.view)
            .field("mappings", &self.len())
            .finish()
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Every place in a space, and the unmaps that wait for leases.

use std::collections::BTreeSet;
use std::ops::Deref;
use std::sync::Arc;

use checked_sync::{fence, lock, wait_until, AtomicUsize, Condvar, Mutex, Ordering, CHECKED};

use super::place::Place;
use crate::deadline::Deadline;
use crate::grace::{Grace, EXCHANGE_IS_BARRIER};
use crate::mapping::Mapping;
use crate::Holder;

/// Places that holders share, one at a time; more are made when all are taken.
pub(super) const PLACES: usize = if CHECKED { 1 } else { 16 };

/// Every place in a space, and those who wait.
pub(crate) struct Ledger {
    pub(super) shared: [Place; PLACES],
    pub(super) further: Mutex<Vec<Arc<Place>>>,
    /// How many unmaps wait, so that whoever returns leases need not look further when none does.
    waiting: AtomicUsize,
    gate: Mutex<()>,
    returned: Condvar,
}

/// Mappings that are leased, by where they are.
pub(crate) struct LeasedOf(BTreeSet<usize>);

impl LeasedOf {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn has(&self, mapping: &Arc<Mapping>) -> bool {
        self.0.contains(&Arc::as_ptr(mapping).addr())
    }
}

impl Ledger {
    pub(crate) fn new(grace: &Grace) -> Self {
        Ledger {
            shared: std::array::from_fn(|_| Place::new(grace, true)),
            further: Mutex::new(Vec::new()),
            waiting: AtomicUsize::new(0),
            gate: Mutex::new(()),
            returned: Condvar::new(),
        }
    }

    /// Waits until nobody leases any of the mappings; those that are still leased at the deadline.
    ///
    /// They are out of the table and a grace period has passed: no lease can be added.
    pub(crate) fn wait_released<'a>(
        &self,
        mappings: impl Iterator<Item = &'a Arc<Mapping>>,
        deadline: &Deadline,
    ) -> LeasedOf {
        let all = self.leased();
        if all.is_empty() {
            return all;
        }
        let leased = mappings.filter(|mapping| all.has(mapping));
        let leased = leased.map(|mapping| Arc::as_ptr(mapping).addr());
        let mut left = LeasedOf(leased.collect());
        if left.is_empty() {
            return left;
        }
        self.waiting.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let mut gate = lock(&self.gate);
        // What was seen free stays free: only the rest is looked for again.
        left = self.still(&left);
        while !left.is_empty() {
            match wait_until(&self.returned, &self.gate, gate, deadline.instant()) {
                Some(guard) => gate = guard,
                None => break,
            }
            left = self.still(&left);
        }
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        left
    }

    /// Visits who leases the mapping.
    pub(crate) fn each_holder(&self, mapping: &Mapping, visit: impl FnMut(Holder)) {
        let further = lock(&self.further);
        let places = self.places(&further);
        places
            .filter(|place| place.has(mapping))
            .filter_map(|place| place.holder(mapping))
            .for_each(visit);
    }

    /// Which mappings are leased. However many there are, each lease is looked for once.
    fn leased(&self) -> LeasedOf {
        let further = lock(&self.further);
        let mut leased = BTreeSet::new();
        // Not by a loop, which would ask for each place whose turn it is: the shared or the further ones.
        self.places(&further).for_each(|place| {
            if place.len.load(Ordering::Acquire) > 0 {
                place.each(|addr| {
                    leased.insert(addr);
                });
            }
        });
        LeasedOf(leased)
    }

    /// Those of them that are still leased.
    fn still(&self, before: &LeasedOf) -> LeasedOf {
        let LeasedOf(now) = self.leased();
        LeasedOf(now.intersection(&before.0).copied().collect())
    }

    /// Leases there are.
    pub(crate) fn count(&self) -> usize {
        let further = lock(&self.further);
        self.places(&further).map(Place::count).sum()
    }

    fn places<'a>(&'a self, further: &'a [Arc<Place>]) -> impl Iterator<Item = &'a Place> {
        self.shared.iter().chain(further.iter().map(Arc::deref))
    }

    pub(super) fn tell_those_who_wait(&self) {
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

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a holder has of its place.

use std::ptr::{self, NonNull};
use std::sync::Arc;

use checked_sync::lock;

use super::ledger::PLACES;
use super::place::Place;
use super::Leased;
use crate::grace::{thread_number, Inside, Running};
use crate::mapping::Mapping;
use crate::space::{Space, View};

/// A place that a holder has. It must be [left](Claim::leave): whoever has it does so when dropped.
///
/// # Invariants
///
/// It is in the ledger of the holder's space until it is left, and nobody else's until then.
#[derive(Clone, Copy)]
pub(super) struct Claim(NonNull<Place>);

// SAFETY: stands for a `&Place`, which can be sent and shared.
unsafe impl Send for Claim {}
// SAFETY: as above.
unsafe impl Sync for Claim {}

impl Claim {
    /// A place, and the holder's first access.
    #[inline]
    pub(super) fn new(view: &Arc<View>) -> (Self, Leasing<'_>) {
        let place = &view.space.leases.shared[thread_number() % PLACES];
        match place.claim() {
            Some(running) => Claim::signed(view, place, running),
            None => Claim::elsewhere(view),
        }
    }

    #[cold]
    #[inline(never)]
    fn elsewhere(view: &Arc<View>) -> (Self, Leasing<'_>) {
        let ledger = &view.space.leases;
        for place in &ledger.shared {
            if let Some(running) = place.claim() {
                return Claim::signed(view, place, running);
            }
        }
        let place = Arc::new(Place::new(&view.space.grace, false));
        // SAFETY: the ledger has a reference until the place is left, which is after this access.
        let claimed = unsafe { &*Arc::as_ptr(&place) };
        lock(&ledger.further).push(place);
        Claim::signed(view, claimed, claimed.slot.enter())
    }

    /// INVARIANT: the caller has claimed the place, which is in the ledger.
    #[inline]
    fn signed<'a>(
        view: &'a Arc<View>,
        place: &'a Place,
        running: Running<'a>,
    ) -> (Self, Leasing<'a>) {
        place.sign(view);
        (Claim(NonNull::from(place)), Leasing { place, running })
    }

    #[inline]
    pub(super) fn place(self, _space: &Space) -> &Place {
        // SAFETY: by the invariant it lives as long as the space, or until it is left.
        unsafe { self.0.as_ref() }
    }

    /// Begins an access. Only for the holder, who has one at a time.
    #[inline]
    pub(super) fn enter(self, space: &Space) -> Leasing<'_> {
        let place = self.place(space);
        let running = place.slot.enter();
        Leasing { place, running }
    }

    /// Returns the leases and the place, which is not used after.
    pub(super) fn leave(self, space: &Space) {
        let place = self.place(space);
        place.leave();
        if !place.shared {
            space.grace.unregister(&place.slot);
            let place = self.0.as_ptr().cast_const();
            lock(&space.leases.further).retain(|other| !ptr::eq(Arc::as_ptr(other), place));
        }
        space.leases.tell_those_who_wait();
    }
}

/// A running access that may lease what it finds.
pub(crate) struct Leasing<'a> {
    place: &'a Place,
    running: Running<'a>,
}

impl Leasing<'_> {
    #[inline]
    pub(crate) fn inside(&self) -> Inside<'_> {
        self.running.inside()
    }

    #[inline]
    pub(crate) fn lease(&self, mapping: &Mapping) -> Leased {
        self.place.add(mapping, self.inside())
    }
}

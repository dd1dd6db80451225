// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who leases.

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;

use super::claim::{Claim, Leasing};
use super::Leased;
use crate::mapping::{Mapping, Need};
use crate::space::{Space, View};
use crate::Result;

/// The leases of one holder that takes them as it goes; dropping it returns them.
///
/// # Invariants
///
/// What `first` and `newest` hold is leased until this is dropped.
pub(crate) struct LeaseSet {
    view: Arc<View>,
    /// Made with the first lease: a guard that lends nothing costs nothing.
    claim: Cell<Option<Claim>>,
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
            claim: Cell::new(None),
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
    pub(crate) fn lease(&self, iova: u64, need: Need) -> Result<&Mapping> {
        match self.known(iova, need).or_else(|| self.find(iova, need)) {
            Some(mapping) => Ok(mapping),
            None => self.look_up(iova, need),
        }
    }

    /// As [`lease`](LeaseSet::lease), of the mappings that are remembered only.
    #[inline(always)]
    pub(crate) fn known(&self, iova: u64, need: Need) -> Option<&Mapping> {
        for leased in [&self.first, &self.newest] {
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

    /// As [`lease`](LeaseSet::lease), where it is not one of those that are remembered. `None` says
    /// nothing but that there is more to look at.
    #[inline(never)]
    pub(crate) fn find(&self, iova: u64, need: Need) -> Option<&Mapping> {
        match self.claim.get() {
            Some(claim) => self.find_by(claim.enter(&self.view.space), iova, need),
            // Apart, so that what an access is made of need not be in memory above.
            None => self.find_first(iova, need),
        }
    }

    #[inline(never)]
    fn find_first(&self, iova: u64, need: Need) -> Option<&Mapping> {
        self.find_by(self.enter(), iova, need)
    }

    #[inline(always)]
    fn find_by(&self, leasing: Leasing<'_>, iova: u64, need: Need) -> Option<&Mapping> {
        let mapping = self.view.space.table.find(iova, leasing.inside())?;
        if !mapping.allows(need) {
            return None;
        }
        Some(self.remember(leasing.lease(mapping)))
    }

    /// As [`find`](LeaseSet::find), with the reason where there is no such mapping.
    #[cold]
    #[inline(never)]
    pub(crate) fn look_up(&self, iova: u64, need: Need) -> Result<&Mapping> {
        let leasing = self.enter();
        let space = &self.view.space;
        let mapping = space.usable(leasing.inside(), iova, need, 0)?;
        Ok(self.remember(leasing.lease(mapping)))
    }

    /// Begins an access, the first of which claims a place.
    #[inline]
    fn enter(&self) -> Leasing<'_> {
        match self.claim.get() {
            Some(claim) => claim.enter(&self.view.space),
            None => {
                let (claim, leasing) = Claim::new(&self.view);
                self.claim.set(Some(claim));
                leasing
            }
        }
    }

    /// The mapping, which was just leased.
    #[inline]
    fn remember(&self, leased: Leased) -> &Mapping {
        if self.first.get().is_none() {
            self.first.set(Some(leased));
        }
        self.newest.set(Some(leased));
        // SAFETY: leased until `self` is dropped.
        unsafe { leased.get() }
    }

    fn len(&self) -> usize {
        let claim = self.claim.get();
        claim.map_or(0, |claim| claim.place(&self.view.space).count())
    }
}

impl Drop for LeaseSet {
    #[inline]
    fn drop(&mut self) {
        if let Some(claim) = self.claim.get() {
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

/// Leases that were taken by one access; dropping it returns them.
pub(crate) struct Leases(LeaseSet);

// SAFETY: nothing is leased through the set any more, so that nobody looks at its cells but its drop.
unsafe impl Sync for Leases {}

impl Leases {
    /// Runs an access that may lease what it finds.
    pub(crate) fn taken_by(
        view: Arc<View>,
        access: impl FnOnce(&Space, &Leasing<'_>) -> Result<()>,
    ) -> Result<Self> {
        let leases = LeaseSet::new(view);
        access(&leases.view.space, &leases.enter())?;
        Ok(Leases(leases))
    }

    pub(crate) fn view(&self) -> &View {
        &self.0.view
    }
}

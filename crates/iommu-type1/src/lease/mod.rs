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

mod claim;
mod ledger;
mod place;
mod set;

use std::ptr::NonNull;

use crate::mapping::Mapping;

pub(crate) use ledger::{LeasedOf, Ledger};
pub(crate) use set::{LeaseSet, Leases};

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

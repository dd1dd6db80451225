// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One mapping: a range of IOVAs, the memory behind it, and what may be done with it.

use vm_memory::{Permissions, VolatileSlice};

use crate::dirty::DirtySlice;
use crate::range::IovaRange;
use crate::sync::AtomicUsize;
use crate::Backing;

/// # Invariants
///
/// `range.size()` equals `backing.len()`, and the memory allows what `prot` allows.
#[derive(Debug)]
pub(crate) struct Mapping {
    pub(crate) range: IovaRange,
    pub(crate) prot: Permissions,
    pub(crate) backing: Backing,
    /// How many have slices of it outside of a call.
    pub(crate) leases: AtomicUsize,
}

impl Mapping {
    pub(crate) fn new(range: IovaRange, prot: Permissions, backing: Backing) -> Self {
        Mapping {
            range,
            prot,
            backing,
            leases: AtomicUsize::new(0),
        }
    }

    /// The memory from `iova` to the end of the mapping, at most `len` bytes of it.
    #[inline]
    pub(crate) fn slice(&self, iova: u64, len: usize) -> VolatileSlice<'_, DirtySlice<'_>> {
        // A mapping is not larger than the address space of this process: offsets fit.
        self.backing.slice((iova - self.range.first) as usize, len)
    }
}

/// The policy of type1 for accesses: a write needs the read permission too. (Pins need just what they
/// ask for.)
#[inline]
pub(crate) fn needed_for(access: Permissions) -> Permissions {
    if access.has_write() {
        Permissions::ReadWrite
    } else {
        access
    }
}

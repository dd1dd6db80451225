// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where a guest has memory, if anybody has said so.

use vm_memory::GuestAddress;

/// A guest physical address or none, in eight bytes: no memory begins at the last address there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GuestPlace(u64);

impl GuestPlace {
    pub(crate) const UNKNOWN: GuestPlace = GuestPlace(u64::MAX);

    pub(crate) fn at(address: u64) -> Self {
        GuestPlace(address)
    }

    pub(crate) fn address(self) -> Option<GuestAddress> {
        (self != GuestPlace::UNKNOWN).then_some(GuestAddress(self.0))
    }

    /// `offset` bytes behind it, inside the same memory.
    pub(crate) fn behind(self, offset: usize) -> Self {
        match self {
            GuestPlace::UNKNOWN => self,
            GuestPlace(address) => GuestPlace(address + offset as u64),
        }
    }
}

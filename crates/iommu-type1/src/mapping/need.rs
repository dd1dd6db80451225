// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What an access needs of a mapping, and what a mapping was made for, as bits.

use vm_memory::Permissions;

use crate::PermissionPolicy;

/// What an access needs, as bits of [`PageWord`](super::PageWord)s.
///
/// What a write needs of a mapping is decided when it is made: a mapping has the bit of writes if the
/// [`PermissionPolicy`] lets it be written. Pins need just what they ask for, whatever the policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Need(pub(super) usize);

pub(super) const READ: usize = 1;
pub(super) const WRITE: usize = 2;
/// Nobody wants to know what is written.
pub(super) const PLAIN: usize = 4;
/// Where the bits stand of what was asked for when it was mapped; not in page words.
pub(super) const ASKED: u32 = 3;

impl Need {
    pub(crate) const READ: Need = Need(READ);
    pub(crate) const WRITE: Need = Need(WRITE);
    pub(crate) const READ_WRITE: Need = Need(READ | WRITE);

    /// Nothing: every mapping permits it.
    #[cfg(feature = "sigbus")]
    pub(crate) const NOTHING: Need = Need(0);

    /// What no mapping permits: of an access that is wrong in itself.
    pub(crate) const IMPOSSIBLE: Need = Need(usize::MAX);

    /// What an access for these permissions needs.
    #[inline]
    pub(crate) fn of(access: Permissions) -> Need {
        Need(bits(access))
    }

    /// Exactly these permissions, as the mapping was made with.
    #[inline]
    pub(crate) fn exactly(permissions: Permissions) -> Need {
        Need(bits(permissions) << ASKED)
    }

    /// The permissions that a mapping must have been made with.
    pub(crate) fn permissions(self, policy: PermissionPolicy) -> Permissions {
        if self.writes() && policy == PermissionPolicy::WriteNeedsRead {
            return Permissions::ReadWrite;
        }
        permissions(self.0 | self.0 >> ASKED)
    }

    pub(super) fn writes(self) -> bool {
        self.0 & WRITE != 0
    }
}

pub(super) fn permissions(bits: usize) -> Permissions {
    match bits & (READ | WRITE) {
        0 => Permissions::No,
        READ => Permissions::Read,
        WRITE => Permissions::Write,
        _ => Permissions::ReadWrite,
    }
}

#[inline]
pub(super) fn bits(permissions: Permissions) -> usize {
    match permissions {
        Permissions::No => 0,
        Permissions::Read => READ,
        Permissions::Write => WRITE,
        Permissions::ReadWrite => READ | WRITE,
    }
}

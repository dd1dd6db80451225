// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who keeps an unmap from finishing.

use std::fmt;
use std::time::Duration;

/// What somebody holds of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HolderKind {
    /// Pinned pages.
    Pin,
    /// Slices that left the call: of a guard, a scatter list or a running stream.
    Lease,
    /// An access that has been running since the unmap began: a copy that is very long, or whose
    /// thread does not get the processor.
    Access,
}

/// Somebody who holds memory in a range that is to be unmapped.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Holder {
    /// What is held.
    pub kind: HolderKind,
    /// Name of the view or the pinner it was taken through.
    pub name: String,
    /// First address held: of the page for a pin, of the mapping for a lease.
    pub iova: u64,
    /// Bytes held: of the pinned pages, or of the whole mapping for a lease.
    pub size: u64,
    /// For how long: of a lease, since its holder took the first of its leases.
    pub age: Duration,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = match self.kind {
            HolderKind::Pin => "pins",
            HolderKind::Lease => "leases",
            HolderKind::Access => "uses",
        };
        write!(
            f,
            "{} {verb} {:#x} bytes at {:#x} for {:.1?} now",
            self.name, self.size, self.iova, self.age
        )
    }
}

/// The holders of an error message, one after the other.
pub(crate) struct Listed<'a>(pub(crate) &'a [Holder]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, holder) in self.0.iter().enumerate() {
            let separator = if i == 0 { "" } else { "; " };
            write!(f, "{separator}{holder}")?;
        }
        Ok(())
    }
}

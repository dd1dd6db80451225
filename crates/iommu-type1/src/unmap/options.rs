// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How long an unmap waits for holders, and what then.

use std::time::Duration;

use crate::UNMAP_DEADLINE;

/// What becomes of a mapping whose holders do not let go before the deadline of an unmap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum UnmapPolicy {
    /// It stays inaccessible and its addresses stay taken; its memory lives until the last holder
    /// leaves. Unmapping again waits again.
    #[default]
    Revoked,
    /// It becomes accessible again. Holders that let go meanwhile do not get back what they held.
    Restore,
}

/// How long an unmap waits for holders, and what then.
///
/// ```
/// use std::time::Duration;
/// use iommu_type1::{IoAddressSpace, UnmapOptions, UnmapPolicy};
///
/// let patient = UnmapOptions::new()
///     .deadline(Duration::from_secs(4))
///     .policy(UnmapPolicy::Restore);
/// assert_eq!(IoAddressSpace::new().unmap_with(0, 0x1000, patient)?, 0);
/// # Ok::<(), iommu_type1::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct UnmapOptions {
    pub(super) deadline: Duration,
    pub(crate) policy: UnmapPolicy,
}

impl UnmapOptions {
    /// [`UNMAP_DEADLINE`] and [`UnmapPolicy::Revoked`].
    pub fn new() -> Self {
        UnmapOptions {
            deadline: UNMAP_DEADLINE,
            policy: UnmapPolicy::default(),
        }
    }

    /// How long to wait for holders, from when somebody first has to be waited for.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    pub(crate) fn longest(&self) -> Duration {
        self.deadline
    }

    /// What becomes of a mapping that is still held then.
    pub fn policy(mut self, policy: UnmapPolicy) -> Self {
        self.policy = policy;
        self
    }
}

impl Default for UnmapOptions {
    fn default() -> Self {
        UnmapOptions::new()
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Removing mappings: Live, then Revoking, then gone; or, at the deadline, what the policy says.
//!
//! 1. Under the write lock the mappings are made inaccessible. Taking that lock waits for the
//!    running inline accesses: it is the grace period.
//! 2. With no lock held, those interested are told, then leases and pins in the range are waited
//!    for.
//! 3. Under the write lock again, what is free now is removed; its memory is released after the
//!    lock.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::holder::HolderKind;
use crate::mapping::Mapping;
use crate::range::{check_aligned, IovaRange};
use crate::space::Space;
use crate::stream;
use crate::sync::write;
use crate::table::State;
use crate::{Error, Holder, IoAddressSpace, Result, UNMAP_DEADLINE};

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
    deadline: Duration,
    policy: UnmapPolicy,
}

impl UnmapOptions {
    /// [`UNMAP_DEADLINE`] and [`UnmapPolicy::Revoked`].
    pub fn new() -> Self {
        UnmapOptions {
            deadline: UNMAP_DEADLINE,
            policy: UnmapPolicy::default(),
        }
    }

    /// How long to wait for holders from the start of the unmap.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
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

impl IoAddressSpace {
    /// Removes every mapping inside `size` bytes from `iova` and returns the bytes removed, 0 where
    /// nothing is mapped.
    ///
    /// When this returns without error no access to the range is running, nothing of it is leased
    /// or pinned, and its memory is released.
    ///
    /// # Errors
    ///
    /// In this order: [`Error::Misaligned`] or [`Error::Empty`] (EINVAL), [`Error::Overflow`]
    /// (EOVERFLOW), [`Error::InsideAccess`] (EDEADLK), [`Error::Bisect`] (EINVAL: type1 v2 cuts no
    /// mapping), [`Error::Revoked`] (EBUSY: another unmap of it is running); nothing is removed by
    /// these. [`Error::Deadline`] (EDEADLK) says what was removed, and who holds the rest.
    pub fn unmap(&self, iova: u64, size: u64) -> Result<u64> {
        self.unmap_with(iova, size, self.view.space.unmap)
    }

    /// As [`unmap`](IoAddressSpace::unmap), with a deadline and policy of its own.
    ///
    /// # Errors
    ///
    /// As [`unmap`](IoAddressSpace::unmap).
    pub fn unmap_with(&self, iova: u64, size: u64, options: UnmapOptions) -> Result<u64> {
        check_aligned("address", iova)?;
        check_aligned("size", size)?;
        self.unmap_range(IovaRange::new(iova, size)?, options)
    }

    /// Removes every mapping of the space and returns the bytes removed.
    ///
    /// # Errors
    ///
    /// [`Error::InsideAccess`], [`Error::Revoked`] and [`Error::Deadline`] as
    /// [`unmap`](IoAddressSpace::unmap).
    pub fn unmap_all(&self) -> Result<u64> {
        self.unmap_range(IovaRange::ALL, self.view.space.unmap)
    }

    fn unmap_range(&self, range: IovaRange, options: UnmapOptions) -> Result<u64> {
        let deadline = Instant::now().checked_add(options.deadline);
        let revocation = Revocation::begin(&self.view.space, range, options.policy)?;
        revocation.tell();
        revocation.finish(deadline)
    }
}

/// Mappings that are being removed. Dropped without [`finish`](Revocation::finish) (a notice
/// panicked), it leaves them to the policy.
struct Revocation<'a> {
    space: &'a Space,
    mappings: Vec<Arc<Mapping>>,
    policy: UnmapPolicy,
}

impl<'a> Revocation<'a> {
    fn begin(space: &'a Space, range: IovaRange, policy: UnmapPolicy) -> Result<Self> {
        if stream::is_inside(space) {
            return Err(Error::InsideAccess {
                iova: range.first,
                size: range.size(),
            });
        }
        let mut table = write(&space.table);
        if let Some(cut) = table.cut_by(range) {
            return Err(Error::Bisect {
                iova: range.first,
                size: range.size(),
                mapped: cut.range.first,
                mapped_size: cut.range.size(),
            });
        }
        let running = table
            .in_range_mut(range)
            .find(|entry| entry.state == State::Revoking);
        if let Some(entry) = running {
            return Err(Error::Revoked {
                iova: entry.mapping.range.first,
                completed: 0,
            });
        }
        let mappings = table
            .in_range_mut(range)
            .map(|entry| {
                entry.state = State::Revoking;
                entry.mapping.clone()
            })
            .collect();
        Ok(Revocation {
            space,
            mappings,
            policy,
        })
    }

    fn tell(&self) {
        for mapping in &self.mappings {
            let range = mapping.range;
            self.space.pins.tell(range.first, range.size());
        }
    }

    fn finish(mut self, deadline: Option<Instant>) -> Result<u64> {
        // A deadline beyond the clock's range is no deadline; a day is as good.
        let deadline = deadline.unwrap_or_else(|| Instant::now() + Duration::from_secs(86_400));
        let mut holders = Vec::new();
        let (held, free): (Vec<_>, Vec<_>) = std::mem::take(&mut self.mappings)
            .into_iter()
            .partition(|mapping| {
                let found = self.wait_released(mapping.range, deadline);
                let is_held = !found.is_empty();
                holders.extend(found);
                is_held
            });
        self.mappings = held;
        let unmapped = self.remove(&free);
        if self.mappings.is_empty() {
            return Ok(unmapped);
        }
        let left = self
            .mappings
            .iter()
            .map(|mapping| mapping.range.size())
            .sum();
        log::warn!(
            "unmap at its deadline: {left:#x} bytes are still held by {} holders",
            holders.len()
        );
        Err(Error::Deadline {
            unmapped,
            left,
            holders,
        })
    }

    fn wait_released(&self, range: IovaRange, deadline: Instant) -> Vec<Holder> {
        let mut holders = self.space.leases.wait_released(range, deadline);
        let pins = self
            .space
            .pins
            .wait_released(range.first, range.size(), deadline);
        let page_size = self.space.pins.page_size();
        holders.extend(pins.err().into_iter().flatten().map(|pin| Holder {
            kind: HolderKind::Pin,
            name: pin.name,
            iova: pin.iova,
            size: pin.pages as u64 * page_size,
            age: pin.age,
        }));
        holders
    }

    fn remove(&self, free: &[Arc<Mapping>]) -> u64 {
        let mut table = write(&self.space.table);
        let removed: Vec<_> = free
            .iter()
            .filter_map(|mapping| table.remove(mapping.range.first))
            .collect();
        drop(table);
        removed.iter().map(|mapping| mapping.range.size()).sum()
    }
}

impl Drop for Revocation<'_> {
    fn drop(&mut self) {
        if self.mappings.is_empty() {
            return;
        }
        let state = match self.policy {
            UnmapPolicy::Revoked => State::Revoked,
            UnmapPolicy::Restore => State::Live,
        };
        let mut table = write(&self.space.table);
        for mapping in &self.mappings {
            for entry in table.in_range_mut(mapping.range) {
                entry.state = state;
            }
        }
    }
}

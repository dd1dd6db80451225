// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Removing mappings: Live, then Revoking, then gone; or, at the deadline, what the policy says.
//!
//! 1. Under the writer's lock the mappings are taken out of the table: no later access finds them.
//! 2. With no lock held, the accesses that run are waited for (the grace period), those interested
//!    are told, then leases and pins in the range are waited for.
//! 3. Under the lock again, what is free now is forgotten; its memory is released after the lock.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::holder::HolderKind;
use crate::mapping::Mapping;
use crate::range::{check_aligned, IovaRange};
use crate::space::Space;
use crate::stream;
use crate::sync::{lock, now};
use crate::table::Unlinked;
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
    /// mapping), [`Error::Unmapping`] (EBUSY: another unmap of it is running); nothing is removed by
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

    /// Removes every mapping of the space and returns the bytes removed. Those that another unmap is
    /// removing at the moment are left to it.
    ///
    /// # Errors
    ///
    /// [`Error::InsideAccess`] and [`Error::Deadline`] as [`unmap`](IoAddressSpace::unmap).
    pub fn unmap_all(&self) -> Result<u64> {
        self.unmap_range(IovaRange::ALL, self.view.space.unmap)
    }

    fn unmap_range(&self, range: IovaRange, options: UnmapOptions) -> Result<u64> {
        let begun = now();
        // A deadline beyond the clock's range is no deadline; a day is as good.
        let deadline = begun
            .checked_add(options.deadline)
            .unwrap_or_else(|| begun + Duration::from_secs(86_400));
        let mut revocation = Revocation::begin(&self.view.space, range, options.policy, begun)?;
        let graced = revocation.grace_period(deadline);
        revocation.tell();
        revocation.finish(graced, deadline)
    }
}

/// Mappings that are being removed. Dropped without [`finish`](Revocation::finish) (a notice
/// panicked), it leaves them to the policy.
struct Revocation<'a> {
    space: &'a Space,
    mappings: Vec<Arc<Mapping>>,
    policy: UnmapPolicy,
    /// What accesses that ran when it was taken out of the table may still see.
    unlinked: Unlinked,
    begun: Instant,
}

impl<'a> Revocation<'a> {
    fn begin(
        space: &'a Space,
        range: IovaRange,
        policy: UnmapPolicy,
        begun: Instant,
    ) -> Result<Self> {
        if stream::is_inside(space) {
            return Err(Error::InsideAccess {
                iova: range.first,
                size: range.size(),
            });
        }
        let mut writer = lock(&space.writer);
        if let Some(mapped) = writer.cut_by(&space.table, range) {
            return Err(Error::Bisect {
                iova: range.first,
                size: range.size(),
                mapped: mapped.first,
                mapped_size: mapped.size(),
            });
        }
        let running = match range {
            // Everything means whatever there is to take.
            IovaRange::ALL => None,
            _ => writer.revoking_in(range),
        };
        if let Some(leaving) = running {
            let mapped = leaving.mapping.range;
            return Err(Error::Unmapping {
                iova: range.first,
                size: range.size(),
                mapped: mapped.first,
                mapped_size: mapped.size(),
            });
        }
        let (mappings, mut unlinked) = writer.revoke(&space.table, range);
        if !mappings.is_empty() {
            // There will be a grace period; what is late can use it too.
            unlinked.append(std::mem::take(&mut writer.late));
        }
        Ok(Revocation {
            space,
            mappings,
            policy,
            unlinked,
            begun,
        })
    }

    /// Waits for the accesses that run; what no access can see any more is freed then.
    fn grace_period(&mut self, deadline: Instant) -> bool {
        if self.mappings.is_empty() {
            return true;
        }
        let passed = self.space.grace.synchronize(deadline);
        let unlinked = std::mem::take(&mut self.unlinked);
        let mut writer = lock(&self.space.writer);
        if passed {
            writer.table_bytes -= unlinked.bytes();
        } else {
            writer.late.append(unlinked);
        }
        passed
    }

    fn tell(&self) {
        for mapping in &self.mappings {
            let range = mapping.range;
            self.space.pins.tell(range.first, range.size());
        }
    }

    fn finish(mut self, graced: bool, deadline: Instant) -> Result<u64> {
        self.space.leases.wait_released(&self.mappings, deadline);
        let mut holders = Vec::new();
        let (held, free): (Vec<_>, Vec<_>) = std::mem::take(&mut self.mappings)
            .into_iter()
            .partition(|mapping| {
                let found = self.holders(mapping, graced, deadline);
                let is_held = !found.is_empty();
                holders.extend(found);
                is_held
            });
        self.mappings = held;
        let unmapped = self.remove(free);
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

    /// Who still holds something of the mapping when the deadline has passed.
    fn holders(&self, mapping: &Mapping, graced: bool, deadline: Instant) -> Vec<Holder> {
        let range = mapping.range;
        let mut holders = self.space.leases.holders(mapping);
        if !graced {
            holders.push(Holder {
                kind: HolderKind::Access,
                name: String::from("a running access"),
                iova: range.first,
                size: range.size(),
                age: now().saturating_duration_since(self.begun),
            });
        }
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

    fn remove(&self, free: Vec<Arc<Mapping>>) -> u64 {
        let mut writer = lock(&self.space.writer);
        let gone: Vec<_> = free
            .iter()
            .filter_map(|mapping| writer.forget(mapping))
            .collect();
        drop(writer);
        gone.iter().map(|gone| gone.mapping.range.size()).sum()
    }
}

impl Drop for Revocation<'_> {
    fn drop(&mut self) {
        if self.mappings.is_empty() {
            return;
        }
        let mut writer = lock(&self.space.writer);
        writer.late.append(std::mem::take(&mut self.unlinked));
        for mapping in &self.mappings {
            match self.policy {
                UnmapPolicy::Revoked => writer.keep_revoked(mapping),
                UnmapPolicy::Restore => {
                    if let Some(leaving) = writer.forget(mapping) {
                        writer.publish(&self.space.table, leaving.mapping);
                    }
                }
            }
        }
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Taking the memory of mappings away and giving them other memory: what a VMM does that is replaced by
//! another process while its devices live on.
//!
//! A mapping without memory is not in the table: it stands among those that leave, and nothing blocks.

use std::ops::ControlFlow;
use std::slice;
use std::sync::Arc;

use checked_sync::lock;
use vm_memory::Permissions;

use crate::check::Request;
use crate::deadline::Deadline;
use crate::map::{check_backing, unmapping};
use crate::mapping::Mapping;
use crate::memory;
use crate::profile::Cut;
use crate::range::IovaRange;
use crate::space::Space;
use crate::table::Unlinked;
use crate::unmap::{beginning, check_outside, inside, put_back, stops, Holders, Replaced};
use crate::writer::{State, Writer};
use crate::{Backing, Error, IoAddressSpace, Result};

impl IoAddressSpace {
    /// Takes the memory away from every mapping inside `size` bytes from `iova`, as
    /// `VFIO_DMA_UNMAP_FLAG_VADDR` does, and returns the bytes that are without.
    ///
    /// Accesses to them and pins of their pages fail at once with [`Error::VaddrInvalid`] until
    /// [`resume_vaddr`](IoAddressSpace::resume_vaddr). They stay mapped: with their addresses, permissions
    /// and dirty pages, and they can be unmapped. When this returns without error nobody uses the
    /// memory any more: accesses and leases are waited for as by an unmap.
    ///
    /// ```
    /// use iommu_type1::{Backing, IoAddressSpace};
    /// use vm_memory::Permissions::ReadWrite;
    ///
    /// let space = IoAddressSpace::new();
    /// space.map(0x4000, Backing::anonymous(0x2000)?, ReadWrite)?;
    /// space.invalidate_vaddr(0x4000, 0x2000)?;
    /// assert_eq!(space.read(0x4000, &mut [0]).unwrap_err().errno(), libc::EBUSY);
    /// space.resume_vaddr(0x4000, 0x2000, Backing::anonymous(0x2000)?)?;
    /// space.read(0x4000, &mut [0])?;
    /// # Ok::<(), iommu_type1::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// All or nothing. [`Error::NotInProfile`] (EINVAL); what [`unmap`](IoAddressSpace::unmap) says of a
    /// request that is wrong in itself; [`Error::InsideAccess`] (EDEADLK), [`Error::Bisect`] (EINVAL),
    /// [`Error::Unmapping`] (EBUSY), [`Error::VaddrInvalid`] (EINVAL: one of them has no memory already),
    /// [`Error::Pinned`] (EBUSY: who pins pages wants to use them as long as they are mapped),
    /// [`Error::AccessRuns`] (EBUSY) and [`Error::Deadline`] (EDEADLK).
    pub fn invalidate_vaddr(&self, iova: u64, size: u64) -> Result<u64> {
        let rules = self.view.space.rules;
        check_profile(&self.view.space)?;
        self.invalidate(Request::to_unmap(iova, size).check(&self.view.space, rules.unmap)?)
    }

    /// As [`invalidate_vaddr`](IoAddressSpace::invalidate_vaddr) of every mapping.
    ///
    /// # Errors
    ///
    /// As [`invalidate_vaddr`](IoAddressSpace::invalidate_vaddr).
    pub fn invalidate_all_vaddr(&self) -> Result<u64> {
        check_profile(&self.view.space)?;
        self.invalidate(IovaRange::ALL)
    }

    /// How many mappings have no memory at the moment.
    ///
    /// The kernel attaches nothing to a container that has one (EBUSY): hardware may need all memory at once.
    pub fn without_memory(&self) -> usize {
        let writer = lock(&self.view.space.writer);
        let leaving = writer.leaving_inside(IovaRange::ALL);
        leaving.filter(|leaving| leaving.state.is_vaddr()).count()
    }

    /// Gives a mapping without memory other memory, as `VFIO_DMA_MAP_FLAG_VADDR` does; it permits what it
    /// did before, and its dirty pages stay dirty.
    ///
    /// # Errors
    ///
    /// [`Error::NotInProfile`] (EINVAL); [`Error::Empty`] (EINVAL), [`Error::Overflow`] or
    /// [`Error::HostOverflow`] (EOVERFLOW), [`Error::Misaligned`] (EINVAL); [`Error::NothingMapped`]
    /// (ENOENT); [`Error::Unmapping`] (EBUSY); [`Error::VaddrValid`] (EINVAL) where it is not exactly a
    /// mapping without memory; [`Error::BackingRange`] (of other than `size` bytes),
    /// [`Error::BackingProtection`] (EFAULT). The mapping stays without memory then.
    pub fn resume_vaddr(&self, iova: u64, size: u64, backing: Backing) -> Result<()> {
        let space = &*self.view.space;
        check_profile(space)?;
        let request = Request {
            size,
            ..Request::to_map(iova, &backing, Permissions::ReadWrite)
        };
        let range = request.check(space, space.rules.map)?;
        let writer = space.turn(range)?;
        let hollow = hollow_at(&writer, space, range)?;
        if backing.len() as u64 != size {
            return Err(Error::BackingRange {
                offset: 0,
                len: size,
                size: backing.len() as u64,
            });
        }
        check_backing(space, range, &backing, hollow.permissions())?;
        let mapping = Arc::new(hollow.with_memory(backing));
        let (mut writer, agreed) = writer.ask(&[], slice::from_ref(&mapping), |_| Ok(()));
        agreed?;
        if let Err(error) = writer.publish(&space.table, mapping.clone()) {
            drop(writer.report(slice::from_ref(&mapping), &[]));
            return Err(error);
        }
        hollow.give_marks(&mapping);
        writer.forget(&[mapping]);
        if writer.tracking {
            writer.log_bytes -= hollow.log_bytes();
        }
        Ok(())
    }

    /// As [`resume_vaddr`](IoAddressSpace::resume_vaddr) with memory at an address of somebody: `resolve` finds
    /// it, for what the mapping permits, when nothing else is wrong. It runs without a lock.
    #[cfg(feature = "uapi")]
    pub(crate) fn resume_resolved(
        &self,
        iova: u64,
        size: u64,
        host: u64,
        resolve: impl FnOnce(Permissions) -> Result<Backing>,
    ) -> Result<()> {
        let space = &*self.view.space;
        check_profile(space)?;
        let request = Request {
            host,
            ..Request::to_unmap(iova, size)
        };
        let range = request.check(space, space.rules.map)?;
        let prot = hollow_at(&lock(&space.writer), space, range)?.permissions();
        self.resume_vaddr(iova, size, resolve(prot)?)
    }

    fn invalidate(&self, range: IovaRange) -> Result<u64> {
        let space = &*self.view.space;
        check_outside(space, range)?;
        let mut writer = space.turn(range)?;
        let mut mappings = Vec::new();
        match space.rules.cut {
            Cut::Whole => beginning(&writer, space, range, &mut mappings)?,
            Cut::Refuse | Cut::Split => inside(&writer, space, range, &mut mappings)?,
        }
        if stops(&writer, space, range) {
            // Nothing behind is looked at either, whatever its state.
            return Ok(0);
        }
        check_valid(&writer, range)?;
        check_unpinned(space, &mappings)?;
        // The same memory may have been replaced here, and put back.
        let ranges = memory::collect(mappings.iter().map(|mapping| mapping.range))?;
        let used = writer.replaced_in(&ranges).cloned();
        let mut used = memory::collect(used.map(Replaced::of))?;
        writer.reserve_leaving(mappings.len())?;
        let mut unlinked = Unlinked::default();
        writer.revoke(&space.table, &mappings, &mut unlinked);
        for mapping in &mappings {
            writer.set_state(mapping, State::Invalidating);
        }
        drop(writer.report(&mappings, &[]));
        let deadline = Deadline::after(space.unmap.longest());
        let graced = mappings.is_empty() || space.grace.synchronize(&deadline);
        let outcome = unused(space, &mappings, &used, &deadline, graced);

        // A harvest forgets nothing that it refers to (`Revocation::remove`).
        let harvest = outcome.is_ok().then(|| lock(&space.harvest));
        if outcome.is_ok() {
            used.iter_mut().for_each(|replaced| replaced.over = true);
            // Who has replaced them may have waited too, and left them to whoever is the last.
            let mut writer = lock(&space.writer);
            writer.release(&space.table, &space.pins, &mut used);
        }
        drop(harvest);
        drop(used);
        let mut writer = space.another_turn();
        if graced {
            writer.table_bytes -= unlinked.bytes();
        } else {
            writer.late.append(std::mem::take(&mut unlinked));
        }
        let hollows = outcome.and_then(|()| {
            memory::try_collect(mappings.iter().map(|mapping| writer.hollow(mapping)))
        });
        let sizes = mappings.iter().map(|mapping| mapping.range.size());
        let size = sizes.fold(0, u64::saturating_add);
        match hollows {
            Ok(hollows) => {
                for (mapping, hollow) in mappings.iter().zip(hollows) {
                    writer.hollow_out(mapping, hollow);
                }
                Ok(size)
            }
            Err(error) => {
                drop(put_back(writer, space, mappings));
                Err(error)
            }
        }
    }
}

fn check_profile(space: &Space) -> Result<()> {
    match space.rules.vaddr {
        true => Ok(()),
        false => Err(Error::NotInProfile("an invalidation of addresses")),
    }
}

/// Refuses a range in which a mapping has no memory, or is being unmapped.
fn check_valid(writer: &Writer, range: IovaRange) -> Result<()> {
    match writer.leaving_inside(range).next() {
        Some(leaving) if leaving.state == State::Invalid => Err(Error::VaddrInvalid {
            iova: leaving.mapping.range.first,
            completed: 0,
            errno: libc::EINVAL,
        }),
        Some(leaving) => Err(unmapping(range, leaving)),
        None => Ok(()),
    }
}

fn check_unpinned(space: &Space, mappings: &[Arc<Mapping>]) -> Result<()> {
    let pinned = mappings
        .iter()
        .map(|mapping| mapping.range)
        .find(|range| space.pins.is_pinned(range.first, range.size()));
    pinned.map_or(Ok(()), |range| {
        Err(Error::Pinned {
            iova: range.first,
            size: range.size(),
        })
    })
}

/// Waits for the leases of what is `used`, after the grace period; refuses mappings that somebody uses.
fn unused(
    space: &Space,
    mappings: &[Arc<Mapping>],
    used: &[Replaced],
    deadline: &Deadline,
    graced: bool,
) -> Result<()> {
    if !graced {
        return Err(Error::AccessRuns {
            waited: deadline.age(),
        });
    }
    // Of accesses that were running when it was looked at before.
    check_unpinned(space, mappings)?;
    let used = used.iter().map(|replaced| &replaced.mapping);
    let used = mappings.iter().chain(used);
    let leased = space.leases.wait_released(used.clone(), deadline);
    if leased.is_empty() {
        return Ok(());
    }
    let held = used.filter(|mapping| leased.has(mapping));
    let sizes = held.clone().map(|mapping| mapping.range.size());
    let mut holders = Holders::default();
    for mapping in held {
        let leases = &space.leases;
        leases.each_holder(mapping, |holder| holders.add(holder));
    }
    Err(Error::Deadline {
        unmapped: 0,
        left: sizes.fold(0, u64::saturating_add),
        holders: holders.listed,
    })
}

/// The mapping without memory that is exactly at `range`.
fn hollow_at(writer: &Writer, space: &Space, range: IovaRange) -> Result<Arc<Mapping>> {
    let leaving = writer.leaving_in(range);
    if let Some(leaving) = leaving.filter(|leaving| leaving.state != State::Invalid) {
        return Err(unmapping(range, leaving));
    }
    let hollow = leaving.map(|leaving| &leaving.mapping);
    match hollow {
        Some(hollow) if hollow.range == range => return Ok(hollow.clone()),
        _ => {}
    }
    let live = space
        .table
        .visit(range, |mapping| ControlFlow::Break(mapping.range));
    let Some(mapped) = hollow.map(|hollow| hollow.range).or(live) else {
        return Err(Error::NothingMapped {
            iova: range.first,
            size: range.size(),
        });
    };
    Err(Error::VaddrValid {
        iova: range.first,
        size: range.size(),
        mapped: mapped.first,
        mapped_size: mapped.size(),
    })
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Putting mappings in the place of others: replacements, and cuts.
//!
//! What is replaced leaves the table, and what replaces it comes, during one turn as the writer. An access
//! that finds nothing in between looks again when that turn is over (`Space::look_again`): at every
//! address it finds what was there or what is there, and never a hole. What was replaced has no addresses
//! any more, but whoever has found it before may use it; it stays among the `replaced` until nobody does,
//! and the marks of its pages go to what has its addresses.

use std::ops::ControlFlow;
use std::slice;
use std::sync::Arc;

use vm_memory::Permissions;

use crate::check::Request;
use crate::map::{check_backing, check_entries, check_memory, check_not_unmapping, unmapping};
use crate::mapping::Mapping;
use crate::memory;
use crate::range::IovaRange;
use crate::space::Space;
use crate::table::{Table, Unlinked};
use crate::turn::Turn;
use crate::unmap::{check_outside, share_all, Cuts, Replaced, Revocation, Undo};
use crate::writer::{Leaving, Writer};
use crate::{Backing, Error, IoAddressSpace, Result, UnmapOptions};

impl IoAddressSpace {
    /// Has other memory and permissions stand in the place of exactly one mapping, of as many bytes.
    ///
    /// Accesses find the memory before or the memory after, never nothing. Dirty pages of the range stay
    /// dirty. When this returns without error nobody uses the memory before any more: accesses, leases
    /// and pins are waited for, and told, as by an unmap. (Pins are known by their address: who pins pages
    /// of the new memory before this has returned is waited for too.)
    ///
    /// ```
    /// use iommu_type1::{Backing, IoAddressSpace};
    /// use vm_memory::Permissions::ReadWrite;
    ///
    /// let space = IoAddressSpace::new();
    /// space.map(0x4000, Backing::anonymous(0x2000)?, ReadWrite)?;
    /// space.write(0x4000, &[1])?;
    /// space.replace(0x4000, Backing::anonymous(0x2000)?, ReadWrite)?;
    /// let mut byte = [1];
    /// space.read(0x4000, &mut byte)?;
    /// assert_eq!(byte, [0]);
    /// # Ok::<(), iommu_type1::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// What [`map`](IoAddressSpace::map) says of a request that is wrong in itself;
    /// [`Error::InsideAccess`] (EDEADLK); [`Error::Unmapping`] (EBUSY); [`Error::VaddrInvalid`] (EBUSY);
    /// [`Error::NothingMapped`] (ENOENT); [`Error::Bisect`] (as of an unmap) where it is not exactly one
    /// mapping; [`Error::EntryLimit`], [`Error::TableLimit`], [`Error::DirtyLimit`] (ENOSPC); [`Error::BackingProtection`]
    /// (EFAULT); [`Error::NoMemory`] (ENOMEM). Nothing is replaced by these. [`Error::Deadline`] (EDEADLK) names who uses the memory
    /// before: with [`UnmapPolicy::Revoked`](crate::UnmapPolicy::Revoked) it is replaced nevertheless, and
    /// waited for again by the next unmap; with [`UnmapPolicy::Restore`](crate::UnmapPolicy::Restore) it is
    /// there again, unless what replaced it was unmapped or replaced meanwhile.
    pub fn replace(&self, iova: u64, backing: Backing, prot: Permissions) -> Result<()> {
        self.replace_with(iova, backing, prot, self.view.space.unmap)
    }

    /// As [`replace`](IoAddressSpace::replace), with a deadline and policy of its own.
    ///
    /// # Errors
    ///
    /// As [`replace`](IoAddressSpace::replace).
    pub fn replace_with(
        &self,
        iova: u64,
        backing: Backing,
        prot: Permissions,
        options: UnmapOptions,
    ) -> Result<()> {
        let space = &*self.view.space;
        let range = Request::to_map(iova, &backing, prot).check(space, space.rules.map)?;
        check_outside(space, range)?;
        let writer = space.turn(range)?;
        check_not_unmapping(&writer, range)?;
        if writer.leaving_in(range).is_some() {
            return Err(Error::VaddrInvalid {
                iova,
                completed: 0,
                errno: libc::EBUSY,
            });
        }
        let before = overlapping(space, range)?;
        let Some(first) = before.first() else {
            return Err(Error::NothingMapped {
                iova,
                size: range.size(),
            });
        };
        if let Some(other) = before.iter().find(|mapping| mapping.range != range) {
            return Err(Error::Bisect {
                iova,
                size: range.size(),
                mapped: other.range.first,
                mapped_size: other.range.size(),
                errno: space.rules.cut_errno,
            });
        }
        // As many as before, but for those that are replaced and still used.
        check_entries(&writer, space, 0)?;
        check_memory(&writer, space, [range])?;
        check_backing(space, range, &backing, prot)?;
        let by = Arc::new(space.mapping(range, prot, backing, self.view.set));
        let undo = Undo {
            by: vec![by.clone()],
            holes: Vec::new(),
            parts: vec![Arc::new(first.part(range))],
        };
        let new = slice::from_ref(&by);
        let room = |writer: &Writer| check_memory(writer, space, [range]);
        let (mut writer, agreed) = writer.ask(&before, new, room);
        agreed?;
        let mut unlinked = Unlinked::default();
        if let Err((_, error)) = writer.exchange(&space.table, &before, &[], new, &mut unlinked) {
            // Nobody has seen the new one, as there is only one.
            writer.late.append(unlinked);
            drop(writer.report(new, &before));
            return Err(error);
        }
        drop(writer);
        drop(by);
        let replaced = before.into_iter().map(|mapping| Replaced {
            gone: vec![range],
            ..Replaced::of(mapping)
        });
        // One.
        let replaced = replaced.collect();
        Revocation::of_replaced(space, replaced, undo, unlinked, options).run(None)?;
        Ok(())
    }
}

/// Has mappings begin and end where `range` does, of which nothing is being removed then. Their memory
/// stays what it is.
pub(crate) fn cut(
    writer: &mut Writer,
    space: &Space,
    range: IovaRange,
    unlinked: &mut Unlinked,
    cuts: &mut Cuts,
) -> Result<()> {
    let is_in_the_way =
        |leaving: &&Leaving| leaving.state.is_busy() || !range.contains_all(leaving.mapping.range);
    match writer.all_leaving_in(range).find(is_in_the_way) {
        Some(leaving) if range != IovaRange::ALL => return Err(unmapping(range, leaving)),
        _ => {}
    }
    let mut before = overlapping(space, range)?;
    before.retain(|mapping| !range.contains_all(mapping.range));
    if before.is_empty() {
        return Ok(());
    }
    let mut after = Vec::new();
    for mapping in &before {
        let [left, right] = outside(mapping.range, range);
        let parts = [left, Some(mapping.range.clamp(range)), right];
        let parts = parts.into_iter().flatten();
        memory::extend(&mut after, parts.map(|part| Arc::new(mapping.part(part))))?;
    }
    check_entries(writer, space, after.len() - before.len())?;
    check_memory(writer, space, after.iter().map(|mapping| mapping.range))?;
    memory::reserve(&mut cuts.before, before.len())?;
    memory::reserve(&mut cuts.after, after.len())?;
    // Parts that were there for a moment are the same memory: who uses one is waited for as for what was replaced.
    let exchanged = writer.exchange(&space.table, &before, &[], &after, unlinked);
    exchanged.map_err(|(_, error)| error)?;
    cuts.before.extend(before);
    cuts.after.extend(after);
    Ok(())
}

/// Ends an [`exchange`](Writer::exchange) that failed: those who listen are told, and whoever has seen what was there
/// for a moment is waited for.
pub(crate) fn end_failed(
    turn: Turn<'_>,
    space: &Space,
    before: &[Arc<Mapping>],
    mut after: Vec<Arc<Mapping>>,
    published: usize,
    unlinked: Unlinked,
) {
    let mut turn = turn.report(&after, before);
    after.truncate(published);
    let seen = memory::collect(after.into_iter().map(Replaced::of)).unwrap_or_default();
    if seen.is_empty() {
        // Nobody has seen anything; or the next unmap there waits for who has.
        turn.late.append(unlinked);
        return;
    }
    drop(turn);
    let mut revocation =
        Revocation::of_replaced(space, seen, Undo::default(), unlinked, space.unmap);
    if let Err(error) = revocation.run(None) {
        log::warn!("what was mapped before there was no memory: {error}");
    }
}

/// Puts back what was replaced, if what has replaced it is still there, and nothing where nothing was left. If so, what had
/// replaced it.
pub(crate) fn undo(turn: Turn<'_>, table: &Table, undo: Undo) -> Option<Vec<Arc<Mapping>>> {
    let is_there = |by: &Arc<Mapping>| {
        let found = table.visit(by.range, |mapping| {
            ControlFlow::Break(std::ptr::eq(mapping, Arc::as_ptr(by)))
        });
        found == Some(true)
    };
    let is_free = |hole: &IovaRange| {
        let found = table.visit(*hole, |_| ControlFlow::Break(()));
        found.is_none() && turn.leaving_in(*hole).is_none()
    };
    if !undo.by.iter().all(is_there) || !undo.holes.iter().all(is_free) {
        return None;
    }
    let mut unlinked = Unlinked::default();
    // Nobody else can change it while those who listen are told.
    let mut writer = turn.report(&undo.by, &undo.parts);
    let exchanged = writer.exchange(table, &undo.by, &[], &undo.parts, &mut unlinked);
    if let Err((_, error)) = &exchanged {
        log::warn!("what was replaced is not put back: {error}");
        writer = writer.report(&undo.parts, &undo.by);
    }
    writer.late.append(unlinked);
    exchanged.is_ok().then_some(undo.by)
}

/// The mappings of the table that share an address with a range.
fn overlapping(space: &Space, range: IovaRange) -> Result<Vec<Arc<Mapping>>> {
    let mut found = Vec::new();
    share_all(space, range, &mut found)?;
    Ok(found)
}

/// The parts of a mapped range before and behind another that it overlaps.
pub(crate) fn outside(mapped: IovaRange, range: IovaRange) -> [Option<IovaRange>; 2] {
    let before = (mapped.first < range.first).then(|| IovaRange {
        first: mapped.first,
        last: range.first - 1,
    });
    let behind = (mapped.last > range.last).then(|| IovaRange {
        first: range.last + 1,
        last: mapped.last,
    });
    [before, behind]
}

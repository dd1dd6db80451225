// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Changes of an IOTLB: maps over whatever is there and unmaps of whatever is there, all of a list at once.
//!
//! What a list comes to is decided first: pieces of addresses, each with new memory or with none. The pieces
//! then come during one turn as the writer, as a replacement does ([`crate::replace`]).

use std::collections::BTreeMap;
use std::ptr;
use std::sync::Arc;

use vm_memory::Permissions;

use crate::check::Request;
use crate::map::{check_backing, check_entries, check_memory, unmapping};
use crate::mapping::Mapping;
use crate::mapping_set::SetId;
use crate::memory;
use crate::profile::Overlapping;
use crate::range::{first_met, union, IovaRange};
use crate::replace::{end_failed, outside};
use crate::space::Space;
use crate::table::{Table, Unlinked};
use crate::unmap::{check_outside, check_owned, meet_replaced, Replaced, Revocation, Undo};
use crate::writer::{State, Writer};
use crate::{Backing, Error, IoAddressSpace, Result, UnmapOptions};

/// One change of what an IOTLB maps, for [`IoAddressSpace::change`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Change {
    /// Maps over whatever is there.
    Map {
        /// First address.
        iova: u64,
        /// The memory, all of it.
        backing: Backing,
        /// For which accesses.
        prot: Permissions,
    },
    /// Unmaps whatever is there, also parts of mappings.
    Unmap {
        /// First address.
        iova: u64,
        /// Bytes.
        size: u64,
    },
    /// Unmaps everything.
    UnmapAll,
}

impl IoAddressSpace {
    /// Makes several changes at once, in a space with [`Profile::Iotlb`](crate::Profile::Iotlb).
    ///
    /// They count in the order given: of addresses that several are about, the last has the say. All of them are
    /// made or none, with no map or unmap of somebody else in between, and one grace period serves all. An
    /// access that runs meanwhile finds at each address what was there or what is there, and never a hole where
    /// both have something. When this returns without error nobody uses what was there any more: accesses,
    /// leases and pins are told and waited for, as by an unmap. So is whoever has made an unmap fail at its deadline,
    /// where the list unmaps all of that mapping.
    ///
    /// ```
    /// use iommu_type1::{Backing, Change, IoAddressSpace, Profile};
    /// use vm_memory::Permissions::ReadWrite;
    ///
    /// let space = IoAddressSpace::builder().profile(Profile::Iotlb).build();
    /// let backing = Backing::anonymous(0x4000)?;
    /// space.change([
    ///     Change::Map { iova: 0x1000, backing, prot: ReadWrite },
    ///     Change::Unmap { iova: 0x2000, size: 0x1000 },
    /// ])?;
    /// assert_eq!(space.mappings(), 2);
    /// assert_eq!(space.read(0x2000, &mut [0]).unwrap_err().errno(), libc::EAGAIN);
    /// # Ok::<(), iommu_type1::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::NotInProfile`] (EINVAL). What [`map`](IoAddressSpace::map) and [`unmap`](IoAddressSpace::unmap)
    /// say of a request that is wrong in itself; [`Error::Unmapping`] (EBUSY); [`Error::EntryLimit`],
    /// [`Error::TableLimit`], [`Error::DirtyLimit`] (ENOSPC); [`Error::OutsideRanges`] (EINVAL);
    /// [`Error::BackingProtection`] (EFAULT); [`Error::InsideAccess`] (EDEADLK); [`Error::NoMemory`] (ENOMEM).
    /// Nothing is changed by these.
    /// [`Error::Deadline`] (EDEADLK) names who uses what was there: with
    /// [`UnmapPolicy::Revoked`](crate::UnmapPolicy::Revoked) all changes are made nevertheless, and those users
    /// waited for again by the next unmap of their addresses; with
    /// [`UnmapPolicy::Restore`](crate::UnmapPolicy::Restore) everything is as it was, unless somebody has changed
    /// any of it meanwhile.
    pub fn change(&self, changes: impl IntoIterator<Item = Change>) -> Result<()> {
        self.change_with(changes, self.view.space.unmap)
    }

    /// As [`change`](IoAddressSpace::change), with a deadline and policy of its own.
    ///
    /// # Errors
    ///
    /// As [`change`](IoAddressSpace::change).
    pub fn change_with(
        &self,
        changes: impl IntoIterator<Item = Change>,
        options: UnmapOptions,
    ) -> Result<()> {
        let space = &*self.view.space;
        if space.rules.overlapping != Overlapping::Replace {
            return Err(Error::NotInProfile("a list of changes"));
        }
        let pieces = changes.into_iter().map(|change| Piece::of(space, change));
        let pieces = memory::try_collect(pieces)?;
        change(space, pieces, self.view.set, options)
    }
}

/// Addresses, and what comes there: memory or nothing.
pub(crate) struct Piece {
    pub(crate) range: IovaRange,
    pub(crate) memory: Option<(Backing, Permissions)>,
}

impl Piece {
    fn of(space: &Space, change: Change) -> Result<Self> {
        Ok(match change {
            Change::Map {
                iova,
                backing,
                prot,
            } => Piece {
                range: Request::to_map(iova, &backing, prot).check(space, space.rules.map)?,
                memory: Some((backing, prot)),
            },
            Change::Unmap { iova, size } => Piece {
                range: Request::to_unmap(iova, size).check(space, space.rules.unmap)?,
                memory: None,
            },
            Change::UnmapAll => Piece {
                range: IovaRange::ALL,
                memory: None,
            },
        })
    }

    /// A part of it.
    fn part(&self, range: IovaRange) -> Result<Self> {
        let memory = match &self.memory {
            Some((backing, prot)) => {
                let offset = range.first - self.range.first;
                let part = backing.slice(offset as usize, range.size() as usize)?;
                Some((part, *prot))
            }
            None => None,
        };
        Ok(Piece { range, memory })
    }
}

/// Makes changes, all or none.
pub(crate) fn change(
    space: &Space,
    pieces: Vec<Piece>,
    set: SetId,
    options: UnmapOptions,
) -> Result<()> {
    let unmapped = unmapped_by(&pieces)?;
    let pieces = apart(pieces)?;
    let Some(first) = pieces.first() else {
        return Ok(());
    };
    let writer = space.turn(first.range)?;
    let mut revoked = Vec::new();
    for piece in &pieces {
        meet_revoked(&writer, piece, &unmapped, &mut revoked)?;
        check_owned(&writer, space, piece.range, set)?;
    }
    let mut replaced = meet(space, &pieces)?;
    let before = memory::collect(replaced.iter().map(|met| met.mapping.clone()))?;
    let mut after = stays(&replaced)?;
    let maps = || pieces.iter().filter(|piece| piece.memory.is_some());
    // What only goes needs no room, also where there is none left.
    let more = after.len() + maps().count();
    if more > 0 {
        check_entries(&writer, space, more.saturating_sub(before.len()))?;
    }
    let stay = memory::collect(after.iter().map(|mapping| mapping.range))?;
    let room = |writer: &Writer| {
        let new = maps().map(|piece| piece.range);
        if more > 0 {
            check_memory(writer, space, stay.iter().copied().chain(new))?;
        }
        maps().try_for_each(|piece| writer.ranges.check(piece.range, space.rules))
    };
    room(&writer)?;
    for piece in &pieces {
        if let Some((backing, prot)) = &piece.memory {
            check_backing(space, piece.range, backing, *prot)?;
        }
    }
    let mut undo = Undo::default();
    for piece in &pieces {
        match &piece.memory {
            Some((backing, prot)) => {
                let by = space.mapping(piece.range, *prot, backing.clone(), set);
                memory::push(&mut undo.by, Arc::new(by))?;
            }
            None => memory::push(&mut undo.holes, piece.range)?,
        }
    }
    memory::extend(&mut after, undo.by.iter().cloned())?;
    for met in &replaced {
        let parts = met.gone.iter();
        let parts = parts.map(|gone| Arc::new(met.mapping.part(*gone)));
        memory::extend(&mut undo.parts, parts)?;
    }
    // Who uses what was replaced there before is waited for too.
    let others = meet_replaced(&writer, space, &unmapped, |_| true)?;
    memory::extend(&mut replaced, others)?;
    // And so is who uses what was revoked in vain.
    let others = revoked.iter().map(|mapping| Replaced {
        gone: vec![mapping.range],
        ..Replaced::of(mapping.clone())
    });
    memory::extend(&mut replaced, others)?;
    if !replaced.is_empty() {
        check_outside(space, first.range)?;
    }
    let (mut writer, agreed) = writer.ask(&before, &after, room);
    agreed?;
    let mut unlinked = Unlinked::default();
    let exchanged = writer.exchange(&space.table, &before, &revoked, &after, &mut unlinked);
    if let Err((published, error)) = exchanged {
        drop(undo);
        end_failed(writer, space, &before, after, published, unlinked);
        return Err(error);
    }
    drop(after);
    writer.maps += undo.by.len() as u64;
    drop(writer);
    drop((before, revoked));
    Revocation::of_replaced(space, replaced, undo, unlinked, options).run(None)?;
    Ok(())
}

/// The addresses that a list unmaps, whatever it maps there then.
fn unmapped_by(pieces: &[Piece]) -> Result<Vec<IovaRange>> {
    let holes = pieces.iter().filter(|piece| piece.memory.is_none());
    Ok(union(memory::collect(holes.map(|piece| piece.range))?))
}

/// Adds what was revoked in vain at the addresses of a piece, if the list unmaps all of it; refuses what else is
/// being unmapped there. Of everything what another unmap is about is left to that.
fn meet_revoked(
    writer: &Writer,
    piece: &Piece,
    unmapped: &[IovaRange],
    met: &mut Vec<Arc<Mapping>>,
) -> Result<()> {
    for leaving in writer.all_leaving_in(piece.range) {
        let mapping = &leaving.mapping;
        let unmapped = first_met(unmapped, mapping.range);
        let is_all = unmapped.is_some_and(|range| range.contains_all(mapping.range));
        let takes_what_there_is = unmapped == Some(IovaRange::ALL) && piece.memory.is_none();
        match leaving.state {
            State::Revoked if is_all => {
                // The piece before may have met it.
                let is_it = |last: &Arc<Mapping>| Arc::ptr_eq(last, mapping);
                if !met.last().is_some_and(is_it) {
                    memory::push(met, mapping.clone())?;
                }
            }
            _ if takes_what_there_is => {}
            _ => return Err(unmapping(piece.range, leaving)),
        }
    }
    Ok(())
}

/// The pieces by address and without a piece that another has the say about.
fn apart(pieces: Vec<Piece>) -> Result<Vec<Piece>> {
    if pieces.len() < 2 {
        return Ok(pieces);
    }
    let mut apart: BTreeMap<u64, Piece> = BTreeMap::new();
    for piece in pieces {
        let range = piece.range;
        let below = apart.range(..=range.last).rev();
        let met = below
            .take_while(|(_, other)| other.range.last >= range.first)
            .map(|(first, _)| *first);
        for first in memory::collect(met)? {
            let Some(other) = apart.remove(&first) else {
                continue;
            };
            for rest in outside(other.range, range).into_iter().flatten() {
                apart.insert(rest.first, other.part(rest)?);
            }
        }
        apart.insert(range.first, piece);
    }
    memory::collect(apart.into_values())
}

/// What is mapped at the addresses of pieces, which are by address, and which parts of it go.
fn meet(space: &Space, pieces: &[Piece]) -> Result<Vec<Replaced>> {
    let mut met: Vec<Replaced> = Vec::new();
    for piece in pieces {
        space.table.try_visit(piece.range, |mapping| {
            let gone = mapping.range.clamp(piece.range);
            match met.last_mut() {
                Some(last) if ptr::eq(&*last.mapping, mapping) => {
                    memory::push(&mut last.gone, gone)
                }
                _ => {
                    let gone = vec![gone];
                    let of = Replaced::of(Table::share(mapping));
                    memory::push(&mut met, Replaced { gone, ..of })
                }
            }
        })?;
    }
    Ok(met)
}

/// The parts that do not go.
fn stays(met: &[Replaced]) -> Result<Vec<Arc<Mapping>>> {
    let mut stays = Vec::new();
    for Replaced { mapping, gone, .. } in met {
        let mut rest = Some(mapping.range);
        for gone in gone {
            let [below, behind] = rest.map_or([None, None], |rest| outside(rest, *gone));
            memory::extend(&mut stays, below.map(|part| Arc::new(mapping.part(part))))?;
            rest = behind;
        }
        memory::extend(&mut stays, rest.map(|part| Arc::new(mapping.part(part))))?;
    }
    Ok(stays)
}

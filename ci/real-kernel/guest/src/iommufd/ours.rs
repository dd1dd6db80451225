// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Our crate by the rules of iommufd. What belongs to ids and structs is done here, what belongs to
//! addresses by the crate.

use std::fs::File;
use std::ops::RangeInclusive;
use std::sync::Arc;

use iommu_type1::uapi::{Type1, UserMemory};
use iommu_type1::{Backing, Error, IoAddressSpace, IovaRanges, Profile, Result};
use vfio_bindings::bindings::vfio::{
    vfio_iommu_type1_dma_map, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE,
};
use vm_memory::{FileOffset, Permissions};

use super::op::{
    Allow, Copied, Map, Memory, Op, Outcome, Unmap, ATTACHED, FIXED, READ, SPACES, WRITE,
};
use super::rules::{alignment, Area, Rules};
use crate::memory::PAGE;
use crate::ours::OwnMemory;

/// No errno of the kernel's: an answer that breaks a rule.
const WRONG: i32 = -1;

/// Spaces of ours in the places of IOASes.
#[derive(Debug)]
pub struct Ours {
    spaces: [Option<Type1<OwnMemory>>; SPACES],
    reserved: Vec<RangeInclusive<u64>>,
    file: Arc<File>,
}

fn new_space(ranges: IovaRanges) -> Type1<OwnMemory> {
    let builder = IoAddressSpace::builder().profile(Profile::Iommufd);
    Type1::new(builder.iova_ranges(ranges).build(), OwnMemory)
}

fn permissions(flags: u32) -> Permissions {
    match (flags & READ != 0, flags & WRITE != 0) {
        (true, true) => Permissions::ReadWrite,
        (true, false) => Permissions::Read,
        (false, true) => Permissions::Write,
        (false, false) => Permissions::No,
    }
}

fn errno(error: Error) -> i32 {
    error.errno()
}

impl Ours {
    /// With all spaces there, and nothing mapped.
    pub fn new(reserved: &[(u64, u64)], file: &Arc<File>) -> Result<Self> {
        let reserved: Vec<_> = reserved
            .iter()
            .map(|(first, last)| *first..=*last)
            .collect();
        let ranges = IovaRanges::new(&[], &reserved)?;
        Ok(Ours {
            spaces: std::array::from_fn(|space| {
                let ranges = if space == ATTACHED {
                    ranges.clone()
                } else {
                    IovaRanges::default()
                };
                Some(new_space(ranges))
            }),
            reserved,
            file: file.clone(),
        })
    }

    fn reserved(&self, space: usize) -> &[RangeInclusive<u64>] {
        if space == ATTACHED {
            &self.reserved
        } else {
            &[]
        }
    }

    fn type1(&self, space: usize) -> std::result::Result<&Type1<OwnMemory>, i32> {
        self.spaces[space].as_ref().ok_or(libc::ENOENT)
    }

    /// Follows what the kernel may do as it likes, or does on the way to an error: an address that it has
    /// chosen, areas that it has removed.
    pub fn apply(&mut self, op: &Op, kernel: &Outcome, rules: &Rules) -> Outcome {
        let changed = |result: std::result::Result<u64, i32>, given: u64| {
            Outcome::plain(result.map(|_| ()), result.unwrap_or(given))
        };
        match op {
            Op::Alloc(space) => {
                self.spaces[*space] = Some(new_space(IovaRanges::default()));
                Outcome::plain(Ok(()), 0)
            }
            Op::Destroy(space) => Outcome::plain(self.destroy(*space), 0),
            Op::Map(map) => changed(self.map(map, kernel, rules), map.iova),
            Op::Unmap(unmap) => changed(self.unmap(unmap, rules), unmap.length),
            Op::Copy(copy) => changed(self.copy(copy, kernel, rules), copy.to_iova),
            Op::Ranges(space, room) => self.ranges(*space, *room),
            Op::Allow(allow) => Outcome::plain(self.allow(allow), 0),
        }
    }

    fn map(&self, map: &Map, kernel: &Outcome, rules: &Rules) -> std::result::Result<u64, i32> {
        let Map {
            flags,
            length,
            iova,
            ..
        } = *map;
        let type1 = self.type1(map.space)?;
        let prot = permissions(flags);
        if let (Memory::Own(vaddr), true) = (map.memory, flags & FIXED != 0) {
            let read = if flags & READ != 0 {
                VFIO_DMA_MAP_FLAG_READ
            } else {
                0
            };
            let write = if flags & WRITE != 0 {
                VFIO_DMA_MAP_FLAG_WRITE
            } else {
                0
            };
            let argsz = size_of::<vfio_iommu_type1_dma_map>() as u32;
            let (flags, size) = (read | write, length);
            let arg = vfio_iommu_type1_dma_map {
                argsz,
                flags,
                vaddr,
                iova,
                size,
            };
            return type1.map_dma(&arg).map_err(errno).map(|()| iova);
        }
        let backing = self.backing(map.memory, length, prot)?;
        let space = type1.space();
        if flags & FIXED != 0 {
            return space.map(iova, backing, prot).map_err(errno).map(|()| iova);
        }
        let found = space.map_anywhere(backing.clone(), prot).map_err(errno)?;
        if !is_right(map.space, found, &backing, rules) || kernel.result.is_err() {
            return Ok(found);
        }
        if space.unmap(found, length).map_err(errno)? != length {
            return Err(WRONG);
        }
        space.map(kernel.value, backing, prot).map_err(errno)?;
        Ok(kernel.value)
    }

    fn backing(
        &self,
        memory: Memory,
        length: u64,
        prot: Permissions,
    ) -> std::result::Result<Backing, i32> {
        match memory {
            Memory::Own(vaddr) => OwnMemory.backing(vaddr, length, prot).map_err(errno),
            Memory::File(start) => {
                let file = FileOffset::from_arc(self.file.clone(), start);
                Backing::file(file, length as usize, Permissions::ReadWrite).map_err(errno)
            }
            Memory::Closed => Err(libc::EBADF),
        }
    }

    /// Has mapped what a copy that was refused would have.
    pub fn follow(&self, to: usize, iova: u64, parts: &[Area], flags: u32) -> bool {
        let mut next = iova;
        parts.iter().all(|part| {
            let Ok(type1) = self.type1(to) else {
                return false;
            };
            let prot = permissions(flags);
            let backing = self.backing(part.memory, part.length, prot);
            let mapped = backing.map(|backing| type1.space().map(next, backing, prot));
            next += part.length;
            matches!(mapped, Ok(Ok(())))
        })
    }

    fn unmap(&self, unmap: &Unmap, rules: &Rules) -> std::result::Result<u64, i32> {
        let space = self.type1(unmap.space)?.space();
        let before = space.mappings();
        let unmapped = space.unmap(unmap.iova, unmap.length).map_err(errno);
        if unmapped.is_err() && space.mappings() != before {
            return Err(WRONG);
        }
        for area in rules.removed() {
            let follows = space.unmap(area.iova, area.length).map_err(errno)?;
            if unmapped.is_ok() || follows != area.length {
                return Err(WRONG);
            }
        }
        unmapped
    }

    fn copy(
        &self,
        copy: &Copied,
        kernel: &Outcome,
        rules: &Rules,
    ) -> std::result::Result<u64, i32> {
        let Copied {
            flags,
            to,
            from,
            length,
            to_iova,
            from_iova,
        } = *copy;
        let from = self.type1(from)?.space();
        let to = self.type1(to)?.space();
        let at = match (flags & FIXED, kernel.result) {
            (0, Ok(())) => kernel.value,
            // Some place that is free: it is something else that is wrong.
            (0, Err(_)) if to_iova != u64::MAX => {
                rules.anywhere(copy.to, length, PAGE).unwrap_or(to_iova)
            }
            _ => to_iova,
        };
        let copied = from.copy_to(from_iova, length, to, at, permissions(flags));
        copied.map_err(errno).map(|()| at)
    }

    fn ranges(&self, space: usize, room: u32) -> Outcome {
        let ranges = match (
            self.type1(space),
            IovaRanges::new(&[], self.reserved(space)),
        ) {
            (Err(errno), _) => return Outcome::plain(Err(errno), room.into()),
            (_, Err(error)) => return Outcome::plain(Err(errno(error)), room.into()),
            (_, Ok(ranges)) => ranges.usable(),
        };
        // None stands for everything.
        let ranges = if ranges.is_empty() {
            vec![0..=u64::MAX]
        } else {
            ranges
        };
        let enough = ranges.len() <= room as usize;
        let written = ranges.iter().take(room as usize);
        Outcome {
            ranges: written
                .map(|range| (*range.start(), *range.end()))
                .collect(),
            ..Outcome::plain(
                enough.then_some(()).ok_or(libc::EMSGSIZE),
                ranges.len() as u64,
            )
        }
    }

    fn allow(&self, allow: &Allow) -> std::result::Result<(), i32> {
        let type1 = self.type1(allow.space)?;
        let allowed: Vec<_> = allow
            .given()
            .iter()
            .map(|(first, last)| *first..=*last)
            .collect();
        let ranges = IovaRanges::new(&allowed, self.reserved(allow.space)).map_err(errno)?;
        type1.space().set_iova_ranges(ranges).map_err(errno)
    }

    fn destroy(&mut self, space: usize) -> std::result::Result<(), i32> {
        self.type1(space)?;
        if space == ATTACHED {
            return Err(libc::EBUSY);
        }
        self.spaces[space] = None;
        Ok(())
    }
}

/// Whether an address is one that may be chosen: by then the rules have the kernel's choice mapped.
fn is_right(space: usize, found: u64, backing: &Backing, rules: &Rules) -> bool {
    let length = backing.len() as u64;
    let host = backing.host_address().addr() as u64;
    let Some(last) = found.checked_add(length - 1) else {
        return false;
    };
    let reserved = rules.reserved(space);
    let allowed = rules.space(space).map_or(&[][..], |space| &space.allowed);
    let clear = reserved.iter().all(|one| one.1 < found || last < one.0);
    let inside = allowed.is_empty() || allowed.iter().any(|one| one.0 <= found && last <= one.1);
    found != 0 && found % alignment(host, length).max(PAGE) == 0 && clear && inside
}

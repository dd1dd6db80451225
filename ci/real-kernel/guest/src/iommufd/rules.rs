// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The rules of IOASes as a plain program: whom to believe where the kernel and our crate differ, and what
//! is mapped as far as the generator has to know it.

use vm_memory::Permissions;

use super::op::{
    Allow, Copied, Map, Memory, Op, Outcome, Unmap, ATTACHED, FIXED, READ, SPACES, WRITE,
};
use super::FILE_PAGES;
use crate::memory::{self, PAGE};

/// The largest alignment of an address that was not asked for: a huge page's.
pub const HUGE: u64 = 2 << 20;

/// Neither an address nor a length may be this.
const MAX: u64 = u64::MAX;

/// A part of memory that is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// Its first address.
    pub iova: u64,
    /// Its bytes.
    pub length: u64,
    /// Where its memory begins.
    pub memory: Memory,
    /// Whether what it was first mapped as could be written; copies are of the same.
    pub writable: bool,
    /// What this one is mapped for.
    pub flags: u32,
}

impl Area {
    /// Its last address.
    pub fn last(&self) -> u64 {
        self.iova + (self.length - 1)
    }

    fn part(&self, first: u64, last: u64) -> Area {
        let offset = first - self.iova;
        Area {
            iova: first,
            length: last - first + 1,
            memory: match self.memory {
                Memory::Own(from) => Memory::Own(from + offset),
                Memory::File(from) => Memory::File(from + offset),
                Memory::Closed => Memory::Closed,
            },
            ..*self
        }
    }
}

/// One IOAS.
#[derive(Clone, Debug, Default)]
pub struct Space {
    /// In ascending order.
    pub areas: Vec<Area>,
    /// In ascending order; everything where there is none.
    pub allowed: Vec<(u64, u64)>,
}

/// All of an iommufd's.
#[derive(Debug)]
pub struct Rules {
    spaces: [Option<Space>; SPACES],
    /// What a device cannot reach.
    reserved: Vec<(u64, u64)>,
    /// What an unmap that failed has removed.
    removed: Vec<Area>,
}

fn check(ok: bool, errno: i32) -> Result<(), i32> {
    ok.then_some(()).ok_or(errno)
}

fn last_of(iova: u64, length: u64) -> Result<u64, i32> {
    iova.checked_add(length.wrapping_sub(1))
        .ok_or(libc::EOVERFLOW)
}

/// What lies between ranges in ascending order.
pub fn around(ranges: &[(u64, u64)], first: u64, last: u64) -> Vec<(u64, u64)> {
    let mut around = Vec::new();
    let mut next = Some(first);
    for (from, to) in ranges {
        let Some(begin) = next else { break };
        if *to < begin {
            continue;
        }
        if begin < *from && begin <= last {
            around.push((begin, last.min(from - 1)));
        }
        next = to.checked_add(1);
    }
    around.extend(next.filter(|next| *next <= last).map(|next| (next, last)));
    around
}

/// What the alignment of an address has to be.
pub fn alignment(host: u64, length: u64) -> u64 {
    let of_host = if host == 0 {
        HUGE
    } else {
        host & host.wrapping_neg()
    };
    length.next_power_of_two().min(of_host).min(HUGE)
}

impl Rules {
    /// With all IOASes there, and nothing mapped.
    pub fn new(reserved: &[(u64, u64)]) -> Self {
        Rules {
            spaces: std::array::from_fn(|_| Some(Space::default())),
            reserved: reserved.to_vec(),
            removed: Vec::new(),
        }
    }

    /// One IOAS, if it is there.
    pub fn space(&self, space: usize) -> Option<&Space> {
        self.spaces[space].as_ref()
    }

    /// What the last operation has removed although it failed.
    pub fn removed(&self) -> &[Area] {
        &self.removed
    }

    /// Areas in all of them.
    pub fn areas(&self) -> usize {
        self.spaces
            .iter()
            .flatten()
            .map(|space| space.areas.len())
            .sum()
    }

    /// The reserved addresses of an IOAS.
    pub fn reserved(&self, space: usize) -> &[(u64, u64)] {
        if space == ATTACHED {
            &self.reserved
        } else {
            &[]
        }
    }

    fn granule(space: usize) -> u64 {
        if space == ATTACHED {
            PAGE
        } else {
            1
        }
    }

    fn areas_of(&self, space: usize) -> Result<&Vec<Area>, i32> {
        self.spaces[space]
            .as_ref()
            .map(|space| &space.areas)
            .ok_or(libc::ENOENT)
    }

    /// What is mapped in `iova..=last`.
    pub fn overlapping(&self, space: usize, iova: u64, last: u64) -> Vec<Area> {
        let areas = self.areas_of(space).map_or(&[][..], |areas| areas);
        let met = |area: &&Area| area.iova <= last && iova <= area.last();
        areas.iter().filter(met).copied().collect()
    }

    /// What a copy finds.
    pub fn sources(&self, copy: &Copied) -> Vec<Area> {
        let first = copy.from_iova;
        let last = first.saturating_add(copy.length.wrapping_sub(1));
        let areas = self.overlapping(copy.from, first, last);
        let part = |area: &Area| area.part(area.iova.max(first), area.last().min(last));
        areas.iter().map(part).collect()
    }

    /// The lowest address that fits.
    pub fn anywhere(&self, space: usize, length: u64, alignment: u64) -> Result<u64, i32> {
        let fit = |(first, last): (u64, u64)| {
            let first = first.checked_next_multiple_of(alignment)?;
            (first < last && last - first >= length.wrapping_sub(1)).then_some(first)
        };
        let this = self.spaces[space].as_ref().ok_or(libc::ENOENT)?;
        let (first, last) = (PAGE, u64::MAX - PAGE);
        let allowed = match &this.allowed[..] {
            [] => vec![(first, last)],
            // The holes between holes: ranges that touch are one.
            some => around(&around(some, first, last), first, last),
        };
        let areas = this.areas.iter().map(|area| (area.iova, area.last()));
        let mut used: Vec<_> = self.reserved(space).iter().copied().chain(areas).collect();
        used.sort_unstable();
        let fitting = allowed.into_iter().find_map(|(first, last)| {
            let first = fit((first, last))?;
            around(&used, first, last).into_iter().find_map(fit)
        });
        fitting.ok_or(libc::ENOSPC)
    }

    /// Puts parts side by side; where, that is answered.
    fn place(&mut self, space: usize, flags: u32, iova: u64, parts: &[Area]) -> Result<u64, i32> {
        self.areas_of(space)?;
        let granule = Self::granule(space);
        let length = parts.iter().map(|part| part.length).sum::<u64>();
        check(length % granule == 0, libc::EINVAL)?;
        let host = match parts[0].memory {
            Memory::Own(from) | Memory::File(from) => from,
            Memory::Closed => 0,
        };
        let first = if flags & FIXED == 0 {
            self.anywhere(space, length, alignment(host, length))?
        } else {
            check(iova % granule == 0, libc::EINVAL)?;
            iova
        };
        let last = last_of(first, length)?;
        let reserved = self.reserved(space).iter();
        let met = |(from, to): &(u64, u64)| *from <= last && first <= *to;
        check(!reserved.into_iter().any(met), libc::EINVAL)?;
        check(
            self.overlapping(space, first, last).is_empty(),
            libc::EEXIST,
        )?;
        let mut next = first;
        let mut placed = Vec::new();
        for part in parts {
            check(flags & WRITE == 0 || part.writable, libc::EPERM)?;
            let begins = match part.memory {
                Memory::Own(from) | Memory::File(from) => from % PAGE,
                Memory::Closed => 0,
            };
            check(begins % granule == 0, libc::EINVAL)?;
            placed.push(Area {
                iova: next,
                flags,
                ..*part
            });
            next = next.wrapping_add(part.length);
        }
        if space == ATTACHED {
            // Only now that a device is to reach it, it is looked for.
            parts.iter().try_for_each(is_there)?;
        }
        if let Some(space) = &mut self.spaces[space] {
            space.areas.extend(placed);
            space.areas.sort_unstable_by_key(|area| area.iova);
        }
        Ok(first)
    }

    fn map(&mut self, map: &Map) -> Result<u64, i32> {
        let Map {
            flags,
            length,
            iova,
            ..
        } = *map;
        check(flags & !(FIXED | READ | WRITE) == 0, libc::EOPNOTSUPP)?;
        check(iova != MAX && length != MAX, libc::EOVERFLOW)?;
        check(flags & (READ | WRITE) != 0, libc::EINVAL)?;
        self.areas_of(map.space)?;
        match map.memory {
            Memory::Own(from) => check(from.checked_add(length).is_some(), libc::EOVERFLOW)?,
            _ => check(length > 0, libc::EINVAL)?,
        }
        if let Memory::File(start) = map.memory {
            last_of(start, length)?;
        }
        check(map.memory != Memory::Closed, libc::EBADF)?;
        check(length > 0 && length <= MAX - PAGE, libc::EINVAL)?;
        let whole = Area {
            iova,
            length,
            memory: map.memory,
            writable: flags & WRITE != 0,
            flags,
        };
        self.place(map.space, flags, iova, &[whole])
    }

    fn copy(&mut self, copy: &Copied) -> Result<u64, i32> {
        let Copied {
            flags,
            to,
            from,
            length,
            to_iova,
            from_iova,
        } = *copy;
        check(flags & !(FIXED | READ | WRITE) == 0, libc::EOPNOTSUPP)?;
        check(
            ![length, to_iova, from_iova].contains(&MAX),
            libc::EOVERFLOW,
        )?;
        check(flags & (READ | WRITE) != 0, libc::EINVAL)?;
        self.areas_of(from)?;
        check(length > 0, libc::EINVAL)?;
        last_of(from_iova, length)?;
        let parts = self.sources(copy);
        let found: u64 = parts.iter().map(|part| part.length).sum();
        check(found == length, libc::ENOENT)?;
        self.place(to, flags, to_iova, &parts)
    }

    fn unmap(&mut self, unmap: &Unmap) -> Result<u64, i32> {
        let Unmap {
            space,
            iova,
            length,
        } = *unmap;
        self.areas_of(space)?;
        let all = (iova, length) == (0, MAX);
        if !all {
            check(iova != MAX && length != MAX, libc::EOVERFLOW)?;
            check(length > 0, libc::EINVAL)?;
        }
        let last = if all { MAX } else { last_of(iova, length)? };
        let met = self.overlapping(space, iova, last);
        let cut = met
            .iter()
            .position(|area| area.iova < iova || area.last() > last);
        let goes = &met[..cut.unwrap_or(met.len())];
        if let Some(space) = &mut self.spaces[space] {
            space.areas.retain(|area| !goes.contains(area));
        }
        if cut.is_some() {
            self.removed = goes.to_vec();
        }
        check(cut.is_none() && (all || !goes.is_empty()), libc::ENOENT)?;
        Ok(goes.iter().map(|area| area.length).sum())
    }

    fn ranges(&self, space: usize, room: u32) -> Outcome {
        if let Err(errno) = self.areas_of(space) {
            return Outcome::plain(Err(errno), room.into());
        }
        let ranges = around(self.reserved(space), 0, MAX);
        let enough = check(ranges.len() <= room as usize, libc::EMSGSIZE);
        Outcome {
            ranges: ranges.iter().take(room as usize).copied().collect(),
            ..Outcome::plain(enough, ranges.len() as u64)
        }
    }

    fn allow(&mut self, allow: &Allow) -> Result<(), i32> {
        self.areas_of(allow.space)?;
        let mut ranges = allow.given().to_vec();
        ranges.sort_unstable();
        check(
            ranges.iter().all(|(first, last)| first < last),
            libc::EINVAL,
        )?;
        check(
            ranges.windows(2).all(|two| two[0].1 < two[1].0),
            libc::EINVAL,
        )?;
        let reserved = self.reserved(allow.space);
        let free = |range: &(u64, u64)| {
            reserved
                .iter()
                .all(|one| one.1 < range.0 || range.1 < one.0)
        };
        check(ranges.iter().all(free), libc::EADDRINUSE)?;
        if let Some(space) = &mut self.spaces[allow.space] {
            space.allowed = ranges;
        }
        Ok(())
    }

    fn destroy(&mut self, space: usize) -> Result<(), i32> {
        self.areas_of(space)?;
        check(space != ATTACHED, libc::EBUSY)?;
        self.spaces[space] = None;
        Ok(())
    }

    /// Does one operation.
    pub fn apply(&mut self, op: &Op) -> Outcome {
        self.removed.clear();
        let changed = |result: Result<u64, i32>, given: u64| {
            Outcome::plain(result.map(|_| ()), result.unwrap_or(given))
        };
        match op {
            Op::Alloc(space) => {
                self.spaces[*space] = Some(Space::default());
                Outcome::plain(Ok(()), 0)
            }
            Op::Destroy(space) => Outcome::plain(self.destroy(*space), 0),
            Op::Map(map) => changed(self.map(map), map.iova),
            Op::Unmap(unmap) => changed(self.unmap(unmap), unmap.length),
            Op::Copy(copy) => changed(self.copy(copy), copy.to_iova),
            Op::Ranges(space, room) => self.ranges(*space, *room),
            Op::Allow(allow) => Outcome::plain(self.allow(allow), 0),
        }
    }
}

/// Whether a device could reach what is mapped for it.
fn is_there(area: &Area) -> Result<(), i32> {
    match area.memory {
        Memory::Own(from) => {
            let needed = if area.writable {
                Permissions::ReadWrite
            } else {
                Permissions::Read
            };
            let allowed = memory::access(from, area.length);
            check(allowed.allow(needed), libc::EFAULT)
        }
        Memory::File(from) => check(from + area.length <= FILE_PAGES * PAGE, libc::EINVAL),
        Memory::Closed => Err(libc::EBADF),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_the_lowest_that_are_free_allowed_and_aligned() {
        let mut rules = Rules::new(&[(0x8000, 0x8fff)]);
        let (space, flags, iova) = (ATTACHED, READ, 0);
        let mut map = |from: u64, length| {
            let memory = Memory::Own(memory::PRIVATE.first + from);
            rules
                .apply(&Op::Map(Map {
                    space,
                    flags,
                    memory,
                    length,
                    iova,
                }))
                .value
        };
        assert_eq!(map(0, 0x1000), 0x1000);
        assert_eq!(map(0, 0x3000), 0x4000);
        assert_eq!(map(0x1000, 0x3000), 0x9000);
        assert_eq!(map(0x2000, 0x2000), 0x2000);
    }

    #[test]
    fn what_lies_around() {
        assert_eq!(around(&[], 1, 9), [(1, 9)]);
        assert_eq!(around(&[(0, 1), (4, 5)], 1, 9), [(2, 3), (6, 9)]);
        assert_eq!(around(&[(3, u64::MAX)], 1, u64::MAX), [(1, 2)]);
        assert_eq!(around(&[(3, 4)], 5, 9), [(5, 9)]);
    }
}

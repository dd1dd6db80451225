// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a space has to do, said as plainly as can be.

use std::collections::{BTreeMap, BTreeSet};

use iommu_type1::{page_size, UnmapPolicy};
use vm_memory::Permissions::{self, Read, ReadWrite};

use crate::ops::{NewMapping, Range};

/// Mappings that there may be.
pub const LIMIT: usize = 8;

#[derive(Clone)]
pub struct Mapped {
    pub bytes: Vec<u8>,
    pub prot: Permissions,
    /// An unmap has given up on it.
    pub revoked: bool,
    /// Addresses of pages.
    pub dirty: BTreeSet<u64>,
}

/// What the counters of a space should say.
#[derive(Debug, Default, PartialEq)]
pub struct Counts {
    pub maps: u64,
    pub unmaps: u64,
    pub stragglers: u64,
    pub misses: u64,
}

/// Parts of mappings: where, and how many bytes.
pub type Segments = Vec<(u64, usize)>;

/// A list that somebody has.
#[derive(Clone)]
pub struct Held {
    pub segments: Segments,
    pub writable: bool,
}

#[derive(Default)]
pub struct Model {
    pub mappings: BTreeMap<u64, Mapped>,
    pub held: Vec<Held>,
    pub tracking: bool,
    pub counts: Counts,
}

/// What the kernel wants of a range: pages, some, inside the space. Its last byte.
fn check((iova, size): Range) -> Result<u64, i32> {
    if iova % page_size() != 0 || size % page_size() != 0 || size == 0 {
        return Err(libc::EINVAL);
    }
    iova.checked_add(size - 1).ok_or(libc::EOVERFLOW)
}

impl Mapped {
    fn last(&self, start: u64) -> u64 {
        start + (self.bytes.len() as u64 - 1)
    }
}

impl Model {
    /// All of them or none.
    pub fn map(&mut self, new: &[NewMapping]) -> Result<(), i32> {
        for &(iova, size, prot) in new {
            if size == 0 {
                return Err(libc::EINVAL);
            }
            iova.checked_add(size - 1).ok_or(libc::EOVERFLOW)?;
            check((iova, size))?;
            if prot == Permissions::No {
                return Err(libc::EINVAL);
            }
        }
        let meets = |one: Range, other: Range| {
            one.0 <= other.0 + (other.1 - 1) && other.0 <= one.0 + (one.1 - 1)
        };
        for (i, one) in new.iter().enumerate() {
            if new[..i]
                .iter()
                .any(|other| meets((one.0, one.1), (other.0, other.1)))
            {
                return Err(libc::EEXIST);
            }
        }
        for &(iova, size, _) in new {
            let met = |revoked| {
                self.mappings.iter().any(|(start, mapped)| {
                    let range = (*start, mapped.bytes.len() as u64);
                    mapped.revoked == revoked && meets((iova, size), range)
                })
            };
            if met(true) {
                return Err(libc::EBUSY);
            }
            if met(false) {
                return Err(libc::EEXIST);
            }
        }
        if self.mappings.len() + new.len() > LIMIT {
            return Err(libc::ENOSPC);
        }
        for &(iova, size, prot) in new {
            let mapped = Mapped {
                bytes: vec![0; size as usize],
                prot,
                revoked: false,
                dirty: BTreeSet::new(),
            };
            self.mappings.insert(iova, mapped);
            self.counts.maps += 1;
        }
        Ok(())
    }

    /// Starts of the mappings inside a range, unless it cuts one.
    pub fn inside(&self, range: Range) -> Result<Vec<u64>, i32> {
        let (first, last) = (range.0, check(range)?);
        let mut inside = Vec::new();
        for (start, mapped) in &self.mappings {
            let end = mapped.last(*start);
            if *start >= first && end <= last {
                inside.push(*start);
            } else if *start <= last && first <= end {
                return Err(libc::EINVAL);
            }
        }
        Ok(inside)
    }

    fn is_held(&self, start: u64) -> bool {
        self.leases().any(|leased| leased == start)
    }

    /// Starts of leased mappings, one for each mapping and list.
    pub fn leases(&self) -> impl Iterator<Item = u64> + '_ {
        self.held.iter().flat_map(|held| {
            let starts = held.segments.iter().map(|(at, _)| self.find(*at).unwrap());
            starts.collect::<BTreeSet<_>>()
        })
    }

    /// Bytes removed, and bytes left.
    pub fn unmap(&mut self, ranges: &[Range], policy: UnmapPolicy) -> Result<(u64, u64), i32> {
        for range in ranges {
            check(*range)?;
        }
        let mut inside = BTreeSet::new();
        for range in ranges {
            inside.extend(self.inside(*range)?);
        }
        Ok(self.remove(inside, policy))
    }

    pub fn remove(&mut self, starts: BTreeSet<u64>, policy: UnmapPolicy) -> (u64, u64) {
        let (mut unmapped, mut left) = (0, 0);
        for start in starts {
            let size = self.mappings[&start].bytes.len() as u64;
            if self.is_held(start) {
                let mapped = self.mappings.get_mut(&start).unwrap();
                mapped.revoked = policy == UnmapPolicy::Revoked;
                left += size;
                self.counts.stragglers += 1;
            } else {
                self.mappings.remove(&start);
                unmapped += size;
                self.counts.unmaps += 1;
            }
        }
        (unmapped, left)
    }

    /// Start of the mapping at an address.
    fn find(&self, at: u64) -> Option<u64> {
        let (start, mapped) = self.mappings.range(..=at).next_back()?;
        (at <= mapped.last(*start)).then_some(*start)
    }

    /// The byte at an address whatever it may be used for, marked if it is written.
    pub fn byte(&mut self, at: u64, write: bool) -> &mut u8 {
        let start = self.find(at).unwrap();
        let mapped = self.mappings.get_mut(&start).unwrap();
        if write && self.tracking {
            mapped.dirty.insert(at / page_size() * page_size());
        }
        &mut mapped.bytes[(at - start) as usize]
    }

    /// Byte by byte until one refuses: its errno and how many came before.
    pub fn access(
        &mut self,
        iova: u64,
        len: usize,
        write: bool,
        mut each: impl FnMut(usize, &mut u8),
    ) -> Result<(), (i32, usize)> {
        let reached = self.reach(iova, len, write);
        let done = match reached {
            Ok(()) => len,
            Err((_, done)) => done,
        };
        (0..done).for_each(|i| each(i, self.byte(iova + i as u64, write)));
        reached
    }

    /// As an access, but nothing is read or written.
    pub fn reach(&mut self, iova: u64, len: usize, write: bool) -> Result<(), (i32, usize)> {
        if iova as u128 + len as u128 > 1 << 64 {
            return Err((libc::EOVERFLOW, 0));
        }
        let needed = if write { ReadWrite } else { Read };
        for i in 0..len {
            let at = iova + i as u64;
            let refused = match self.find(at).map(|start| &self.mappings[&start]) {
                None => Some(libc::EINVAL),
                Some(mapped) if mapped.revoked => Some(libc::EBUSY),
                Some(mapped) if !mapped.prot.allow(needed) => Some(libc::EPERM),
                Some(_) => None,
            };
            if let Some(errno) = refused {
                self.counts.misses += 1;
                return Err((errno, i));
            }
        }
        Ok(())
    }

    /// The bytes there, if all of them lie in one place and may be written.
    pub fn atomic(&mut self, at: u64, width: u64) -> Result<Vec<u8>, (i32, usize)> {
        if at % width != 0 {
            return Err((libc::EINVAL, 0));
        }
        let mut bytes = Vec::new();
        self.access(at, width as usize, true, |_, byte| bytes.push(*byte))?;
        Ok(bytes)
    }

    /// Parts of mappings that make up a range, which is accessible.
    pub fn segments(&self, iova: u64, len: usize) -> Segments {
        let mut segments = Vec::new();
        let mut done = 0;
        while done < len {
            let at = iova + done as u64;
            let start = self.find(at).unwrap();
            let behind = self.mappings[&start].last(start) - at + 1;
            let n = behind.min((len - done) as u64) as usize;
            segments.push((at, n));
            done += n;
        }
        segments
    }

    pub fn set_tracking(&mut self, tracking: bool) {
        if self.tracking != tracking {
            self.mappings
                .values_mut()
                .for_each(|mapped| mapped.dirty.clear());
        }
        self.tracking = tracking;
    }

    pub fn take(&mut self, range: Range) -> Result<Vec<u64>, i32> {
        check(range)?;
        if !self.tracking {
            return Err(libc::EINVAL);
        }
        let inside = self.inside(range)?;
        let taken = inside
            .iter()
            .map(|start| std::mem::take(&mut self.mappings.get_mut(start).unwrap().dirty));
        Ok(taken.flatten().collect())
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A naive model of each profile: an entry a page, which knows which mapping it is a part of.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

use iommu_type1::{page_size, Profile, UnmapPolicy};
use vm_memory::Permissions;
use Permissions::{Read, ReadWrite, Write};

use super::op::{Range, GUEST, LIMIT};

/// Memory that several mappings may have.
pub(crate) type Memory = Rc<RefCell<Vec<u8>>>;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum State {
    Live,
    Revoked,
    Invalid,
}

#[derive(Clone)]
pub(crate) struct Mapped {
    /// Which one it is, also when others stand in its place.
    pub(crate) id: usize,
    pub(crate) first: u64,
    pub(crate) last: u64,
    pub(crate) memory: Memory,
    pub(crate) offset: usize,
    pub(crate) prot: Permissions,
    pub(crate) state: State,
}

impl Mapped {
    pub(crate) fn size(&self) -> u64 {
        self.last - self.first + 1
    }

    pub(crate) fn range(&self) -> Range {
        (self.first, self.size())
    }

    pub(crate) fn overlaps(&self, first: u64, last: u64) -> bool {
        self.first <= last && first <= self.last
    }

    pub(crate) fn is_inside(&self, first: u64, last: u64) -> bool {
        first <= self.first && self.last <= last
    }

    pub(crate) fn index(&self, at: u64) -> usize {
        self.offset + (at - self.first) as usize
    }
}

/// What a list refers to.
pub(crate) struct Held {
    pub(crate) ids: BTreeSet<usize>,
}

pub(crate) struct Model {
    pub(crate) profile: Profile,
    pub(crate) strict: bool,
    /// By address, those without memory and those revoked included.
    pub(crate) mappings: Vec<Mapped>,
    /// Those that others stand in place of.
    pub(crate) replaced: Vec<Mapped>,
    pub(crate) held: Vec<Held>,
    pub(crate) tracking: bool,
    /// Addresses of pages.
    pub(crate) dirty: BTreeSet<u64>,
    pub(crate) next: usize,
}

pub(crate) type Outcome<T> = Result<T, i32>;

/// Bytes unmapped, and bytes left at the deadline.
pub(crate) type Unmapped = (u64, u64);

pub(crate) fn is_aligned(value: u64) -> bool {
    value % page_size() == 0
}

impl Model {
    pub(crate) fn new(profile: Profile, strict: bool) -> Self {
        Model {
            profile,
            strict,
            mappings: Vec::new(),
            replaced: Vec::new(),
            held: Vec::new(),
            tracking: false,
            dirty: BTreeSet::new(),
            next: 0,
        }
    }

    pub(crate) fn entries(&self) -> usize {
        self.mappings.len() + self.replaced.len()
    }

    pub(crate) fn cut_errno(&self) -> i32 {
        match self.profile {
            Profile::Iommufd => libc::ENOENT,
            _ => libc::EINVAL,
        }
    }

    /// The last byte of a range to map.
    pub(crate) fn check_map(&self, (iova, size): Range, prot: Permissions) -> Outcome<u64> {
        let last = iova.checked_add(size.wrapping_sub(1));
        let aligned = is_aligned(iova) && is_aligned(size);
        if self.profile == Profile::Iommufd {
            if iova == u64::MAX || size == u64::MAX {
                return Err(libc::EOVERFLOW);
            }
            if prot == Permissions::No || size == 0 || !aligned {
                return Err(libc::EINVAL);
            }
            return last.ok_or(libc::EOVERFLOW);
        }
        if size == 0 {
            return Err(libc::EINVAL);
        }
        let last = last.ok_or(libc::EOVERFLOW)?;
        if prot == Permissions::No || !aligned {
            return Err(libc::EINVAL);
        }
        Ok(last)
    }

    /// First and last byte of a range to unmap.
    pub(crate) fn check_unmap(&self, (iova, size): Range) -> Outcome<(u64, u64)> {
        if self.profile == Profile::Iommufd {
            if (iova, size) == (0, u64::MAX) {
                return Ok((0, u64::MAX));
            }
            if iova == u64::MAX || size == u64::MAX {
                return Err(libc::EOVERFLOW);
            }
        } else if !is_aligned(iova) || !is_aligned(size) {
            return Err(libc::EINVAL);
        }
        if size == 0 {
            return Err(libc::EINVAL);
        }
        let last = iova.checked_add(size - 1).ok_or(libc::EOVERFLOW)?;
        Ok((iova, last))
    }

    pub(crate) fn overlapping(&self, first: u64, last: u64) -> Vec<Mapped> {
        let mapped = self.mappings.iter();
        mapped
            .filter(|mapped| mapped.overlaps(first, last))
            .cloned()
            .collect()
    }

    pub(crate) fn add(&mut self, mapped: Mapped) {
        let mapped = Mapped {
            id: self.next,
            ..mapped
        };
        self.next += 1;
        self.mappings.push(mapped);
        self.mappings.sort_by_key(|mapped| mapped.first);
    }

    pub(crate) fn fresh(range: Range, prot: Permissions) -> Mapped {
        Mapped {
            id: 0,
            first: range.0,
            last: range.0 + (range.1 - 1),
            memory: Rc::new(RefCell::new(vec![0; range.1 as usize])),
            offset: 0,
            prot,
            state: State::Live,
        }
    }

    pub(crate) fn part(of: &Mapped, first: u64, last: u64) -> Mapped {
        Mapped {
            first,
            last,
            offset: of.index(first),
            ..of.clone()
        }
    }

    /// The parts of a mapping outside of a range.
    pub(crate) fn outside(of: &Mapped, first: u64, last: u64) -> Vec<Mapped> {
        let mut parts = Vec::new();
        if of.first < first {
            parts.push(Model::part(of, of.first, first - 1));
        }
        if of.last > last {
            parts.push(Model::part(of, last + 1, of.last));
        }
        parts
    }

    pub(crate) fn is_leased(&self, id: usize) -> bool {
        self.held.iter().any(|held| held.ids.contains(&id))
    }

    /// Forgets marks of pages that are not mapped any more.
    pub(crate) fn trim_dirty(&mut self) {
        let mappings = &self.mappings;
        self.dirty
            .retain(|page| mappings.iter().any(|mapped| mapped.overlaps(*page, *page)));
    }

    pub(crate) fn map(&mut self, new: Mapped) -> Outcome<()> {
        if self.profile == Profile::Iotlb {
            return self.update(vec![new]);
        }
        let there = self.overlapping(new.first, new.last);
        if there.iter().any(|mapped| mapped.state == State::Revoked) {
            return Err(libc::EBUSY);
        }
        if !there.is_empty() {
            return Err(libc::EEXIST);
        }
        if self.entries() + 1 > LIMIT {
            return Err(libc::ENOSPC);
        }
        self.add(new);
        Ok(())
    }

    /// Maps over what is there, one behind the other.
    pub(crate) fn update(&mut self, new: Vec<Mapped>) -> Outcome<()> {
        let (first, last) = (new[0].first, new[new.len() - 1].last);
        let there = self.overlapping(first, last);
        if there.iter().any(|mapped| mapped.state == State::Revoked) {
            return Err(libc::EBUSY);
        }
        let parts: Vec<_> = there
            .iter()
            .flat_map(|mapped| Model::outside(mapped, first, last))
            .collect();
        if self.entries() + (parts.len() + new.len()).saturating_sub(there.len()) > LIMIT {
            return Err(libc::ENOSPC);
        }
        self.exchange(&there, parts, new, UnmapPolicy::Revoked)
    }

    /// Puts `new`, and `parts` of what was there, in the place of what was there.
    pub(crate) fn exchange(
        &mut self,
        there: &[Mapped],
        parts: Vec<Mapped>,
        new: Vec<Mapped>,
        policy: UnmapPolicy,
    ) -> Outcome<()> {
        let is_there = |id| there.iter().any(|mapped| mapped.id == id);
        self.mappings.retain(|mapped| !is_there(mapped.id));
        let (first, last) = (new[0].first, new[new.len() - 1].last);
        parts.into_iter().for_each(|part| self.add(part));
        let id = self.next;
        new.into_iter().for_each(|new| self.add(new));
        let mut is_held = false;
        for old in there {
            if self.is_leased(old.id) {
                is_held = true;
                self.replaced.push(old.clone());
            }
        }
        if !is_held {
            return Ok(());
        }
        if policy == UnmapPolicy::Restore {
            // Nobody has leased it in that moment.
            self.mappings.retain(|mapped| mapped.id != id);
            for old in there {
                let part = Model::part(old, old.first.max(first), old.last.min(last));
                self.add(part);
            }
        }
        Err(libc::EDEADLK)
    }

    /// The mappings that an unmap of a range takes away.
    pub(crate) fn select(&self, first: u64, last: u64) -> Outcome<Vec<Mapped>> {
        let there = self.overlapping(first, last);
        match self.profile {
            Profile::Type1v1 => Ok(match there.first() {
                Some(mapped) if mapped.first < first => Vec::new(),
                _ => there,
            }),
            _ if there.iter().all(|mapped| mapped.is_inside(first, last)) => Ok(there),
            _ => Err(self.cut_errno()),
        }
    }

    /// Cuts mappings at the ends of a range.
    pub(crate) fn cut(&mut self, first: u64, last: u64) -> Outcome<()> {
        let mut there = self.overlapping(first, last);
        there.retain(|mapped| !mapped.is_inside(first, last));
        if there.iter().any(|mapped| mapped.state != State::Live) {
            return Err(libc::EBUSY);
        }
        let mut parts = Vec::new();
        for mapped in &there {
            parts.extend(Model::outside(mapped, first, last));
            parts.push(Model::part(
                mapped,
                mapped.first.max(first),
                mapped.last.min(last),
            ));
        }
        if there.is_empty() {
            return Ok(());
        }
        if self.entries() + parts.len() - there.len() > LIMIT {
            return Err(libc::ENOSPC);
        }
        let is_there = |id| there.iter().any(|mapped| mapped.id == id);
        self.mappings.retain(|mapped| !is_there(mapped.id));
        parts.into_iter().for_each(|part| self.add(part));
        // Whether anybody uses them is looked at by the unmap.
        self.replaced.extend(there);
        Ok(())
    }

    pub(crate) fn unmap(&mut self, ranges: &[Range], policy: UnmapPolicy) -> Outcome<Unmapped> {
        let ranges = ranges.iter().map(|range| self.check_unmap(*range));
        let ranges = ranges.collect::<Outcome<Vec<_>>>()?;
        for (first, last) in &ranges {
            if self.profile == Profile::Iotlb {
                self.cut(*first, *last)?;
            }
            let selected = self.select(*first, *last)?;
            let everything = (*first, *last) == (0, u64::MAX);
            if self.profile == Profile::Iommufd && selected.is_empty() && !everything {
                return Err(libc::ENOENT);
            }
        }
        let mut ids = BTreeSet::new();
        for (first, last) in &ranges {
            ids.extend(self.select(*first, *last)?.iter().map(|mapped| mapped.id));
        }
        Ok(self.remove(&ids, &ranges, policy))
    }

    pub(crate) fn remove(
        &mut self,
        ids: &BTreeSet<usize>,
        ranges: &[(u64, u64)],
        policy: UnmapPolicy,
    ) -> Unmapped {
        // Those whose users are waited for beside those of the mappings.
        let mut still = Vec::new();
        for old in std::mem::take(&mut self.replaced) {
            let is_met = ranges
                .iter()
                .any(|(first, last)| old.overlaps(*first, *last));
            if self.is_leased(old.id) {
                if is_met {
                    still.push(old.clone());
                }
                self.replaced.push(old);
            } else if !is_met {
                self.replaced.push(old);
            }
        }
        let (mut unmapped, mut left) = (0, 0);
        for mut mapped in std::mem::take(&mut self.mappings) {
            if !ids.contains(&mapped.id) {
                self.mappings.push(mapped);
                continue;
            }
            let is_lent = still
                .iter()
                .any(|old| old.overlaps(mapped.first, mapped.last));
            if !is_lent && !self.is_leased(mapped.id) {
                unmapped += mapped.size();
                continue;
            }
            left += mapped.size();
            mapped.state = match policy {
                _ if mapped.state == State::Invalid => State::Invalid,
                UnmapPolicy::Restore => State::Live,
                _ => State::Revoked,
            };
            self.mappings.push(mapped);
        }
        self.trim_dirty();
        if left == 0 && !still.is_empty() {
            // Nothing is left but to wait for.
            return (unmapped, u64::MAX);
        }
        (unmapped, left)
    }

    pub(crate) fn replace(
        &mut self,
        range: Range,
        prot: Permissions,
        policy: UnmapPolicy,
    ) -> Outcome<()> {
        let last = self.check_map(range, prot)?;
        let there = self.overlapping(range.0, last);
        if there.iter().any(|mapped| mapped.state != State::Live) {
            return Err(libc::EBUSY);
        }
        if there.is_empty() {
            return Err(libc::ENOENT);
        }
        if there.iter().any(|mapped| mapped.range() != range) {
            return Err(self.cut_errno());
        }
        if self.entries() > LIMIT {
            return Err(libc::ENOSPC);
        }
        let new = vec![Model::fresh(range, prot)];
        self.exchange(&there, Vec::new(), new, policy)
    }

    pub(crate) fn has_vaddr(&self) -> bool {
        matches!(self.profile, Profile::Type1v1 | Profile::Type1v2)
    }

    pub(crate) fn invalidate(&mut self, range: Option<Range>) -> Outcome<u64> {
        if !self.has_vaddr() {
            return Err(libc::EINVAL);
        }
        let (first, last) = match range {
            Some(range) => self.check_unmap(range)?,
            None => (0, u64::MAX),
        };
        let selected = self.select(first, last)?;
        let not_live = selected.iter().find(|mapped| mapped.state != State::Live);
        match not_live.map(|mapped| mapped.state) {
            Some(State::Invalid) => return Err(libc::EINVAL),
            Some(_) => return Err(libc::EBUSY),
            None => {}
        }
        let uses = |mapped: &&Mapped| {
            let old = self.replaced.iter();
            let mut ids = old.filter(|old| old.overlaps(mapped.first, mapped.last));
            self.is_leased(mapped.id) || ids.any(|old| self.is_leased(old.id))
        };
        if selected.iter().any(|mapped| uses(&mapped)) {
            return Err(libc::EDEADLK);
        }
        // Nobody uses what they stand in place of any more, so that is over too.
        self.replaced.retain(|old| {
            let mut there = selected.iter();
            !there.any(|mapped| old.overlaps(mapped.first, mapped.last))
        });
        let mut bytes = 0;
        for mapped in &mut self.mappings {
            if selected.iter().any(|other| other.id == mapped.id) {
                mapped.state = State::Invalid;
                bytes += mapped.size();
            }
        }
        Ok(bytes)
    }

    pub(crate) fn resume(&mut self, range: Range) -> Outcome<()> {
        if !self.has_vaddr() {
            return Err(libc::EINVAL);
        }
        let last = self.check_map(range, ReadWrite)?;
        let there = self.overlapping(range.0, last);
        let not_live = there.iter().find(|mapped| mapped.state != State::Live);
        match not_live {
            Some(mapped) if mapped.state == State::Revoked => return Err(libc::EBUSY),
            _ if there.is_empty() => return Err(libc::ENOENT),
            Some(mapped) if mapped.range() == range => {}
            _ => return Err(libc::EINVAL),
        }
        let fresh = Model::fresh(range, ReadWrite).memory;
        for mapped in &mut self.mappings {
            if mapped.first == range.0 {
                mapped.state = State::Live;
                (mapped.memory, mapped.offset) = (fresh.clone(), 0);
            }
        }
        Ok(())
    }

    /// Copies inside of the space, one mapping after the other or none.
    /// The last byte of a range to copy.
    pub(crate) fn check_copy(
        &self,
        (iova, size): Range,
        to: u64,
        prot: Permissions,
    ) -> Outcome<u64> {
        if self.profile != Profile::Iommufd {
            return self.check_map((iova, size), prot);
        }
        if [iova, size, to].contains(&u64::MAX) {
            return Err(libc::EOVERFLOW);
        }
        if prot == Permissions::No || size == 0 {
            return Err(libc::EINVAL);
        }
        iova.checked_add(size - 1).ok_or(libc::EOVERFLOW)
    }

    /// Whether there is room for one mapping.
    pub(crate) fn check_room(&self, first: u64, last: u64) -> Outcome<()> {
        if self.profile == Profile::Iotlb {
            return Ok(());
        }
        let there = self.overlapping(first, last);
        if there.iter().any(|mapped| mapped.state == State::Revoked) {
            return Err(libc::EBUSY);
        }
        if !there.is_empty() {
            return Err(libc::EEXIST);
        }
        if self.entries() + 1 > LIMIT {
            return Err(libc::ENOSPC);
        }
        Ok(())
    }

    pub(crate) fn copy(&mut self, range: Range, to: u64, prot: Permissions) -> Outcome<()> {
        let last = self.check_copy(range, to, prot)?;
        let there = self.overlapping(range.0, last);
        if there.iter().any(|mapped| mapped.state != State::Live) {
            return Err(libc::EBUSY);
        }
        let mut next = range.0;
        let mut parts = Vec::new();
        for mapped in &there {
            if mapped.first > next {
                return Err(libc::ENOENT);
            }
            let part = Model::part(mapped, next, mapped.last.min(last));
            next = part.last.wrapping_add(1);
            parts.push(part);
        }
        if next != last.wrapping_add(1) {
            return Err(libc::ENOENT);
        }
        let to_last = self.check_map((to, range.1), prot)?;
        self.check_room(to, to_last)?;
        for part in &mut parts {
            if !part.prot.allow(prot) {
                return Err(libc::EPERM);
            }
            if !is_aligned(part.first) {
                return Err(libc::EINVAL);
            }
            part.prot = prot;
            let size = part.size();
            part.first = to + (part.first - range.0);
            part.last = part.first + (size - 1);
        }
        self.map_parts(parts)
    }

    /// Maps one behind the other, all or none.
    fn map_parts(&mut self, parts: Vec<Mapped>) -> Outcome<()> {
        if self.profile == Profile::Iotlb {
            return self.update(parts);
        }
        let met: Vec<_> = parts
            .iter()
            .flat_map(|part| self.overlapping(part.first, part.last))
            .collect();
        // As the parts are looked at one by one, the first that meets something says what.
        for part in &parts {
            let there = self.overlapping(part.first, part.last);
            if there.iter().any(|mapped| mapped.state == State::Revoked) {
                return Err(libc::EBUSY);
            }
            if !there.is_empty() {
                return Err(libc::EEXIST);
            }
        }
        assert!(met.is_empty());
        if self.entries() + parts.len() > LIMIT {
            return Err(libc::ENOSPC);
        }
        parts.into_iter().for_each(|part| self.add(part));
        Ok(())
    }

    /// `guest` has the regions of the guest's memory.
    pub(crate) fn map_guest(
        &mut self,
        (iova, size): Range,
        page: u64,
        prot: Permissions,
        guest: &[Memory],
    ) -> Outcome<()> {
        let p = page_size();
        let behind = size.checked_sub(1).ok_or(libc::EINVAL)?;
        for first in [iova, page * p] {
            first.checked_add(behind).ok_or(libc::EOVERFLOW)?;
        }
        let mut parts = Vec::new();
        let mut done = 0;
        while done < size {
            let at = page * p + done;
            let mut regions = GUEST.iter().zip(guest);
            let inside =
                |(first, pages): (u64, u64)| (first * p..(first + pages) * p).contains(&at);
            let found = regions.find(|(region, _)| inside(**region));
            let ((first, pages), memory) = found.ok_or(libc::EFAULT)?;
            let offset = at - first * p;
            let len = (size - done).min(pages * p - offset);
            parts.push(Mapped {
                memory: memory.clone(),
                offset: offset as usize,
                ..Model::fresh((iova + done, len), prot)
            });
            done += len;
        }
        for part in &parts {
            self.check_map(part.range(), prot)?;
        }
        self.map_parts(parts)
    }

    pub(crate) fn is_unmapped(&self, (iova, size): Range) -> Outcome<bool> {
        let behind = size.checked_sub(1).ok_or(libc::EINVAL)?;
        let last = iova.checked_add(behind).ok_or(libc::EOVERFLOW)?;
        let mut all = self.mappings.iter().chain(&self.replaced);
        Ok(!all.any(|mapped| mapped.overlaps(iova, last)))
    }

    /// Somebody says that bytes were written.
    pub(crate) fn mark_dirty(&mut self, iova: u64, len: usize) -> Result<(), (i32, usize)> {
        if iova as u128 + len as u128 > 1 << 64 {
            return Err((libc::EOVERFLOW, 0));
        }
        for i in 0..len {
            let at = iova + i as u64;
            if let Some(errno) = self.refusal(at, |mapped| mapped.prot.allow(Write)) {
                return Err((errno, i));
            }
            if self.tracking {
                self.dirty.insert(at / page_size() * page_size());
            }
        }
        Ok(())
    }

    pub(crate) fn find(&self, at: u64) -> Option<&Mapped> {
        self.mappings.iter().find(|mapped| mapped.overlaps(at, at))
    }

    pub(crate) fn refusal(&self, at: u64, allows: impl Fn(&Mapped) -> bool) -> Option<i32> {
        match self.find(at) {
            None => Some(match self.profile {
                Profile::Iommufd => libc::ENOENT,
                Profile::Iotlb => libc::EAGAIN,
                _ => libc::EINVAL,
            }),
            Some(mapped) if mapped.state != State::Live => Some(libc::EBUSY),
            Some(mapped) if !allows(mapped) => Some(libc::EPERM),
            Some(_) => None,
        }
    }

    pub(crate) fn permits(&self, mapped: &Mapped, write: bool) -> bool {
        match (write, self.strict) {
            (false, true) => mapped.prot.allow(Read),
            (true, true) => mapped.prot.allow(Write),
            (false, false) => mapped.prot.allow(Read),
            (true, false) => mapped.prot == ReadWrite,
        }
    }

    /// Byte by byte until one refuses: its errno and how many came before.
    pub(crate) fn access(
        &mut self,
        iova: u64,
        len: usize,
        write: bool,
        mut each: impl FnMut(usize, &mut u8),
    ) -> Result<(), (i32, usize)> {
        if iova as u128 + len as u128 > 1 << 64 {
            return Err((libc::EOVERFLOW, 0));
        }
        for i in 0..len {
            let at = iova + i as u64;
            if let Some(errno) = self.refusal(at, |mapped| self.permits(mapped, write)) {
                return Err((errno, i));
            }
            let mapped = self.find(at).unwrap();
            each(i, &mut mapped.memory.borrow_mut()[mapped.index(at)]);
            if write && self.tracking {
                self.dirty.insert(at / page_size() * page_size());
            }
        }
        Ok(())
    }

    pub(crate) fn hold(&mut self, iova: u64, len: usize) -> Result<(), (i32, usize)> {
        if iova as u128 + len as u128 > 1 << 64 {
            return Err((libc::EOVERFLOW, 0));
        }
        let mut ids = BTreeSet::new();
        for i in 0..len {
            let at = iova + i as u64;
            let both = |mapped: &Mapped| self.permits(mapped, false) && self.permits(mapped, true);
            if let Some(errno) = self.refusal(at, both) {
                return Err((errno, i));
            }
            ids.insert(self.find(at).unwrap().id);
        }
        self.held.push(Held { ids });
        Ok(())
    }

    pub(crate) fn take_dirty(&mut self, range: Range) -> Outcome<Vec<u64>> {
        let (iova, size) = range;
        if !is_aligned(iova) || !is_aligned(size) || size == 0 {
            return Err(libc::EINVAL);
        }
        let last = iova.checked_add(size - 1).ok_or(libc::EOVERFLOW)?;
        if !self.tracking {
            return Err(libc::EINVAL);
        }
        let there = self.overlapping(iova, last);
        if !there.iter().all(|mapped| mapped.is_inside(iova, last)) {
            return Err(self.cut_errno());
        }
        let taken: Vec<u64> = self.dirty.range(iova..=last).copied().collect();
        self.dirty.retain(|page| *page < iova || *page > last);
        Ok(taken)
    }
}

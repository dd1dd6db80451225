// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The four profiles against a naive model of each: maps, unmaps, replacements, copies, memory that is
//! taken away and given back, dirty pages, and lists that are held meanwhile, by one thread.
//!
//! The model has an entry a page and knows which mapping it is a part of.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use iommu_type1::{
    page_size, Backing, Error, IoAddressSpace, PermissionPolicy, Profile, ScatterList,
    UnmapOptions, UnmapPolicy,
};
use proptest::prelude::*;
use vm_memory::Permissions;

use Permissions::{Read, ReadWrite, Write};

const LIMIT: usize = 7;
/// Pages of the region that is used; the second half is the top of the 64-bit space.
const PAGES: u64 = 16;

fn address(page: u64) -> u64 {
    let p = page_size();
    if page < PAGES / 2 {
        0x7000_0000 + page * p
    } else {
        (page * p).wrapping_sub(PAGES * p)
    }
}

type Range = (u64, u64);

#[derive(Clone, Debug)]
enum Op {
    Map(Range, Permissions),
    Unmap(Range, UnmapPolicy),
    UnmapBatch(Range, Range, UnmapPolicy),
    UnmapAll,
    Replace(Range, Permissions, UnmapPolicy),
    Invalidate(Range),
    InvalidateAll,
    Resume(Range),
    Copy(Range, u64, Permissions),
    Read(u64, usize),
    Write(u64, usize, u8),
    Pin(u64, Permissions),
    Hold(u64, usize),
    Release(prop::sample::Index),
    SetTracking(bool),
    TakeDirty(Range),
}

fn page() -> impl Strategy<Value = u64> {
    (0..PAGES).prop_map(address)
}

/// Mostly whole pages.
fn range() -> impl Strategy<Value = Range> {
    let odd = || prop_oneof![25 => Just(0), 1 => 1..page_size()];
    let near = (page(), odd(), 0..6_u64, odd())
        .prop_map(|(at, past, n, odd)| (at.wrapping_add(past), n * page_size() + odd));
    let rest = prop_oneof![
        Just((0, u64::MAX)),
        Just((u64::MAX, page_size())),
        Just((0, 0_u64.wrapping_sub(page_size()))),
        // Beyond the end.
        (PAGES - 2..PAGES).prop_map(|page| (address(page), 4 * page_size())),
        Just((address(0), (PAGES / 2) * page_size())),
    ];
    prop_oneof![12 => near, 1 => rest]
}

fn prot() -> impl Strategy<Value = Permissions> {
    prop_oneof![
        8 => Just(ReadWrite),
        2 => Just(Read),
        2 => Just(Write),
        1 => Just(Permissions::No),
    ]
}

fn policy() -> impl Strategy<Value = UnmapPolicy> {
    prop_oneof![Just(UnmapPolicy::Revoked), Just(UnmapPolicy::Restore)]
}

fn byte() -> impl Strategy<Value = u64> {
    (page(), 0..page_size()).prop_map(|(at, offset)| at + offset)
}

fn len() -> impl Strategy<Value = usize> {
    prop_oneof![0..64_usize, 0..3 * page_size() as usize]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        14 => (range(), prot()).prop_map(|(range, prot)| Op::Map(range, prot)),
        8 => (range(), policy()).prop_map(|(range, policy)| Op::Unmap(range, policy)),
        2 => (range(), range(), policy())
            .prop_map(|(one, other, policy)| Op::UnmapBatch(one, other, policy)),
        1 => Just(Op::UnmapAll),
        5 => (range(), prot(), policy())
            .prop_map(|(range, prot, policy)| Op::Replace(range, prot, policy)),
        4 => range().prop_map(Op::Invalidate),
        1 => Just(Op::InvalidateAll),
        5 => range().prop_map(Op::Resume),
        5 => (range(), page(), prot()).prop_map(|(range, to, prot)| Op::Copy(range, to, prot)),
        8 => (byte(), len()).prop_map(|(at, len)| Op::Read(at, len)),
        12 => (byte(), len(), any::<u8>()).prop_map(|(at, len, seed)| Op::Write(at, len, seed)),
        3 => (page(), prot()).prop_map(|(at, prot)| Op::Pin(at, prot)),
        4 => (byte(), len()).prop_map(|(at, len)| Op::Hold(at, len)),
        4 => any::<prop::sample::Index>().prop_map(Op::Release),
        2 => (0..4_u8).prop_map(|n| Op::SetTracking(n > 0)),
        6 => range().prop_map(Op::TakeDirty),
    ]
}

/// Ranges that an op is about are drawn from what is mapped now and then: else replacements, resumptions
/// and exact unmaps would hardly ever succeed.
fn aim(op: Op, model: &Model, pick: prop::sample::Index) -> Op {
    let ranges: Vec<Range> = model.mappings.iter().map(Mapped::range).collect();
    if ranges.is_empty() || pick.index(4) == 0 {
        return op;
    }
    let range = ranges[pick.index(ranges.len())];
    match op {
        Op::Replace(_, prot, policy) => Op::Replace(range, prot, policy),
        Op::Invalidate(_) => Op::Invalidate(range),
        Op::Resume(_) => Op::Resume(range),
        op => op,
    }
}

/// Memory that several mappings may have.
type Memory = Rc<RefCell<Vec<u8>>>;

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    Live,
    Revoked,
    Invalid,
}

#[derive(Clone)]
struct Mapped {
    /// Which one it is, also when others stand in its place.
    id: usize,
    first: u64,
    last: u64,
    memory: Memory,
    offset: usize,
    prot: Permissions,
    state: State,
}

impl Mapped {
    fn size(&self) -> u64 {
        self.last - self.first + 1
    }

    fn range(&self) -> Range {
        (self.first, self.size())
    }

    fn overlaps(&self, first: u64, last: u64) -> bool {
        self.first <= last && first <= self.last
    }

    fn is_inside(&self, first: u64, last: u64) -> bool {
        first <= self.first && self.last <= last
    }

    fn index(&self, at: u64) -> usize {
        self.offset + (at - self.first) as usize
    }
}

/// What a list refers to.
struct Held {
    ids: BTreeSet<usize>,
}

struct Model {
    profile: Profile,
    strict: bool,
    /// By address, those without memory and those revoked included.
    mappings: Vec<Mapped>,
    /// Those that others stand in place of.
    replaced: Vec<Mapped>,
    held: Vec<Held>,
    tracking: bool,
    /// Addresses of pages.
    dirty: BTreeSet<u64>,
    next: usize,
}

type Outcome<T> = Result<T, i32>;

/// Bytes unmapped, and bytes left at the deadline.
type Unmapped = (u64, u64);

fn is_aligned(value: u64) -> bool {
    value % page_size() == 0
}

impl Model {
    fn new(profile: Profile, strict: bool) -> Self {
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

    fn entries(&self) -> usize {
        self.mappings.len() + self.replaced.len()
    }

    fn cut_errno(&self) -> i32 {
        match self.profile {
            Profile::Iommufd => libc::ENOENT,
            _ => libc::EINVAL,
        }
    }

    /// The last byte of a range to map.
    fn check_map(&self, (iova, size): Range, prot: Permissions) -> Outcome<u64> {
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
    fn check_unmap(&self, (iova, size): Range) -> Outcome<(u64, u64)> {
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

    fn overlapping(&self, first: u64, last: u64) -> Vec<Mapped> {
        let mapped = self.mappings.iter();
        mapped
            .filter(|mapped| mapped.overlaps(first, last))
            .cloned()
            .collect()
    }

    fn add(&mut self, mapped: Mapped) {
        let mapped = Mapped {
            id: self.next,
            ..mapped
        };
        self.next += 1;
        self.mappings.push(mapped);
        self.mappings.sort_by_key(|mapped| mapped.first);
    }

    fn fresh(range: Range, prot: Permissions) -> Mapped {
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

    fn part(of: &Mapped, first: u64, last: u64) -> Mapped {
        Mapped {
            first,
            last,
            offset: of.index(first),
            ..of.clone()
        }
    }

    /// The parts of a mapping outside of a range.
    fn outside(of: &Mapped, first: u64, last: u64) -> Vec<Mapped> {
        let mut parts = Vec::new();
        if of.first < first {
            parts.push(Model::part(of, of.first, first - 1));
        }
        if of.last > last {
            parts.push(Model::part(of, last + 1, of.last));
        }
        parts
    }

    fn is_leased(&self, id: usize) -> bool {
        self.held.iter().any(|held| held.ids.contains(&id))
    }

    /// Forgets marks of pages that are not mapped any more.
    fn trim_dirty(&mut self) {
        let mappings = &self.mappings;
        self.dirty
            .retain(|page| mappings.iter().any(|mapped| mapped.overlaps(*page, *page)));
    }

    fn map(&mut self, new: Mapped) -> Outcome<()> {
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
    fn update(&mut self, new: Vec<Mapped>) -> Outcome<()> {
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
    fn exchange(
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
            let by = self.mappings.iter().position(|mapped| mapped.id == id);
            let by = self.mappings.remove(by.unwrap());
            self.replaced.push(by);
            for old in there {
                let part = Model::part(old, old.first.max(first), old.last.min(last));
                self.add(part);
            }
        }
        Err(libc::EDEADLK)
    }

    /// The mappings that an unmap of a range takes away.
    fn select(&self, first: u64, last: u64) -> Outcome<Vec<Mapped>> {
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
    fn cut(&mut self, first: u64, last: u64) -> Outcome<()> {
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

    fn unmap(&mut self, ranges: &[Range], policy: UnmapPolicy) -> Outcome<Unmapped> {
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

    fn remove(
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

    fn replace(&mut self, range: Range, prot: Permissions, policy: UnmapPolicy) -> Outcome<()> {
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

    fn has_vaddr(&self) -> bool {
        matches!(self.profile, Profile::Type1v1 | Profile::Type1v2)
    }

    fn invalidate(&mut self, range: Option<Range>) -> Outcome<u64> {
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

    fn resume(&mut self, range: Range) -> Outcome<()> {
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
    fn check_copy(&self, (iova, size): Range, to: u64, prot: Permissions) -> Outcome<u64> {
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
    fn check_room(&self, first: u64, last: u64) -> Outcome<()> {
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

    fn copy(&mut self, range: Range, to: u64, prot: Permissions) -> Outcome<()> {
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

    fn find(&self, at: u64) -> Option<&Mapped> {
        self.mappings.iter().find(|mapped| mapped.overlaps(at, at))
    }

    fn refusal(&self, at: u64, allows: impl Fn(&Mapped) -> bool) -> Option<i32> {
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

    fn permits(&self, mapped: &Mapped, write: bool) -> bool {
        match (write, self.strict) {
            (false, true) => mapped.prot.allow(Read),
            (true, true) => mapped.prot.allow(Write),
            (false, false) => mapped.prot.allow(Read),
            (true, false) => mapped.prot == ReadWrite,
        }
    }

    /// Byte by byte until one refuses: its errno and how many came before.
    fn access(
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

    fn hold(&mut self, iova: u64, len: usize) -> Result<(), (i32, usize)> {
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

    fn take_dirty(&mut self, range: Range) -> Outcome<Vec<u64>> {
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

/// The space that is tested.
struct Real {
    space: IoAddressSpace,
    held: Vec<ScatterList>,
}

/// Too much to be memory: no such request comes as far as its memory.
const HUGE: u64 = 1 << 30;

fn memory(size: u64) -> Option<Backing> {
    (size > 0 && size < HUGE).then(|| Backing::anonymous(size as usize).unwrap())
}

fn unmapped(result: Result<u64, Error>) -> Outcome<Unmapped> {
    match result {
        Ok(bytes) => Ok((bytes, 0)),
        Err(Error::Deadline {
            unmapped,
            left,
            holders,
        }) => {
            assert!(!holders.is_empty());
            Ok((unmapped, if left == 0 { u64::MAX } else { left }))
        }
        Err(error) => Err(error.errno()),
    }
}

fn errno<T>(result: Result<T, Error>) -> Outcome<T> {
    result.map_err(|error| error.errno())
}

fn step(real: &mut Real, model: &mut Model, op: Op) -> Result<(), TestCaseError> {
    let options = |policy| UnmapOptions::new().deadline(Duration::ZERO).policy(policy);
    let space = &real.space;
    match op {
        Op::Map(range, prot) => {
            let Some(backing) = memory(range.1) else {
                return Ok(());
            };
            let wanted = model.check_map(range, prot);
            let wanted = wanted.and_then(|_| model.map(Model::fresh(range, prot)));
            prop_assert_eq!(errno(space.map(range.0, backing, prot)), wanted);
        }
        Op::Unmap(range, policy) => {
            let result = unmapped(space.unmap_with(range.0, range.1, options(policy)));
            prop_assert_eq!(result, model.unmap(&[range], policy));
        }
        Op::UnmapBatch(one, other, policy) => {
            let result = unmapped(space.unmap_batch_with(&[one, other], options(policy)));
            prop_assert_eq!(result, model.unmap(&[one, other], policy));
        }
        Op::UnmapAll => {
            let ids = model.mappings.iter().map(|mapped| mapped.id).collect();
            let wanted = model.remove(&ids, &[(0, u64::MAX)], UnmapPolicy::Revoked);
            prop_assert_eq!(unmapped(space.unmap_all()), Ok(wanted));
        }
        Op::Replace(range, prot, policy) => {
            let Some(backing) = memory(range.1) else {
                return Ok(());
            };
            let result = space.replace_with(range.0, backing, prot, options(policy));
            prop_assert_eq!(errno(result), model.replace(range, prot, policy));
        }
        Op::Invalidate(range) => {
            let result = errno(space.invalidate_vaddr(range.0, range.1));
            prop_assert_eq!(result, model.invalidate(Some(range)));
        }
        Op::InvalidateAll => {
            let result = errno(space.invalidate_all_vaddr());
            prop_assert_eq!(result, model.invalidate(None));
        }
        Op::Resume(range) => {
            let Some(backing) = memory(range.1) else {
                return Ok(());
            };
            let result = errno(space.resume_vaddr(range.0, range.1, backing));
            prop_assert_eq!(result, model.resume(range));
        }
        Op::Copy(range, to, prot) => {
            let result = errno(space.copy_to(range.0, range.1, space, to, prot));
            prop_assert_eq!(result, model.copy(range, to, prot));
        }
        Op::Read(at, len) => {
            let (mut found, mut expected) = (vec![0xee; len], vec![0xee; len]);
            let wanted = model.access(at, len, false, |i, byte| expected[i] = *byte);
            let result = space.read(at, &mut found);
            prop_assert_eq!(result.map_err(|e| (e.errno(), e.completed())), wanted);
            prop_assert_eq!(found, expected);
        }
        Op::Write(at, len, seed) => {
            let data: Vec<u8> = (0..len).map(|i| seed.wrapping_add(i as u8)).collect();
            let wanted = model.access(at, len, true, |i, byte| *byte = data[i]);
            let result = space.write(at, &data);
            prop_assert_eq!(result.map_err(|e| (e.errno(), e.completed())), wanted);
        }
        Op::Pin(at, prot) => {
            let pinner = space.pinner(
                "model",
                iommu_type1::Interest::Holder,
                std::sync::Arc::new(|_, _| ()),
            );
            let result = errno(pinner.pin_pages(at, 1, prot)).map(drop);
            let refusal = match model.profile {
                Profile::Type1v1 => Some(libc::EACCES),
                _ => model.refusal(at, |mapped| mapped.prot.allow(prot)),
            };
            // Whoever has pinned a page may have written it.
            if refusal.is_none() && model.tracking && model.profile == Profile::Type1v2 {
                model.dirty.insert(at);
            }
            prop_assert_eq!(result, refusal.map_or(Ok(()), Err));
        }
        Op::Hold(at, len) => {
            let result = space.scatter(at, len, ReadWrite);
            let errno = result.as_ref().map(|_| ());
            let errno = errno.map_err(|e| (e.errno(), e.completed()));
            prop_assert_eq!(errno, model.hold(at, len));
            real.held.extend(result);
        }
        Op::Release(index) if !model.held.is_empty() => {
            let index = index.index(model.held.len());
            real.held.swap_remove(index);
            model.held.swap_remove(index);
        }
        Op::Release(_) => {}
        Op::SetTracking(true) => {
            let result = errno(space.start_dirty_tracking());
            if model.profile == Profile::Type1v1 {
                prop_assert_eq!(result, Err(libc::EACCES));
            } else {
                prop_assert_eq!(result, Ok(()));
                if !model.tracking {
                    model.dirty.clear();
                }
                model.tracking = true;
            }
        }
        Op::SetTracking(false) => {
            space.stop_dirty_tracking();
            model.tracking = false;
            model.dirty.clear();
        }
        Op::TakeDirty(range) => {
            let result = errno(space.take_dirty(range.0, range.1));
            let pages = result.map(|dirty| {
                let mut pages: Vec<_> = dirty.iter().collect();
                pages.sort_unstable();
                pages
            });
            prop_assert_eq!(pages, model.take_dirty(range));
        }
    }
    Ok(())
}

/// As many entries, and every byte that can be read, is what the model has.
fn compare(real: &Real, model: &mut Model) -> Result<(), TestCaseError> {
    prop_assert_eq!(real.space.mappings(), model.entries());
    let mappings: BTreeMap<u64, Mapped> = model
        .mappings
        .iter()
        .map(|mapped| (mapped.first, mapped.clone()))
        .collect();
    for (first, mapped) in mappings {
        let mut found = vec![0; mapped.size() as usize];
        let mut expected = found.clone();
        let wanted = model.access(first, found.len(), false, |i, byte| expected[i] = *byte);
        let result = real.space.read(first, &mut found);
        prop_assert_eq!(result.map_err(|e| (e.errno(), e.completed())), wanted);
        prop_assert_eq!(found, expected);
    }
    Ok(())
}

fn profile() -> impl Strategy<Value = Profile> {
    prop_oneof![
        1 => Just(Profile::Type1v1),
        1 => Just(Profile::Type1v2),
        1 => Just(Profile::Iommufd),
        2 => Just(Profile::Iotlb),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2048))]

    #[test]
    fn every_profile_equals_its_naive_model(
        profile in profile(),
        other_policy in any::<bool>(),
        is_tracked in any::<bool>(),
        ops in prop::collection::vec((op(), any::<prop::sample::Index>()), 1..60)
    ) {
        let strict = matches!(profile, Profile::Iommufd | Profile::Iotlb) != other_policy;
        let mut builder = IoAddressSpace::builder()
            .entry_limit(LIMIT)
            .unmap_deadline(Duration::ZERO)
            .profile(profile);
        if other_policy {
            builder = builder.permission_policy(match strict {
                true => PermissionPolicy::Strict,
                false => PermissionPolicy::WriteNeedsRead,
            });
        }
        let mut real = Real { space: builder.build(), held: Vec::new() };
        let mut model = Model::new(profile, strict);
        step(&mut real, &mut model, Op::SetTracking(is_tracked))?;
        for (op, pick) in ops {
            let op = aim(op, &model, pick);
            step(&mut real, &mut model, op)?;
            compare(&real, &mut model)?;
        }

        // Whatever was not taken on the way.
        for mapped in model.mappings.clone() {
            step(&mut real, &mut model, Op::TakeDirty(mapped.range()))?;
        }

        // Nothing stays behind.
        real.held.clear();
        real.space.unmap_all().unwrap();
        let stats = real.space.stats();
        prop_assert_eq!((stats.mappings, stats.leaving, stats.leases, stats.table_bytes), (0, 0, 0, 0));
        prop_assert_eq!(stats.dirty_bytes, 0);
    }
}

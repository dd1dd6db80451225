// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Maps, unmaps, accesses, leases, pins and dirty pages from a list of actions, against a model of
//! mapped pages.

#![no_main]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

use arbitrary::Arbitrary;
use iommu_type1::{
    page_size, Backing, DmaHandle, Error, Interest, IoAddressSpace, PinnedPages, ScatterList,
    UnmapOptions, UnmapPolicy,
};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, Permissions};

#[derive(Arbitrary, Clone, Copy, Debug)]
struct NewMapping {
    page: u8,
    pages: u8,
    prot: u8,
}

#[derive(Arbitrary, Debug)]
enum Action {
    Map(NewMapping),
    MapBatch(Vec<NewMapping>),
    Unmap { page: u8, pages: u8, restore: bool },
    UnmapBatch { ranges: Vec<(u8, u8)>, restore: bool },
    UnmapAnywhere { iova: u64, size: u64 },
    Read { page: u8, offset: u16, len: u16 },
    Write { page: u8, offset: u16, len: u16, value: u8 },
    ReadAnywhere { iova: u64, len: u16 },
    CompareExchange { page: u8, offset: u16, hit: bool, new: u32 },
    Lease { page: u8, len: u16, write: bool },
    WriteLeased { index: u8, value: u8 },
    Pin { page: u8, pages: u8 },
    Release { index: u8 },
    StartDirty,
    StopDirty,
    TakeDirty { page: u8, pages: u8 },
}

struct Mapped {
    pages: u64,
    prot: Permissions,
    bytes: Vec<u8>,
    revoked: bool,
    /// Page numbers inside the mapping.
    dirty: BTreeSet<u64>,
}

impl Mapped {
    fn last(&self, start: u64) -> u64 {
        start + (self.pages * page_size() - 1)
    }
}

enum Memory {
    /// Of bytes from here on, which may be written or not.
    Lease(ScatterList, u64, bool),
    Pin(#[allow(dead_code)] PinnedPages),
}

/// Memory that somebody has, and the addresses that cannot be unmapped meanwhile.
struct Held(Memory, u64, u64);

impl Held {
    fn touches(&self, iova: u64, last: u64) -> bool {
        let Held(_, from, to) = self;
        *from <= last && iova <= *to
    }
}

/// Pages that are pinned by now: whoever has pinned them may write them at any time, and says nothing.
fn pinned(held: &[Held]) -> impl Iterator<Item = u64> + '_ {
    let pins = held.iter().filter(|Held(memory, _, _)| matches!(memory, Memory::Pin(_)));
    pins.flat_map(|Held(_, from, to)| (0..=(to - from) / page_size()).map(move |page| from + page * page_size()))
}

const LIMIT: usize = 16;

/// The first 128 page numbers lie low, the others end at the top of the 64-bit space.
fn iova(page: u8) -> u64 {
    match page {
        0..=127 => u64::from(page) * page_size(),
        high => (u64::from(high) - 128).wrapping_sub(128).wrapping_mul(page_size()),
    }
}

fn prot(bits: u8) -> Permissions {
    [Permissions::No, Permissions::Read, Permissions::Write, Permissions::ReadWrite][usize::from(bits % 4)]
}

#[derive(Default)]
struct Model {
    mappings: BTreeMap<u64, Mapped>,
    tracking: bool,
}

impl Model {
    fn find(&mut self, at: u64) -> Option<(u64, &mut Mapped)> {
        let (start, mapped) = self.mappings.range_mut(..=at).next_back()?;
        (at <= mapped.last(*start)).then_some((*start, mapped))
    }

    /// Writes a byte, whoever does.
    fn write(&mut self, at: u64, value: u8) {
        let tracking = self.tracking;
        let (start, mapped) = self.find(at).unwrap();
        mapped.bytes[(at - start) as usize] = value;
        if tracking {
            mapped.dirty.insert((at - start) / page_size());
        }
    }

    /// All of them or none: the errno, or 0.
    fn map(&mut self, new: &[NewMapping]) -> i32 {
        let p = page_size();
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for mapping in new {
            let Some(last) = mapping.iova().checked_add(mapping.size() - 1) else {
                return libc::EOVERFLOW;
            };
            if prot(mapping.prot) == Permissions::No {
                return libc::EINVAL;
            }
            ranges.push((mapping.iova(), last));
        }
        for (i, (first, last)) in ranges.iter().enumerate() {
            if ranges[..i].iter().any(|(f, l)| f <= last && first <= l) {
                return libc::EEXIST;
            }
        }
        for mapping in new {
            let pages = (0..mapping.size() / p).map(|i| mapping.iova() + i * p);
            let met: Vec<_> = pages.filter_map(|at| Some(self.find(at)?.1.revoked)).collect();
            if met.contains(&true) {
                return libc::EBUSY;
            }
            if !met.is_empty() {
                return libc::EEXIST;
            }
        }
        if self.mappings.len() + new.len() > LIMIT {
            return libc::ENOSPC;
        }
        for mapping in new {
            let mapped = Mapped {
                pages: mapping.size() / p,
                prot: prot(mapping.prot),
                bytes: vec![0; mapping.size() as usize],
                revoked: false,
                dirty: BTreeSet::new(),
            };
            self.mappings.insert(mapping.iova(), mapped);
        }
        0
    }

    /// Starts of the mappings inside a range, unless it wraps or cuts one.
    fn inside(&self, (first, size): (u64, u64)) -> Result<Vec<u64>, i32> {
        let last = first.checked_add(size - 1).ok_or(libc::EOVERFLOW)?;
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

    /// Bytes that were unmapped, and bytes that are left.
    fn unmap(&mut self, ranges: &[(u64, u64)], held: &[Held], restore: bool) -> Result<(u64, u64), i32> {
        for (first, size) in ranges {
            first.checked_add(size - 1).ok_or(libc::EOVERFLOW)?;
        }
        let mut inside = BTreeSet::new();
        for range in ranges {
            inside.extend(self.inside(*range)?);
        }
        let (mut unmapped, mut left) = (0, 0);
        for start in inside {
            let mapped = self.mappings.get_mut(&start).unwrap();
            let size = mapped.pages * page_size();
            if held.iter().any(|held| held.touches(start, mapped.last(start))) {
                mapped.revoked = !restore;
                left += size;
            } else {
                self.mappings.remove(&start);
                unmapped += size;
            }
        }
        Ok((unmapped, left))
    }

    fn set_tracking(&mut self, tracking: bool, held: &[Held]) {
        if self.tracking != tracking {
            self.mappings.values_mut().for_each(|mapped| mapped.dirty.clear());
            self.tracking = tracking;
            pinned(held).for_each(|page| self.mark(page));
        }
    }

    /// Says that a page was written.
    fn mark(&mut self, page: u64) {
        if self.tracking {
            let (start, mapped) = self.find(page).unwrap();
            mapped.dirty.insert((page - start) / page_size());
        }
    }

    fn take(&mut self, range: (u64, u64), held: &[Held]) -> Result<Vec<u64>, i32> {
        range.0.checked_add(range.1 - 1).ok_or(libc::EOVERFLOW)?;
        if !self.tracking {
            return Err(libc::EINVAL);
        }
        let mut taken = Vec::new();
        for start in self.inside(range)? {
            let mapped = self.mappings.get_mut(&start).unwrap();
            let dirty = std::mem::take(&mut mapped.dirty);
            taken.extend(dirty.iter().map(|page| start + page * page_size()));
        }
        let last = range.0 + (range.1 - 1);
        let again = pinned(held).filter(|page| (range.0..=last).contains(page));
        again.for_each(|page| self.mark(page));
        Ok(taken)
    }

    /// How many bytes of an access succeed, and the errno it ends with if not all do.
    fn access(&mut self, iova: u64, len: usize, write: bool, mut each: impl FnMut(usize, u8)) -> (usize, i32) {
        if len > 0 && iova.checked_add(len as u64 - 1).is_none() {
            return (0, libc::EOVERFLOW);
        }
        for i in 0..len {
            let at = iova + i as u64;
            let Some((start, mapped)) = self.find(at) else {
                return (i, libc::EINVAL);
            };
            if mapped.revoked {
                return (i, libc::EBUSY);
            }
            let needed = if write { Permissions::ReadWrite } else { Permissions::Read };
            if !mapped.prot.allow(needed) {
                return (i, libc::EPERM);
            }
            each(i, mapped.bytes[(at - start) as usize]);
        }
        (len, 0)
    }
}

impl NewMapping {
    fn iova(&self) -> u64 {
        iova(self.page)
    }

    fn size(&self) -> u64 {
        (u64::from(self.pages % 8) + 1) * page_size()
    }

    fn made(&self) -> (u64, Backing, Permissions) {
        let backing = Backing::anonymous(self.size() as usize).unwrap();
        (self.iova(), backing, prot(self.prot))
    }
}

/// So many pages and one more, as address and size.
fn range(page: u8, pages: u8) -> (u64, u64) {
    (iova(page), (u64::from(pages) + 1) * page_size())
}

fn outcome(result: Result<(), Error>, len: usize) -> (usize, i32) {
    match result {
        Ok(()) => (len, 0),
        Err(error) => (error.completed(), error.errno()),
    }
}

fn unmapped(result: Result<u64, Error>) -> Result<(u64, u64), i32> {
    match result {
        Ok(bytes) => Ok((bytes, 0)),
        Err(Error::Deadline { unmapped, left, .. }) => Ok((unmapped, left)),
        Err(error) => Err(error.errno()),
    }
}

fn options(restore: bool) -> UnmapOptions {
    let policy = if restore { UnmapPolicy::Restore } else { UnmapPolicy::Revoked };
    UnmapOptions::new().deadline(Duration::ZERO).policy(policy)
}

fuzz_target!(|actions: Vec<Action>| {
    let p = page_size();
    let space = IoAddressSpace::builder().entry_limit(LIMIT).build();
    let handle = space.handle();
    let pinner = space.pinner("fuzz", Interest::All, Arc::new(|_, _| ()));
    let mut model = Model::default();
    let mut held: Vec<Held> = Vec::new();
    for action in actions.into_iter().take(200) {
        match action {
            Action::Map(new) => {
                let (at, backing, prot) = new.made();
                let errno = space.map(at, backing, prot).map_or_else(|e| e.errno(), |()| 0);
                assert_eq!(errno, model.map(&[new]));
            }
            Action::MapBatch(new) => {
                let new = &new[..new.len().min(2 * LIMIT)];
                let batch = new.iter().map(NewMapping::made);
                let errno = space.map_batch(batch).map_or_else(|e| e.errno(), |()| 0);
                assert_eq!(errno, model.map(new));
            }
            Action::Unmap { page, pages, restore } => {
                let (at, size) = range(page, pages);
                let result = unmapped(space.unmap_with(at, size, options(restore)));
                assert_eq!(result, model.unmap(&[(at, size)], &held, restore));
            }
            Action::UnmapBatch { ranges, restore } => {
                let ranges: Vec<_> = ranges.iter().map(|(page, pages)| range(*page, *pages)).collect();
                let result = unmapped(space.unmap_batch_with(&ranges, options(restore)));
                assert_eq!(result, model.unmap(&ranges, &held, restore));
            }
            Action::UnmapAnywhere { iova, size } if iova % p != 0 || size % p != 0 || size == 0 => {
                assert_eq!(space.unmap(iova, size).unwrap_err().errno(), libc::EINVAL);
            }
            Action::UnmapAnywhere { .. } => {}
            Action::Read { page, offset, len } => {
                let at = iova(page).wrapping_add(offset.into());
                read(&space, &mut model, at, len.into());
            }
            Action::ReadAnywhere { iova, len } => read(&space, &mut model, iova, len.into()),
            Action::Write { page, offset, len, value } => {
                let (at, len) = (iova(page).wrapping_add(offset.into()), usize::from(len));
                let data: Vec<u8> = (0..len).map(|i| value ^ i as u8).collect();
                let found = outcome(space.write(at, &data), len);
                let wanted = model.access(at, len, true, |_, _| ());
                assert_eq!(found, wanted);
                (0..wanted.0).for_each(|i| model.write(at + i as u64, data[i]));
            }
            Action::CompareExchange { page, offset, hit, new } => {
                compare_exchange(&handle, &mut model, iova(page).wrapping_add(offset.into()), hit, new);
            }
            Action::Lease { page, len, write } => {
                let (at, len) = (iova(page), usize::from(len));
                let expected = model.access(at, len, write, |_, _| ());
                let access = if write { Permissions::ReadWrite } else { Permissions::Read };
                match space.scatter(at, len, access) {
                    Ok(list) => {
                        assert_eq!(expected, (len, 0));
                        let bytes: usize = list.iter().map(|slice| slice.len()).sum();
                        assert_eq!(bytes, len);
                        if len > 0 {
                            // Whole mappings are leased.
                            let last = at + (len as u64 - 1);
                            let first = model.find(at).unwrap().0;
                            let (start, mapped) = model.find(last).unwrap();
                            let last = mapped.last(start);
                            held.push(Held(Memory::Lease(list, at, write), first, last));
                        }
                    }
                    Err(error) => assert_eq!(expected, (error.completed(), error.errno())),
                }
            }
            Action::WriteLeased { index, value } if !held.is_empty() => {
                let index = usize::from(index) % held.len();
                if let Memory::Lease(list, mut at, true) = &held[index].0 {
                    for slice in list.iter() {
                        slice.copy_from(&vec![value; slice.len()]);
                        for _ in 0..slice.len() {
                            model.write(at, value);
                            at = at.wrapping_add(1);
                        }
                    }
                }
            }
            Action::WriteLeased { .. } => {}
            Action::Pin { page, pages } => {
                let (at, pages) = (iova(page), usize::from(pages));
                match pinner.pin_pages(at, pages, Permissions::Read) {
                    Ok(pinned) => {
                        let mut byte = [0];
                        pinned.page(pages - 1).unwrap().read_slice(&mut byte, 0).unwrap();
                        let last = at + (pages as u64 * p - 1);
                        assert_eq!(model.find(last).map(|(start, m)| m.bytes[(last + 1 - p - start) as usize]), Some(byte[0]));
                        for page in 0..pages as u64 {
                            model.mark(at + page * p);
                        }
                        held.push(Held(Memory::Pin(pinned), at, last));
                    }
                    Err(error) if pages == 0 => assert_eq!(error.errno(), libc::EINVAL),
                    Err(error) => {
                        let expected = model.access(at, pages * p as usize, false, |_, _| ());
                        assert_eq!(expected, (error.completed(), error.errno()));
                    }
                }
            }
            Action::Release { index } if !held.is_empty() => {
                held.swap_remove(usize::from(index) % held.len());
            }
            Action::Release { .. } => {}
            Action::StartDirty => {
                space.start_dirty_tracking().unwrap();
                model.set_tracking(true, &held);
            }
            Action::StopDirty => {
                space.stop_dirty_tracking();
                model.set_tracking(false, &held);
            }
            Action::TakeDirty { page, pages } => {
                let (at, size) = range(page, pages);
                let taken = space.take_dirty(at, size).map_err(|error| error.errno()).map(|dirty| {
                    let mut pages: Vec<_> = dirty.iter().collect();
                    assert_eq!((dirty.len(), dirty.is_empty()), (pages.len(), pages.is_empty()));
                    pages.sort_unstable();
                    pages
                });
                assert_eq!(taken, model.take((at, size), &held));
            }
        }
        assert_eq!(space.mappings(), model.mappings.len());
    }
});

fn read(space: &IoAddressSpace, model: &mut Model, at: u64, len: usize) {
    let (mut bytes, mut wanted) = (vec![0; len], vec![0; len]);
    let found = outcome(space.read(at, &mut bytes), len);
    assert_eq!(found, model.access(at, len, false, |i, byte| wanted[i] = byte));
    assert_eq!(bytes, wanted);
}

/// With what is there, or with anything else.
fn compare_exchange(handle: &DmaHandle, model: &mut Model, at: u64, hit: bool, new: u32) {
    let mut there = [0; 4];
    let wanted = match at % 4 {
        0 => model.access(at, 4, true, |i, byte| there[i] = byte),
        _ => (0, libc::EINVAL),
    };
    let before = u32::from_ne_bytes(there);
    let current = if hit { before } else { !before };
    let result = handle.compare_exchange(at, current, new, Ordering::AcqRel, Ordering::Acquire);
    match result {
        Ok(found) => {
            assert_eq!(wanted, (4, 0));
            assert_eq!(found, if hit { Ok(before) } else { Err(before) });
            // What is found to be different counts as written too.
            let after = if hit { new } else { before };
            for (i, byte) in after.to_ne_bytes().into_iter().enumerate() {
                model.write(at + i as u64, byte);
            }
        }
        Err(error) => assert_eq!(wanted, (error.completed(), error.errno())),
    }
}

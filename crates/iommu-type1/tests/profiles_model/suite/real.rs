// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Each operation on a space and on the model of it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use iommu_type1::{
    page_size, Backing, DirtyBitmap, Error, IoAddressSpace, Listener, Listening, MappingInfo,
    Profile, SavedMapping, ScatterList, Snapshot, UnmapOptions, UnmapPolicy,
};
use proptest::prelude::*;
use vm_memory::Permissions::{self, ReadWrite};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::model::{Mapped, Memory, Model, Outcome, State, Unmapped};
use super::op::{Op, GUEST, LIMIT};

/// The space that is tested.
pub(crate) struct Real {
    pub(crate) space: IoAddressSpace,
    pub(crate) held: Vec<ScatterList>,
    /// The guest's memory, and the model's of it.
    guest: GuestMemoryMmap,
    guest_model: Vec<Memory>,
    /// What somebody who listens has been told of.
    heard: Option<(Listening, Arc<Mirror>)>,
}

/// The mappings that a listener knows, by address: their sizes.
#[derive(Default)]
struct Mirror(Mutex<BTreeMap<u64, u64>>);

impl Listener for Mirror {
    fn map(&self, mapping: &MappingInfo) -> io::Result<()> {
        let mut mapped = self.0.lock().unwrap();
        let last = mapping.iova + (mapping.size - 1);
        let before = mapped.range(..=last).next_back();
        assert!(before.is_none_or(|(iova, size)| iova + (size - 1) < mapping.iova));
        mapped.insert(mapping.iova, mapping.size);
        Ok(())
    }

    fn unmap(&self, iova: u64, size: u64) {
        assert_eq!(self.0.lock().unwrap().remove(&iova), Some(size));
    }
}

impl Real {
    pub(crate) fn new(space: IoAddressSpace, is_heard: bool) -> Self {
        let p = page_size();
        let regions = GUEST.map(|(page, pages)| (GuestAddress(page * p), (pages * p) as usize));
        let region = |(_, len): (GuestAddress, usize)| Rc::new(RefCell::new(vec![0; len]));
        let heard = is_heard.then(|| {
            let mirror = Arc::new(Mirror::default());
            (space.listen(mirror.clone()).unwrap(), mirror)
        });
        Real {
            held: Vec::new(),
            guest: GuestMemoryMmap::from_ranges(&regions).unwrap(),
            guest_model: regions.map(region).to_vec(),
            heard,
            space,
        }
    }
}

/// Too much to be memory: no such request comes as far as its memory.
pub(crate) const HUGE: u64 = 1 << 30;

pub(crate) fn memory(size: u64) -> Option<Backing> {
    (size > 0 && size < HUGE).then(|| Backing::anonymous(size as usize).unwrap())
}

pub(crate) fn unmapped(result: Result<u64, Error>) -> Outcome<Unmapped> {
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

pub(crate) fn errno<T>(result: Result<T, Error>) -> Outcome<T> {
    result.map_err(|error| error.errno())
}

pub(crate) fn step(real: &mut Real, model: &mut Model, op: Op) -> Result<(), TestCaseError> {
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
        Op::TakeBitmap(range) => {
            let p = page_size();
            let mut words = vec![0; 2];
            // What needs more words is refused, and so is what is wrong in any case.
            let Ok(mut bitmap) = DirtyBitmap::new(range.0, range.1, p, &mut words) else {
                return Ok(());
            };
            let result = errno(space.take_dirty_bitmap(&mut bitmap));
            let pages = result.map(|()| {
                let is_set = |page: &u64| words[*page as usize / 64] >> (page % 64) & 1 == 1;
                let set = (0..128_u64).filter(is_set);
                set.map(|page| range.0 + page * p).collect()
            });
            prop_assert_eq!(pages, model.take_dirty(range));
        }
        Op::MarkDirty(at, len) => {
            let result = space.mark_dirty(at, len);
            let result = result.map_err(|e| (e.errno(), e.completed()));
            prop_assert_eq!(result, model.mark_dirty(at, len));
        }
        Op::MapAnywhere(pages, prot) => {
            let size = pages * page_size();
            let backing = memory(size).unwrap();
            match space.map_anywhere(backing, prot) {
                Ok(at) => {
                    prop_assert!(at > 0 && model.overlapping(at, at + (size - 1)).is_empty());
                    let wanted = model.check_map((at, size), prot);
                    let wanted = wanted.and_then(|_| model.map(Model::fresh((at, size), prot)));
                    prop_assert_eq!(wanted, Ok(()));
                }
                Err(error) => {
                    let is_full = model.entries() + 1 > LIMIT;
                    let wanted = match prot {
                        Permissions::No => libc::EINVAL,
                        _ if is_full => libc::ENOSPC,
                        _ => 0,
                    };
                    prop_assert_eq!(error.errno(), wanted);
                }
            }
        }
        Op::MapGuest(at, page, size, prot) => {
            let from = GuestAddress(page * page_size());
            let result = errno(space.map_guest_memory(at, &real.guest, from, size, prot));
            let wanted = model.map_guest((at, size), page, prot, &real.guest_model);
            prop_assert_eq!(result, wanted);
        }
        Op::IsUnmapped(range) => {
            let result = errno(space.is_unmapped(range.0, range.1));
            prop_assert_eq!(result, model.is_unmapped(range));
        }
        Op::Snapshot => snapshot(space, model)?,
    }
    Ok(())
}

/// A snapshot has what is mapped and dirty, and so has what is made of it.
fn snapshot(space: &IoAddressSpace, model: &Model) -> Result<(), TestCaseError> {
    let (taken, _) = space.snapshot().unwrap();
    let saved: Vec<_> = taken
        .mappings
        .iter()
        .map(|saved| (saved.iova, saved.size, saved.backing.is_some()))
        .collect();
    let there = model
        .mappings
        .iter()
        .filter(|mapped| mapped.state != State::Revoked);
    let wanted: Vec<_> = there
        .map(|mapped| (mapped.first, mapped.size(), mapped.state == State::Live))
        .collect();
    prop_assert_eq!(saved, wanted);
    let dirty: Vec<u64> = taken.mappings.iter().flat_map(dirty_of).collect();
    let inside = |page: &u64| {
        let mapped = model.find(*page);
        mapped.is_some_and(|mapped| mapped.state != State::Revoked)
    };
    let wanted: Vec<_> = model.dirty.iter().copied().filter(inside).collect();
    prop_assert_eq!(dirty, wanted);

    let builder = IoAddressSpace::builder();
    let restored = builder
        .restore(&taken, |place| Backing::anonymous(place.size as usize))
        .unwrap();
    let again = restored.snapshot().unwrap().0;
    prop_assert_eq!((again.profile, again.limits), (taken.profile, taken.limits));
    let without_place = |snapshot: &Snapshot| {
        let mappings = snapshot.mappings.iter();
        mappings
            .map(|saved| (saved.iova, saved.size, saved.access, saved.dirty.clone()))
            .collect::<Vec<_>>()
    };
    prop_assert_eq!(without_place(&again), without_place(&taken));
    Ok(())
}

fn dirty_of(saved: &SavedMapping) -> impl Iterator<Item = u64> + '_ {
    let pages = 0..saved.size / page_size();
    let is_dirty = |page: &u64| {
        let word = saved.dirty.get(*page as usize / 64);
        word.is_some_and(|word| word >> (page % 64) & 1 == 1)
    };
    let iova = saved.iova;
    pages
        .filter(is_dirty)
        .map(move |page| iova + page * page_size())
}

/// As many entries, and every byte that can be read, is what the model has.
pub(crate) fn compare(real: &Real, model: &mut Model) -> Result<(), TestCaseError> {
    prop_assert_eq!(real.space.mappings(), model.entries());
    if let Some((listening, mirror)) = &real.heard {
        prop_assert!(!listening.is_lost());
        let live = model
            .mappings
            .iter()
            .filter(|mapped| mapped.state == State::Live);
        let live = live.map(|mapped| (mapped.first, mapped.size())).collect();
        prop_assert_eq!(&*mirror.0.lock().unwrap(), &live);
    }
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

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Each operation on a space and on the model of it.

use std::collections::BTreeMap;
use std::time::Duration;

use iommu_type1::{
    Backing, Error, IoAddressSpace, Profile, ScatterList, UnmapOptions, UnmapPolicy,
};
use proptest::prelude::*;
use vm_memory::Permissions::ReadWrite;

use super::model::{Mapped, Model, Outcome, Unmapped};
use super::op::Op;

/// The space that is tested.
pub(crate) struct Real {
    pub(crate) space: IoAddressSpace,
    pub(crate) held: Vec<ScatterList>,
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
    }
    Ok(())
}

/// As many entries, and every byte that can be read, is what the model has.
pub(crate) fn compare(real: &Real, model: &mut Model) -> Result<(), TestCaseError> {
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

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Spaces made of snapshots, which may come from anybody.

use std::sync::Arc;

use checked_sync::lock;
use vm_memory::GuestAddress;

use super::{
    BackingRef, Place, SavedLimits, SavedMapping, Snapshot, SnapshotError, SNAPSHOT_VERSION,
};
use crate::backing::GuestPlace;
use crate::check::Request;
use crate::dirty::check_pages;
use crate::map::{check_apart, check_backing, check_log_bytes, check_memory};
use crate::mapping::Mapping;
use crate::mapping_set::SetId;
use crate::memory;
use crate::range::{page_size, IovaRange};
use crate::space::Space;
use crate::{Backing, Error, IoAddressSpace, IoAddressSpaceBuilder, Result};

impl IoAddressSpaceBuilder {
    /// A space with what a snapshot says is mapped, all of it or nothing. `resolve` finds the memory of each
    /// mapping that has some.
    ///
    /// Profile, permission policy, limits, and whether dirty pages are tracked are the snapshot's, everything else is
    /// the builder's; its limits bound those of the snapshot. A snapshot may come from anybody: nothing is asked
    /// for, and no memory taken, before all of it has been checked, and no more memory than it has itself.
    ///
    /// # Errors
    ///
    /// [`Error::Snapshot`] (EINVAL) and [`Error::NotInProfile`] (EINVAL) of a snapshot that is wrong in itself or
    /// does not fit; what [`map_batch`](IoAddressSpace::map_batch) says of its mappings; what `resolve` says.
    pub fn restore(
        self,
        snapshot: &Snapshot,
        mut resolve: impl FnMut(&BackingRef) -> Result<Backing>,
    ) -> Result<IoAddressSpace> {
        if snapshot.version != SNAPSHOT_VERSION {
            return Err(SnapshotError::Version(snapshot.version).into());
        }
        if snapshot.page_size != page_size() {
            return Err(SnapshotError::PageSize(snapshot.page_size).into());
        }
        let limits = snapshot.limits.within(self.limits())?;
        let restored = self
            .with_limits(limits)
            .profile(snapshot.profile)
            .permission_policy(snapshot.permissions)
            .build();
        let space = &*restored.view.space;
        let ranges = check(snapshot, space)?;

        let mut mappings = Vec::new();
        memory::reserve(&mut mappings, ranges.len())?;
        for (saved, range) in snapshot.mappings.iter().zip(ranges) {
            let prot = saved.access.into();
            let mapping = match &saved.backing {
                Some(place) => {
                    let backing = resolve(place)?;
                    check_size(saved, backing.len() as u64)?;
                    let backing = match place.guest_address {
                        Some(address) => backing.with_guest_address(GuestAddress(address))?,
                        None => backing.in_guest(GuestPlace::UNKNOWN),
                    };
                    Request::to_map(saved.iova, &backing, prot).check(space, space.rules.map)?;
                    check_backing(space, range, &backing, prot)?;
                    space.mapping(range, prot, backing, SetId::NONE)
                }
                None => Mapping::without_memory(range, prot, space.permissions),
            };
            mappings.push(Arc::new(mapping));
        }

        let mut writer = lock(&space.writer);
        writer.tracking = snapshot.tracks_dirty;
        for (saved, mapping) in snapshot.mappings.iter().zip(mappings) {
            check_memory(&writer, space, [mapping.range])?;
            if mapping.is_hollow() {
                writer.insert_hollow(mapping.clone())?;
            } else {
                writer.publish(&space.table, mapping.clone())?;
            }
            for (index, marks) in saved.dirty.iter().enumerate() {
                mapping.dirty.put_back(index, *marks);
            }
        }
        drop(writer);
        Ok(restored)
    }
}

impl SavedLimits {
    /// As numbers of this process, none of which is larger than those of a builder.
    fn within(self, allowed: [usize; 3]) -> Result<[usize; 3]> {
        let mut limits = allowed;
        for (limit, asked) in limits
            .iter_mut()
            .zip([self.entries, self.table, self.dirty])
        {
            let allowed = *limit as u64;
            if asked > allowed {
                return Err(SnapshotError::Limit { asked, allowed }.into());
            }
            *limit = asked as usize;
        }
        Ok(limits)
    }
}

/// The ranges of a snapshot, if all that it says can be.
fn check(snapshot: &Snapshot, space: &Space) -> Result<Vec<IovaRange>> {
    if snapshot.mappings.len() > space.entry_limit {
        return Err(Error::EntryLimit {
            limit: space.entry_limit,
        });
    }
    let writer = lock(&space.writer);
    let mut ranges = Vec::new();
    memory::reserve(&mut ranges, snapshot.mappings.len())?;
    let mut log_bytes = 0;
    for saved in &snapshot.mappings {
        let request = Request {
            iova: saved.iova,
            size: saved.size,
            host: 0,
            prot: saved.access.into(),
        };
        let range = request.check(space, space.rules.map)?;
        writer.ranges.check(range, space.rules)?;
        match &saved.backing {
            Some(backing) => {
                check_size(saved, backing.size)?;
                if !is_there(snapshot, backing) {
                    return Err(SnapshotError::Place { iova: saved.iova }.into());
                }
                if let Some(address) = backing.guest_address {
                    check_guest(saved, address)?;
                }
            }
            None if space.rules.vaddr => {}
            None => return Err(Error::NotInProfile("a mapping without memory")),
        }
        if snapshot.tracks_dirty {
            check_pages(range)?;
        }
        check_dirty(snapshot, saved)?;
        log_bytes += size_of_val(saved.dirty.as_slice());
        ranges.push(range);
    }
    check_apart(memory::collect(ranges.iter().copied())?)?;
    check_log_bytes(log_bytes, space.log_limit)?;
    Ok(ranges)
}

fn is_there(snapshot: &Snapshot, backing: &BackingRef) -> bool {
    let (offset, size) = match backing.place {
        Place::File { file, offset } if file < snapshot.files => (offset, u64::MAX),
        Place::File { .. } => return false,
        Place::Anonymous { region, offset } => match snapshot.anonymous.get(region as usize) {
            Some(size) => (offset, *size),
            None => return false,
        },
    };
    let end = offset.checked_add(backing.size);
    end.is_some_and(|end| end <= size)
}

fn check_guest(saved: &SavedMapping, address: u64) -> Result<()> {
    if address.checked_add(saved.size).is_some() {
        return Ok(());
    }
    let iova = saved.iova;
    Err(SnapshotError::GuestAddress { iova, address }.into())
}

fn check_size(saved: &SavedMapping, backing: u64) -> Result<()> {
    let (iova, size) = (saved.iova, saved.size);
    if size == backing {
        return Ok(());
    }
    Err(SnapshotError::Size {
        iova,
        size,
        backing,
    }
    .into())
}

/// Refuses marks of fewer or more pages than a mapping has.
fn check_dirty(snapshot: &Snapshot, saved: &SavedMapping) -> Result<()> {
    let pages = match snapshot.tracks_dirty {
        true => saved.size / snapshot.page_size,
        false => 0,
    };
    let words = saved.dirty.len();
    let word = u64::from(u64::BITS);
    let behind = pages % word;
    let last = saved.dirty.last().copied().unwrap_or(0);
    let is_fitting = words as u64 == pages.div_ceil(word) && (behind == 0 || last >> behind == 0);
    if is_fitting {
        return Ok(());
    }
    let iova = saved.iova;
    Err(SnapshotError::Dirty { iova, words }.into())
}

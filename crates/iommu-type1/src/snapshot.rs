// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is mapped, as data, and spaces made of it.

use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;

use checked_sync::lock;
#[cfg(feature = "serde")]
use serde::{Deserialize, Serialize};
use vm_memory::{GuestAddress, Permissions};

use crate::backing::GuestPlace;
use crate::check::Request;
use crate::dirty::{check_pages, mark_what_is_pinned};
use crate::map::{check_apart, check_backing, check_log_bytes, check_memory};
use crate::mapping::Mapping;
use crate::mapping_set::SetId;
use crate::memory;
use crate::range::{page_size, IovaRange};
use crate::space::Space;
use crate::{
    Backing, Error, IoAddressSpace, IoAddressSpaceBuilder, PermissionPolicy, Profile, Result,
};

/// The layout of [`Snapshot`] that this version writes and reads.
pub const SNAPSHOT_VERSION: u32 = 1;

/// What an address space was at one moment, from [`IoAddressSpace::snapshot`].
///
/// Data and nothing else. With the feature `serde` it can be written and read in any format of serde; whoever
/// reads it need not be trusted ([`IoAddressSpaceBuilder::restore`]).
///
/// Not in it: the bytes of the memory; pins, leases, handles, listeners and the sets that mappings belong to;
/// mappings that are being unmapped or whose unmap has ended at its deadline; deadline and policy of unmaps, the
/// barrier, and which addresses and sizes of pages the hardware knows, which are the builder's.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(Serialize, Deserialize))]
pub struct Snapshot {
    /// [`SNAPSHOT_VERSION`].
    pub version: u32,
    /// Bytes of a host page: what a bit of [`SavedMapping::dirty`] stands for.
    pub page_size: u64,
    /// Whose rules the space follows.
    pub profile: Profile,
    /// What a write needs.
    pub permissions: PermissionPolicy,
    /// The limits of the space.
    pub limits: SavedLimits,
    /// Whether dirty pages are tracked.
    pub tracks_dirty: bool,
    /// How many files there are behind mappings.
    pub files: u32,
    /// The size of each region of memory that belongs to no file.
    pub anonymous: Vec<u64>,
    /// By address.
    pub mappings: Vec<SavedMapping>,
}

/// The limits of a space, as [`IoAddressSpaceBuilder`] has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(Serialize, Deserialize))]
pub struct SavedLimits {
    /// Most mappings.
    pub entries: u64,
    /// Most bytes of the table's nodes.
    pub table: u64,
    /// Most bytes of the marks of dirty pages.
    pub dirty: u64,
}

/// A mapping of a [`Snapshot`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(Serialize, Deserialize))]
pub struct SavedMapping {
    /// First address.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
    /// What it is mapped for.
    pub access: SavedAccess,
    /// The memory; none of a mapping whose memory was taken away
    /// ([`IoAddressSpace::invalidate_vaddr`]).
    pub backing: Option<BackingRef>,
    /// While dirty pages are tracked, a bit for each page, the first in the lowest bit of the first word; else
    /// none.
    pub dirty: Vec<u64>,
}

/// Permissions in a [`Snapshot`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(Serialize, Deserialize))]
pub struct SavedAccess {
    /// Reads.
    pub read: bool,
    /// Writes.
    pub write: bool,
}

/// Which memory is behind a mapping of a [`Snapshot`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(Serialize, Deserialize))]
pub struct BackingRef {
    /// Where it is.
    pub place: Place,
    /// Bytes.
    pub size: u64,
    /// What the process may do with it.
    pub access: SavedAccess,
    /// Where the guest has it, if that is known ([`Backing::guest_address`]).
    #[cfg_attr(feature = "serde", serde(default))]
    pub guest_address: Option<u64>,
}

/// Where memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(Serialize, Deserialize))]
pub enum Place {
    /// In a file.
    File {
        /// Index in [`SnapshotMemory::files`].
        file: u32,
        /// Where it begins in the file.
        offset: u64,
    },
    /// In memory that belongs to no file, whose bytes somebody has to bring along.
    Anonymous {
        /// Index in [`Snapshot::anonymous`] and [`SnapshotMemory::anonymous`].
        region: u32,
        /// Where it begins in the region.
        offset: u64,
    },
}

/// What a [`Snapshot`] refers to by index, for whoever passes the files on and copies the bytes.
///
/// It keeps the memory, also of mappings that are unmapped meanwhile.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct SnapshotMemory {
    /// Files: mappings of the same open file (the same `Arc`) have one.
    pub files: Vec<Arc<File>>,
    /// Whole regions of memory that belong to no file.
    pub anonymous: Vec<Backing>,
}

/// What is wrong with a [`Snapshot`] in itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// It has a layout that is not known.
    #[error("version {0} of a snapshot is not known")]
    Version(u32),
    /// It was taken where pages have another size.
    #[error("a snapshot with pages of {0:#x} bytes")]
    PageSize(u64),
    /// It asks for more than the builder allows.
    #[error("a limit of {asked} in a snapshot, where {allowed} is allowed")]
    Limit {
        /// The limit that it has.
        asked: u64,
        /// That of the builder.
        allowed: u64,
    },
    /// A mapping refers to a file or region that is not there, or to what is behind its end.
    #[error("the mapping at {iova:#x} refers to memory that is not there")]
    Place {
        /// Start of the mapping.
        iova: u64,
    },
    /// The memory behind a mapping has another size.
    #[error("the mapping at {iova:#x} has {size:#x} bytes, the memory behind it {backing:#x}")]
    Size {
        /// Start of the mapping.
        iova: u64,
        /// Its size in bytes.
        size: u64,
        /// Bytes of the memory.
        backing: u64,
    },
    /// A mapping stands for guest memory that ends beyond the 64-bit address space.
    #[error("the mapping at {iova:#x} stands for guest memory at {address:#x} that ends beyond the 64-bit address space")]
    GuestAddress {
        /// Start of the mapping.
        iova: u64,
        /// Where the guest should have it.
        address: u64,
    },
    /// The dirty pages of a mapping are not those of so many pages.
    #[error("the mapping at {iova:#x} has {words} words of dirty pages that do not fit its size")]
    Dirty {
        /// Start of the mapping.
        iova: u64,
        /// Words of them.
        words: usize,
    },
}

impl From<Permissions> for SavedAccess {
    fn from(permissions: Permissions) -> Self {
        SavedAccess {
            read: permissions.allow(Permissions::Read),
            write: permissions.allow(Permissions::Write),
        }
    }
}

impl From<SavedAccess> for Permissions {
    fn from(access: SavedAccess) -> Self {
        match (access.read, access.write) {
            (false, false) => Permissions::No,
            (true, false) => Permissions::Read,
            (false, true) => Permissions::Write,
            (true, true) => Permissions::ReadWrite,
        }
    }
}

impl IoAddressSpace {
    /// What is mapped at this moment, and the memory behind it.
    ///
    /// No map or unmap comes in between. Dirty pages stay dirty. A write that has returned before is among
    /// them, and all that is pinned; one that runs meanwhile may or may not be. Whoever wants to know them exactly
    /// stops the devices before. Those who map and unmap wait meanwhile.
    ///
    /// ```
    /// use iommu_type1::{Backing, IoAddressSpace};
    /// use vm_memory::Permissions::ReadWrite;
    ///
    /// let space = IoAddressSpace::new();
    /// space.map(0x4000, Backing::anonymous(0x2000)?, ReadWrite)?;
    /// let (snapshot, memory) = space.snapshot()?;
    /// assert_eq!(memory.anonymous[0].len(), 0x2000);
    ///
    /// let restored = IoAddressSpace::builder().restore(&snapshot, |backing| {
    ///     Backing::anonymous(backing.size as usize)
    /// })?;
    /// restored.write(0x5fff, &[1])?;
    /// assert_eq!(restored.snapshot()?.0, snapshot);
    /// # Ok::<(), iommu_type1::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::NoMemory`] (ENOMEM): it takes about 100 bytes a mapping, and a bit a page while dirty pages are
    /// tracked.
    pub fn snapshot(&self) -> Result<(Snapshot, SnapshotMemory)> {
        let space = &*self.view.space;
        let mut tables = Tables::default();
        let mut mappings = Vec::new();
        let writer = lock(&space.writer);
        let is_tracking = writer.tracking;
        writer.settle_marks(&space.table);
        let mut save = |mapping: &Mapping| {
            if is_tracking {
                mark_what_is_pinned(space, mapping);
            }
            memory::push(&mut mappings, tables.save(mapping)?)
        };
        space.table.try_visit(IovaRange::ALL, &mut save)?;
        for leaving in writer.leaving_inside(IovaRange::ALL) {
            if leaving.state.is_vaddr() {
                save(&leaving.mapping)?;
            }
        }
        drop(writer);
        mappings.sort_unstable_by_key(|mapping| mapping.iova);
        let limits = [space.entry_limit, space.table_limit, space.log_limit];
        let anonymous = tables.memory.anonymous.iter();
        let anonymous = memory::collect(anonymous.map(|region| region.len() as u64))?;
        let snapshot = Snapshot {
            version: SNAPSHOT_VERSION,
            page_size: page_size(),
            profile: space.profile,
            permissions: space.permissions,
            limits: SavedLimits::of(limits),
            tracks_dirty: is_tracking,
            files: tables.memory.files.len() as u32,
            anonymous,
            mappings,
        };
        Ok((snapshot, tables.memory))
    }
}

impl SavedLimits {
    fn of([entries, table, dirty]: [usize; 3]) -> Self {
        SavedLimits {
            entries: entries as u64,
            table: table as u64,
            dirty: dirty as u64,
        }
    }

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

/// What mappings refer to, and at which index.
#[derive(Default)]
struct Tables {
    memory: SnapshotMemory,
    files: HashMap<*const File, u32>,
    /// By the address where a region begins.
    regions: HashMap<usize, u32>,
}

impl Tables {
    fn save(&mut self, mapping: &Mapping) -> Result<SavedMapping> {
        let mut dirty = Vec::new();
        if mapping.dirty.is_on() {
            // A word for all the marks that it will be given.
            memory::reserve(&mut dirty, mapping.log_bytes() / size_of::<u64>())?;
            mapping
                .dirty
                .look(mapping.pages(), |marks| dirty.push(marks));
        }
        let backing = (!mapping.is_hollow()).then(|| mapping.backing(mapping.range));
        let backing = backing.map(|backing| self.refer(&backing)).transpose()?;
        Ok(SavedMapping {
            iova: mapping.range.first,
            size: mapping.range.size(),
            access: mapping.permissions().into(),
            backing,
            dirty,
        })
    }

    fn refer(&mut self, backing: &Backing) -> Result<BackingRef> {
        let no_memory = |_| memory::no_memory::<(usize, u32)>(self.memory.files.len() + 1);
        self.files.try_reserve(1).map_err(no_memory)?;
        memory::reserve(&mut self.memory.files, 1)?;
        let no_memory = |_| memory::no_memory::<(usize, u32)>(self.memory.anonymous.len() + 1);
        self.regions.try_reserve(1).map_err(no_memory)?;
        memory::reserve(&mut self.memory.anonymous, 1)?;
        let place = match backing.file_offset() {
            Some(file) => {
                let files = &mut self.memory.files;
                let index = *self
                    .files
                    .entry(Arc::as_ptr(file.arc()))
                    .or_insert_with(|| {
                        files.push(file.arc().clone());
                        files.len() as u32 - 1
                    });
                Place::File {
                    file: index,
                    offset: file.start(),
                }
            }
            None => {
                let whole = backing.region();
                let start = whole.host_address().addr();
                let regions = &mut self.memory.anonymous;
                let index = *self.regions.entry(start).or_insert_with(|| {
                    regions.push(whole);
                    regions.len() as u32 - 1
                });
                Place::Anonymous {
                    region: index,
                    offset: (backing.host_address().addr() - start) as u64,
                }
            }
        };
        Ok(BackingRef {
            place,
            size: backing.len() as u64,
            access: backing.access().into(),
            guest_address: backing.guest_address().map(|address| address.0),
        })
    }
}

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

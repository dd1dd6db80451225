// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is mapped at one moment, written down.

use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;

use checked_sync::lock;

use super::{
    BackingRef, Place, SavedLimits, SavedMapping, Snapshot, SnapshotMemory, SNAPSHOT_VERSION,
};
use crate::dirty::mark_what_is_pinned;
use crate::mapping::Mapping;
use crate::memory;
use crate::range::{page_size, IovaRange};
use crate::{Backing, IoAddressSpace, Result};

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
    /// [`Error::NoMemory`](crate::Error::NoMemory) (ENOMEM): it takes about 100 bytes a mapping, and a bit a page while dirty pages are
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

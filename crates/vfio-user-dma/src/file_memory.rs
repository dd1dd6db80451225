// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The files that clients share their memory through, each mapped into this process once.
//!
//! A guest behind an IOMMU maps every page by itself: a mapping of ours for each would meet the kernel's limit
//! (`vm.max_map_count`), and a file descriptor for each that of the process.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Weak};

use iommu_type1::Backing;
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap, MmapRegion, Permissions};

use crate::sharing::{self, FileId};
use crate::{Error, Result};

/// Most files at a time: each keeps a file descriptor.
pub(crate) const FILE_LIMIT: usize = 256;

/// Memory of one file. The table holds it as long as a part of it is mapped.
#[derive(Debug)]
pub(crate) struct FileMemory(GuestRegionMmap);

#[derive(Debug, Default)]
pub(crate) struct Files {
    known: BTreeMap<(FileId, bool), Weak<FileMemory>>,
}

/// What to check of a file that is not known yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Checks {
    pub(crate) sealed: bool,
    pub(crate) client: Option<i32>,
}

impl Files {
    /// `size` bytes from `offset` of a file.
    pub(crate) fn backing(
        &mut self,
        file: File,
        offset: u64,
        size: usize,
        prot: Permissions,
        checks: Checks,
    ) -> Result<(Arc<FileMemory>, Backing)> {
        let metadata = file.metadata().map_err(Error::io("the file of a map"))?;
        let id = FileId {
            dev: metadata.dev(),
            ino: metadata.ino(),
        };
        let writable = sharing::is_writable(&file);
        if prot.has_write() && !writable {
            return Err(Error::FileAccess);
        }
        let inside = |memory: &Arc<FileMemory>| Backing::from_region(&memory.0, offset, size);
        if let Some(memory) = self.known.get(&(id, writable)).and_then(Weak::upgrade) {
            // A file that has grown since is mapped anew.
            if let Ok(backing) = inside(&memory) {
                return Ok((memory, backing));
            }
        }
        self.known.retain(|_, memory| memory.strong_count() > 0);
        if self.known.len() >= FILE_LIMIT {
            return Err(Error::Limit {
                what: "files behind mappings",
                limit: FILE_LIMIT,
            });
        }
        if checks.sealed && !sharing::is_sealed(&file) {
            return Err(Error::Unsealed);
        }
        if let Some(pid) = checks.client {
            if sharing::is_private(pid, id) {
                return Err(Error::PrivateMemory { pid });
            }
        }
        let memory = Arc::new(FileMemory::new(file, metadata.len(), writable)?);
        let backing = inside(&memory)?;
        self.known.insert((id, writable), Arc::downgrade(&memory));
        Ok((memory, backing))
    }
}

impl FileMemory {
    fn new(file: File, len: u64, writable: bool) -> Result<Self> {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let write = if writable { libc::PROT_WRITE } else { 0 };
        let region = MmapRegion::build(
            Some(FileOffset::new(file, 0)),
            len,
            libc::PROT_READ | write,
            libc::MAP_NORESERVE | libc::MAP_SHARED,
        )
        .map_err(|source| iommu_type1::Error::Mmap { len, source })?;
        let region = GuestRegionMmap::new(region, GuestAddress(0));
        region
            .map(FileMemory)
            .ok_or(Error::Malformed("a file of 2^64 bytes"))
    }
}

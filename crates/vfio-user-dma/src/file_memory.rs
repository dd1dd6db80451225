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
use vm_memory::{FileOffset, Permissions};

use crate::sharing::{self, FileId};
use crate::{Error, Result};

/// Most files at a time: each keeps a file descriptor.
pub(crate) const FILE_LIMIT: usize = 256;

/// Memory of one file. The table holds it as long as a part of it is mapped.
#[derive(Debug)]
pub(crate) struct FileMemory(Backing);

#[derive(Debug, Default)]
pub(crate) struct Files {
    known: BTreeMap<(FileId, bool), Weak<FileMemory>>,
}

/// What to check of a file that is not known yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Checks {
    pub(crate) sealed: bool,
    pub(crate) client: Option<i32>,
    /// Whether an access has to survive that the file gets shorter.
    pub(crate) guard: bool,
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
        let inside = |memory: &FileMemory| memory.part(offset, size);
        if let Some(memory) = self.known.get(&(id, writable)).and_then(Weak::upgrade) {
            // A file that has grown since is mapped anew, or has its size again.
            if let Ok(backing) = inside(&memory) {
                if !memory.is_bad() {
                    return Ok((memory, backing));
                }
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
        let memory = Arc::new(FileMemory::new(
            file,
            metadata.len(),
            writable,
            checks.guard,
        )?);
        let backing = inside(&memory)?;
        self.known.insert((id, writable), Arc::downgrade(&memory));
        Ok((memory, backing))
    }
}

impl FileMemory {
    fn new(file: File, len: u64, writable: bool, guard: bool) -> Result<Self> {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let access = match writable {
            true => Permissions::ReadWrite,
            false => Permissions::Read,
        };
        let memory = Backing::file(FileOffset::new(file, 0), len, access)?;
        #[cfg(feature = "sigbus")]
        if guard {
            return Ok(FileMemory(memory.guarded()?));
        }
        let _ = guard;
        Ok(FileMemory(memory))
    }

    fn part(&self, offset: u64, size: usize) -> Result<Backing> {
        // An offset beyond the address space is beyond the file.
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        Ok(self.0.slice(offset, size)?)
    }

    /// Whether bytes were missed that the file has had.
    fn is_bad(&self) -> bool {
        #[cfg(feature = "sigbus")]
        return self.0.fault_offset().is_some();
        #[cfg(not(feature = "sigbus"))]
        false
    }
}

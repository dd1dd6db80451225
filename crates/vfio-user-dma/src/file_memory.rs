// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The files that clients share their memory through, each mapped into this process once.
//!
//! A guest behind an IOMMU maps every page by itself: a mapping of ours for each would meet the kernel's limit
//! (`vm.max_map_count`), and a file descriptor for each that of the process.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Weak};

use iommu_type1::Backing;
use vm_memory::{FileOffset, Permissions};

use crate::sharing::{self, FileId};
use crate::{Error, Result};

/// Most files at a time: each keeps a file descriptor.
pub(crate) const FILE_LIMIT: usize = 256;

/// Most bytes of files at a time, unless told otherwise: all of each is mapped, memory or not, and this process has
/// addresses for 128 TiB (x86-64, four levels). Without any left nothing in it can allocate.
pub const FILE_BYTES_LIMIT: u64 = 4 << 40;

/// Memory of one file. The table holds it as long as a part of it is mapped.
#[derive(Debug)]
pub(crate) struct FileMemory(Backing);

/// The oldest first. One that has grown, or got shorter, since it was mapped is there more than once.
#[derive(Debug, Default)]
pub(crate) struct Files {
    known: Vec<Known>,
}

#[derive(Debug)]
struct Known {
    id: FileId,
    writable: bool,
    bytes: u64,
    memory: Weak<FileMemory>,
}

/// What to check of a file that is not known yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Checks {
    pub(crate) sealed: bool,
    pub(crate) client: Option<i32>,
    /// Whether an access has to survive that the file gets shorter.
    pub(crate) guard: bool,
    /// Most bytes of all files.
    pub(crate) bytes: u64,
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
        let is_it = |known: &&Known| (known.id, known.writable) == (id, writable);
        let newest = self.known.iter().rfind(is_it);
        if let Some(memory) = newest.and_then(|known| known.memory.upgrade()) {
            // A file that has grown since is mapped anew, or has its size again.
            if let Ok(backing) = inside(&memory) {
                if !memory.is_bad() {
                    return Ok((memory, backing));
                }
            }
        }
        self.known.retain(|known| known.memory.strong_count() > 0);
        if self.known.len() >= FILE_LIMIT {
            return Err(Error::Limit {
                what: "files behind mappings",
                limit: FILE_LIMIT,
            });
        }
        let bytes = metadata.len();
        let all = self.known.iter().map(|known| known.bytes);
        if all.fold(bytes, u64::saturating_add) > checks.bytes {
            return Err(Error::Limit {
                what: "bytes of files behind mappings",
                limit: usize::try_from(checks.bytes).unwrap_or(usize::MAX),
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
        let memory = Arc::new(FileMemory::new(file, bytes, writable, checks.guard)?);
        let backing = inside(&memory)?;
        self.known.push(Known {
            id,
            writable,
            bytes,
            memory: Arc::downgrade(&memory),
        });
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

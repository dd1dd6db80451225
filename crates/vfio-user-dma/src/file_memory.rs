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
#[derive(Debug)]
pub(crate) struct Files {
    known: Vec<Known>,
    /// Most bytes of all.
    bytes: u64,
    guard: bool,
}

#[derive(Debug)]
struct Known {
    id: FileId,
    writable: bool,
    bytes: u64,
    memory: Weak<FileMemory>,
}

/// A file as a client has sent it.
#[derive(Debug)]
pub(crate) struct SentFile {
    file: Arc<File>,
    id: FileId,
    writable: bool,
    bytes: u64,
}

/// The part of a file that is to be mapped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    pub(crate) offset: u64,
    pub(crate) size: usize,
    pub(crate) prot: Permissions,
}

impl SentFile {
    /// With `sealed` nothing is asked of a file that may become shorter: one of a file system of the client's (FUSE)
    /// may never answer. Seals are asked for without its file system.
    pub(crate) fn new(file: File, sealed: bool) -> Result<Self> {
        if sealed && !sharing::is_sealed(&file) {
            return Err(Error::Unsealed);
        }
        let metadata = file.metadata().map_err(Error::io("the file of a map"))?;
        let id = FileId {
            dev: metadata.dev(),
            ino: metadata.ino(),
        };
        let writable = sharing::is_writable(&file);
        Ok(SentFile {
            file: Arc::new(file),
            id,
            writable,
            bytes: metadata.len(),
        })
    }

    /// Whether it may be mapped. That takes as long as the kernel takes to say what the client has mapped, so no lock is
    /// held meanwhile.
    pub(crate) fn check(
        &self,
        client: Option<i32>,
        is_private: impl FnOnce(i32, FileId) -> bool,
    ) -> Result<()> {
        match client {
            Some(pid) if is_private(pid, self.id) => Err(Error::PrivateMemory { pid }),
            _ => Ok(()),
        }
    }
}

impl Files {
    /// No file yet, and at most so many bytes of all. With `guard` an access has to survive that a file gets shorter.
    pub(crate) fn new(bytes: u64, guard: bool) -> Self {
        Files {
            known: Vec::new(),
            bytes,
            guard,
        }
    }

    /// A part of a file that is mapped already; `None` for one that is not, and may be.
    pub(crate) fn find(
        &mut self,
        sent: &SentFile,
        part: Part,
    ) -> Result<Option<(Arc<FileMemory>, Backing)>> {
        if part.prot.has_write() && !sent.writable {
            return Err(Error::FileAccess);
        }
        let is_it = |known: &&Known| (known.id, known.writable) == (sent.id, sent.writable);
        let newest = self.known.iter().rfind(is_it);
        if let Some(memory) = newest.and_then(|known| known.memory.upgrade()) {
            // A file that has grown since is mapped anew, or has its size again.
            if let Ok(backing) = memory.part(part) {
                if !memory.is_bad() {
                    return Ok(Some((memory, backing)));
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
        let all = self.known.iter().map(|known| known.bytes);
        if all.fold(sent.bytes, u64::saturating_add) > self.bytes {
            return Err(Error::Limit {
                what: "bytes of files behind mappings",
                limit: usize::try_from(self.bytes).unwrap_or(usize::MAX),
            });
        }
        Ok(None)
    }

    /// A part of a file that has been checked, which is mapped now unless it is already.
    pub(crate) fn map(
        &mut self,
        sent: &SentFile,
        part: Part,
    ) -> Result<(Arc<FileMemory>, Backing)> {
        if let Some(found) = self.find(sent, part)? {
            return Ok(found);
        }
        let SentFile {
            ref file,
            id,
            writable,
            bytes,
        } = *sent;
        let file = FileOffset::from_arc(file.clone(), 0);
        let memory = Arc::new(FileMemory::new(file, bytes, writable, self.guard)?);
        let backing = memory.part(part)?;
        self.known.push(Known {
            id,
            writable,
            bytes,
            memory: Arc::downgrade(&memory),
        });
        Ok((memory, backing))
    }

    /// All that are mapped.
    pub(crate) fn living(&self) -> Vec<Arc<FileMemory>> {
        let living = self.known.iter().map(|known| known.memory.upgrade());
        living.flatten().collect()
    }
}

impl FileMemory {
    fn new(file: FileOffset, len: u64, writable: bool, guard: bool) -> Result<Self> {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let access = match writable {
            true => Permissions::ReadWrite,
            false => Permissions::Read,
        };
        let memory = Backing::file(file, len, access)?;
        #[cfg(feature = "sigbus")]
        if guard {
            return Ok(FileMemory(memory.guarded()?));
        }
        let _ = guard;
        Ok(FileMemory(memory))
    }

    fn part(&self, part: Part) -> Result<Backing> {
        // An offset beyond the address space is beyond the file.
        let offset = usize::try_from(part.offset).unwrap_or(usize::MAX);
        Ok(self.0.slice(offset, part.size)?)
    }

    /// Whether bytes were missed that the file has had.
    fn is_bad(&self) -> bool {
        #[cfg(feature = "sigbus")]
        return self.0.fault_offset().is_some();
        #[cfg(not(feature = "sigbus"))]
        false
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Maps.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use vfio_bindings::bindings::vfio::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE};
use vm_memory::Permissions;

use super::{lock, whole_pages, DmaTable, Entry, Memory};
use crate::file_memory::{Part, SentFile};
use crate::sharing::{self, FileId};
use crate::{Error, Result};

impl DmaTable {
    /// Does what a DMA_MAP asks for; the flags are those of `VFIO_IOMMU_MAP_DMA`. Without a file the memory stays
    /// with the client, and `offset` says nothing.
    ///
    /// # Errors
    ///
    /// In this order: [`Error::Flags`] or [`Error::Range`] (EINVAL), [`Error::Overlap`] (EEXIST), [`Error::Limit`]
    /// (ENOSPC), then what is wrong with the file: [`Error::Unsealed`] (EPERM), [`Error::Io`],
    /// [`Error::FileAccess`] (EACCES), [`Error::Limit`], [`Error::PrivateMemory`] (EINVAL) and [`Error::Space`]
    /// (EFAULT where the range is not inside of the file; EBUSY where an unmap has not finished).
    pub fn map(
        &self,
        flags: u32,
        offset: u64,
        address: u64,
        size: u64,
        fd: Option<OwnedFd>,
    ) -> Result<()> {
        self.map_with(flags, offset, address, size, fd, sharing::is_private)
    }

    fn map_with(
        &self,
        flags: u32,
        offset: u64,
        address: u64,
        size: u64,
        fd: Option<OwnedFd>,
        is_private: impl FnOnce(i32, FileId) -> bool,
    ) -> Result<()> {
        let prot = permissions(flags)?;
        let offset = if fd.is_some() { offset } else { 0 };
        let last = whole_pages(offset, address, size)?;
        let sent = fd.map(|fd| SentFile::new(fd.into(), self.0.config.require_seals));
        let sent = sent.transpose();
        // What is wrong with the range comes first.
        let sent = sent.or_else(|error| self.check_room(address, last).and(Err(error)))?;
        // Let go before the file, whose closing may wait for the client.
        let mut files = lock(&self.0.turn);
        self.check_room(address, last)?;
        let memory = match &sent {
            None => Memory::Client(prot),
            Some(sent) => {
                let size = usize::try_from(size).map_err(|_| Error::Range {
                    address,
                    size,
                    offset,
                })?;
                let part = Part { offset, size, prot };
                let (memory, backing) = match files.find(sent, part)? {
                    Some(found) => found,
                    None => {
                        drop(files);
                        sent.check(self.client(), is_private)?;
                        files = lock(&self.0.turn);
                        // Others may have had their turn.
                        self.check_room(address, last)?;
                        files.map(sent, part)?
                    }
                };
                self.0.space.map(address, backing, prot)?;
                Memory::File(memory)
            }
        };
        let entry = Entry { last, memory };
        self.entries().ranges.insert(address, entry);
        Ok(())
    }

    /// Whether another mapping may be here.
    fn check_room(&self, address: u64, last: u64) -> Result<()> {
        let entries = self.entries();
        if let Some((mapped, _)) = entries.overlapping(address, last).next() {
            return Err(Error::Overlap {
                address,
                size: last - address + 1,
                mapped,
            });
        }
        let limit = self.0.config.entry_limit;
        if entries.ranges.len() >= limit {
            return Err(Error::Limit {
                what: "mappings",
                limit,
            });
        }
        Ok(())
    }

    /// The client's process, where that is known.
    fn client(&self) -> Option<i32> {
        Some(self.0.client.load(Ordering::Relaxed)).filter(|pid| *pid > 0)
    }
}

fn permissions(flags: u32) -> Result<Permissions> {
    const READ: u32 = VFIO_DMA_MAP_FLAG_READ;
    const WRITE: u32 = VFIO_DMA_MAP_FLAG_WRITE;
    const READ_WRITE: u32 = READ | WRITE;
    match flags {
        READ => Ok(Permissions::Read),
        WRITE => Ok(Permissions::Write),
        READ_WRITE => Ok(Permissions::ReadWrite),
        flags => Err(Error::Flags {
            what: "a map",
            flags,
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io;
    use std::os::fd::FromRawFd;
    use std::sync::Arc;

    use iommu_type1::{page_size, Listener, MappingInfo};

    use super::*;

    const PID: i32 = 1;

    /// A table whose client is known, and 16 pages of memory that it might share.
    fn table_and_file() -> (DmaTable, File) {
        let table = DmaTable::new().unwrap();
        table.set_client(Some(PID));
        // SAFETY: the name ends with a NUL.
        let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), 0) };
        assert!(fd >= 0);
        // SAFETY: the descriptor is new.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(16 * page_size()).unwrap();
        (table, file)
    }

    /// Maps a page from the beginning of the file.
    fn map(
        table: &DmaTable,
        file: &File,
        address: u64,
        is_private: impl FnOnce(i32, FileId) -> bool,
    ) -> Result<()> {
        let fd = Some(file.try_clone().unwrap().into());
        table.map_with(3, 0, address, page_size(), fd, is_private)
    }

    #[test]
    fn nobody_waits_while_the_kernel_says_what_the_client_has_mapped() {
        let (table, file) = table_and_file();
        let mut asked = false;
        let is_private = |pid, _| {
            asked = true;
            assert_eq!(pid, PID);
            assert!(table.0.turn.try_lock().is_ok());
            assert!(table.0.entries.try_lock().is_ok());
            false
        };
        map(&table, &file, 0, is_private).unwrap();
        assert!(asked);
        // One that is mapped already is not asked for again.
        map(&table, &file, 0x10_0000, |_, _| panic!()).unwrap();
    }

    #[test]
    fn what_others_map_meanwhile_is_seen() {
        let (table, file) = table_and_file();
        let other = |_, _| {
            table.map(3, 0, 0, 0x1_0000, None).unwrap();
            false
        };
        let error = map(&table, &file, 0, other).unwrap_err();
        assert!(matches!(error, Error::Overlap { .. }), "{error}");
        // The same file is mapped once.
        let same = |_, _| {
            map(&table, &file, 0x10_0000, |_, _| false).unwrap();
            false
        };
        map(&table, &file, 0x20_0000, same).unwrap();
        assert_eq!(lock(&table.0.turn).living().len(), 1);
        assert_eq!(table.mappings(), 3);
    }

    /// Looks at the table while it is told of a mapping.
    struct Looks(DmaTable);

    impl Listener for Looks {
        fn map(&self, _mapping: &MappingInfo) -> io::Result<()> {
            assert!(self.0 .0.entries.try_lock().is_ok());
            Ok(())
        }

        fn unmap(&self, _iova: u64, _size: u64) {
            assert!(self.0 .0.entries.try_lock().is_ok());
        }
    }

    #[test]
    fn who_is_told_of_a_mapping_may_look_at_the_table() {
        let (table, file) = table_and_file();
        let _listening = table
            .space()
            .listen(Arc::new(Looks(table.clone())))
            .unwrap();
        map(&table, &file, 0, |_, _| false).unwrap();
        assert_eq!(table.clear().unwrap(), page_size());
    }

    #[test]
    fn memory_that_the_client_does_not_share_is_refused() {
        let (table, file) = table_and_file();
        let error = map(&table, &file, 0, |_, _| true).unwrap_err();
        assert!(matches!(error, Error::PrivateMemory { pid: PID }));
        assert_eq!(table.mappings(), 0);
    }
}

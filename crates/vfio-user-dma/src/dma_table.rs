// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the client has mapped for the device, and the one face through which the device reads and writes it.
//!
//! Memory that came with a file descriptor is in an [`IoAddressSpace`], and an access to it is one of that
//! space and nothing else. Ranges without one are kept here only: the space does not know them, so an access
//! finds them where the space has nothing.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use iommu_type1::{page_size, DmaHandle, IoAddressSpace, UnmapOptions, DMA_ENTRY_LIMIT};
use vfio_bindings::bindings::vfio::{
    VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_DMA_UNMAP_FLAG_ALL,
    VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP,
};
use vm_memory::Permissions;

use crate::file_memory::{Checks, FileMemory, Files};
use crate::message_dma::{Ask, MessageDma};
use crate::{AccessError, Error, Result};

/// How long an unmap waits for those who touch the range unless told otherwise: QEMU takes the server for dead
/// after 5 s.
pub const UNMAP_DEADLINE: Duration = Duration::from_secs(3);

/// How long an access to memory without a file waits for the client unless told otherwise.
pub const MESSAGE_DEADLINE: Duration = Duration::from_secs(5);

/// The DMA table of a vfio-user device. A cheap reference: clones are the same table.
///
/// ```
/// use vfio_user_dma::DmaTable;
///
/// let table = DmaTable::new()?;
/// // A range of which the client keeps the memory, readable and writable.
/// table.map(3, 0, 0x1_0000, 0x1000, None)?;
/// assert_eq!(table.map(3, 0, 0x1_0000, 0x1000, None).unwrap_err().errno(), libc::EEXIST);
/// // No client is connected who could be asked for it.
/// assert_eq!(table.read(0x1_0000, &mut [0; 4]).unwrap_err().errno(), libc::ENOTCONN);
/// assert_eq!(table.unmap(0, 0x1_0000, 0x1000)?, 0x1000);
/// // What was never mapped is no error.
/// assert_eq!(table.unmap(0, 0xfef0_0000, 0u64.wrapping_sub(0xfef0_0000))?, 0);
/// # Ok::<(), vfio_user_dma::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct DmaTable(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    space: IoAddressSpace,
    /// Taken by each map and unmap for as long as it runs, before the entries.
    turn: Mutex<()>,
    entries: Mutex<Entries>,
    messages: MessageDma,
    /// The process of the client, 0 where it is not known.
    client: AtomicI32,
    config: DmaTableBuilder,
}

#[derive(Debug, Default)]
struct Entries {
    ranges: BTreeMap<u64, Entry>,
    files: Files,
}

#[derive(Debug)]
struct Entry {
    last: u64,
    memory: Memory,
}

#[derive(Debug)]
enum Memory {
    /// In the address space. Never looked at: its drop is what counts.
    File(#[allow(dead_code)] Arc<FileMemory>),
    /// With the client.
    Client(Permissions),
}

/// Limits and rules of a [`DmaTable`].
///
/// ```
/// use std::time::Duration;
/// use vfio_user_dma::DmaTable;
///
/// let table = DmaTable::builder().entry_limit(1).unmap_deadline(Duration::from_secs(1)).build()?;
/// table.map(3, 0, 0, 0x1000, None)?;
/// assert_eq!(table.map(3, 0, 0x1000, 0x1000, None).unwrap_err().errno(), libc::ENOSPC);
/// # Ok::<(), vfio_user_dma::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct DmaTableBuilder {
    entry_limit: usize,
    unmap_deadline: Duration,
    message_deadline: Duration,
    strict_unmap: bool,
    require_seals: bool,
    guard_files: bool,
}

impl DmaTableBuilder {
    /// Most mappings, [`DMA_ENTRY_LIMIT`] unless told otherwise.
    pub fn entry_limit(mut self, limit: usize) -> Self {
        self.entry_limit = limit;
        self
    }

    /// How long an unmap waits for those who touch the range, [`UNMAP_DEADLINE`] unless told otherwise.
    pub fn unmap_deadline(mut self, deadline: Duration) -> Self {
        self.unmap_deadline = deadline;
        self
    }

    /// How long an access to memory without a file waits for the client, [`MESSAGE_DEADLINE`] unless told
    /// otherwise.
    pub fn message_deadline(mut self, deadline: Duration) -> Self {
        self.message_deadline = deadline;
        self
    }

    /// Whether an unmap must be of exactly one mapping, as the text of the protocol has it. Otherwise the rule
    /// of type1 v2 holds: everything that is wholly inside goes, and nothing may be cut.
    pub fn strict_unmap(mut self, strict: bool) -> Self {
        self.strict_unmap = strict;
        self
    }

    /// Whether files must be sealed against shrinking (`F_SEAL_SHRINK`, as QEMU seals its memfds). A client that
    /// shrinks a file that is not kills this process with SIGBUS at the next access, unless files are guarded (feature
    /// `sigbus`).
    pub fn require_seals(mut self, require: bool) -> Self {
        self.require_seals = require;
        self
    }

    /// Whether an access ends with an error (EFAULT) where a client has shrunk a file that is not sealed, and not
    /// this process. It installs a handler of SIGBUS; see [`Backing::guarded`](iommu_type1::Backing::guarded).
    #[cfg(feature = "sigbus")]
    pub fn guard_files(mut self, guard: bool) -> Self {
        self.guard_files = guard;
        self
    }

    /// Makes the table.
    ///
    /// # Errors
    ///
    /// [`Error::Io`]: no eventfd could be made.
    pub fn build(self) -> Result<DmaTable> {
        Ok(DmaTable(Arc::new(Inner {
            space: IoAddressSpace::builder()
                .entry_limit(self.entry_limit)
                .unmap_deadline(self.unmap_deadline)
                .build(),
            turn: Mutex::default(),
            entries: Mutex::default(),
            messages: MessageDma::new(self.message_deadline)?,
            client: AtomicI32::new(0),
            config: self,
        })))
    }
}

impl DmaTable {
    /// An empty table with the usual limits.
    ///
    /// # Errors
    ///
    /// As [`DmaTableBuilder::build`].
    pub fn new() -> Result<Self> {
        DmaTable::builder().build()
    }

    /// A table with other limits.
    pub fn builder() -> DmaTableBuilder {
        DmaTableBuilder {
            entry_limit: DMA_ENTRY_LIMIT,
            unmap_deadline: UNMAP_DEADLINE,
            message_deadline: MESSAGE_DEADLINE,
            strict_unmap: false,
            require_seals: false,
            guard_files: false,
        }
    }

    /// Where the memory is that came with files: for slices, queues and pins. Map and unmap through the table
    /// only.
    pub fn space(&self) -> &IoAddressSpace {
        &self.0.space
    }

    /// Most mappings that there may be.
    pub fn entry_limit(&self) -> usize {
        self.0.config.entry_limit
    }

    /// How many mappings there are.
    pub fn mappings(&self) -> usize {
        self.entries().ranges.len()
    }

    /// Says which process the client is, so that memory it has mapped privately can be refused. A
    /// [`Server`](crate::Server) does that by itself.
    pub fn set_client(&self, pid: Option<i32>) {
        self.0.client.store(pid.unwrap_or(0), Ordering::Relaxed);
    }

    /// Does what a DMA_MAP asks for; the flags are those of `VFIO_IOMMU_MAP_DMA`. Without a file the memory stays
    /// with the client, and `offset` says nothing.
    ///
    /// # Errors
    ///
    /// In this order: [`Error::Flags`] or [`Error::Range`] (EINVAL), [`Error::Overlap`] (EEXIST), [`Error::Limit`]
    /// (ENOSPC), then what is wrong with the file: [`Error::Io`], [`Error::FileAccess`] (EACCES),
    /// [`Error::Limit`], [`Error::Unsealed`] (EPERM), [`Error::PrivateMemory`] (EINVAL) and [`Error::Space`]
    /// (EFAULT where the range is not inside of the file; EBUSY where an unmap has not finished).
    pub fn map(
        &self,
        flags: u32,
        offset: u64,
        address: u64,
        size: u64,
        fd: Option<OwnedFd>,
    ) -> Result<()> {
        let prot = permissions(flags)?;
        let file = fd.map(File::from);
        let offset = if file.is_some() { offset } else { 0 };
        let last = whole_pages(offset, address, size)?;
        let _turn = lock(&self.0.turn);
        let mut entries = self.entries();
        if let Some((mapped, _)) = entries.overlapping(address, last).next() {
            return Err(Error::Overlap {
                address,
                size,
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
        let memory = match file {
            None => Memory::Client(prot),
            Some(file) => {
                let checks = Checks {
                    sealed: self.0.config.require_seals,
                    client: Some(self.0.client.load(Ordering::Relaxed)).filter(|pid| *pid > 0),
                    guard: self.0.config.guard_files,
                };
                let len = usize::try_from(size).map_err(|_| Error::Range {
                    address,
                    size,
                    offset,
                })?;
                let (memory, backing) = entries.files.backing(file, offset, len, prot, checks)?;
                self.0.space.map(address, backing, prot)?;
                Memory::File(memory)
            }
        };
        entries.ranges.insert(address, Entry { last, memory });
        Ok(())
    }

    /// Does what a DMA_UNMAP asks for and returns the bytes that were unmapped, 0 where nothing is mapped. The
    /// flags are those of `VFIO_IOMMU_UNMAP_DMA`.
    ///
    /// When it returns, nobody touches the range any more, and nothing is sent for it.
    ///
    /// # Errors
    ///
    /// [`Error::DirtyBitmap`] (EOPNOTSUPP), [`Error::Flags`], [`Error::Range`] or [`Error::Cut`] (EINVAL), where unmaps
    /// are strict [`Error::NothingMapped`] (ENOENT); nothing is unmapped then. [`Error::Space`]: somebody holds
    /// memory of the range longer than the deadline (EDEADLK). What is held stays unusable and is there to be
    /// unmapped again.
    pub fn unmap(&self, flags: u32, address: u64, size: u64) -> Result<u64> {
        if flags & VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP != 0 {
            return Err(Error::DirtyBitmap);
        }
        if flags & !VFIO_DMA_UNMAP_FLAG_ALL != 0 {
            return Err(Error::Flags {
                what: "an unmap",
                flags,
            });
        }
        if flags & VFIO_DMA_UNMAP_FLAG_ALL != 0 {
            if (address, size) != (0, 0) {
                return Err(Error::Range {
                    address,
                    size,
                    offset: 0,
                });
            }
            return self.remove(0, u64::MAX);
        }
        let last = whole_pages(0, address, size)?;
        self.remove_checked(address, last, |entries| {
            let mut touched = entries.overlapping(address, last);
            let cut = if self.0.config.strict_unmap {
                match touched.next() {
                    None => return Err(Error::NothingMapped { address, size }),
                    only => only != Some((address, last)),
                }
            } else {
                touched.any(|(start, end)| start < address || end > last)
            };
            if cut {
                return Err(Error::Cut { address, size });
            }
            Ok(())
        })
    }

    /// Unmaps everything, as when the client has gone.
    ///
    /// # Errors
    ///
    /// [`Error::Space`]: somebody holds memory longer than the deadline.
    pub fn clear(&self) -> Result<u64> {
        self.remove(0, u64::MAX)
    }

    fn remove(&self, first: u64, last: u64) -> Result<u64> {
        self.remove_checked(first, last, |_| Ok(()))
    }

    fn remove_checked(
        &self,
        first: u64,
        last: u64,
        check: impl FnOnce(&Entries) -> Result<()>,
    ) -> Result<u64> {
        let _turn = lock(&self.0.turn);
        let mut entries = self.entries();
        check(&entries)?;
        let mut removed = 0_u64;
        let mut in_space = Vec::new();
        let touched: Vec<_> = entries.overlapping(first, last).collect();
        for (start, last) in touched {
            match entries.ranges[&start].memory {
                Memory::File(_) => in_space.push((start, last - start + 1)),
                Memory::Client(_) => {
                    // All of the 64-bit space counts as one byte less, as its size has no number.
                    removed = removed.saturating_add((last - start).saturating_add(1));
                    entries.ranges.remove(&start);
                }
            }
        }
        self.0.messages.unmapped(first, last);
        // Nobody else changes the table during our turn; accesses may look meanwhile.
        drop(entries);
        if in_space.is_empty() {
            return Ok(removed);
        }
        let result = self.0.space.unmap_batch(&in_space);
        let mut entries = self.entries();
        match result {
            Ok(bytes) => {
                for (start, _) in in_space {
                    entries.ranges.remove(&start);
                }
                Ok(removed.saturating_add(bytes))
            }
            Err(error) => {
                // Those that nobody holds are gone, and are not to be in the way.
                let now = UnmapOptions::new().deadline(Duration::ZERO);
                for (start, size) in in_space {
                    if self.0.space.unmap_with(start, size, now).is_ok() {
                        entries.ranges.remove(&start);
                    }
                }
                Err(error.into())
            }
        }
    }

    /// Reads bytes that are mapped in any way.
    ///
    /// # Errors
    ///
    /// [`Error::Access`] says how far it came and why it stopped.
    pub fn read(&self, iova: u64, buf: &mut [u8]) -> Result<()> {
        self.read_by(iova, buf, |iova, buf| self.0.space.read(iova, buf))
    }

    /// Writes bytes that are mapped in any way.
    ///
    /// # Errors
    ///
    /// As [`read`](DmaTable::read).
    pub fn write(&self, iova: u64, buf: &[u8]) -> Result<()> {
        self.write_by(iova, buf, |iova, buf| self.0.space.write(iova, buf))
    }

    /// A handle for one thread of the device: as fast as one of the address space where memory came with a file.
    pub fn handle(&self) -> TableHandle {
        TableHandle {
            table: self.clone(),
            space: self.0.space.handle(),
        }
    }

    fn read_by(
        &self,
        iova: u64,
        buf: &mut [u8],
        read: impl Fn(u64, &mut [u8]) -> iommu_type1::Result<()>,
    ) -> Result<()> {
        let mut progress = Progress::at(iova);
        while let Err(error) = read(progress.iova(), &mut buf[progress.done..]) {
            progress.stopped(error)?;
            let rest = &mut buf[progress.done..];
            let ask = || Ask::Read(rest.len());
            let (answer, len) = progress.ask(self, Permissions::Read, ask)?;
            rest[..len].copy_from_slice(&answer);
            progress.done += len;
        }
        Ok(())
    }

    fn write_by(
        &self,
        iova: u64,
        buf: &[u8],
        write: impl Fn(u64, &[u8]) -> iommu_type1::Result<()>,
    ) -> Result<()> {
        let mut progress = Progress::at(iova);
        while let Err(error) = write(progress.iova(), &buf[progress.done..]) {
            progress.stopped(error)?;
            let rest = &buf[progress.done..];
            let ask = || Ask::Write(rest);
            let (_, len) = progress.ask(self, Permissions::ReadWrite, ask)?;
            progress.done += len;
        }
        Ok(())
    }

    /// Ends every access that waits for the client (ECANCELED), as for a reset that cannot wait: the thread that
    /// serves the socket is the one that brings the answers. Accesses that begin later are not concerned.
    pub fn cancel_messages(&self) {
        self.0.messages.cancel();
    }

    /// Whether all of a range is memory without a file that permits `need`.
    pub(crate) fn client_has(&self, iova: u64, size: u64, need: Permissions) -> bool {
        let Some(last) = size.checked_sub(1).and_then(|rest| iova.checked_add(rest)) else {
            return false;
        };
        let entries = self.entries();
        let mut at = iova;
        while let Some((end, prot)) = entries.client_range(at) {
            if prot & need != need {
                return false;
            }
            if end >= last {
                return true;
            }
            at = end + 1;
        }
        false
    }

    pub(crate) fn messages(&self) -> &MessageDma {
        &self.0.messages
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        lock(&self.0.entries)
    }
}

/// How far an access has come.
struct Progress {
    start: u64,
    done: usize,
    /// Why the space had nothing more, for where the table has nothing either.
    stopped: Option<iommu_type1::Error>,
    deadline: Option<Instant>,
}

impl Progress {
    fn at(start: u64) -> Self {
        Progress {
            start,
            done: 0,
            stopped: None,
            deadline: None,
        }
    }

    /// Past the last byte of the 64-bit space only when nothing is left to do.
    fn iova(&self) -> u64 {
        self.start.wrapping_add(self.done as u64)
    }

    fn error(&self, cause: AccessError) -> Error {
        Error::Access {
            iova: self.iova(),
            completed: self.done,
            cause,
        }
    }

    /// The space came so far. It may go on where it has nothing.
    fn stopped(&mut self, error: iommu_type1::Error) -> Result<()> {
        self.done += error.completed();
        match error {
            iommu_type1::Error::NotMapped { .. } => {
                self.stopped = Some(error);
                Ok(())
            }
            error => Err(self.error(error.into())),
        }
    }

    /// Asks the client for the rest, or as much of it as one message may have.
    fn ask<'a>(
        &mut self,
        table: &DmaTable,
        need: Permissions,
        ask: impl Fn() -> Ask<'a>,
    ) -> Result<(Vec<u8>, usize)> {
        let messages = table.messages();
        let deadline = *self.deadline.get_or_insert_with(|| messages.deadline());
        let iova = self.iova();
        loop {
            let asked = {
                let entries = table.entries();
                match entries.client_range(iova) {
                    // It may have been mapped since the space was asked; then that access came first.
                    None => match self.stopped.take() {
                        Some(error) => Err(error.into()),
                        None => Err(AccessError::Unmapped),
                    },
                    Some((_, prot)) if prot & need != need => Err(AccessError::Permission),
                    Some((last, _)) => messages.ask(iova, ask().up_to(last - iova)),
                }
            };
            let answer =
                asked.and_then(|(ticket, len)| Ok((messages.wait(ticket, deadline)?, len)));
            match answer {
                // The question was only how to ask.
                Ok((_, 0)) => {}
                Ok(answer) => return Ok(answer),
                Err(cause) => return Err(self.error(cause)),
            }
        }
    }
}

/// Reads and writes of one thread of the device through a [`DmaTable`].
///
/// ```
/// use vfio_user_dma::DmaTable;
///
/// let table = DmaTable::new()?;
/// let dma = table.handle();
/// assert_eq!(dma.write(0x1000, &[1, 2, 3]).unwrap_err().errno(), libc::EINVAL);
/// # Ok::<(), vfio_user_dma::Error>(())
/// ```
#[derive(Debug)]
pub struct TableHandle {
    table: DmaTable,
    space: DmaHandle,
}

impl TableHandle {
    /// As [`DmaTable::read`].
    ///
    /// # Errors
    ///
    /// As [`DmaTable::read`].
    pub fn read(&self, iova: u64, buf: &mut [u8]) -> Result<()> {
        let read = |iova, buf: &mut [u8]| self.space.read(iova, buf);
        self.table.read_by(iova, buf, read)
    }

    /// As [`DmaTable::write`].
    ///
    /// # Errors
    ///
    /// As [`DmaTable::read`].
    pub fn write(&self, iova: u64, buf: &[u8]) -> Result<()> {
        let write = |iova, buf: &[u8]| self.space.write(iova, buf);
        self.table.write_by(iova, buf, write)
    }

    /// The handle of the address space: memory that came with files, and nothing else.
    pub fn space(&self) -> &DmaHandle {
        &self.space
    }
}

impl Entries {
    /// First and last address of the mappings that touch a range.
    fn overlapping(&self, first: u64, last: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let before = self.ranges.range(..first).next_back();
        before
            .filter(move |(_, entry)| entry.last >= first)
            .into_iter()
            .chain(self.ranges.range(first..=last))
            .map(|(start, entry)| (*start, entry.last))
    }

    /// The range without a file that contains an address: its last one, and what it permits.
    fn client_range(&self, iova: u64) -> Option<(u64, Permissions)> {
        let (_, entry) = self.ranges.range(..=iova).next_back()?;
        match entry.memory {
            Memory::Client(prot) if entry.last >= iova => Some((entry.last, prot)),
            _ => None,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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

/// The last address of a range of whole pages.
fn whole_pages(offset: u64, address: u64, size: u64) -> Result<u64> {
    let aligned = (offset | address | size) & (page_size() - 1) == 0;
    let last = size
        .checked_sub(1)
        .and_then(|rest| address.checked_add(rest));
    last.filter(|_| aligned).ok_or(Error::Range {
        address,
        size,
        offset,
    })
}

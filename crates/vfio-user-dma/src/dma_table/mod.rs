// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the client has mapped for the device.
//!
//! Memory that came with a file descriptor is in an [`IoAddressSpace`], and an access to it is one of that
//! space and nothing else. Ranges without one are kept here only: the space does not know them, so an access
//! finds them where the space has nothing.

mod access;
mod builder;
mod map;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iommu_type1::{page_size, IoAddressSpace};
use vfio_bindings::bindings::vfio::{
    VFIO_DMA_UNMAP_FLAG_ALL, VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP,
};
use vm_memory::Permissions;

use crate::file_memory::{FileMemory, Files};
use crate::message_dma::MessageDma;
use crate::{Error, Result};

pub use access::TableHandle;
pub use builder::{DmaTableBuilder, MESSAGE_DEADLINE, UNMAP_DEADLINE};

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
    /// Taken by each map and unmap for as long as it changes anything, before the entries.
    turn: Mutex<Files>,
    /// Changed by whose turn it is only. Accesses look here, so nothing that takes long is done meanwhile.
    entries: Mutex<Entries>,
    messages: MessageDma,
    /// The process of the client, 0 where it is not known.
    client: AtomicI32,
    config: DmaTableBuilder,
}

#[derive(Debug, Default)]
struct Entries {
    ranges: BTreeMap<u64, Entry>,
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
        DmaTableBuilder::new()
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

    /// Does what a DMA_UNMAP asks for and returns the bytes that were unmapped, 0 where nothing is mapped. The
    /// flags are those of `VFIO_IOMMU_UNMAP_DMA`.
    ///
    /// When it returns, nobody touches the range any more, and nothing is sent for it.
    ///
    /// # Errors
    ///
    /// [`Error::DirtyBitmap`] (EOPNOTSUPP), [`Error::Flags`], [`Error::Range`] or [`Error::Cut`] (EINVAL), where unmaps
    /// are strict [`Error::NothingMapped`] (ENOENT), and [`Error::NoMemory`] or [`Error::Space`] where there is no
    /// memory for what it needs (ENOMEM); nothing is unmapped then. [`Error::Space`]: somebody holds memory of the
    /// range longer than the deadline (EDEADLK). What is held stays unusable and is there to be unmapped again.
    ///
    /// An access that waits for the client has ended by then ([`AccessError::Unmapped`](crate::AccessError::Unmapped)),
    /// also where there was no memory.
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
    /// [`Error::Space`]: somebody holds memory longer than the deadline (EDEADLK), or there is no memory for what it
    /// needs (ENOMEM), as is [`Error::NoMemory`].
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
        let files = lock(&self.0.turn);
        let entries = self.entries();
        check(&entries)?;
        let mut in_space = Vec::new();
        let mut with_client = Vec::new();
        let met = entries.overlapping(first, last).count();
        let room = with_client.try_reserve_exact(met);
        let room = room.and_then(|()| in_space.try_reserve_exact(met));
        room.map_err(|_| Error::NoMemory(met * size_of::<(u64, u64)>()))?;
        for (start, last) in entries.overlapping(first, last) {
            match entries.ranges[&start].memory {
                Memory::File(_) => in_space.push((start, last - start + 1)),
                // All of the 64-bit space counts as one byte less, as its size has no number.
                Memory::Client(_) => with_client.push((start, (last - start).saturating_add(1))),
            }
        }
        // Who waits for the client may hold memory of the range meanwhile, which is waited for below.
        self.0.messages.unmapped(first, last);
        // Nobody else changes the table during our turn; accesses may look meanwhile.
        drop(entries);
        let result = match in_space[..] {
            [] => Ok(0),
            _ => self.0.space.unmap_batch(&in_space),
        };
        // But for the deadline, whoever fails has changed nothing.
        let result = match result {
            Err(error) if !matches!(error, iommu_type1::Error::Deadline { .. }) => {
                return Err(error.into());
            }
            result => result,
        };
        // So that those which go with their last entry are unmapped and closed when nobody waits for the entries.
        let _living = files.living();
        let mut entries = self.entries();
        let mut removed = 0_u64;
        for (start, size) in with_client {
            entries.ranges.remove(&start);
            removed = removed.saturating_add(size);
        }
        // What was asked since then.
        self.0.messages.unmapped(first, last);
        for (start, size) in in_space {
            // At the deadline those that nobody holds are gone, and are not to be in the way.
            if result.is_ok() || self.0.space.is_unmapped(start, size).unwrap_or(false) {
                entries.ranges.remove(&start);
            }
        }
        Ok(removed.saturating_add(result?))
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

    /// How many of `len` bytes from `iova` on are in one range without a file: none where that does not permit writes.
    pub(crate) fn client_room(&self, iova: u64, len: usize) -> Option<usize> {
        let (last, prot) = self.entries().client_range(iova)?;
        if prot != Permissions::ReadWrite {
            return Some(0);
        }
        let behind_first = usize::try_from(last - iova).unwrap_or(usize::MAX);
        Some(len.min(behind_first.saturating_add(1)))
    }

    pub(crate) fn messages(&self) -> &MessageDma {
        &self.0.messages
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        lock(&self.0.entries)
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

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Inline accesses: short, on the caller's thread, never outliving the call.

use std::sync::atomic::Ordering;

use checked_sync::lock;
use vm_memory::{AtomicAccess, ByteValued, Bytes};

use crate::atomics::CompareExchange;
use crate::copy;
use crate::grace::Inside;
use crate::mapping::{InlineSlice, Mapping, Need};
use crate::range::IovaRange;
use crate::sigbus;
use crate::space::Space;
use crate::table::Found;
use crate::{Error, IoAddressSpace, Result};

/// The direction and the data of a [`dma_rw`](IoAddressSpace::dma_rw).
#[derive(Debug)]
pub enum Transfer<'a> {
    /// Fill the buffer from memory.
    Read(&'a mut [u8]),
    /// Write the buffer to memory.
    Write(&'a [u8]),
}

/// The shared path: convenient from any thread. A user of much memory takes a
/// [`handle`](IoAddressSpace::handle).
impl IoAddressSpace {
    /// Fills `buf` from `iova` on; an empty buffer succeeds.
    ///
    /// # Errors
    ///
    /// [`Error::Overflow`] (EOVERFLOW) before anything is read; [`Error::NotMapped`] (EINVAL),
    /// [`Error::Revoked`] (EBUSY) or [`Error::Permission`] (EPERM) with the bytes read before.
    pub fn read(&self, iova: u64, buf: &mut [u8]) -> Result<()> {
        let space = &self.view.space;
        space
            .grace
            .enter_shared(|inside| space.read(inside, iova, buf))
    }

    /// Writes `buf` from `iova` on; an empty buffer succeeds.
    ///
    /// # Errors
    ///
    /// As [`read`](IoAddressSpace::read), with the bytes written before; what was written stays.
    pub fn write(&self, iova: u64, buf: &[u8]) -> Result<()> {
        let space = &self.view.space;
        space
            .grace
            .enter_shared(|inside| space.write(inside, iova, buf))
    }

    /// The kernel's `vfio_dma_rw`: as [`read`](IoAddressSpace::read) and
    /// [`write`](IoAddressSpace::write), but an empty transfer is refused.
    ///
    /// ```
    /// use iommu_type1::{IoAddressSpace, Transfer};
    ///
    /// let error = IoAddressSpace::new().dma_rw(0, Transfer::Write(&[])).unwrap_err();
    /// assert_eq!(error.errno(), libc::EINVAL);
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Empty`] (EINVAL), otherwise as [`read`](IoAddressSpace::read).
    pub fn dma_rw(&self, iova: u64, transfer: Transfer<'_>) -> Result<()> {
        let space = &self.view.space;
        space
            .grace
            .enter_shared(|inside| space.dma_rw(inside, iova, transfer))
    }

    /// Whether a range is mapped and its memory is not known to be gone (see
    /// [`Backing::guarded`](crate::Backing::guarded)): for those who have copied from or to slices or
    /// pinned pages.
    ///
    /// # Errors
    ///
    /// [`Error::Fault`] (EFAULT) with the first address whose memory is gone; [`Error::Overflow`]
    /// (EOVERFLOW), [`Error::NotMapped`] (EINVAL) or [`Error::Revoked`] (EBUSY).
    #[cfg(feature = "sigbus")]
    pub fn check_memory(&self, iova: u64, len: usize) -> Result<()> {
        let space = &self.view.space;
        space.grace.enter_shared(|inside| {
            space.for_each_chunk(inside, iova, len, Need::NOTHING, |_, _, _, _| ())
        })
    }
}

impl Space {
    #[inline]
    pub(crate) fn read(&self, inside: Inside<'_>, iova: u64, buf: &mut [u8]) -> Result<()> {
        match self.lookup(inside, iova, buf.len(), Need::READ) {
            Some(slice) if !sigbus::seen() => {
                copy::read(&slice, buf);
                self.was_there(inside, iova, buf.len(), Need::READ)
            }
            _ => self.read_chunks(inside, iova, buf),
        }
    }

    #[inline]
    pub(crate) fn write(&self, inside: Inside<'_>, iova: u64, buf: &[u8]) -> Result<()> {
        match self.lookup(inside, iova, buf.len(), Need::WRITE) {
            Some(slice) if !sigbus::seen() => {
                copy::write(&slice, buf);
                self.was_there(inside, iova, buf.len(), Need::WRITE)
            }
            _ => self.write_chunks(inside, iova, buf),
        }
    }

    /// `len` bytes from `iova` for an access that `need` says, if they lie in one mapping.
    ///
    /// `None` says nothing but that there is more to look at.
    #[inline]
    fn lookup<'a>(
        &self,
        inside: Inside<'a>,
        iova: u64,
        len: usize,
        need: Need,
    ) -> Option<InlineSlice<'a>> {
        let mapping = match self.table.lookup(iova, inside) {
            Found::Page(word, beside) => {
                // SAFETY: found at this page by an access that runs as long as the slice lives.
                let slice = unsafe { word.slice(iova, len, need) };
                if slice.is_some() {
                    return slice;
                }
                beside.mapping()
            }
            Found::Mapping(mapping) => mapping,
        };
        mapping?.whole(iova, len, need)
    }

    #[inline(never)]
    fn read_chunks(&self, inside: Inside<'_>, iova: u64, buf: &mut [u8]) -> Result<()> {
        let need = Need::READ;
        self.for_each_chunk(inside, iova, buf.len(), need, |mapping, at, n, done| {
            let slice = mapping.inline_slice(at, n);
            copy::read(&slice, &mut buf[done..][..n]);
        })
    }

    #[inline(never)]
    fn write_chunks(&self, inside: Inside<'_>, iova: u64, buf: &[u8]) -> Result<()> {
        let need = Need::WRITE;
        self.for_each_chunk(inside, iova, buf.len(), need, |mapping, at, n, done| {
            let slice = mapping.inline_slice(at, n);
            copy::write(&slice, &buf[done..][..n]);
        })
    }

    pub(crate) fn dma_rw(
        &self,
        inside: Inside<'_>,
        iova: u64,
        transfer: Transfer<'_>,
    ) -> Result<()> {
        match transfer {
            Transfer::Read([]) | Transfer::Write([]) => Err(Error::Empty { iova }),
            Transfer::Read(buf) => self.read(inside, iova, buf),
            Transfer::Write(buf) => self.write(inside, iova, buf),
        }
    }

    #[inline]
    pub(crate) fn load<T: AtomicAccess>(
        &self,
        inside: Inside<'_>,
        iova: u64,
        order: Ordering,
    ) -> Result<T> {
        self.atomic::<T, T>(inside, iova, Need::READ, |slice| slice.load(0, order))
    }

    #[inline]
    pub(crate) fn store<T: AtomicAccess>(
        &self,
        inside: Inside<'_>,
        value: T,
        iova: u64,
        order: Ordering,
    ) -> Result<()> {
        self.atomic::<T, ()>(inside, iova, Need::WRITE, |slice| {
            slice.store(value, 0, order)
        })
    }

    pub(crate) fn compare_exchange<T: CompareExchange>(
        &self,
        inside: Inside<'_>,
        iova: u64,
        current: T,
        new: T,
        orders: (Ordering, Ordering),
    ) -> Result<std::result::Result<T, T>> {
        self.atomic::<T, _>(inside, iova, Need::READ_WRITE, |slice| {
            T::exchange_in(slice, current, new, orders)
        })
    }

    /// A naturally aligned value lies inside one page and so inside one mapping.
    #[inline]
    fn atomic<T: ByteValued, R>(
        &self,
        inside: Inside<'_>,
        iova: u64,
        need: Need,
        op: impl FnOnce(&InlineSlice<'_>) -> vm_memory::VolatileMemoryResult<R>,
    ) -> Result<R> {
        let size = size_of::<T>();
        let misaligned = || Error::Misaligned {
            what: "address of an atomic access",
            value: iova,
            unit: size as u64,
        };
        if size == 0 || iova % size as u64 != 0 {
            return Err(misaligned());
        }
        let slice = match self.lookup(inside, iova, size, need) {
            Some(slice) => slice,
            None => {
                let mapping = self.usable(inside, iova, need, 0)?;
                mapping.inline_slice(iova, size)
            }
        };
        let result = op(&slice).map_err(|_| misaligned())?;
        self.was_there(inside, iova, size, need)?;
        Ok(result)
    }

    /// Whether the memory of an access that has come to its end was there.
    #[inline(always)]
    fn was_there(&self, inside: Inside<'_>, iova: u64, len: usize, need: Need) -> Result<()> {
        if sigbus::seen() {
            return self.look_for_faults(inside, iova, len, need);
        }
        Ok(())
    }

    /// Whether the memory of an access that took place is there, as far as is known. A mapping that has gone
    /// since says nothing; of one that was replaced the new one is looked at, as nobody could say whether the
    /// access came before the old one's memory was gone.
    #[cold]
    #[inline(never)]
    fn look_for_faults(&self, inside: Inside<'_>, iova: u64, len: usize, need: Need) -> Result<()> {
        match self.for_each_chunk(inside, iova, len, need, |_, _, _, _| ()) {
            Err(fault @ Error::Fault { .. }) => Err(fault),
            _ => Ok(()),
        }
    }

    /// Visits the mappings that `len` bytes from `iova` touch, in order, as
    /// `(mapping, address, bytes of it, bytes before it)`.
    ///
    /// A chunk is the rest of a mapping, never a page. The first address whose mapping does not allow
    /// the `need`, or whose memory is known to be gone before or after the visit, ends the walk with an error
    /// that says how many bytes came before.
    #[inline]
    pub(crate) fn for_each_chunk(
        &self,
        inside: Inside<'_>,
        iova: u64,
        len: usize,
        need: Need,
        mut op: impl FnMut(&Mapping, u64, usize, usize),
    ) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let last = match iova.checked_add(len as u64 - 1) {
            Some(last) => last,
            None => {
                let size = len as u64;
                return Err(Error::Overflow { iova, size });
            }
        };
        let mut at = iova;
        let mut done = 0;
        loop {
            let mapping = self.usable(inside, at, need, done)?;
            let end = mapping.range.last.min(last);
            let n = (end - at) as usize + 1;
            let there = mapping.bytes_there(at, n);
            if there > 0 {
                op(mapping, at, there, done);
            }
            let there = mapping.bytes_there(at, n);
            if there < n {
                return Err(Error::Fault {
                    iova: at + there as u64,
                    completed: done + there,
                });
            }
            if end == last {
                return Ok(());
            }
            done += n;
            at = end + 1;
        }
    }

    /// The mapping that contains `iova`, if it permits the `need`.
    #[inline]
    pub(crate) fn usable<'a>(
        &self,
        inside: Inside<'a>,
        iova: u64,
        need: Need,
        completed: usize,
    ) -> Result<&'a Mapping> {
        match self.table.find(iova, inside) {
            Some(mapping) if mapping.allows(need) => Ok(mapping),
            Some(mapping) => Err(self.forbidden(mapping, iova, need, completed)),
            None => self.look_again(inside, iova, need, completed),
        }
    }

    /// What a mapping does not permit.
    #[cold]
    #[inline(never)]
    fn forbidden(&self, mapping: &Mapping, iova: u64, need: Need, completed: usize) -> Error {
        self.counters.misses.add(1);
        Error::Permission {
            iova,
            needed: need.permissions(self.permissions),
            allowed: mapping.permissions(),
            completed,
        }
    }

    /// The mapping that contains `iova` when nobody changes the table, or why there is none.
    ///
    /// Whoever replaces a mapping takes it out and puts another in during one turn as the writer: an access
    /// that finds nothing between the two finds the other here.
    #[cold]
    #[inline(never)]
    fn look_again<'a>(
        &self,
        inside: Inside<'a>,
        iova: u64,
        need: Need,
        completed: usize,
    ) -> Result<&'a Mapping> {
        let at = IovaRange {
            first: iova,
            last: iova,
        };
        let writer = lock(&self.writer);
        match self.table.find(iova, inside) {
            Some(mapping) if mapping.allows(need) => return Ok(mapping),
            Some(mapping) => return Err(self.forbidden(mapping, iova, need, completed)),
            None => {}
        }
        self.counters.misses.add(1);
        Err(match writer.leaving_in(at) {
            Some(leaving) if leaving.state.is_vaddr() => Error::VaddrInvalid {
                iova,
                completed,
                errno: libc::EBUSY,
            },
            Some(_) => Error::Revoked { iova, completed },
            None => Error::NotMapped {
                iova,
                completed,
                errno: self.rules.hole_errno,
            },
        })
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Inline accesses: short, on the caller's thread, never outliving the call.

use std::ops::ControlFlow;
use std::sync::atomic::Ordering;

use vm_memory::{AtomicAccess, ByteValued, Bytes, Permissions, VolatileSlice};

use crate::dirty::DirtySlice;
use crate::space::Space;
use crate::sync::read;
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
        self.view.space.read(iova, buf)
    }

    /// Writes `buf` from `iova` on; an empty buffer succeeds.
    ///
    /// # Errors
    ///
    /// As [`read`](IoAddressSpace::read), with the bytes written before; what was written stays.
    pub fn write(&self, iova: u64, buf: &[u8]) -> Result<()> {
        self.view.space.write(iova, buf)
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
        self.view.space.dma_rw(iova, transfer)
    }
}

impl Space {
    pub(crate) fn read(&self, iova: u64, buf: &mut [u8]) -> Result<()> {
        self.for_each_chunk(iova, buf.len(), Permissions::Read, |slice, at| {
            slice.copy_to(&mut buf[at..]);
        })
    }

    pub(crate) fn write(&self, iova: u64, buf: &[u8]) -> Result<()> {
        self.for_each_chunk(iova, buf.len(), Permissions::Write, |slice, at| {
            slice.copy_from(&buf[at..]);
        })
    }

    pub(crate) fn dma_rw(&self, iova: u64, transfer: Transfer<'_>) -> Result<()> {
        match transfer {
            Transfer::Read([]) | Transfer::Write([]) => Err(Error::Empty { iova }),
            Transfer::Read(buf) => self.read(iova, buf),
            Transfer::Write(buf) => self.write(iova, buf),
        }
    }

    pub(crate) fn load<T: AtomicAccess>(&self, iova: u64, order: Ordering) -> Result<T> {
        self.atomic::<T, T>(iova, Permissions::Read, |slice| slice.load(0, order))
    }

    pub(crate) fn store<T: AtomicAccess>(
        &self,
        value: T,
        iova: u64,
        order: Ordering,
    ) -> Result<()> {
        self.atomic::<T, ()>(iova, Permissions::Write, |slice| {
            slice.store(value, 0, order)
        })
    }

    /// A naturally aligned value lies inside one page and so inside one mapping.
    fn atomic<T: ByteValued, R>(
        &self,
        iova: u64,
        access: Permissions,
        op: impl Fn(&VolatileSlice<'_, DirtySlice<'_>>) -> vm_memory::VolatileMemoryResult<R>,
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
        let mut result = None;
        self.for_each_chunk(iova, size, access, |slice, _| result = op(&slice).ok())?;
        result.ok_or_else(misaligned)
    }

    /// Runs `op` on each chunk of the range with the bytes done before it. The table stays locked
    /// for reading meanwhile, so `op` must not call out of this crate.
    fn for_each_chunk(
        &self,
        iova: u64,
        len: usize,
        access: Permissions,
        mut op: impl FnMut(VolatileSlice<'_, DirtySlice<'_>>, usize),
    ) -> Result<()> {
        read(&self.table)
            .walk(iova, len, access, |mapping, at, n, completed| {
                op(mapping.slice(at, n), completed);
                ControlFlow::<()>::Continue(())
            })
            .map(|_| ())
    }
}

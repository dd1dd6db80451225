// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The handle: one per user of the memory.

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;
use std::sync::atomic::Ordering;
use std::sync::Arc;

use vm_memory::{AtomicAccess, Bytes, GuestAddress, ReadVolatile, WriteVolatile};

use crate::grace::Slot;
use crate::lease::LeaseSet;
use crate::space::Space;
use crate::{stream, CompareExchange, Error, IoAddressSpace, Result, Transfer};

/// One user's way to the memory of an [`IoAddressSpace`].
///
/// A thread or a queue takes its own: a handle can be sent to another thread but not shared with
/// one. It implements [`Bytes`] with IOVAs as [`GuestAddress`], typed and atomic accesses included.
///
/// ```
/// use std::sync::atomic::Ordering;
/// use iommu_type1::{Backing, IoAddressSpace};
/// use vm_memory::{Bytes, GuestAddress, Permissions};
///
/// let space = IoAddressSpace::new();
/// space.map(0, Backing::anonymous(0x1_0000)?, Permissions::ReadWrite)?;
/// let handle = space.handle();
/// handle.write_obj(0x1234_5678_u32, GuestAddress(0x10))?;
/// assert_eq!(handle.load::<u16>(GuestAddress(0x12), Ordering::Acquire)?, 0x1234);
/// # Ok::<(), iommu_type1::Error>(())
/// ```
pub struct DmaHandle {
    space: IoAddressSpace,
    /// What `space` refers to, a step nearer.
    memory: Arc<Space>,
    slot: Arc<Slot>,
    /// The slot has one user, who runs one access at a time: `Send`, not `Sync`.
    _one_user: PhantomData<Cell<()>>,
}

impl IoAddressSpace {
    /// A handle for one user of the memory.
    pub fn handle(&self) -> DmaHandle {
        DmaHandle {
            space: self.clone(),
            memory: self.view.space.clone(),
            slot: self.view.space.grace.register(),
            _one_user: PhantomData,
        }
    }
}

impl DmaHandle {
    /// Fills `buf` from `iova` on; an empty buffer succeeds.
    ///
    /// # Errors
    ///
    /// As [`IoAddressSpace::read`].
    // Left to the compiler, what else a crate has decides: the call is a fifth of a short access.
    #[inline(always)]
    pub fn read(&self, iova: u64, buf: &mut [u8]) -> Result<()> {
        let running = self.slot.enter();
        self.memory.read(running.inside(), iova, buf)
    }

    /// Writes `buf` from `iova` on; an empty buffer succeeds.
    ///
    /// # Errors
    ///
    /// As [`IoAddressSpace::write`].
    // Left to the compiler, what else a crate has decides: the call is a fifth of a short access.
    #[inline(always)]
    pub fn write(&self, iova: u64, buf: &[u8]) -> Result<()> {
        let running = self.slot.enter();
        self.memory.write(running.inside(), iova, buf)
    }

    /// The kernel's `vfio_dma_rw`: an empty transfer is refused.
    ///
    /// # Errors
    ///
    /// As [`IoAddressSpace::dma_rw`].
    pub fn dma_rw(&self, iova: u64, transfer: Transfer<'_>) -> Result<()> {
        let running = self.slot.enter();
        self.memory.dma_rw(running.inside(), iova, transfer)
    }

    /// Writes `new` at `iova` if `current` is there, in one step; what was there is returned, in
    /// [`Ok`] if it was `current`. The memory counts as written either way.
    ///
    /// ```
    /// use std::sync::atomic::Ordering::{AcqRel, Acquire};
    /// use iommu_type1::{Backing, IoAddressSpace};
    /// use vm_memory::Permissions;
    ///
    /// let space = IoAddressSpace::new();
    /// space.map(0, Backing::anonymous(0x1000)?, Permissions::ReadWrite)?;
    /// let handle = space.handle();
    /// assert_eq!(handle.compare_exchange(8, 0_u32, 1, AcqRel, Acquire)?, Ok(0));
    /// assert_eq!(handle.compare_exchange(8, 0_u32, 2, AcqRel, Acquire)?, Err(1));
    /// # Ok::<(), iommu_type1::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Misaligned`] (EINVAL) where `iova` is not aligned to the size of the value, otherwise
    /// as [`IoAddressSpace::write`].
    ///
    /// # Panics
    ///
    /// As the standard library's atomics, where `failure` is an order that a load cannot have.
    pub fn compare_exchange<T: CompareExchange>(
        &self,
        iova: u64,
        current: T,
        new: T,
        success: Ordering,
        failure: Ordering,
    ) -> Result<std::result::Result<T, T>> {
        let running = self.slot.enter();
        let orders = (success, failure);
        self.memory
            .compare_exchange(running.inside(), iova, current, new, orders)
    }

    /// The space it belongs to.
    pub fn space(&self) -> &IoAddressSpace {
        &self.space
    }

    fn leases(&self) -> LeaseSet {
        LeaseSet::new(self.space.view.clone())
    }
}

impl fmt::Debug for DmaHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaHandle")
            .field("space", &self.space)
            .finish_non_exhaustive()
    }
}

impl Drop for DmaHandle {
    fn drop(&mut self) {
        self.memory.grace.unregister(&self.slot);
    }
}

/// What was done before an error counts as success with fewer bytes, as in vm-memory.
fn partial(result: Result<()>, len: usize) -> Result<usize> {
    match result {
        Ok(()) => Ok(len),
        Err(error) if error.completed() > 0 => Ok(error.completed()),
        Err(error) => Err(error),
    }
}

impl Bytes<GuestAddress> for DmaHandle {
    type E = Error;

    fn write(&self, buf: &[u8], addr: GuestAddress) -> Result<usize> {
        partial(self.write(addr.0, buf), buf.len())
    }

    fn read(&self, buf: &mut [u8], addr: GuestAddress) -> Result<usize> {
        let len = buf.len();
        partial(self.read(addr.0, buf), len)
    }

    fn write_slice(&self, buf: &[u8], addr: GuestAddress) -> Result<()> {
        self.write(addr.0, buf)
    }

    fn read_slice(&self, buf: &mut [u8], addr: GuestAddress) -> Result<()> {
        self.read(addr.0, buf)
    }

    fn read_volatile_from<F>(&self, addr: GuestAddress, src: &mut F, count: usize) -> Result<usize>
    where
        F: ReadVolatile,
    {
        stream::fill(&self.leases(), addr.0, src, count)?.any()
    }

    fn read_exact_volatile_from<F>(
        &self,
        addr: GuestAddress,
        src: &mut F,
        count: usize,
    ) -> Result<()>
    where
        F: ReadVolatile,
    {
        stream::fill(&self.leases(), addr.0, src, count)?.exactly()
    }

    fn write_volatile_to<F>(&self, addr: GuestAddress, dst: &mut F, count: usize) -> Result<usize>
    where
        F: WriteVolatile,
    {
        stream::drain(&self.leases(), addr.0, dst, count)?.any()
    }

    fn write_all_volatile_to<F>(&self, addr: GuestAddress, dst: &mut F, count: usize) -> Result<()>
    where
        F: WriteVolatile,
    {
        stream::drain(&self.leases(), addr.0, dst, count)?.exactly()
    }

    fn store<T: AtomicAccess>(&self, val: T, addr: GuestAddress, order: Ordering) -> Result<()> {
        let running = self.slot.enter();
        self.memory.store(running.inside(), val, addr.0, order)
    }

    fn load<T: AtomicAccess>(&self, addr: GuestAddress, order: Ordering) -> Result<T> {
        let running = self.slot.enter();
        self.memory.load(running.inside(), addr.0, order)
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a VMM can use today, each behind one call, and the copy nobody can beat.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use vm_memory::iommu::{Error, IotlbIterator, IovaRange};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap, Iommu, IommuMemory,
    Iotlb, Permissions,
};

/// `read_slice` of a `GuestMemoryMmap`, which is generic: it is compiled here, with everything inlined
/// that the optimizer wants.
#[inline(never)]
pub fn mmap(memory: &GuestMemoryMmap, gpa: u64, buf: &mut [u8]) {
    memory.read_slice(buf, GuestAddress(gpa)).expect("memory");
}

/// What user space does in place of `kvm_read_guest`: a call of [`mmap`] a page.
#[inline(never)]
pub fn page_loop(memory: &GuestMemoryMmap, gpa: u64, buf: &mut [u8]) {
    let mut done = 0;
    while done < buf.len() {
        let at = gpa + done as u64;
        let left_in_page = 4096 - (at % 4096) as usize;
        let end = buf.len().min(done + left_in_page);
        mmap(memory, at, &mut buf[done..end]);
        done = end;
    }
}

/// A load of a `GuestMemoryAtomic`, and `read_slice` on what it gives.
#[inline(never)]
pub fn atomic(memory: &GuestMemoryAtomic<GuestMemoryMmap>, gpa: u64, buf: &mut [u8]) {
    let memory = memory.memory();
    memory.read_slice(buf, GuestAddress(gpa)).expect("memory");
}

/// `read_slice` of an `IommuMemory`.
#[inline(never)]
pub fn iommu(memory: &IommuMemory<GuestMemoryMmap, LockedIotlb>, iova: u64, buf: &mut [u8]) {
    memory.read_slice(buf, GuestAddress(iova)).expect("mapped");
}

/// A copy as long as `buf`.
///
/// # Safety
///
/// As many bytes can be read at `host`, and are not part of `buf`.
#[inline(never)]
pub unsafe fn memcpy(host: *const u8, buf: &mut [u8]) {
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy_nonoverlapping(host, buf.as_mut_ptr(), buf.len()) };
}

/// vm-memory's own IOTLB, behind the lock its documentation proposes, holding every mapping.
#[derive(Debug, Default)]
pub struct LockedIotlb(RwLock<Iotlb>);

impl LockedIotlb {
    /// Adds a mapping.
    ///
    /// # Panics
    ///
    /// Panics where the IOTLB refuses.
    pub fn map(&self, iova: u64, gpa: GuestAddress, len: u64) {
        let mut iotlb = self.0.write().unwrap_or_else(PoisonError::into_inner);
        iotlb
            .set_mapping(
                GuestAddress(iova),
                gpa,
                len as usize,
                Permissions::ReadWrite,
            )
            .expect("the IOTLB takes it");
    }

    /// Removes what is mapped in a range.
    pub fn unmap(&self, iova: u64, len: u64) {
        let mut iotlb = self.0.write().unwrap_or_else(PoisonError::into_inner);
        iotlb.invalidate_mapping(GuestAddress(iova), len as usize);
    }
}

impl Iommu for LockedIotlb {
    type IotlbGuard<'a> = RwLockReadGuard<'a, Iotlb>;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<RwLockReadGuard<'_, Iotlb>>, Error> {
        let iotlb = self.0.read().unwrap_or_else(PoisonError::into_inner);
        Iotlb::lookup(iotlb, iova, length, access).map_err(|_| Error::CannotResolve {
            iova_range: IovaRange { base: iova, length },
            reason: String::from("not mapped"),
        })
    }
}

/// The obvious translation: a lock around a tree from I/O virtual to host addresses.
///
/// # Invariants
///
/// Every entry is a range of memory that outlives the tree.
#[derive(Debug, Default)]
pub struct LockedTree(RwLock<BTreeMap<u64, HostRange>>);

#[derive(Clone, Copy, Debug)]
struct HostRange {
    /// An address; a pointer would be neither `Send` nor `Sync`.
    host: usize,
    len: u64,
}

impl LockedTree {
    /// Adds a mapping to `len` bytes at `host`, which must outlive its last [`read`](Self::read).
    pub fn map(&self, iova: u64, host: *mut u8, len: u64) {
        let mut tree = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let host = host as usize;
        tree.insert(iova, HostRange { host, len });
    }

    /// Removes the mapping that begins at `iova`.
    pub fn unmap(&self, iova: u64) {
        let mut tree = self.0.write().unwrap_or_else(PoisonError::into_inner);
        tree.remove(&iova);
    }

    /// Fills `buf` from `iova` on.
    ///
    /// # Panics
    ///
    /// Panics where nothing is mapped.
    #[inline(never)]
    pub fn read(&self, iova: u64, buf: &mut [u8]) {
        let tree = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let mut done = 0;
        while done < buf.len() {
            let at = iova + done as u64;
            let (first, range) = tree.range(..=at).next_back().expect("mapped");
            let offset = at - first;
            assert!(offset < range.len, "mapped");
            let n = (buf.len() - done).min((range.len - offset) as usize);
            let host = (range.host + offset as usize) as *const u8;
            // SAFETY: by the invariant `n` bytes of memory are at `host`; guest memory is not `buf`.
            unsafe { memcpy(host, &mut buf[done..done + n]) };
            done += n;
        }
    }
}

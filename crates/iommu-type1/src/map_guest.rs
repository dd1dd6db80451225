// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Mapping guest memory by its guest physical addresses, whatever regions it lies in.

use vm_memory::bitmap::Bitmap;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, Permissions,
};

use crate::memory;
use crate::range::IovaRange;
use crate::{Backing, Error, IoAddressSpace, Result};

impl IoAddressSpace {
    /// Maps `size` bytes of guest memory from a guest physical address, as hypervisors and vIOMMUs name
    /// what is to be mapped. Memory that goes on in the next region is a mapping for each: all of them or none, as with
    /// [`map_batch`](IoAddressSpace::map_batch).
    ///
    /// ```
    /// use iommu_type1::IoAddressSpace;
    /// use vm_memory::Permissions::ReadWrite;
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    ///
    /// let regions = [(GuestAddress(0), 0x8000), (GuestAddress(0x8000), 0x8000)];
    /// let memory = GuestMemoryMmap::<()>::from_ranges(&regions)?;
    /// let space = IoAddressSpace::new();
    /// space.map_guest_memory(0x4000_0000, &memory, GuestAddress(0x7000), 0x2000, ReadWrite)?;
    /// space.write(0x4000_0ffe, &[1, 2, 3, 4])?;
    /// assert_eq!(memory.read_obj::<[u8; 4]>(GuestAddress(0x7ffe))?, [1, 2, 3, 4]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Empty`] (EINVAL), [`Error::Overflow`] (EOVERFLOW) of the I/O virtual range or of the guest's,
    /// [`Error::NoRegion`] with the first guest physical address that is in no region; then as
    /// [`map_batch`](IoAddressSpace::map_batch), which also wants each part aligned. Nothing is mapped then.
    pub fn map_guest_memory<B>(
        &self,
        iova: u64,
        memory: &GuestMemoryMmap<B>,
        gpa: GuestAddress,
        size: u64,
        prot: Permissions,
    ) -> Result<()>
    where
        B: Bitmap + Send + Sync + 'static,
    {
        IovaRange::new(iova, size)?;
        IovaRange::new(gpa.0, size)?;
        let mut parts = Vec::new();
        let mut done = 0;
        while done < size {
            let at = GuestAddress(gpa.0 + done);
            let region = memory.find_region(at).ok_or(Error::NoRegion(at.0))?;
            let behind = region.last_addr().0 - at.0;
            let len = (size - done - 1).min(behind) + 1;
            let backing = Backing::from_guest_memory(memory, at, len as usize)?;
            memory::push(&mut parts, (iova + done, backing, prot))?;
            done += len;
        }
        self.map_batch(parts)
    }
}

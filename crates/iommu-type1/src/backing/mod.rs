// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory behind a mapping.

mod guest_place;
mod region;

use std::fmt;
use std::sync::Arc;

use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, Permissions,
};

pub(crate) use guest_place::GuestPlace;
#[cfg(feature = "sigbus")]
pub(crate) use region::to_prot;
pub(crate) use region::Region;

use crate::{Error, Result};

/// Memory of this process that a mapping can show to a device: a part of a memory region.
///
/// Clones refer to the same memory, which stays alive as long as any of them or any mapping of it.
///
/// ```
/// use iommu_type1::Backing;
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
///
/// let own = Backing::anonymous(0x4000)?;
/// assert_eq!(own.len(), 0x4000);
///
/// // What a VMM has already mapped for its guest.
/// let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0x10_0000), 0x10_0000)]).unwrap();
/// let guest = Backing::from_guest_memory(&memory, GuestAddress(0x10_2000), 0x2000)?;
/// assert_eq!(guest.len(), 0x2000);
/// # Ok::<(), iommu_type1::Error>(())
/// ```
#[derive(Clone)]
pub struct Backing {
    region: Arc<dyn Region>,
    /// INVARIANT: `len` bytes from here lie inside the region.
    address: *mut u8,
    len: usize,
    /// Whether the region wants to know what was written.
    tracks: bool,
    guest: GuestPlace,
}

// SAFETY: `Region` is `Send` and `Sync`; the address points into memory that the region owns, and
// which is only accessed through volatile slices.
unsafe impl Send for Backing {}
// SAFETY: as above.
unsafe impl Sync for Backing {}

impl Backing {
    /// Fresh zeroed memory of `len` bytes, private to this process.
    ///
    /// # Errors
    ///
    /// [`Error::Mmap`].
    pub fn anonymous(len: usize) -> Result<Self> {
        let region = MmapRegionBuilder::new_with_bitmap(len, ())
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_PRIVATE)
            .build()
            .map_err(|source| Error::Mmap { len, source })?;
        Ok(Backing::whole(region))
    }

    /// `len` bytes of a file (a memfd, a file on hugetlbfs or tmpfs), shared with everyone who
    /// maps it. `access` says what this process may do with it, [`Permissions::Read`] for a file
    /// opened for reading only.
    ///
    /// # Errors
    ///
    /// [`Error::BackingRange`]: the range is not inside the file, where touching it would kill the
    /// process with SIGBUS. [`Error::Mmap`]: for one, the offset is not page aligned.
    pub fn file(file: FileOffset, len: usize, access: Permissions) -> Result<Self> {
        check_inside(&file, len)?;
        let region = MmapRegionBuilder::new_with_bitmap(len, ())
            .with_mmap_prot(region::to_prot(access))
            .with_mmap_flags(libc::MAP_NORESERVE | libc::MAP_SHARED)
            .with_file_offset(file)
            .build()
            .map_err(|source| Error::Mmap { len, source })?;
        Ok(Backing::whole(region))
    }

    /// `len` bytes from `offset` of a guest memory region. Writes are marked in its bitmap, in the
    /// middle of the access: a bitmap of one's own must not map or unmap.
    ///
    /// # Errors
    ///
    /// [`Error::BackingRange`].
    pub fn from_region<B>(region: &GuestRegionMmap<B>, offset: u64, len: usize) -> Result<Self>
    where
        B: Bitmap + Send + Sync + 'static,
    {
        let mmap = region.get_mmap();
        let outside = || Error::BackingRange {
            offset,
            len: len as u64,
            size: mmap.size() as u64,
        };
        let start = usize::try_from(offset).map_err(|_| outside())?;
        let end = start.checked_add(len).ok_or_else(outside)?;
        if end > mmap.size() {
            return Err(outside());
        }
        Ok(Backing::part(mmap, start, len))
    }

    /// `len` bytes of guest memory from a guest physical address, inside one region. It carries that address
    /// ([`guest_address`](Backing::guest_address)). A range that goes on in the next region is a backing for each:
    /// [`map_guest_memory`](crate::IoAddressSpace::map_guest_memory) maps them together.
    ///
    /// # Errors
    ///
    /// [`Error::NoRegion`], [`Error::BackingRange`].
    pub fn from_guest_memory<B>(
        memory: &GuestMemoryMmap<B>,
        gpa: GuestAddress,
        len: usize,
    ) -> Result<Self>
    where
        B: Bitmap + Send + Sync + 'static,
    {
        let region = memory.find_region(gpa).ok_or(Error::NoRegion(gpa.0))?;
        Backing::from_region(region, gpa.0 - region.start_addr().0, len)?.with_guest_address(gpa)
    }

    /// The same memory, which the guest has at a guest physical address: a mapping of it stands for that address,
    /// and parts of it for those behind.
    ///
    /// ```
    /// use iommu_type1::Backing;
    /// use vm_memory::GuestAddress;
    ///
    /// let memory = Backing::anonymous(0x4000)?.with_guest_address(GuestAddress(0x8000_0000))?;
    /// let part = memory.slice(0x1000, 0x1000)?;
    /// assert_eq!(part.guest_address(), Some(GuestAddress(0x8000_1000)));
    /// # Ok::<(), iommu_type1::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Overflow`] where it would not end before the last address there is.
    pub fn with_guest_address(mut self, address: GuestAddress) -> Result<Self> {
        let (iova, size) = (address.0, self.len as u64);
        if iova.checked_add(size).is_none() {
            return Err(Error::Overflow { iova, size });
        }
        self.guest = GuestPlace::at(iova);
        Ok(self)
    }

    /// Where the guest has the first byte, if that is known.
    pub fn guest_address(&self) -> Option<GuestAddress> {
        self.guest.address()
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no memory in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What this process may do with the memory.
    pub fn access(&self) -> Permissions {
        self.region.access()
    }

    /// Address of the first byte in this process.
    pub fn host_address(&self) -> *mut u8 {
        self.address
    }

    /// The file of the memory and where in it the first byte is; none of memory that belongs to no file.
    ///
    /// ```
    /// use iommu_type1::Backing;
    ///
    /// assert!(Backing::anonymous(0x1000)?.file_offset().is_none());
    /// # Ok::<(), iommu_type1::Error>(())
    /// ```
    pub fn file_offset(&self) -> Option<FileOffset> {
        let file = self.region.file_offset()?;
        let start = file.start() + self.start() as u64;
        Some(FileOffset::from_arc(file.arc().clone(), start))
    }

    /// The same memory, of which `len` bytes from `offset`.
    ///
    /// ```
    /// use iommu_type1::Backing;
    ///
    /// let whole = Backing::anonymous(0x4000)?;
    /// assert_eq!(whole.slice(0x1000, 0x2000)?.len(), 0x2000);
    /// assert!(whole.slice(0x1000, 0x4000).is_err());
    /// # Ok::<(), iommu_type1::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::BackingRange`].
    pub fn slice(&self, offset: usize, len: usize) -> Result<Self> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => {
                let start = self.start() + offset;
                let part = Backing::part(self.region.clone(), start, len);
                Ok(part.in_guest(self.guest.behind(offset)))
            }
            _ => Err(Error::BackingRange {
                offset: offset as u64,
                len: len as u64,
                size: self.len as u64,
            }),
        }
    }

    /// The whole region that it is a part of.
    pub(crate) fn region(&self) -> Self {
        Backing::part(self.region.clone(), 0, self.region.size())
    }

    /// The same memory at another place of the guest's.
    pub(crate) fn in_guest(mut self, guest: GuestPlace) -> Self {
        self.guest = guest;
        self
    }

    /// The region, the address of the first byte, whether the region wants to know what was written, and where
    /// the guest has it.
    pub(crate) fn into_parts(self) -> (Arc<dyn Region>, *mut u8, bool, GuestPlace) {
        (self.region, self.address, self.tracks, self.guest)
    }

    fn whole(region: impl Region + 'static) -> Self {
        let len = region.size();
        Backing::part(Arc::new(region), 0, len)
    }

    /// INVARIANT: callers have checked that `offset + len` is at most the region's size.
    pub(crate) fn part(region: Arc<dyn Region>, offset: usize, len: usize) -> Self {
        Backing {
            address: region.host_address().wrapping_add(offset),
            len,
            tracks: region.tracks(),
            region,
            guest: GuestPlace::UNKNOWN,
        }
    }

    /// The same part of a region that has the same memory.
    #[cfg(feature = "sigbus")]
    pub(crate) fn in_region<R: Region + 'static>(
        self,
        wrap: impl FnOnce(Arc<dyn Region>) -> R,
    ) -> Self {
        let (start, guest) = (self.start(), self.guest);
        Backing::part(Arc::new(wrap(self.region)), start, self.len).in_guest(guest)
    }

    #[cfg(feature = "sigbus")]
    pub(crate) fn region_fault(&self) -> Option<usize> {
        self.region.fault_offset()
    }

    #[cfg(feature = "sigbus")]
    pub(crate) fn is_guarded(&self) -> bool {
        self.region.is_guarded()
    }

    /// Where in the region it begins.
    pub(crate) fn start(&self) -> usize {
        self.address.addr() - self.region.host_address().addr()
    }

    #[cfg(test)]
    pub(crate) fn for_model(region: impl Region + 'static) -> Self {
        Backing::whole(region)
    }
}

/// Refuses what is behind the end of a regular file; other kinds of files do not know their end.
fn check_inside(file: &FileOffset, len: usize) -> Result<()> {
    let metadata = file.file().metadata().map_err(|error| Error::Mmap {
        len,
        source: MmapRegionError::Mmap(error),
    })?;
    let end = file.start().checked_add(len as u64);
    if metadata.is_file() && end.is_none_or(|end| end > metadata.len()) {
        return Err(Error::BackingRange {
            offset: file.start(),
            len: len as u64,
            size: metadata.len(),
        });
    }
    Ok(())
}

impl fmt::Debug for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backing")
            .field("offset", &self.start())
            .field("len", &self.len)
            .field("access", &self.access())
            .field("guest_address", &self.guest_address())
            .finish_non_exhaustive()
    }
}

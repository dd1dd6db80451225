// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the ioctls of a type1 container do, on the structs that are their arguments.
//!
//! For whoever gets those structs from somebody else (a vfio-user server, a test beside the real kernel): one
//! place that knows their sizes and flags, and in which order the kernel refuses what is wrong. Needs the
//! feature `uapi`.

use vfio_bindings::bindings::vfio::{
    vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap, VFIO_TYPE1v2_IOMMU,
    VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_VADDR, VFIO_DMA_MAP_FLAG_WRITE,
    VFIO_DMA_UNMAP_FLAG_ALL, VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP, VFIO_DMA_UNMAP_FLAG_VADDR,
    VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP, VFIO_IOMMU_DIRTY_PAGES_FLAG_START,
    VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP, VFIO_TYPE1_IOMMU, VFIO_UNMAP_ALL, VFIO_UPDATE_VADDR,
};
use vm_memory::bitmap::Bitmap as RegionBitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, Permissions};

use crate::check::whole_pages;
use crate::dirty::check_page_size;
use crate::info::MAX_DIRTY_BITMAP_SIZE;
use crate::range::{check_aligned, IovaRange};
use crate::{Backing, DirtyBitmap, Error, IoAddressSpace, Result};

pub use vfio_bindings::bindings::vfio as bindings;

/// Sizes of the structs of the ioctls.
const MAP_SIZE: u32 = size_of::<vfio_iommu_type1_dma_map>() as u32;
const UNMAP_SIZE: u32 = size_of::<vfio_iommu_type1_dma_unmap>() as u32;
const DIRTY_SIZE: u32 = size_of::<bindings::vfio_iommu_type1_dirty_bitmap>() as u32;
const DIRTY_GET_SIZE: u32 = size_of::<bindings::vfio_iommu_type1_dirty_bitmap_get>() as u32;
const BITMAP_SIZE: u32 = size_of::<bindings::vfio_bitmap>() as u32;

/// The memory that the addresses of a user mean: those that it says in [`Type1::map_dma`].
pub trait UserMemory {
    /// The memory of `size` bytes at `vaddr`, which a device will access as `prot` says.
    ///
    /// It is called without a lock, and only where nothing else is wrong with a mapping.
    ///
    /// # Errors
    ///
    /// One whose errno is EFAULT where there is nothing ([`Error::BackingRange`]) or not for such accesses
    /// ([`Error::BackingProtection`]).
    fn backing(&self, vaddr: u64, size: u64, prot: Permissions) -> Result<Backing>;
}

/// Guest memory by its host addresses, each range inside of one region: what a VMM says that has mapped it.
///
/// ```
/// use iommu_type1::uapi::UserMemory;
/// use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, Permissions::ReadWrite};
///
/// let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0x10_0000), 0x4000)]).unwrap();
/// let vaddr = memory.get_host_address(GuestAddress(0x10_1000)).unwrap() as u64;
/// assert_eq!(memory.backing(vaddr, 0x3000, ReadWrite)?.host_address() as u64, vaddr);
/// assert_eq!(memory.backing(vaddr, 0x4000, ReadWrite).unwrap_err().errno(), libc::EFAULT);
/// # Ok::<(), iommu_type1::Error>(())
/// ```
impl<B: RegionBitmap + Send + Sync + 'static> UserMemory for GuestMemoryMmap<B> {
    fn backing(&self, vaddr: u64, size: u64, _prot: Permissions) -> Result<Backing> {
        let of_host = self.iter().find_map(|region| {
            let offset = vaddr.checked_sub(region.get_mmap().as_ptr() as u64)?;
            (offset < region.len()).then_some((region, offset))
        });
        let (region, offset) = of_host.ok_or(Error::NoRegion(vaddr))?;
        let len = usize::try_from(size).unwrap_or(usize::MAX);
        Backing::from_region(region, offset, len)
    }
}

/// The bitmap of dirty pages that is a part of an argument (`struct vfio_bitmap`).
#[derive(Debug)]
pub struct Bitmap<'a> {
    /// Bytes that a bit stands for.
    pub pgsize: u64,
    /// Bytes of the bitmap, as the user says.
    pub size: u64,
    /// The memory of it; shorter than the pages need where some of it is not there.
    pub data: &'a mut [u64],
}

/// A type1 container with its IOMMU set: the ioctls of its file, by the rules of the space.
///
/// ```
/// use iommu_type1::uapi::{bindings::vfio_iommu_type1_dma_map, Type1, UserMemory};
/// use iommu_type1::{Backing, IoAddressSpace, Result};
/// use vm_memory::Permissions;
///
/// struct Anything;
/// impl UserMemory for Anything {
///     fn backing(&self, _vaddr: u64, size: u64, _prot: Permissions) -> Result<Backing> {
///         Backing::anonymous(size as usize)
///     }
/// }
///
/// let space = IoAddressSpace::new();
/// let type1 = Type1::new(space.clone(), Anything);
/// type1.map_dma(&vfio_iommu_type1_dma_map {
///     argsz: 32,
///     flags: 3,
///     vaddr: 0x7000_0000,
///     iova: 0x1000,
///     size: 0x2000,
/// })?;
/// space.write(0x2fff, &[1])?;
/// # Ok::<(), iommu_type1::Error>(())
/// ```
#[derive(Debug)]
pub struct Type1<M> {
    space: IoAddressSpace,
    memory: M,
}

impl<M: UserMemory> Type1<M> {
    /// The container of a space, for a user with this memory.
    pub fn new(space: IoAddressSpace, memory: M) -> Self {
        Type1 { space, memory }
    }

    /// The space.
    pub fn space(&self) -> &IoAddressSpace {
        &self.space
    }

    /// The memory of the user.
    pub fn memory(&self) -> &M {
        &self.memory
    }

    /// `VFIO_IOMMU_MAP_DMA`.
    ///
    /// # Errors
    ///
    /// In this order: [`Error::ArgumentSize`], [`Error::Flags`] (EINVAL), then as [`IoAddressSpace::map`], whose
    /// last are those of [`UserMemory::backing`].
    pub fn map_dma(&self, argument: &vfio_iommu_type1_dma_map) -> Result<()> {
        let &vfio_iommu_type1_dma_map {
            argsz,
            flags,
            vaddr,
            iova,
            size,
        } = argument;
        check_argsz(argsz, MAP_SIZE)?;
        let known = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE | VFIO_DMA_MAP_FLAG_VADDR;
        if flags & !known != 0 {
            return Err(map_flags(flags));
        }
        let prot = permissions(flags);
        if flags & VFIO_DMA_MAP_FLAG_VADDR != 0 {
            if prot != Permissions::No {
                // That a range ends beyond the space comes first.
                IovaRange::new(iova, size)?;
                IovaRange::new(vaddr, size)
                    .map_err(|_| Error::HostOverflow { host: vaddr, size })?;
                return Err(map_flags(flags));
            }
            return self.space.resume_resolved(iova, size, vaddr, |prot| {
                self.memory.backing(vaddr, size, prot)
            });
        }
        self.space.map_resolved(iova, size, vaddr, prot, || {
            self.memory.backing(vaddr, size, prot)
        })
    }

    /// `VFIO_IOMMU_UNMAP_DMA`. On success the size says what was unmapped; on an error it stays. `bitmap` is the
    /// one behind the struct, which is looked at with `VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP` only.
    ///
    /// # Errors
    ///
    /// In this order: [`Error::ArgumentSize`], [`Error::Flags`] (EINVAL), [`Error::ArgumentMemory`] (EFAULT: no
    /// bitmap where one is meant), [`Error::BitmapSize`] (EINVAL), [`Error::Misaligned`],
    /// [`Error::UnmapAllRange`] (EINVAL), [`Error::BitmapPageSize`] (EINVAL), then as
    /// [`IoAddressSpace::unmap_dirty`] and [`IoAddressSpace::unmap`].
    pub fn unmap_dma(
        &self,
        argument: &mut vfio_iommu_type1_dma_unmap,
        bitmap: Option<Bitmap<'_>>,
    ) -> Result<()> {
        let (argsz, flags) = (argument.argsz, argument.flags);
        let (iova, size) = (argument.iova, argument.size);
        check_argsz(argsz, UNMAP_SIZE)?;
        let others = VFIO_DMA_UNMAP_FLAG_ALL | VFIO_DMA_UNMAP_FLAG_VADDR;
        let wants_bitmap = flags & VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP != 0;
        let is_known = flags & !(others | VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP) == 0;
        if !is_known || wants_bitmap && flags & others != 0 {
            return Err(Error::Flags {
                what: "VFIO_IOMMU_UNMAP_DMA",
                flags,
            });
        }
        argument.size = if wants_bitmap {
            check_argsz(argsz, UNMAP_SIZE + BITMAP_SIZE)?;
            self.unmap_with_bitmap(iova, size, checked(bitmap, size)?)?
        } else {
            self.unmap_plainly(flags, iova, size)?
        };
        Ok(())
    }

    fn unmap_plainly(&self, flags: u32, iova: u64, size: u64) -> Result<u64> {
        let only_vaddr = flags & VFIO_DMA_UNMAP_FLAG_VADDR != 0;
        if flags & VFIO_DMA_UNMAP_FLAG_ALL == 0 {
            return if only_vaddr {
                self.space.invalidate_vaddr(iova, size)
            } else {
                self.space.unmap(iova, size)
            };
        }
        check_aligned("address", iova, self.space.view.space.unit())?;
        if iova != 0 || size != 0 {
            return Err(Error::UnmapAllRange { iova, size });
        }
        if only_vaddr {
            self.space.invalidate_all_vaddr()
        } else {
            self.space.unmap_all()
        }
    }

    fn unmap_with_bitmap(&self, iova: u64, size: u64, bitmap: Bitmap<'_>) -> Result<u64> {
        let space = &self.space.view.space;
        whole_pages(space, iova, size)?;
        // The kernel looks for the same reason at both, tracking and this.
        check_page_size(space, bitmap.pgsize)?;
        let mut filled = writable(iova, size, bitmap)?;
        let (bytes, pages) = self.space.unmap_dirty(iova, size)?;
        filled.fill(&pages);
        Ok(bytes)
    }

    /// `VFIO_IOMMU_DIRTY_PAGES`; `get` is what stands behind the struct, which is looked at with
    /// `VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP` only: address, size and bitmap.
    ///
    /// # Errors
    ///
    /// In this order: [`Error::NoDirtyPages`] (EACCES: a space by the rules of v1), [`Error::ArgumentSize`],
    /// [`Error::Flags`] (EINVAL: not one of them, or more). Of a start those of
    /// [`IoAddressSpace::start_dirty_tracking`]. Of a bitmap [`Error::ArgumentSize`], [`Error::ArgumentMemory`]
    /// (EFAULT), [`Error::Empty`] (EINVAL), [`Error::Overflow`] (EOVERFLOW), [`Error::BitmapSize`],
    /// [`Error::BitmapPageSize`], then those of [`IoAddressSpace::take_dirty`].
    pub fn dirty_pages(
        &self,
        argsz: u32,
        flags: u32,
        get: Option<(u64, u64, Bitmap<'_>)>,
    ) -> Result<()> {
        if !self.space.view.space.rules.dirty_pages {
            return Err(Error::NoDirtyPages);
        }
        check_argsz(argsz, DIRTY_SIZE)?;
        match flags {
            VFIO_IOMMU_DIRTY_PAGES_FLAG_START => self.space.start_dirty_tracking(),
            VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP => {
                self.space.stop_dirty_tracking();
                Ok(())
            }
            VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP => {
                check_argsz(argsz, DIRTY_SIZE + DIRTY_GET_SIZE)?;
                let (iova, size, bitmap) = get.ok_or(Error::ArgumentMemory {
                    needed: DIRTY_GET_SIZE.into(),
                    len: 0,
                })?;
                IovaRange::new(iova, size)?;
                let bitmap = checked(Some(bitmap), size)?;
                check_page_size(&self.space.view.space, bitmap.pgsize)?;
                // Before there is a bitmap of it, which takes whole pages.
                whole_pages(&self.space.view.space, iova, size)?;
                let mut bitmap = writable(iova, size, bitmap)?;
                self.space.take_dirty_bitmap(&mut bitmap)
            }
            _ => Err(Error::Flags {
                what: "VFIO_IOMMU_DIRTY_PAGES",
                flags,
            }),
        }
    }

    /// `VFIO_IOMMU_GET_INFO`: `buf` begins with the struct, and is as much of the argument as is there.
    ///
    /// # Errors
    ///
    /// Those of [`Info::encode`](crate::Info::encode).
    pub fn get_info(&self, buf: &mut [u8]) -> Result<()> {
        self.space.info().encode(buf)
    }

    /// `VFIO_CHECK_EXTENSION`: 1 for what there is.
    pub fn check_extension(&self, extension: u32) -> i32 {
        let known = [
            VFIO_TYPE1_IOMMU,
            VFIO_TYPE1v2_IOMMU,
            VFIO_UNMAP_ALL,
            VFIO_UPDATE_VADDR,
        ];
        i32::from(known.contains(&extension))
    }
}

fn check_argsz(argsz: u32, min: u32) -> Result<()> {
    if argsz < min {
        return Err(Error::ArgumentSize { argsz, min });
    }
    Ok(())
}

fn map_flags(flags: u32) -> Error {
    Error::Flags {
        what: "VFIO_IOMMU_MAP_DMA",
        flags,
    }
}

fn permissions(flags: u32) -> Permissions {
    match (
        flags & VFIO_DMA_MAP_FLAG_READ != 0,
        flags & VFIO_DMA_MAP_FLAG_WRITE != 0,
    ) {
        (true, true) => Permissions::ReadWrite,
        (true, false) => Permissions::Read,
        (false, true) => Permissions::Write,
        (false, false) => Permissions::No,
    }
}

/// A bitmap that is there, of a size that can be asked for.
fn checked(bitmap: Option<Bitmap<'_>>, size: u64) -> Result<Bitmap<'_>> {
    let bitmap = bitmap.ok_or(Error::ArgumentMemory {
        needed: BITMAP_SIZE.into(),
        len: 0,
    })?;
    check_bitmap_size(size, bitmap.pgsize, bitmap.size)?;
    Ok(bitmap)
}

/// The words of a bitmap, if as many are there as its pages need: it must not show after the pages were taken
/// that they are not.
fn writable(iova: u64, size: u64, bitmap: Bitmap<'_>) -> Result<DirtyBitmap<'_>> {
    let needed = (size / bitmap.pgsize).div_ceil(u64::BITS.into()) * 8;
    let len = bitmap.data.len() as u64 * 8;
    if len < needed {
        return Err(Error::ArgumentMemory { needed, len });
    }
    DirtyBitmap::new(iova, size, bitmap.pgsize, bitmap.data)
}

/// What the kernel takes for a bitmap of `size` bytes of addresses: not empty, not too large, and large enough.
fn check_bitmap_size(size: u64, page_size: u64, bytes: u64) -> Result<()> {
    // Of a page size that is no power of two the kernel takes the lowest bit, and refuses it later. There is
    // none in 0.
    let shift = page_size.trailing_zeros();
    let pages = size.checked_shr(shift).unwrap_or(0);
    let needed = pages.div_ceil(u64::BITS.into()) * 8;
    if pages == 0 || bytes == 0 || bytes > MAX_DIRTY_BITMAP_SIZE || bytes < needed {
        return Err(Error::BitmapSize { pages, bytes });
    }
    Ok(())
}

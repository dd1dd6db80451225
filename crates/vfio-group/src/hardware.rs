// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The kernel's own containers, groups and devices: a thin wrapper of the ioctls.
//!
//! Where a device does DMA itself, its external user is whoever holds its file: the kernel keeps the
//! group attached, and the mappings in place, while that is open ([`HardwareUser`]). Errors carry what
//! the kernel answered.
//!
//! ```no_run
//! use vfio_group::hardware::{HardwareContainer, HardwareGroup, READ, WRITE};
//! use vfio_group::IommuType;
//!
//! let container = HardwareContainer::open()?;
//! let group = HardwareGroup::open(26)?;
//! group.set_container(&container)?;
//! container.set_iommu(IommuType::Type1v2)?;
//! # let (memory, size) = (std::ptr::null_mut::<u8>(), 0x1000);
//! // SAFETY: the memory stays mapped here, and nobody expects it to keep its contents, until it is
//! // unmapped below.
//! unsafe { container.map(0x1000, memory, size, READ | WRITE)? };
//! let user = group.device("0000:06:0d.0")?;
//! assert_eq!(group.unset_container().unwrap_err().errno(), libc::EBUSY);
//! drop(user);
//! container.unmap(0x1000, size)?;
//! group.unset_container()?;
//! # Ok::<(), vfio_group::Error>(())
//! ```

#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::raw::{c_int, c_ulong};

use iommu_type1::Info;
use vfio_bindings::bindings::vfio::{
    __IncompleteArrayField, vfio_group_status, vfio_iommu_type1_dma_map,
    vfio_iommu_type1_dma_unmap, vfio_iommu_type1_info, VFIO_DMA_MAP_FLAG_READ,
    VFIO_DMA_MAP_FLAG_WRITE, VFIO_DMA_UNMAP_FLAG_ALL,
};
use vmm_sys_util::ioctl::{
    ioctl, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref, ioctl_with_val,
};

use crate::{Error, IommuType, Result};

/// The numbers of the ioctls.
mod number {
    use vfio_bindings::bindings::vfio::{VFIO_BASE, VFIO_TYPE};
    use vmm_sys_util::ioctl_io_nr;

    ioctl_io_nr!(VFIO_GET_API_VERSION, VFIO_TYPE as u32, VFIO_BASE);
    ioctl_io_nr!(VFIO_CHECK_EXTENSION, VFIO_TYPE as u32, VFIO_BASE + 1);
    ioctl_io_nr!(VFIO_SET_IOMMU, VFIO_TYPE as u32, VFIO_BASE + 2);
    ioctl_io_nr!(VFIO_GROUP_GET_STATUS, VFIO_TYPE as u32, VFIO_BASE + 3);
    ioctl_io_nr!(VFIO_GROUP_SET_CONTAINER, VFIO_TYPE as u32, VFIO_BASE + 4);
    ioctl_io_nr!(VFIO_GROUP_UNSET_CONTAINER, VFIO_TYPE as u32, VFIO_BASE + 5);
    ioctl_io_nr!(VFIO_GROUP_GET_DEVICE_FD, VFIO_TYPE as u32, VFIO_BASE + 6);
    ioctl_io_nr!(VFIO_IOMMU_GET_INFO, VFIO_TYPE as u32, VFIO_BASE + 12);
    ioctl_io_nr!(VFIO_IOMMU_MAP_DMA, VFIO_TYPE as u32, VFIO_BASE + 13);
    ioctl_io_nr!(VFIO_IOMMU_UNMAP_DMA, VFIO_TYPE as u32, VFIO_BASE + 14);
}
use number::*;

/// The device may read (`VFIO_DMA_MAP_FLAG_READ`).
pub const READ: u32 = VFIO_DMA_MAP_FLAG_READ;
/// The device may write (`VFIO_DMA_MAP_FLAG_WRITE`).
pub const WRITE: u32 = VFIO_DMA_MAP_FLAG_WRITE;

/// Most bytes of `VFIO_IOMMU_GET_INFO` that are asked for.
const INFO_LIMIT: usize = 1 << 20;

/// What an ioctl returned, or the error it left in errno.
fn check(operation: &'static str, answer: c_int) -> Result<c_int> {
    if answer < 0 {
        let source = io::Error::last_os_error();
        return Err(Error::Hardware { operation, source });
    }
    Ok(answer)
}

fn open(path: &str) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(|source| Error::Hardware {
            operation: "open",
            source,
        })
}

/// An open `/dev/vfio/vfio`.
#[derive(Debug)]
pub struct HardwareContainer {
    file: File,
}

/// What `VFIO_IOMMU_GET_INFO` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HardwareInfo {
    /// `VFIO_IOMMU_INFO_PGSIZES`, `VFIO_IOMMU_INFO_CAPS`.
    pub flags: u32,
    /// Bitmap of the page sizes of the IOMMU.
    pub iova_pgsizes: u64,
    /// Where the first capability begins, from the start of `bytes`; 0 if there is none.
    pub cap_offset: u32,
    /// All that was written, the capabilities included.
    pub bytes: Vec<u8>,
}

impl HardwareContainer {
    /// Opens `/dev/vfio/vfio`.
    ///
    /// # Errors
    ///
    /// [`Error::Hardware`], as everything here.
    pub fn open() -> Result<Self> {
        Ok(HardwareContainer::from_file(open("/dev/vfio/vfio")?))
    }

    /// A container that somebody else opened, as jailers do.
    pub fn from_file(file: File) -> Self {
        HardwareContainer { file }
    }

    /// `VFIO_GET_API_VERSION`.
    ///
    /// # Errors
    ///
    /// [`Error::Hardware`].
    pub fn api_version(&self) -> Result<u32> {
        // SAFETY: the ioctl takes no argument and changes no memory.
        let answer = unsafe { ioctl(&self.file, VFIO_GET_API_VERSION()) };
        Ok(check("VFIO_GET_API_VERSION", answer)? as u32)
    }

    /// `VFIO_CHECK_EXTENSION`.
    ///
    /// # Errors
    ///
    /// [`Error::Hardware`].
    pub fn check_extension(&self, extension: u32) -> Result<u32> {
        let extension = c_ulong::from(extension);
        // SAFETY: the argument is a number, no memory is changed.
        let answer = unsafe { ioctl_with_val(&self.file, VFIO_CHECK_EXTENSION(), extension) };
        Ok(check("VFIO_CHECK_EXTENSION", answer)? as u32)
    }

    /// `VFIO_SET_IOMMU`.
    ///
    /// # Errors
    ///
    /// [`Error::Hardware`].
    pub fn set_iommu(&self, iommu_type: IommuType) -> Result<()> {
        let number = c_ulong::from(u32::from(iommu_type));
        // SAFETY: the argument is a number, no memory is changed.
        let answer = unsafe { ioctl_with_val(&self.file, VFIO_SET_IOMMU(), number) };
        check("VFIO_SET_IOMMU", answer).map(drop)
    }

    /// `VFIO_IOMMU_MAP_DMA`: `size` bytes from `vaddr` become visible to the devices at `iova`, with
    /// [`READ`], [`WRITE`] or both.
    ///
    /// # Safety
    ///
    /// Until the range is unmapped, or the last group has left the container, devices read and write
    /// that memory behind the compiler's back: it must stay what it is, and be accessed
    /// as memory that others change.
    ///
    /// # Errors
    ///
    /// [`Error::Hardware`].
    pub unsafe fn map(&self, iova: u64, vaddr: *mut u8, size: u64, flags: u32) -> Result<()> {
        let map = vfio_iommu_type1_dma_map {
            argsz: size_of::<vfio_iommu_type1_dma_map>() as u32,
            flags,
            vaddr: vaddr as u64,
            iova,
            size,
        };
        // SAFETY: `map` is what the ioctl reads, as long as `argsz` says, and outlives the call. What
        // the mapping allows devices to do to memory is the caller's promise.
        let answer = unsafe { ioctl_with_ref(&self.file, VFIO_IOMMU_MAP_DMA(), &map) };
        check("VFIO_IOMMU_MAP_DMA", answer).map(drop)
    }

    /// `VFIO_IOMMU_UNMAP_DMA`: the bytes removed.
    ///
    /// # Errors
    ///
    /// [`Error::Hardware`].
    pub fn unmap(&self, iova: u64, size: u64) -> Result<u64> {
        self.unmap_with(iova, size, 0)
    }

    /// As [`unmap`](HardwareContainer::unmap), of everything (`VFIO_DMA_UNMAP_FLAG_ALL`).
    ///
    /// # Errors
    ///
    /// [`Error::Hardware`].
    pub fn unmap_all(&self) -> Result<u64> {
        self.unmap_with(0, 0, VFIO_DMA_UNMAP_FLAG_ALL)
    }

    fn unmap_with(&self, iova: u64, size: u64, flags: u32) -> Result<u64> {
        let mut unmap = vfio_iommu_type1_dma_unmap {
            argsz: size_of::<vfio_iommu_type1_dma_unmap>() as u32,
            flags,
            iova,
            size,
            data: __IncompleteArrayField::new(),
        };
        // SAFETY: `unmap` is what the ioctl reads and writes, no longer than `argsz` says because no
        // bitmap is asked for, and outlives the call.
        let answer = unsafe { ioctl_with_mut_ref(&self.file, VFIO_IOMMU_UNMAP_DMA(), &mut unmap) };
        check("VFIO_IOMMU_UNMAP_DMA", answer)?;
        Ok(unmap.size)
    }

    /// `VFIO_IOMMU_GET_INFO`, with all its capabilities.
    ///
    /// # Errors
    ///
    /// [`Error::Hardware`].
    pub fn info(&self) -> Result<HardwareInfo> {
        let mut len = size_of::<vfio_iommu_type1_info>();
        loop {
            // Words, for the alignment of the structure in front.
            let mut words = vec![0_u64; len.div_ceil(size_of::<u64>())];
            let header = words.as_mut_ptr().cast::<vfio_iommu_type1_info>();
            // SAFETY: `words` is aligned for the structure and at least as long, and zeroes are a
            // value of it.
            unsafe { (*header).argsz = len as u32 };
            // SAFETY: the ioctl reads and writes at most `argsz` bytes from there, which `words` has.
            let answer = unsafe { ioctl_with_mut_ptr(&self.file, VFIO_IOMMU_GET_INFO(), header) };
            check("VFIO_IOMMU_GET_INFO", answer)?;
            // SAFETY: as above; the kernel leaves numbers in it, of which any is a value.
            let info = unsafe { header.read() };
            let wanted = info.argsz as usize;
            if wanted > len && wanted <= INFO_LIMIT {
                len = wanted;
                continue;
            }
            let bytes = words.iter().flat_map(|word| word.to_ne_bytes()).take(len);
            return Ok(HardwareInfo {
                flags: info.flags,
                iova_pgsizes: info.iova_pgsizes,
                cap_offset: info.cap_offset,
                bytes: bytes.collect(),
            });
        }
    }
}

impl HardwareContainer {
    /// What can be mapped: [`info`](HardwareContainer::info), understood. An address space takes it over with
    /// [`page_sizes`](iommu_type1::IoAddressSpaceBuilder::page_sizes) and
    /// [`set_iova_ranges`](iommu_type1::IoAddressSpace::set_iova_ranges).
    ///
    /// # Errors
    ///
    /// [`Error::Hardware`]; [`Error::Iommu`] if the kernel's answer makes no sense.
    pub fn limits(&self) -> Result<Info> {
        Ok(Info::decode(&self.info()?.bytes)?)
    }
}

impl AsFd for HardwareContainer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// An open `/dev/vfio/N`.
#[derive(Debug)]
pub struct HardwareGroup {
    file: File,
}

impl HardwareGroup {
    /// Opens the group of that id.
    ///
    /// # Errors
    ///
    /// [`Error::Hardware`].
    pub fn open(id: u32) -> Result<Self> {
        Ok(HardwareGroup::from_file(open(&format!("/dev/vfio/{id}"))?))
    }

    /// A group that somebody else opened.
    pub fn from_file(file: File) -> Self {
        HardwareGroup { file }
    }

    /// `VFIO_GROUP_GET_STATUS`: [`GroupFile::VIABLE`](crate::GroupFile::VIABLE) and
    /// [`GroupFile::CONTAINER_SET`](crate::GroupFile::CONTAINER_SET).
    ///
    /// # Errors
    ///
    /// [`Error::Hardware`].
    pub fn status(&self) -> Result<u32> {
        let mut status = vfio_group_status {
            argsz: size_of::<vfio_group_status>() as u32,
            flags: 0,
        };
        // SAFETY: `status` is what the ioctl reads and writes, and outlives the call.
        let answer =
            unsafe { ioctl_with_mut_ref(&self.file, VFIO_GROUP_GET_STATUS(), &mut status) };
        check("VFIO_GROUP_GET_STATUS", answer)?;
        Ok(status.flags)
    }

    /// `VFIO_GROUP_SET_CONTAINER`.
    ///
    /// # Errors
    ///
    /// [`Error::Hardware`].
    pub fn set_container(&self, container: &HardwareContainer) -> Result<()> {
        let fd = container.file.as_raw_fd();
        // SAFETY: `fd` is what the ioctl reads, and outlives the call.
        let answer = unsafe { ioctl_with_ref(&self.file, VFIO_GROUP_SET_CONTAINER(), &fd) };
        check("VFIO_GROUP_SET_CONTAINER", answer).map(drop)
    }

    /// `VFIO_GROUP_UNSET_CONTAINER`.
    ///
    /// # Errors
    ///
    /// [`Error::Hardware`].
    pub fn unset_container(&self) -> Result<()> {
        // SAFETY: the ioctl takes no argument and changes no memory of ours: what devices could reach
        // they reach no longer.
        let answer = unsafe { ioctl(&self.file, VFIO_GROUP_UNSET_CONTAINER()) };
        check("VFIO_GROUP_UNSET_CONTAINER", answer).map(drop)
    }

    /// `VFIO_GROUP_GET_DEVICE_FD`. `name` is that of the device in sysfs, as in `0000:06:0d.0`.
    ///
    /// # Errors
    ///
    /// [`Error::Hardware`]; also for a name with a zero byte, which no device has (ENODEV).
    pub fn device(&self, name: &str) -> Result<HardwareUser> {
        let name = CString::new(name).map_err(|_| Error::Hardware {
            operation: "VFIO_GROUP_GET_DEVICE_FD",
            source: io::Error::from_raw_os_error(libc::ENODEV),
        })?;
        // SAFETY: the ioctl reads the name up to its zero, and it outlives the call.
        let answer =
            unsafe { ioctl_with_ptr(&self.file, VFIO_GROUP_GET_DEVICE_FD(), name.as_ptr()) };
        let fd = check("VFIO_GROUP_GET_DEVICE_FD", answer)?;
        // SAFETY: the kernel has just opened it for the caller, and nobody else knows it.
        let device = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(HardwareUser { device })
    }
}

impl AsFd for HardwareGroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// An external user of a group with hardware: it holds a device's file, so the kernel keeps the group
/// attached and the mappings where they are until it is dropped.
#[derive(Debug)]
pub struct HardwareUser {
    device: OwnedFd,
}

impl AsFd for HardwareUser {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

impl From<HardwareUser> for OwnedFd {
    /// The device's file, which goes on being the user.
    fn from(user: HardwareUser) -> Self {
        user.device
    }
}

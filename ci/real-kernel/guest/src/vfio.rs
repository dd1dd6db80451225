// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The kernel's containers, groups and devices: its ioctls, bare.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use libc::{c_int, c_ulong, c_void};
use vfio_bindings::bindings::vfio::{
    vfio_bitmap, vfio_group_status, vfio_iommu_type1_dirty_bitmap,
    vfio_iommu_type1_dirty_bitmap_get, vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap,
    vfio_region_info, VFIO_BASE, VFIO_TYPE,
};

use vfio_group::hardware::HardwareUser;

use crate::op::{info_buffer, Bitmap, Dirty, Machine, Map, Op, Outcome, Unmap};

/// What a call returned, or its errno.
pub type Answer = Result<i32, i32>;

const CHECK_EXTENSION: u32 = 1;
const SET_IOMMU: u32 = 2;
const GROUP_GET_STATUS: u32 = 3;
const GROUP_SET_CONTAINER: u32 = 4;
const GROUP_UNSET_CONTAINER: u32 = 5;
const GROUP_GET_DEVICE_FD: u32 = 6;
const DEVICE_GET_REGION_INFO: u32 = 8;
const IOMMU_GET_INFO: u32 = 12;
const IOMMU_MAP_DMA: u32 = 13;
const IOMMU_UNMAP_DMA: u32 = 14;
const IOMMU_DIRTY_PAGES: u32 = 17;

/// An unmap with the bitmap that may follow it.
#[repr(C)]
struct UnmapArg {
    unmap: vfio_iommu_type1_dma_unmap,
    bitmap: vfio_bitmap,
}

/// A call about dirty pages with the range that may follow it.
#[repr(C)]
struct DirtyArg {
    dirty: vfio_iommu_type1_dirty_bitmap,
    get: vfio_iommu_type1_dirty_bitmap_get,
}

/// An open `/dev/vfio/vfio`.
#[derive(Debug)]
pub struct Container(File);

/// An open `/dev/vfio/N`.
#[derive(Debug)]
pub struct Group(File);

/// An open device.
#[derive(Debug)]
pub struct Device(File);

fn open(path: &str) -> Result<File, i32> {
    let file = File::options().read(true).write(true).open(path);
    file.map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))
}

/// # Safety
///
/// `arg` is what the call takes: a value, or a pointer to what it reads and writes.
unsafe fn ioctl(file: &File, number: u32, arg: *mut c_void) -> Answer {
    let request = c_ulong::from(VFIO_TYPE) << 8 | c_ulong::from(VFIO_BASE + number);
    // SAFETY: as promised.
    let got = unsafe { libc::ioctl(file.as_raw_fd(), request, arg) };
    if got < 0 {
        return Err(io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or(libc::EIO));
    }
    Ok(got)
}

/// Calls that take a value.
fn with_value(file: &File, number: u32, value: u64) -> Answer {
    let arg = std::ptr::without_provenance_mut(value as usize);
    // SAFETY: none of the calls this is used for takes a pointer.
    unsafe { ioctl(file, number, arg) }
}

/// Calls that take a pointer to a struct.
fn with_struct<T>(file: &File, number: u32, arg: &mut T) -> Answer {
    // SAFETY: the call reads and writes at most what `argsz` says, which is checked against the struct
    // where the call writes; pointers in it are to buffers of the sizes that are needed.
    unsafe { ioctl(file, number, std::ptr::from_mut(arg).cast()) }
}

impl Container {
    /// Opens one.
    pub fn open() -> Result<Self, i32> {
        open("/dev/vfio/vfio").map(Container)
    }

    /// `VFIO_SET_IOMMU`.
    pub fn set_iommu(&self, iommu_type: u32) -> Answer {
        with_value(&self.0, SET_IOMMU, u64::from(iommu_type))
    }

    /// `VFIO_CHECK_EXTENSION`.
    pub fn check_extension(&self, extension: u32) -> Answer {
        with_value(&self.0, CHECK_EXTENSION, u64::from(extension))
    }

    /// `VFIO_IOMMU_MAP_DMA`.
    pub fn map(&self, map: &Map) -> Answer {
        let mut arg = map_arg(map);
        with_struct(&self.0, IOMMU_MAP_DMA, &mut arg)
    }

    /// `VFIO_IOMMU_UNMAP_DMA`.
    pub fn unmap(&self, unmap: &Unmap) -> Outcome {
        let mut words = unmap.bitmap.map_or(Vec::new(), |bitmap| bitmap.words());
        let mut arg = UnmapArg {
            unmap: unmap_arg(unmap),
            bitmap: bitmap_arg(unmap.bitmap, &mut words),
        };
        let result = with_struct(&self.0, IOMMU_UNMAP_DMA, &mut arg);
        Outcome {
            size: arg.unmap.size,
            words,
            ..Outcome::plain(result)
        }
    }

    /// `VFIO_IOMMU_DIRTY_PAGES`.
    pub fn dirty(&self, dirty: &Dirty) -> Outcome {
        let mut words = dirty.bitmap.words();
        let mut arg = DirtyArg {
            dirty: vfio_iommu_type1_dirty_bitmap {
                argsz: dirty.argsz,
                flags: dirty.flags,
                ..Default::default()
            },
            get: vfio_iommu_type1_dirty_bitmap_get {
                iova: dirty.iova,
                size: dirty.size,
                bitmap: bitmap_arg(Some(dirty.bitmap), &mut words),
            },
        };
        let result = with_struct(&self.0, IOMMU_DIRTY_PAGES, &mut arg);
        Outcome {
            words,
            ..Outcome::plain(result)
        }
    }

    /// `VFIO_IOMMU_GET_INFO`.
    pub fn info(&self, argsz: u32) -> Outcome {
        let mut info = info_buffer(argsz);
        assert!(argsz as usize <= info.len());
        // SAFETY: the call writes at most `argsz` bytes, and at least the 24 of the struct, which the buffer
        // has room for.
        let result = unsafe { ioctl(&self.0, IOMMU_GET_INFO, info.as_mut_ptr().cast()) };
        Outcome {
            info,
            ..Outcome::plain(result)
        }
    }
}

/// The argument of a map.
pub fn map_arg(map: &Map) -> vfio_iommu_type1_dma_map {
    vfio_iommu_type1_dma_map {
        argsz: map.argsz,
        flags: map.flags,
        vaddr: map.vaddr,
        iova: map.iova,
        size: map.size,
    }
}

/// The argument of an unmap, without the bitmap.
pub fn unmap_arg(unmap: &Unmap) -> vfio_iommu_type1_dma_unmap {
    vfio_iommu_type1_dma_unmap {
        argsz: unmap.argsz,
        flags: unmap.flags,
        iova: unmap.iova,
        size: unmap.size,
        ..Default::default()
    }
}

fn bitmap_arg(bitmap: Option<Bitmap>, words: &mut [u64]) -> vfio_bitmap {
    bitmap.map_or(
        vfio_bitmap {
            pgsize: 0,
            size: 0,
            data: std::ptr::null_mut(),
        },
        |bitmap| vfio_bitmap {
            pgsize: bitmap.pgsize,
            size: bitmap.size,
            data: words.as_mut_ptr(),
        },
    )
}

impl Group {
    /// Opens one.
    pub fn open(id: u32) -> Result<Self, i32> {
        open(&format!("/dev/vfio/{id}")).map(Group)
    }

    /// `VFIO_GROUP_SET_CONTAINER`.
    pub fn set_container(&self, container: &Container) -> Answer {
        let mut fd: c_int = container.0.as_raw_fd();
        with_struct(&self.0, GROUP_SET_CONTAINER, &mut fd)
    }

    /// `VFIO_GROUP_UNSET_CONTAINER`.
    pub fn unset_container(&self) -> Answer {
        with_value(&self.0, GROUP_UNSET_CONTAINER, 0)
    }

    /// `VFIO_GROUP_GET_STATUS`: the flags.
    pub fn status(&self) -> Answer {
        let mut status = vfio_group_status {
            argsz: size_of::<vfio_group_status>() as u32,
            flags: 0,
        };
        with_struct(&self.0, GROUP_GET_STATUS, &mut status).map(|_| status.flags as i32)
    }

    /// `VFIO_GROUP_GET_DEVICE_FD`.
    pub fn device(&self, name: &str) -> Result<Device, i32> {
        let name = CString::new(name).map_err(|_| libc::EINVAL)?;
        // SAFETY: the call reads a string.
        let fd = unsafe { ioctl(&self.0, GROUP_GET_DEVICE_FD, name.as_ptr() as *mut c_void) }?;
        // SAFETY: the call has opened it for us.
        Ok(Device(unsafe { File::from_raw_fd(fd) }))
    }
}

impl From<HardwareUser> for Device {
    fn from(user: HardwareUser) -> Self {
        Device(File::from(OwnedFd::from(user)))
    }
}

impl From<File> for Device {
    fn from(file: File) -> Self {
        Device(file)
    }
}

impl Device {
    /// Where in its file a region begins.
    pub fn region(&self, index: u32) -> Result<u64, i32> {
        let mut info = vfio_region_info {
            argsz: size_of::<vfio_region_info>() as u32,
            index,
            ..Default::default()
        };
        with_struct(&self.0, DEVICE_GET_REGION_INFO, &mut info).map(|_| info.offset)
    }

    /// The file, for its registers.
    pub fn file(&self) -> &File {
        &self.0
    }
}

/// A container of the kernel's with one group.
#[derive(Debug)]
pub struct Kernel {
    // Dropped in this order, so that the group is free when the next container wants it.
    container: Container,
    _group: Group,
}

impl Kernel {
    /// A container of the type, with the group in it and nothing mapped.
    pub fn new(group: u32, iommu_type: u32) -> Result<Self, i32> {
        let container = Container::open()?;
        let group = Group::open(group)?;
        group.set_container(&container)?;
        container.set_iommu(iommu_type)?;
        Ok(Kernel {
            container,
            _group: group,
        })
    }

    /// The container.
    pub fn container(&self) -> &Container {
        &self.container
    }
}

impl Machine for Kernel {
    fn apply(&mut self, op: &Op) -> Outcome {
        let container = &self.container;
        match op {
            Op::Map(map) => Outcome::plain(container.map(map)),
            Op::Unmap(unmap) => container.unmap(unmap),
            Op::Dirty(dirty) => container.dirty(dirty),
            Op::Info(argsz) => container.info(*argsz),
            Op::Extension(extension) => Outcome::plain(container.check_extension(*extension)),
        }
    }
}

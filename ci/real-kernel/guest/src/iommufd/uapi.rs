// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The kernel's iommufd and the device that is attached to one of its IOASes: the ioctls, bare.

use std::fs::{self, File};
use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;

use iommufd_bindings::{
    iommu_destroy, iommu_ioas_alloc, iommu_ioas_allow_iovas, iommu_ioas_copy,
    iommu_ioas_iova_ranges, iommu_ioas_map, iommu_ioas_map_file, iommu_ioas_unmap,
    iommu_iova_range, IOMMUFD_CMD_DESTROY, IOMMUFD_CMD_IOAS_ALLOC, IOMMUFD_CMD_IOAS_ALLOW_IOVAS,
    IOMMUFD_CMD_IOAS_COPY, IOMMUFD_CMD_IOAS_IOVA_RANGES, IOMMUFD_CMD_IOAS_MAP,
    IOMMUFD_CMD_IOAS_MAP_FILE, IOMMUFD_CMD_IOAS_UNMAP, IOMMUFD_TYPE,
};
use libc::c_ulong;
use vfio_bindings::bindings::vfio::{
    vfio_device_attach_iommufd_pt, vfio_device_bind_iommufd, VFIO_BASE, VFIO_TYPE,
};

use super::op::{Allow, Copied, Map, Memory, Op, Outcome, Unmap, ATTACHED, SPACES};

const DEVICE_BIND_IOMMUFD: u32 = VFIO_BASE + 18;
const DEVICE_ATTACH_IOMMUFD_PT: u32 = VFIO_BASE + 19;

/// No object has it.
const NO_ID: u32 = 1 << 20;

/// Ranges there is room for.
const ROOM: usize = 8;

/// Where iommufds come from.
pub const DEV_IOMMU: &str = "/dev/iommu";

/// An iommufd with a device attached to its first IOAS.
#[derive(Debug)]
pub struct Kernel {
    iommufd: File,
    /// Open as long as the device is to be attached.
    _device: File,
    ids: [Option<u32>; SPACES],
    file: File,
}

fn open(path: &str) -> Result<File, i32> {
    let file = File::options().read(true).write(true).open(path);
    file.map_err(errno)
}

fn errno(error: io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

/// # Safety
///
/// `arg` is the struct of the call, with its size in it, and pointers in it are to as much as it says.
unsafe fn ioctl<T>(file: &File, group: u8, number: u32, arg: &mut T) -> Result<(), i32> {
    let request = c_ulong::from(group) << 8 | c_ulong::from(number);
    // SAFETY: as promised.
    let got = unsafe { libc::ioctl(file.as_raw_fd(), request, std::ptr::from_mut(arg)) };
    if got < 0 {
        return Err(errno(io::Error::last_os_error()));
    }
    Ok(())
}

/// The path of the device that iommufd binds.
fn device_path(name: &str) -> io::Result<String> {
    let mut found = fs::read_dir(format!("/sys/bus/pci/devices/{name}/vfio-dev"))?;
    let entry = found.next().ok_or(io::ErrorKind::NotFound)??;
    Ok(format!(
        "/dev/vfio/devices/{}",
        entry.file_name().to_string_lossy()
    ))
}

impl Kernel {
    /// With all IOASes there, and nothing mapped.
    pub fn new(name: &str, file: &File) -> Result<Self, i32> {
        let iommufd = open(DEV_IOMMU)?;
        let device = open(&device_path(name).map_err(errno)?)?;
        let mut bind = vfio_device_bind_iommufd {
            argsz: size_of::<vfio_device_bind_iommufd>() as u32,
            iommufd: iommufd.as_raw_fd(),
            ..Default::default()
        };
        // SAFETY: the struct of the call.
        unsafe { ioctl(&device, VFIO_TYPE, DEVICE_BIND_IOMMUFD, &mut bind)? };
        let mut kernel = Kernel {
            iommufd,
            _device: device,
            ids: [None; SPACES],
            file: file.try_clone().map_err(errno)?,
        };
        for space in 0..SPACES {
            kernel.alloc(space)?;
        }
        let mut attach = vfio_device_attach_iommufd_pt {
            argsz: size_of::<vfio_device_attach_iommufd_pt>() as u32,
            pt_id: kernel.id(ATTACHED),
            ..Default::default()
        };
        // SAFETY: the struct of the call.
        unsafe {
            ioctl(
                &kernel._device,
                VFIO_TYPE,
                DEVICE_ATTACH_IOMMUFD_PT,
                &mut attach,
            )?
        };
        Ok(kernel)
    }

    fn call<T>(&self, number: u32, arg: &mut T) -> Result<(), i32> {
        // SAFETY: all callers below give the struct of the call and buffers that they own.
        unsafe { ioctl(&self.iommufd, IOMMUFD_TYPE, number, arg) }
    }

    fn id(&self, space: usize) -> u32 {
        self.ids[space].unwrap_or(NO_ID)
    }

    fn alloc(&mut self, space: usize) -> Result<(), i32> {
        let mut arg = iommu_ioas_alloc {
            size: size_of::<iommu_ioas_alloc>() as u32,
            ..Default::default()
        };
        self.call(IOMMUFD_CMD_IOAS_ALLOC, &mut arg)?;
        self.ids[space] = Some(arg.out_ioas_id);
        Ok(())
    }

    fn destroy(&mut self, space: usize) -> Result<(), i32> {
        let mut arg = iommu_destroy {
            size: size_of::<iommu_destroy>() as u32,
            id: self.id(space),
        };
        self.call(IOMMUFD_CMD_DESTROY, &mut arg)?;
        self.ids[space] = None;
        Ok(())
    }

    fn map(&self, map: &Map) -> Outcome {
        let ioas_id = self.id(map.space);
        let Map {
            flags,
            length,
            iova,
            ..
        } = *map;
        let (fd, start) = match map.memory {
            Memory::Own(user_va) => {
                let mut arg = iommu_ioas_map {
                    size: size_of::<iommu_ioas_map>() as u32,
                    flags,
                    ioas_id,
                    user_va,
                    length,
                    iova,
                    ..Default::default()
                };
                let result = self.call(IOMMUFD_CMD_IOAS_MAP, &mut arg);
                return Outcome::plain(result, arg.iova);
            }
            Memory::File(start) => (self.file.as_raw_fd(), start),
            Memory::Closed => (-1, 0),
        };
        let mut arg = iommu_ioas_map_file {
            size: size_of::<iommu_ioas_map_file>() as u32,
            flags,
            ioas_id,
            fd,
            start,
            length,
            iova,
        };
        let result = self.call(IOMMUFD_CMD_IOAS_MAP_FILE, &mut arg);
        Outcome::plain(result, arg.iova)
    }

    fn unmap(&self, unmap: &Unmap) -> Outcome {
        let mut arg = iommu_ioas_unmap {
            size: size_of::<iommu_ioas_unmap>() as u32,
            ioas_id: self.id(unmap.space),
            iova: unmap.iova,
            length: unmap.length,
        };
        let result = self.call(IOMMUFD_CMD_IOAS_UNMAP, &mut arg);
        Outcome::plain(result, arg.length)
    }

    fn copy(&self, copy: &Copied) -> Outcome {
        let mut arg = iommu_ioas_copy {
            size: size_of::<iommu_ioas_copy>() as u32,
            flags: copy.flags,
            dst_ioas_id: self.id(copy.to),
            src_ioas_id: self.id(copy.from),
            length: copy.length,
            dst_iova: copy.to_iova,
            src_iova: copy.from_iova,
        };
        let result = self.call(IOMMUFD_CMD_IOAS_COPY, &mut arg);
        Outcome::plain(result, arg.dst_iova)
    }

    fn ranges(&self, space: usize, room: u32) -> Outcome {
        assert!(room as usize <= ROOM);
        let mut ranges = [iommu_iova_range::default(); ROOM];
        let mut arg = iommu_ioas_iova_ranges {
            size: size_of::<iommu_ioas_iova_ranges>() as u32,
            ioas_id: self.id(space),
            num_iovas: room,
            allowed_iovas: ranges.as_mut_ptr().expose_provenance() as u64,
            ..Default::default()
        };
        let result = self.call(IOMMUFD_CMD_IOAS_IOVA_RANGES, &mut arg);
        let answered = matches!(result, Ok(()) | Err(libc::EMSGSIZE));
        let written = if answered {
            room.min(arg.num_iovas) as usize
        } else {
            0
        };
        let ranges = ranges[..written]
            .iter()
            .map(|range| (range.start, range.last));
        Outcome {
            ranges: ranges.collect(),
            ..Outcome::plain(result, arg.num_iovas.into())
        }
    }

    fn allow(&self, allow: &Allow) -> Result<(), i32> {
        let ranges: Vec<_> = allow
            .given()
            .iter()
            .map(|(start, last)| iommu_iova_range {
                start: *start,
                last: *last,
            })
            .collect();
        let mut arg = iommu_ioas_allow_iovas {
            size: size_of::<iommu_ioas_allow_iovas>() as u32,
            ioas_id: self.id(allow.space),
            num_iovas: ranges.len() as u32,
            allowed_iovas: ranges.as_ptr().expose_provenance() as u64,
            ..Default::default()
        };
        self.call(IOMMUFD_CMD_IOAS_ALLOW_IOVAS, &mut arg)
    }

    /// Does one operation.
    pub fn apply(&mut self, op: &Op) -> Outcome {
        match op {
            Op::Alloc(space) => Outcome::plain(self.alloc(*space), 0),
            Op::Destroy(space) => Outcome::plain(self.destroy(*space), 0),
            Op::Map(map) => self.map(map),
            Op::Unmap(unmap) => self.unmap(unmap),
            Op::Copy(copy) => self.copy(copy),
            Op::Ranges(space, room) => self.ranges(*space, *room),
            Op::Allow(allow) => Outcome::plain(self.allow(allow), 0),
        }
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device on its bus, and its registers.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;

/// The ids of the device server's device, as the kernel takes them.
pub const IDS: &str = "8086 9ff9";

/// Size of the BAR: registers, and the GGTT from the middle on.
const BAR: usize = 16 << 20;
const GGTT: usize = 8 << 20;

/// The name of the device on the bus.
pub fn find() -> io::Result<String> {
    for entry in fs::read_dir("/sys/bus/pci/devices")? {
        let entry = entry?;
        let id = |name| -> io::Result<String> {
            let id = fs::read_to_string(entry.path().join(name))?;
            Ok(id.trim().trim_start_matches("0x").to_string())
        };
        if format!("{} {}", id("vendor")?, id("device")?) == IDS {
            return Ok(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Err(io::Error::other(format!("there is no device {IDS}")))
}

/// The BAR of the device, as memory.
#[derive(Debug)]
pub struct Bar(*mut u8);

impl Bar {
    /// Maps it from a file of the kernel's.
    pub fn map(file: &impl AsRawFd, offset: u64) -> io::Result<Self> {
        // SAFETY: new addresses, for memory that belongs to nobody else.
        let at = unsafe {
            libc::mmap(
                ptr::null_mut(),
                BAR,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                libc::off_t::try_from(offset).map_err(io::Error::other)?,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Bar(at.cast()))
    }

    pub fn read(&self, register: u32) -> u32 {
        // SAFETY: `at` has looked that this is in the BAR, which stays mapped.
        unsafe { self.at::<u32>(register as usize).read_volatile() }
    }

    pub fn write(&self, register: u32, value: u32) {
        // SAFETY: as above.
        unsafe { self.at::<u32>(register as usize).write_volatile(value) }
    }

    /// Writes an entry of the GGTT, whole or by halves.
    pub fn write_ggtt(&self, index: u32, entry: u64, whole: bool) {
        let at = GGTT + index as usize * 8;
        if whole {
            // SAFETY: as above.
            unsafe { self.at::<u64>(at).write_volatile(entry) }
        } else {
            self.write(at as u32 + 4, (entry >> 32) as u32);
            self.write(at as u32, entry as u32);
        }
    }

    pub fn read_ggtt(&self, index: u32) -> u64 {
        // SAFETY: as above.
        unsafe { self.at::<u64>(GGTT + index as usize * 8).read_volatile() }
    }

    fn at<T>(&self, offset: usize) -> *mut T {
        assert!(offset % size_of::<T>() == 0 && offset + size_of::<T>() <= BAR);
        self.0.wrapping_add(offset).cast()
    }
}

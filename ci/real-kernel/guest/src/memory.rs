// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory that is mapped for the device: a few areas side by side, of every kind that a mapping can
//! meet, at an address that is the same in every run so that sequences can be repeated.

use std::io;
use std::ptr;
use std::sync::{Mutex, PoisonError};

use libc::{c_int, c_void, off_t};
use vm_memory::Permissions;

/// Bytes of a page, of the host and of the IOMMU.
pub const PAGE: u64 = 4096;

/// Where the first area begins.
pub const BASE: u64 = 0x2000_0000_0000;

/// One area.
#[derive(Clone, Copy, Debug)]
pub struct Area {
    /// Where it begins.
    pub first: u64,
    /// Its pages.
    pub pages: u64,
    /// What can be done with them.
    pub access: Permissions,
}

impl Area {
    const fn new(first_page: u64, pages: u64, access: Permissions) -> Self {
        Area {
            first: BASE + first_page * PAGE,
            pages,
            access,
        }
    }
}

/// Private memory.
pub const PRIVATE: Area = Area::new(0, 64, Permissions::ReadWrite);
/// Private memory that can only be read.
pub const READ_ONLY: Area = Area::new(64, 8, Permissions::Read);
/// Memory of nobody's.
pub const NO_ACCESS: Area = Area::new(72, 8, Permissions::No);
/// Nothing at all.
pub const HOLE: Area = Area::new(80, 8, Permissions::No);
/// Memory shared with children.
pub const SHARED: Area = Area::new(88, 16, Permissions::ReadWrite);
/// The part of a file that is there.
pub const FILE: Area = Area::new(104, 8, Permissions::ReadWrite);
/// Mapped like the file, but behind its end.
pub const BEHIND_FILE: Area = Area::new(112, 8, Permissions::No);

const AREAS: [Area; 7] = [
    PRIVATE,
    READ_ONLY,
    NO_ACCESS,
    HOLE,
    SHARED,
    FILE,
    BEHIND_FILE,
];

/// Makes the areas. For good: once is enough, and more does no harm.
pub fn make() -> io::Result<()> {
    static MADE: Mutex<bool> = Mutex::new(false);
    let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    if !*made {
        make_all()?;
        *made = true;
    }
    Ok(())
}

fn make_all() -> io::Result<()> {
    const ANY: c_int = libc::PROT_READ | libc::PROT_WRITE;
    const OWN: c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    place(PRIVATE.first, PRIVATE.pages, ANY, OWN, -1)?;
    place(READ_ONLY.first, READ_ONLY.pages, libc::PROT_READ, OWN, -1)?;
    place(NO_ACCESS.first, NO_ACCESS.pages, libc::PROT_NONE, OWN, -1)?;
    let shared = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    place(SHARED.first, SHARED.pages, ANY, shared, -1)?;
    // SAFETY: the name ends with a zero byte.
    let file = unsafe { libc::memfd_create(c"memory".as_ptr(), 0) };
    // SAFETY: a file of ours.
    if file < 0 || unsafe { libc::ftruncate(file, (FILE.pages * PAGE) as off_t) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let pages = FILE.pages + BEHIND_FILE.pages;
    place(FILE.first, pages, ANY, libc::MAP_SHARED, file)
}

fn place(first: u64, pages: u64, prot: c_int, flags: c_int, file: c_int) -> io::Result<()> {
    let wanted = ptr::with_exposed_provenance_mut::<c_void>(first as usize);
    let size = (pages * PAGE) as usize;
    let flags = flags | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: nothing that is mapped already is replaced.
    let got = unsafe { libc::mmap(wanted, size, prot, flags, file, 0) };
    if got == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// What can be done with all of a range, nothing where a part of it is missing.
pub fn access(vaddr: u64, size: u64) -> Permissions {
    let Some(end) = vaddr.checked_add(size) else {
        return Permissions::No;
    };
    let (mut at, mut access) = (vaddr, Permissions::ReadWrite);
    while at < end {
        let area = AREAS
            .iter()
            .find(|area| (area.first..area.first + area.pages * PAGE).contains(&at));
        access = match area.map_or(Permissions::No, |area| area.access) {
            Permissions::ReadWrite => access,
            Permissions::Read if access != Permissions::No => Permissions::Read,
            _ => return Permissions::No,
        };
        at = (at / PAGE + 1) * PAGE;
    }
    access
}

/// Reads bytes of a writable area.
pub fn read(vaddr: u64, into: &mut [u8]) {
    assert!(access(vaddr, into.len() as u64).allow(Permissions::Read));
    let from = ptr::with_exposed_provenance::<u8>(vaddr as usize);
    for (at, byte) in into.iter_mut().enumerate() {
        // SAFETY: the area is there, as asserted; devices may write it at the same time, so each byte is
        // read once.
        *byte = unsafe { from.add(at).read_volatile() };
    }
}

/// Writes bytes of a writable area.
pub fn write(vaddr: u64, from: &[u8]) {
    assert!(access(vaddr, from.len() as u64).allow(Permissions::ReadWrite));
    let into = ptr::with_exposed_provenance_mut::<u8>(vaddr as usize);
    for (at, byte) in from.iter().enumerate() {
        // SAFETY: as for reading.
        unsafe { into.add(at).write_volatile(*byte) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_can_do_what_its_least_page_can() {
        assert_eq!(access(PRIVATE.first, 64 * PAGE), Permissions::ReadWrite);
        assert_eq!(access(PRIVATE.first, 65 * PAGE), Permissions::Read);
        assert_eq!(access(PRIVATE.first, 73 * PAGE), Permissions::No);
        assert_eq!(access(FILE.first, 8 * PAGE), Permissions::ReadWrite);
        assert_eq!(access(FILE.first, 8 * PAGE + 1), Permissions::No);
        assert_eq!(access(u64::MAX - 1, 2), Permissions::No);
        assert_eq!(access(BASE - PAGE, PAGE), Permissions::No);
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whether a file that a client sends is really what it shares its memory through.
//!
//! A client that maps its memory privately sees a copy as soon as it writes: the file then never holds what
//! the client sees, and nothing fails. The file itself does not tell; the mappings of the client do, where
//! `/proc` shows them (same user, or allowed to trace it).

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;

/// Which file, for as long as somebody has it open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct FileId {
    pub(crate) dev: u64,
    pub(crate) ino: u64,
}

/// Whether `pid` has writable mappings of the file, and all of them are private. `false` also where that
/// cannot be told.
pub(crate) fn is_private(pid: i32, file: FileId) -> bool {
    let Ok(maps) = File::open(format!("/proc/{pid}/maps")) else {
        return false;
    };
    let mut private = false;
    for line in BufReader::new(maps).split(b'\n') {
        let Ok(line) = line else { return false };
        match sharing(&String::from_utf8_lossy(&line), file) {
            Some('s') => return false,
            Some(_) => private = true,
            None => {}
        }
    }
    private
}

/// `s` or `p` for a mapping of the file that is shared, or private and writable.
fn sharing(line: &str, file: FileId) -> Option<char> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let permissions = fields.next()?;
    let (major, minor) = fields.nth(1)?.split_once(':')?;
    let device = libc::makedev(
        u32::from_str_radix(major, 16).ok()?,
        u32::from_str_radix(minor, 16).ok()?,
    );
    let inode: u64 = fields.next()?.parse().ok()?;
    if (device, inode) != (file.dev, file.ino) {
        return None;
    }
    match permissions.as_bytes() {
        [.., b's'] => Some('s'),
        [_, b'w', _, b'p'] => Some('p'),
        _ => None,
    }
}

/// Whether nobody can make the file smaller any more.
pub(crate) fn is_sealed(file: &File) -> bool {
    // SAFETY: takes no pointers.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    seals >= 0 && seals & libc::F_SEAL_SHRINK != 0
}

/// Whether the file was opened for writing.
pub(crate) fn is_writable(file: &File) -> bool {
    // SAFETY: takes no pointers.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    flags >= 0 && flags & libc::O_ACCMODE == libc::O_RDWR
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_mappings() {
        let file = FileId {
            dev: libc::makedev(0, 1),
            ino: 1029,
        };
        let line = |permissions| {
            format!("7f00-7f10 {permissions} 00000000 00:01 1029  /memfd:mem (deleted)")
        };
        assert_eq!(sharing(&line("rw-s"), file), Some('s'));
        assert_eq!(sharing(&line("rw-p"), file), Some('p'));
        assert_eq!(sharing(&line("r--p"), file), None);
        assert_eq!(sharing(&line("rw-p"), FileId { ino: 1, ..file }), None);
        assert_eq!(sharing("7f00-7f10 rw-p 00000000 00:00 0", file), None);
        for junk in ["", "7f00-7f10", "a b c d e", "a rw-p 0 zz:01 1029"] {
            assert_eq!(sharing(junk, file), None, "{junk}");
        }
    }
}

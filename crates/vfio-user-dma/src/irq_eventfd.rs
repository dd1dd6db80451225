// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The eventfd through which a client is told of an interrupt.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// An eventfd of the client's, for an interrupt.
///
/// As in the kernel, no other file is taken (EINVAL): a write to it could keep the device for as long as the
/// client likes. That is found out in `/proc`, and not where there is none.
///
/// ```
/// use std::fs::File;
/// use std::os::fd::OwnedFd;
/// use vfio_user_dma::IrqEventfd;
///
/// let file = OwnedFd::from(File::open("/dev/null")?);
/// assert_eq!(IrqEventfd::try_from(file).unwrap_err().raw_os_error(), Some(libc::EINVAL));
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct IrqEventfd(File);

impl IrqEventfd {
    /// Tells the client of an interrupt. This does not wait: one that the client has been told of often enough
    /// to fill the counter is told already.
    ///
    /// A client that fills the counter, and has what it shares with us block again in the instant before the
    /// write, could keep the calling thread.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn signal(&self) -> io::Result<()> {
        self.do_not_block()?;
        match (&self.0).write_all(&1_u64.to_ne_bytes()) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            result => result,
        }
    }

    /// The client has the same open file, and may have changed that.
    fn do_not_block(&self) -> io::Result<()> {
        let fd = self.0.as_raw_fd();
        // SAFETY: takes no pointers.
        let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
        if flags < 0 {
            return Err(io::Error::last_os_error());
        }
        if flags & libc::O_NONBLOCK != 0 {
            return Ok(());
        }
        // SAFETY: as above.
        if unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl TryFrom<OwnedFd> for IrqEventfd {
    type Error = io::Error;

    fn try_from(fd: OwnedFd) -> io::Result<Self> {
        match fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())) {
            Ok(link) if link != Path::new("anon_inode:[eventfd]") => {
                Err(io::Error::from_raw_os_error(libc::EINVAL))
            }
            _ => Ok(IrqEventfd(fd.into())),
        }
    }
}

impl AsFd for IrqEventfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::FromRawFd;

    use super::*;

    #[test]
    fn a_full_counter_keeps_nobody() {
        // SAFETY: takes no pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        // SAFETY: the descriptor is new.
        let mut client = unsafe { File::from_raw_fd(fd) };
        let eventfd = IrqEventfd::try_from(OwnedFd::from(client.try_clone().unwrap())).unwrap();
        client.write_all(&(u64::MAX - 1).to_ne_bytes()).unwrap();
        eventfd.signal().unwrap();
        let mut count = [0; 8];
        client.read_exact(&mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), u64::MAX - 1);
        eventfd.signal().unwrap();
        client.read_exact(&mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 1);
    }
}

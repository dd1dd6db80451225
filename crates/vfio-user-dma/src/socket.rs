// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes and file descriptors over a Unix socket, never blocking.

use std::io;
use std::mem::{size_of_val, MaybeUninit};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

/// Most file descriptors that one message may bring.
pub(crate) const MAX_FDS: usize = 16;

/// Room for the control message with that many; words, so that it is aligned.
type Control = [u64; 16];

/// What one receive has brought.
#[derive(Debug)]
pub(crate) struct Received {
    /// 0 where the other end is closed.
    pub(crate) bytes: usize,
    pub(crate) fds: Vec<OwnedFd>,
    /// More file descriptors were sent than there was room, or than this process may have.
    pub(crate) truncated: bool,
}

/// Receives at most `buf.len()` bytes, and the file descriptors that were sent with the first of them.
pub(crate) fn receive(socket: &UnixStream, buf: &mut [u8]) -> io::Result<Received> {
    let mut control: Control = [0; 16];
    let mut iov = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    // SAFETY: all zeroes is a valid message header.
    let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    header.msg_iov = &mut iov;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control) as _;
    // SAFETY: the header points to one buffer and one control area, both with their sizes, that outlive
    // the call.
    let bytes = unsafe {
        libc::recvmsg(
            socket.as_raw_fd(),
            &mut header,
            libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC,
        )
    };
    if bytes < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Received {
        bytes: bytes as usize,
        fds: take_fds(&header),
        truncated: header.msg_flags & libc::MSG_CTRUNC != 0,
    })
}

fn take_fds(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: the kernel has filled the control area that the header points to and set its length.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !next.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR only return whole headers inside of the control area.
        let control = unsafe { &*next };
        if control.cmsg_level == libc::SOL_SOCKET && control.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: takes no pointers.
            let head = unsafe { libc::CMSG_LEN(0) } as usize;
            let count = (control.cmsg_len as usize).saturating_sub(head) / size_of::<RawFd>();
            // SAFETY: the data of the control message begin there.
            let data = unsafe { libc::CMSG_DATA(next) }.cast::<RawFd>();
            for index in 0..count {
                // SAFETY: the kernel wrote `count` descriptors there; each is new and now ours alone.
                fds.push(unsafe { OwnedFd::from_raw_fd(data.add(index).read_unaligned()) });
            }
        }
        // SAFETY: as CMSG_FIRSTHDR above.
        next = unsafe { libc::CMSG_NXTHDR(header, next) };
    }
    fds
}

/// Sends as much of `bytes` as there is room for, and one file descriptor with the first of them.
pub(crate) fn send(
    socket: &UnixStream,
    bytes: &[u8],
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<usize> {
    let mut control: Control = [0; 16];
    let mut iov = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: all zeroes is a valid message header.
    let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    header.msg_iov = &mut iov;
    header.msg_iovlen = 1;
    if let Some(fd) = fd {
        let size = size_of::<RawFd>() as u32;
        header.msg_control = control.as_mut_ptr().cast();
        // SAFETY: takes no pointers.
        header.msg_controllen = unsafe { libc::CMSG_SPACE(size) } as _;
        // SAFETY: the control area has room for one control message with one descriptor.
        unsafe {
            let first = libc::CMSG_FIRSTHDR(&header);
            (*first).cmsg_level = libc::SOL_SOCKET;
            (*first).cmsg_type = libc::SCM_RIGHTS;
            (*first).cmsg_len = libc::CMSG_LEN(size) as _;
            libc::CMSG_DATA(first)
                .cast::<RawFd>()
                .write_unaligned(fd.as_raw_fd());
        }
    }
    // SAFETY: as in `receive`; the kernel only reads the buffer.
    let sent = unsafe {
        libc::sendmsg(
            socket.as_raw_fd(),
            &header,
            libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
        )
    };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(sent as usize)
}

/// The process at the other end, where the kernel knows it.
pub(crate) fn peer(socket: &UnixStream) -> Option<i32> {
    let mut credentials = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut size = size_of_val(&credentials) as libc::socklen_t;
    // SAFETY: the kernel writes at most `size` bytes to the structure, which outlives the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &mut size,
        )
    };
    (result == 0 && credentials.pid > 0).then_some(credentials.pid)
}

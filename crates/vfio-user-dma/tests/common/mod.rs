// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A client and a device to try the server with.

#![allow(dead_code)] // Each test file uses a part of it.

pub mod deadline;
mod device;

use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use deadline::{ended, DEADLINE};
pub use device::{Device, Plain, Told};
use vfio_user_dma::wire::{self, command, flags, Header};
use vfio_user_dma::{Backend, Capabilities, DmaTable, End, Result, Server, Stopper};

pub const PAGE: u64 = 4096;
pub const READ_WRITE: u32 = 3;

/// A file of so many pages, each beginning with its number.
pub fn memfd(pages: u64) -> File {
    // SAFETY: the name ends with a NUL.
    let fd = unsafe {
        libc::memfd_create(
            c"test".as_ptr(),
            libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING,
        )
    };
    assert!(fd >= 0);
    // SAFETY: the descriptor is new.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(pages * PAGE).unwrap();
    for page in 0..pages.min(64) {
        file.write_all_at(&page.to_le_bytes(), page * PAGE).unwrap();
    }
    file
}

pub fn eventfd() -> File {
    // SAFETY: takes no pointers.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: the descriptor is new.
    unsafe { File::from_raw_fd(fd) }
}

pub fn send_with_fds(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut control = [0_u64; 64];
    let mut iov = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: all zeroes is a valid message header.
    let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    header.msg_iov = &mut iov;
    header.msg_iovlen = 1;
    let size = std::mem::size_of_val(fds) as u32;
    if !fds.is_empty() {
        header.msg_control = control.as_mut_ptr().cast();
        // SAFETY: there is room for 100 descriptors; each is written inside of the area.
        unsafe {
            header.msg_controllen = libc::CMSG_SPACE(size) as _;
            assert!(header.msg_controllen <= 512);
            let first = libc::CMSG_FIRSTHDR(&header);
            (*first).cmsg_level = libc::SOL_SOCKET;
            (*first).cmsg_type = libc::SCM_RIGHTS;
            (*first).cmsg_len = libc::CMSG_LEN(size) as _;
            for (index, fd) in fds.iter().enumerate() {
                let data = libc::CMSG_DATA(first).cast::<RawFd>().add(index);
                data.write_unaligned(fd.as_raw_fd());
            }
        }
    }
    // SAFETY: the header points to buffers that outlive the call.
    let sent = unsafe { libc::sendmsg(stream.as_raw_fd(), &header, libc::MSG_NOSIGNAL) };
    assert!(sent > 0, "{}", io::Error::last_os_error());
    (&*stream).write_all(&bytes[sent as usize..]).unwrap();
}

/// Receives a byte, and the file descriptor that comes with it.
pub fn receive_fd(stream: &UnixStream) -> (u8, Option<OwnedFd>) {
    let mut control = [0_u64; 8];
    let mut byte = 0_u8;
    let mut iov = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    // SAFETY: all zeroes is a valid message header.
    let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    header.msg_iov = &mut iov;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = std::mem::size_of_val(&control) as _;
    // SAFETY: the header points to buffers that outlive the call.
    let received =
        unsafe { libc::recvmsg(stream.as_raw_fd(), &mut header, libc::MSG_CMSG_CLOEXEC) };
    assert_eq!(received, 1, "{}", io::Error::last_os_error());
    // SAFETY: the kernel has filled the control area.
    let first = unsafe { libc::CMSG_FIRSTHDR(&header) };
    if first.is_null() {
        return (byte, None);
    }
    // SAFETY: it holds one descriptor, which is new.
    let fd =
        unsafe { OwnedFd::from_raw_fd(libc::CMSG_DATA(first).cast::<RawFd>().read_unaligned()) };
    (byte, Some(fd))
}

#[derive(Debug)]
pub struct Reply {
    pub header: Header,
    pub body: Vec<u8>,
}

impl Reply {
    /// 0 or the errno.
    pub fn errno(&self) -> i32 {
        assert!(self.header.is_reply());
        assert_eq!(
            self.header.flags & flags::ERROR != 0,
            self.header.error != 0
        );
        self.header.error as i32
    }
}

/// The client's end.
pub struct Client {
    pub stream: UnixStream,
    next_id: u16,
}

impl Client {
    pub fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        Client {
            stream,
            next_id: 100,
        }
    }

    pub fn send(&mut self, command: u16, body: &[u8]) -> u16 {
        self.send_all(command, flags::COMMAND, body, &[])
    }

    pub fn send_all(
        &mut self,
        command: u16,
        flags: u32,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> u16 {
        let message_id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        let header = Header {
            message_id,
            command,
            flags,
            ..Header::default()
        };
        let bytes = wire::message(header, |bytes| bytes.extend_from_slice(body));
        send_with_fds(&self.stream, &bytes, fds);
        message_id
    }

    pub fn receive(&mut self) -> Reply {
        self.try_receive().unwrap()
    }

    pub fn try_receive(&mut self) -> io::Result<Reply> {
        let mut header = [0; Header::SIZE];
        self.stream.read_exact(&mut header)?;
        let (header, _) = Header::decode(&header).unwrap();
        let mut body = vec![0; header.message_size as usize - Header::SIZE];
        self.stream.read_exact(&mut body)?;
        Ok(Reply { header, body })
    }

    pub fn call(&mut self, command: u16, body: &[u8]) -> Reply {
        self.call_with(command, body, &[])
    }

    pub fn call_with(&mut self, command: u16, body: &[u8], fds: &[BorrowedFd<'_>]) -> Reply {
        let id = self.send_all(command, flags::COMMAND, body, fds);
        let reply = self.receive();
        assert_eq!(
            (reply.header.message_id, reply.header.command),
            (id, command)
        );
        reply
    }

    pub fn version(&mut self, capabilities: Capabilities) -> Reply {
        let mut body = Vec::new();
        wire::Version { major: 0, minor: 0 }.encode(&mut body);
        body.extend_from_slice(&capabilities.to_text());
        self.call(command::VERSION, &body)
    }

    pub fn map(&mut self, address: u64, size: u64, offset: u64, file: Option<&File>) -> i32 {
        let fds: Vec<_> = file.iter().map(|file| file.as_fd()).collect();
        let body = map_body(READ_WRITE, address, size, offset);
        self.call_with(command::DMA_MAP, &body, &fds).errno()
    }

    pub fn unmap(&mut self, flags: u32, address: u64, size: u64) -> std::result::Result<u64, i32> {
        let mut body = Vec::new();
        let unmap = wire::DmaUnmap {
            argsz: wire::DmaUnmap::SIZE as u32,
            flags,
            address,
            size,
        };
        unmap.encode(&mut body);
        let reply = self.call(command::DMA_UNMAP, &body);
        match reply.errno() {
            0 => Ok(wire::DmaUnmap::decode(&reply.body).unwrap().0.size),
            errno => Err(errno),
        }
    }

    pub fn region_read(
        &mut self,
        region: u32,
        offset: u64,
        count: u32,
    ) -> std::result::Result<Vec<u8>, i32> {
        let mut body = Vec::new();
        wire::RegionAccess {
            offset,
            region,
            count,
        }
        .encode(&mut body);
        let reply = self.call(command::REGION_READ, &body);
        match reply.errno() {
            0 => Ok(reply.body[wire::RegionAccess::SIZE..].to_vec()),
            errno => Err(errno),
        }
    }

    pub fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> i32 {
        let mut body = Vec::new();
        let count = data.len() as u32;
        wire::RegionAccess {
            offset,
            region,
            count,
        }
        .encode(&mut body);
        body.extend_from_slice(data);
        self.call(command::REGION_WRITE, &body).errno()
    }

    /// Nothing is left over of what was sent before.
    pub fn assert_in_step(&mut self) {
        assert_eq!(self.region_write(0, 8, &[7; 4]), 0);
        assert_eq!(self.region_read(0, 8, 4), Ok(vec![7; 4]));
    }

    /// Answers one DMA_READ or DMA_WRITE of the server.
    pub fn reply(&mut self, to: &Reply, flags: u32, error: u32, body: &[u8]) {
        let header = Header {
            flags: flags::REPLY | flags,
            error,
            ..to.header
        };
        let bytes = wire::message(header, |bytes| bytes.extend_from_slice(body));
        self.stream.write_all(&bytes).unwrap();
    }
}

pub fn map_body(flags: u32, address: u64, size: u64, offset: u64) -> Vec<u8> {
    let mut body = Vec::new();
    let map = wire::DmaMap {
        argsz: wire::DmaMap::SIZE as u32,
        flags,
        offset,
        address,
        size,
    };
    map.encode(&mut body);
    body
}

/// A table whose deadlines only pass where something does not come to its end at all.
pub fn patient_table() -> DmaTable {
    DmaTable::builder()
        .unmap_deadline(DEADLINE)
        .message_deadline(DEADLINE)
        .build()
        .unwrap()
}

/// A server with a client.
pub struct Served {
    pub client: Client,
    pub table: DmaTable,
    pub stopper: Stopper,
    pub seen: Arc<Mutex<Vec<String>>>,
    thread: JoinHandle<Result<End>>,
}

impl Served {
    pub fn new() -> Self {
        Served::with(patient_table(), |server| server, Capabilities::default())
    }

    /// With a version agreed on.
    pub fn with(
        table: DmaTable,
        configure: impl FnOnce(Server) -> Server,
        capabilities: Capabilities,
    ) -> Self {
        let mut served = Served::silent(table, configure);
        assert_eq!(served.client.version(capabilities).errno(), 0);
        served
    }

    /// Without.
    pub fn silent(table: DmaTable, configure: impl FnOnce(Server) -> Server) -> Self {
        let server = Server::from_listener(listener())
            .unwrap()
            .io_deadline(DEADLINE);
        let server = configure(server);
        let stopper = server.stopper();
        let device = Device::new(table.clone());
        let seen = device.seen.clone();
        let (client, thread) = serve(server, device);
        Served {
            client,
            table,
            stopper,
            seen,
            thread,
        }
    }

    /// Ends the client, and says how the server took it. Nothing must be left mapped.
    pub fn end(self) -> Result<End> {
        drop(self.client);
        let result = ended("a server ends with its client", self.thread);
        assert_eq!(self.table.mappings(), 0);
        assert_eq!(self.table.space().mappings(), 0);
        assert!(self
            .seen
            .lock()
            .unwrap()
            .contains(&"disconnected".to_owned()));
        result
    }

    /// How the server ended by itself.
    pub fn join(self) -> Result<End> {
        ended("a server ends by itself", self.thread)
    }
}

/// A client of a device that is served in a thread.
pub fn serve(
    server: Server,
    mut device: impl Backend + Send + 'static,
) -> (Client, JoinHandle<Result<End>>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || server.serve(&theirs, &mut device));
    (Client::new(ours), thread)
}

/// The same of a [`Plain`] device, with a version agreed on.
pub fn serve_plain(
    told: impl FnMut(&DmaTable, Told<'_>) -> io::Result<()> + Send + 'static,
) -> (Client, JoinHandle<Result<End>>) {
    let server = Server::from_listener(listener()).unwrap();
    let server = server.io_deadline(DEADLINE);
    let (mut client, thread) = serve(server, Plain::new(told));
    client.version(Capabilities::default());
    (client, thread)
}

pub fn listener() -> UnixListener {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let name = format!(
        "vfio-user-dma-{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    );
    UnixListener::bind_addr(&SocketAddr::from_abstract_name(name).unwrap()).unwrap()
}

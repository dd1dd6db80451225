// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A client that sends what it likes, as messages with files and as bytes, into the server, and has the device access
//! what is mapped. Nothing of it is left when it has gone: no mapping, no file descriptor.

#![no_main]

use std::fs::{self, File};
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::OnceLock;
use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vfio_user_dma::wire::{command, message, DmaMap, DmaUnmap, Header, IrqSet, RegionAccess};
use vfio_user_dma::{Backend, DmaTable, End, Error, IrqData, Irqs, Region, Server, SetIrqs, TableHandle};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Sendable {
    /// Memory of so many pages.
    Memory(u8),
    /// The same file as the last memory.
    Again,
    Sealed(u8),
    Eventfd,
    NoMemory,
}

#[derive(Arbitrary, Debug)]
enum Sent {
    /// A version, so that the rest is looked at.
    Version,
    Message { id: u16, command: u8, flags: u8, body: Vec<u8> },
    /// A map or unmap of few pages.
    Map { flags: u8, page: u8, pages: u8, offset: u8, files: Vec<Sendable> },
    Unmap { flags: u8, page: u8, pages: u8 },
    /// Has the device read or write so many bytes there.
    Access { page: u8, offset: u16, len: u16, write: bool },
    Irqs { flags: u8, start: u8, count: u8, data: Vec<u8>, files: Vec<Sendable> },
    Bytes { bytes: Vec<u8>, files: Vec<Sendable> },
}

struct Device {
    dma: DmaTable,
    handle: TableHandle,
    regions: Vec<Region>,
}

impl Backend for Device {
    fn dma(&self) -> &DmaTable {
        &self.dma
    }

    fn regions(&self) -> &[Region] {
        &self.regions
    }

    fn irqs(&self) -> &[Irqs] {
        &[Irqs { flags: 1, count: 4 }]
    }

    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        assert!(region == 0 && offset + data.len() as u64 <= 4096);
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        assert!(region == 0 && offset + data.len() as u64 <= 4096);
        // The address and the length of an access.
        if let ([address @ .., low, high, write], 11) = (data, data.len()) {
            let address = u64::from_le_bytes(address.try_into().unwrap());
            let mut bytes = vec![0x5a; u16::from_le_bytes([*low, *high]).into()];
            let _ = match write & 1 {
                1 => self.handle.write(address, &bytes),
                _ => self.handle.read(address, &mut bytes),
            };
        }
        Ok(())
    }

    fn set_irqs(&mut self, set: SetIrqs) -> io::Result<()> {
        assert!(set.index == 0 && set.start + set.count <= 4);
        if let IrqData::Eventfd(eventfds) = &set.data {
            eventfds.iter().for_each(|eventfd| eventfd.signal().unwrap());
        }
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| {
        let name = format!("vfio-user-dma-fuzz-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).unwrap();
        let server = Server::from_listener(UnixListener::bind_addr(&address).unwrap()).unwrap();
        server.io_deadline(Duration::from_millis(20)).max_data_xfer_size(4096)
    })
}

fn memfd(pages: u8) -> OwnedFd {
    // SAFETY: the name ends with a 0.
    let fd = unsafe { libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    // SAFETY: just made.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(u64::from(pages % 16) << 12).unwrap();
    file.into()
}

impl Sendable {
    fn made(self, last: &mut Option<OwnedFd>) -> OwnedFd {
        match self {
            Sendable::Memory(pages) => last.insert(memfd(pages)).try_clone().unwrap(),
            Sendable::Again => match last {
                Some(last) => last.try_clone().unwrap(),
                None => memfd(1),
            },
            Sendable::Sealed(pages) => {
                let memory = memfd(pages);
                // SAFETY: takes no pointers.
                unsafe { libc::fcntl(memory.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) };
                memory
            }
            // SAFETY: takes no pointers; the descriptor is new.
            Sendable::Eventfd => unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_CLOEXEC)) },
            Sendable::NoMemory => File::open("/dev/null").unwrap().into(),
        }
    }
}

/// Its bytes, and the files that go with them.
fn message_of(sent: Sent) -> (Vec<u8>, Vec<Sendable>) {
    let of = |command, id, flags, body: &dyn Fn(&mut Vec<u8>)| {
        let header = Header { message_id: id, command, flags, ..Header::default() };
        message(header, body)
    };
    let bytes = |pages: u8| u64::from(pages) << 12;
    match sent {
        Sent::Version => (of(command::VERSION, 1, 0, &|bytes| bytes.extend([0; 4])), Vec::new()),
        Sent::Message { id, command, flags, body } => {
            (of(command.into(), id, flags.into(), &|bytes| bytes.extend(&body)), Vec::new())
        }
        Sent::Map { flags, page, pages, offset, files } => {
            let map = DmaMap {
                argsz: DmaMap::SIZE as u32,
                flags: flags.into(),
                offset: bytes(offset),
                address: bytes(page),
                size: bytes(pages),
            };
            (of(command::DMA_MAP, 2, 0, &|bytes| map.encode(bytes)), files)
        }
        Sent::Unmap { flags, page, pages } => {
            let unmap = DmaUnmap {
                argsz: DmaUnmap::SIZE as u32,
                flags: flags.into(),
                address: bytes(page),
                size: bytes(pages),
            };
            (of(command::DMA_UNMAP, 3, 0, &|bytes| unmap.encode(bytes)), Vec::new())
        }
        Sent::Access { page, offset, len, write } => {
            let access = RegionAccess { offset: 0, region: 0, count: 11 };
            let address = bytes(page) + u64::from(offset);
            let body = |bytes: &mut Vec<u8>| {
                access.encode(bytes);
                bytes.extend(address.to_le_bytes());
                bytes.extend(len.to_le_bytes());
                bytes.push(write.into());
            };
            (of(command::REGION_WRITE, 4, 0, &body), Vec::new())
        }
        Sent::Irqs { flags, start, count, data, files } => {
            let set = IrqSet {
                argsz: IrqSet::SIZE as u32,
                flags: flags.into(),
                index: 0,
                start: start.into(),
                count: count.into(),
            };
            let body = |bytes: &mut Vec<u8>| {
                set.encode(bytes);
                bytes.extend(&data);
            };
            (of(command::DEVICE_SET_IRQS, 5, 0, &body), files)
        }
        Sent::Bytes { bytes, files } => (bytes, files),
    }
}

fn open_files() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

fuzz_target!(|sent: Vec<Sent>| {
    let server = server();
    let before = open_files();
    let (ours, theirs) = UnixStream::pair().unwrap();
    // What fits the socket's buffer at once: nobody reads meanwhile.
    ours.set_nonblocking(true).unwrap();
    let mut last = None;
    for (bytes, files) in sent.into_iter().take(64).map(message_of) {
        let files: Vec<_> = files.into_iter().take(18).map(|file| file.made(&mut last)).collect();
        let fds: Vec<_> = files.iter().map(AsRawFd::as_raw_fd).collect();
        if bytes.is_empty() || ours.send_with_fds(&[&bytes[..]], &fds).is_err() {
            break;
        }
    }
    drop(last);
    ours.shutdown(Shutdown::Write).unwrap();
    let dma = DmaTable::new().unwrap();
    let mut device = Device {
        handle: dma.handle(),
        regions: vec![Region::new(4096)],
        dma: dma.clone(),
    };
    match server.serve(&theirs, &mut device) {
        Ok(End::Closed) | Err(Error::Malformed(_)) => {}
        // The answers did not fit.
        Err(error) => assert_eq!(error.errno(), libc::ETIMEDOUT),
        other => panic!("{other:?}"),
    }
    assert_eq!(dma.mappings(), 0);
    drop((device, dma, ours, theirs));
    assert_eq!(open_files(), before);
});

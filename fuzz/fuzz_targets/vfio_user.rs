// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A client that sends what it likes, as messages and as bytes, into the server.

#![no_main]

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::OnceLock;
use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vfio_user_dma::wire::{command, message, Header};
use vfio_user_dma::{Backend, DmaTable, End, Error, Irqs, Region, Server, SetIrqs};

#[derive(Arbitrary, Debug)]
enum Sent {
    /// A version, so that the rest is looked at.
    Version,
    Message { id: u16, command: u8, flags: u8, body: Vec<u8> },
    /// A map or unmap of few pages.
    Map { flags: u8, page: u8, pages: u8 },
    Unmap { flags: u8, page: u8, pages: u8 },
    Bytes(Vec<u8>),
}

struct Device(DmaTable, Vec<Region>);

impl Backend for Device {
    fn dma(&self) -> &DmaTable {
        &self.0
    }

    fn regions(&self) -> &[Region] {
        &self.1
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
        Ok(())
    }

    fn set_irqs(&mut self, set: SetIrqs) -> io::Result<()> {
        assert!(set.index == 0 && set.start + set.count <= 4);
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

fn bytes_of(sent: Sent) -> Vec<u8> {
    let of = |command, id, flags, body: &[u8]| {
        let header = Header { message_id: id, command, flags, ..Header::default() };
        message(header, |bytes| bytes.extend_from_slice(body))
    };
    let range = |flags: u8, page: u8, pages: u8, offset: &[u8]| {
        let mut body = 32_u32.to_ne_bytes().to_vec();
        body.extend_from_slice(&u32::from(flags).to_ne_bytes());
        body.extend_from_slice(offset);
        body.extend_from_slice(&(u64::from(page) << 12).to_ne_bytes());
        body.extend_from_slice(&(u64::from(pages) << 12).to_ne_bytes());
        body
    };
    match sent {
        Sent::Version => of(command::VERSION, 1, 0, &[0; 4]),
        Sent::Message { id, command, flags, body } => of(command.into(), id, flags.into(), &body),
        Sent::Map { flags, page, pages } => of(command::DMA_MAP, 2, 0, &range(flags, page, pages, &[0; 8])),
        Sent::Unmap { flags, page, pages } => of(command::DMA_UNMAP, 3, 0, &range(flags, page, pages, &[])),
        Sent::Bytes(bytes) => bytes,
    }
}

fuzz_target!(|sent: Vec<Sent>| {
    let mut bytes: Vec<u8> = sent.into_iter().flat_map(bytes_of).collect();
    // What fits the socket's buffer at once: nobody reads meanwhile.
    bytes.truncate(16 << 10);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.write_all(&bytes).unwrap();
    ours.shutdown(Shutdown::Write).unwrap();
    let table = DmaTable::new().unwrap();
    let mut device = Device(table.clone(), vec![Region::new(4096)]);
    match server().serve(&theirs, &mut device) {
        Ok(End::Closed) | Err(Error::Malformed(_)) => {}
        // The answers did not fit.
        Err(error) => assert_eq!(error.errno(), libc::ETIMEDOUT),
        other => panic!("{other:?}"),
    }
    assert_eq!(table.mappings(), 0);
});

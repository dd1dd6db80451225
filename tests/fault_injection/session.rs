// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A vfio-user client that sends and asks for much at once, and unmaps much at once.

use std::fs::File;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use vfio_dma::vfio_user::wire::{self, command};
use vfio_dma::vfio_user::{
    Backend, Capabilities, DmaTable, End, IrqData, Irqs, Region, Server, SetIrqs,
};

use crate::common::{listener, Client};
use crate::inject::aside;
use crate::scenarios::{memfd, p, step, MANY};

/// Bytes of a region, and interrupts: more than a page of either.
const MUCH: usize = 8192;

struct Device {
    table: DmaTable,
    regions: [Region; 1],
    memory: Vec<u8>,
    irqs: usize,
}

impl Backend for Device {
    fn dma(&self) -> &DmaTable {
        &self.table
    }

    fn regions(&self) -> &[Region] {
        &self.regions
    }

    fn irqs(&self) -> &[Irqs] {
        const IRQS: [Irqs; 1] = [Irqs {
            flags: 9,
            count: MUCH as u32,
        }];
        &IRQS
    }

    fn region_read(&mut self, _: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        data.copy_from_slice(&self.memory[offset as usize..][..data.len()]);
        Ok(())
    }

    fn region_write(&mut self, _: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        self.memory[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn set_irqs(&mut self, set: SetIrqs) -> io::Result<()> {
        if let IrqData::Bool(which) = set.data {
            self.irqs += which.len();
        }
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn access() -> Vec<u8> {
    let access = wire::RegionAccess {
        count: MUCH as u32,
        ..Default::default()
    };
    let mut bytes = Vec::new();
    access.encode(&mut bytes);
    bytes
}

/// All that the client says, before it is listened to.
fn say_all(client: &mut Client) {
    let mut version = Vec::new();
    wire::Version { major: 0, minor: 0 }.encode(&mut version);
    version.extend_from_slice(&Capabilities::default().to_text());
    client.send(command::VERSION, &version);
    client.send(command::REGION_WRITE, &[&access()[..], &[7; MUCH]].concat());
    client.send(command::REGION_READ, &access());
    let set = wire::IrqSet {
        argsz: wire::IrqSet::SIZE as u32,
        // Trigger, by booleans.
        flags: 1 << 5 | 1 << 1,
        count: MUCH as u32,
        ..Default::default()
    };
    let mut trigger = Vec::new();
    set.encode(&mut trigger);
    trigger.resize(trigger.len() + MUCH, 1);
    client.send(command::DEVICE_SET_IRQS, &trigger);
    client.send(command::DEVICE_RESET, &[]);
    client.stream.shutdown(Shutdown::Write).unwrap();
}

pub fn session() {
    let (server, mut device) = aside(|| {
        let device = Device {
            table: DmaTable::new().unwrap(),
            regions: [Region::new(MUCH as u64)],
            memory: vec![0; MUCH],
            irqs: 0,
        };
        (Server::from_listener(listener()).unwrap(), device)
    });
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut client = Client::new(ours);
    aside(|| say_all(&mut client));
    assert_eq!(server.serve(&theirs, &mut device).unwrap(), End::Closed);
    drop(theirs);
    let answers: Vec<_> = aside(|| std::iter::from_fn(|| client.try_receive().ok()).collect());
    let commands: Vec<_> = answers.iter().map(|answer| answer.header.command).collect();
    let expected = [
        command::VERSION,
        command::REGION_WRITE,
        command::REGION_READ,
        command::DEVICE_SET_IRQS,
        command::DEVICE_RESET,
    ];
    assert_eq!(commands, expected);
    let errors: Vec<_> = answers.iter().map(|answer| answer.header.error).collect();
    let failed: Vec<_> = errors.iter().filter(|error| **error != 0).collect();
    assert!(failed.is_empty() || failed == [&(libc::ENOMEM as u32)]);
    let [_, has_written, has_read, has_set, _] = [0, 1, 2, 3, 4].map(|at| errors[at] == 0);
    let byte = u8::from(has_written) * 7;
    assert!(device.memory.iter().all(|found| *found == byte));
    if has_read {
        let data = &answers[2].body[wire::RegionAccess::SIZE..];
        assert!(data.len() == MUCH && data.iter().all(|found| *found == byte));
    }
    assert_eq!(device.irqs, if has_set { MUCH } else { 0 });
}

/// Ranges with a file, and as many without one.
pub fn unmap() {
    let table = DmaTable::new().unwrap();
    let space = table.space();
    aside(|| {
        let file = File::from(memfd(MANY));
        for n in 0..MANY {
            let fd = file.try_clone().unwrap().into();
            table.map(3, p(n), p(2 * n), p(1), Some(fd)).unwrap();
            table.map(3, 0, p(2 * n + 1), p(1), None).unwrap();
        }
    });
    let unmapped = step(space, "unmap", || {
        let result = table.unmap(0, 0, p(2 * MANY));
        let left = if result.is_ok() { 0 } else { 2 * MANY as usize };
        assert_eq!(table.mappings(), left);
        result
    });
    assert_eq!(unmapped, p(2 * MANY));
}

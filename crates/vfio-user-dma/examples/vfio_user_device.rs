// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device with one register: what is written there is the address of eight bytes to count up.

use std::io;
use std::sync::mpsc::{channel, Sender};
use std::thread;

use vfio_user_dma::{Backend, DmaTable, Irqs, Region, Server, SetIrqs};

struct Counter {
    dma: DmaTable,
    regions: Vec<Region>,
    doorbell: Sender<u64>,
}

impl Backend for Counter {
    fn dma(&self) -> &DmaTable {
        &self.dma
    }

    fn regions(&self) -> &[Region] {
        &self.regions
    }

    fn irqs(&self) -> &[Irqs] {
        &[]
    }

    fn region_read(&mut self, _region: u32, _offset: u64, data: &mut [u8]) -> io::Result<()> {
        data.fill(0);
        Ok(())
    }

    fn region_write(&mut self, _region: u32, _offset: u64, data: &[u8]) -> io::Result<()> {
        let refused = |_| io::Error::from_raw_os_error(libc::EINVAL);
        let address = data.try_into().map_err(refused)?;
        // DMA is for another thread: it may have to wait for this one.
        let _ = self.doorbell.send(u64::from_le_bytes(address));
        Ok(())
    }

    fn set_irqs(&mut self, _set: SetIrqs) -> io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn count_up(dma: &vfio_user_dma::TableHandle, address: u64) -> vfio_user_dma::Result<()> {
    let mut bytes = [0; 8];
    dma.read(address, &mut bytes)?;
    dma.write(
        address,
        &u64::from_le_bytes(bytes).wrapping_add(1).to_le_bytes(),
    )
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let Some(path) = std::env::args().nth(1) else {
        println!("usage: vfio_user_device SOCKET");
        return Ok(());
    };
    let (doorbell, rung) = channel();
    let dma = DmaTable::new()?;
    let handle = dma.handle();
    thread::spawn(move || {
        for address in rung {
            if let Err(error) = count_up(&handle, address) {
                eprintln!("{error}");
            }
        }
    });
    let mut device = Counter {
        dma,
        regions: vec![Region::new(8)],
        doorbell,
    };
    Server::bind(path)?.run(&mut device)?;
    Ok(())
}

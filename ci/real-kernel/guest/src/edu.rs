// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The edu device of QEMU: copies between memory and a buffer of its own.

use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use vfio_bindings::bindings::vfio::{VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX};

use crate::vfio::Device;

/// The edu device of QEMU, as the kernel writes its ids.
pub const IDS: &str = "1234 11e8";

/// Registers of the device, in its BAR 0.
const DMA_SOURCE: u64 = 0x80;
const DMA_DESTINATION: u64 = 0x88;
const DMA_COUNT: u64 = 0x90;
const DMA_COMMAND: u64 = 0x98;

/// Where its buffer is, as it sees it.
const BUFFER: u32 = 0x4_0000;

const START: u32 = 1;
const TO_MEMORY: u32 = 2;

/// The command register of a PCI device, and what lets it answer and do DMA.
const PCI_COMMAND: u64 = 4;
const MEMORY_AND_MASTER: u16 = 6;

/// An open one.
#[derive(Debug)]
pub struct Edu {
    device: Device,
    registers: u64,
}

impl Edu {
    /// Has it answer and do DMA.
    pub fn open(device: Device) -> Result<Self, String> {
        let failed = |errno: i32| format!("the device: errno {errno}");
        let config = device
            .region(VFIO_PCI_CONFIG_REGION_INDEX)
            .map_err(failed)?;
        let registers = device.region(VFIO_PCI_BAR0_REGION_INDEX).map_err(failed)?;
        let master = MEMORY_AND_MASTER.to_le_bytes();
        device
            .file()
            .write_all_at(&master, config + PCI_COMMAND)
            .map_err(said)?;
        Ok(Edu { device, registers })
    }

    fn set(&self, register: u64, value: u32) -> io::Result<()> {
        let at = self.registers + register;
        self.device.file().write_all_at(&value.to_le_bytes(), at)
    }

    fn get(&self, register: u64) -> io::Result<u32> {
        let mut value = [0; 4];
        let at = self.registers + register;
        self.device.file().read_exact_at(&mut value, at)?;
        Ok(u32::from_le_bytes(value))
    }

    fn transfer(
        &self,
        source: u32,
        destination: u32,
        count: usize,
        how: u32,
    ) -> Result<(), String> {
        let begin = || {
            self.set(DMA_SOURCE, source)?;
            self.set(DMA_DESTINATION, destination)?;
            self.set(DMA_COUNT, count as u32)?;
            self.set(DMA_COMMAND, START | how)
        };
        begin().map_err(said)?;
        let begun = Instant::now();
        while self.get(DMA_COMMAND).map_err(said)? & START != 0 {
            if begun.elapsed() > Duration::from_secs(30) {
                return Err(String::from("a transfer of the device does not end"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// From memory into its buffer.
    pub fn read(&self, iova: u64, count: usize) -> Result<(), String> {
        self.transfer(iova as u32, BUFFER, count, 0)
    }

    /// From its buffer into memory.
    pub fn write(&self, iova: u64, count: usize) -> Result<(), String> {
        self.transfer(BUFFER, iova as u32, count, TO_MEMORY)
    }
}

fn said(error: impl std::fmt::Display) -> String {
    error.to_string()
}

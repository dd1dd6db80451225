// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! PCI configuration space: a header of type 0 with one BAR, INTA and MSI.

use crate::registers::BAR_SIZE;

pub const SIZE: usize = 256;

/// Intel.
const VENDOR: u16 = 0x8086;
/// None of Intel's: a driver for real GPUs finds no display, no power management and no firmware here.
const DEVICE: u16 = 0x9ff9;
/// A display controller that is no VGA.
const CLASS: u32 = 0x03_8000;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const MSI: usize = 0x40;
const MSI_CONTROL: usize = MSI + 2;

/// Memory space, bus master, parity, SERR and INTx disable.
const COMMAND_BITS: u16 = 0x0546;
const INTX_DISABLE: u16 = 1 << 10;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const STATUS_INTX: u8 = 1 << 3;
const BAR_64_BIT: u32 = 0x4;
const CAPABILITY_MSI: u8 = 0x05;
const MSI_ENABLE: u16 = 1 << 0;
const MSI_64_BIT: u16 = 1 << 7;

#[derive(Debug)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    /// Bits that the guest may change.
    writable: [u8; SIZE],
}

impl ConfigSpace {
    pub fn new() -> Self {
        let mut space = ConfigSpace {
            bytes: [0; SIZE],
            writable: [0; SIZE],
        };
        space.read_only(0x00, &VENDOR.to_le_bytes());
        space.read_only(0x02, &DEVICE.to_le_bytes());
        space.read_only(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        space.read_only(0x09, &CLASS.to_le_bytes()[..3]);
        space.read_only(BAR0, &BAR_64_BIT.to_le_bytes());
        space.read_only(0x2c, &VENDOR.to_le_bytes());
        space.read_only(0x34, &[MSI as u8]);
        // INTA.
        space.read_only(0x3d, &[1]);
        space.read_only(MSI, &[CAPABILITY_MSI, 0]);
        space.read_only(MSI_CONTROL, &MSI_64_BIT.to_le_bytes());

        space.writable(COMMAND, &COMMAND_BITS.to_le_bytes());
        // Cache line size and latency timer.
        space.writable(0x0c, &[0xff; 2]);
        let bar = !(BAR_SIZE - 1);
        space.writable(BAR0, &bar.to_le_bytes());
        // Interrupt line.
        space.writable(0x3c, &[0xff]);
        space.writable(MSI_CONTROL, &MSI_ENABLE.to_le_bytes());
        // The message's address and data.
        space.writable(MSI + 4, &0xffff_ffff_ffff_fffc_u64.to_le_bytes());
        space.writable(MSI + 12, &[0xff; 2]);
        space
    }

    /// Reads bytes; `intx` is the state of the interrupt.
    pub fn read(&self, offset: usize, data: &mut [u8], intx: bool) {
        let end = offset + data.len();
        data.copy_from_slice(&self.bytes[offset..end]);
        if intx && (offset..end).contains(&STATUS) {
            data[STATUS - offset] |= STATUS_INTX;
        }
    }

    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (at, value) in (offset..).zip(data) {
            let writable = self.writable[at];
            self.bytes[at] = self.bytes[at] & !writable | value & writable;
        }
    }

    pub fn intx_disabled(&self) -> bool {
        self.word(COMMAND) & INTX_DISABLE != 0
    }

    pub fn msi_enabled(&self) -> bool {
        self.word(MSI_CONTROL) & MSI_ENABLE != 0
    }

    fn word(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    fn read_only(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn writable(&mut self, offset: usize, bits: &[u8]) {
        self.writable[offset..offset + bits.len()].copy_from_slice(bits);
    }
}

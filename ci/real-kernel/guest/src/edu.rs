// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A real device on the same addresses: it reads what our path has written, and the other way round; and
//! what is not mapped for it is refused to both. Its side is mapped through `vfio_group::hardware`.

use std::io;
use std::os::unix::fs::FileExt;
use std::ptr;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vfio_bindings::bindings::vfio::{
    VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_PCI_BAR0_REGION_INDEX,
    VFIO_PCI_CONFIG_REGION_INDEX,
};
use vfio_group::hardware::{HardwareContainer, HardwareGroup};
use vfio_group::IommuType;

use crate::memory::{self, PAGE, PRIVATE};
use crate::op::{Machine, Map, Op, Outcome, Unmap};
use crate::ours::Ours;
use crate::setup::Setup;
use crate::vfio::Device;
use guest_init::Given;

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

/// Transfers each way. Each takes the device a tenth of a second.
const ROUNDS: usize = 8;

/// Addresses that the device reads from, writes to, and may not write to. It has 28 bits.
const SOURCE: u64 = 0x10_0000;
const DESTINATION: u64 = 0x80_3000;
const ONLY_READ: u64 = 0xff_f000;

struct Edu {
    device: Device,
    registers: u64,
}

impl Edu {
    fn open(group: &HardwareGroup, name: &str) -> Result<Self, String> {
        let failed = |errno: i32| format!("the device: errno {errno}");
        let device = Device::from(group.device(name).map_err(said)?);
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

    fn read(&self, iova: u64, count: usize) -> Result<(), String> {
        self.transfer(iova as u32, BUFFER, count, 0)
    }

    fn write(&self, iova: u64, count: usize) -> Result<(), String> {
        self.transfer(BUFFER, iova as u32, count, TO_MEMORY)
    }
}

/// Both containers, and what is mapped in both.
struct Both {
    kernel: HardwareContainer,
    ours: Ours,
}

impl Both {
    fn map(&mut self, iova: u64, page: u64, flags: u32) -> Result<(), String> {
        let vaddr = PRIVATE.first + page * PAGE;
        let memory = ptr::with_exposed_provenance_mut(vaddr as usize);
        // SAFETY: the memory is there as long as this program, and nobody has references into it.
        unsafe { self.kernel.map(iova, memory, PAGE, flags) }.map_err(said)?;
        let ours = self.ours.apply(&Op::Map(Map {
            argsz: 32,
            flags,
            vaddr,
            iova,
            size: PAGE,
        }));
        same(ours, Outcome::plain(Ok(0)))
    }

    fn unmap(&mut self, iova: u64) -> Result<(), String> {
        let size = self.kernel.unmap(iova, PAGE).map_err(said)?;
        let ours = self.ours.apply(&Op::Unmap(Unmap {
            argsz: 24,
            flags: 0,
            iova,
            size: PAGE,
            bitmap: None,
        }));
        let expected = Outcome {
            size,
            ..Outcome::plain(Ok(0))
        };
        same(ours, expected)
    }
}

fn same(ours: Outcome, kernel: Outcome) -> Result<(), String> {
    if ours == kernel {
        Ok(())
    } else {
        Err(format!("{kernel} beside {ours}"))
    }
}

/// Runs all of it.
pub fn run(given: &Given, setup: &Setup, seed: u64) -> Result<(), String> {
    let kernel = HardwareContainer::open().map_err(said)?;
    let group = HardwareGroup::open(given.group).map_err(said)?;
    group.set_container(&kernel).map_err(said)?;
    kernel.set_iommu(IommuType::Type1v2).map_err(said)?;
    let ours = Ours::new(setup, true, 65535).map_err(|error| error.to_string())?;
    let edu = Edu::open(&group, &given.name)?;
    let mut both = Both { kernel, ours };
    let any = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
    both.map(SOURCE, 0, any)?;
    both.map(DESTINATION, 1, any)?;
    both.map(ONLY_READ, 2, VFIO_DMA_MAP_FLAG_READ)?;
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut expected = [rng.random::<u8>(); PAGE as usize];
    both.ours
        .space()
        .write(DESTINATION, &expected)
        .map_err(said)?;
    for _ in 0..ROUNDS {
        let bytes: Vec<u8> = (0..rng.random_range(1..300))
            .map(|_| rng.random())
            .collect();
        let mut inside = || rng.random_range(0..PAGE - bytes.len() as u64);
        let (from, to) = (inside(), inside());
        both.ours
            .space()
            .write(SOURCE + from, &bytes)
            .map_err(said)?;
        edu.read(SOURCE + from, bytes.len())?;
        edu.write(DESTINATION + to, bytes.len())?;
        expected[to as usize..][..bytes.len()].copy_from_slice(&bytes);
        let mut page = [0; PAGE as usize];
        both.ours
            .space()
            .read(DESTINATION, &mut page)
            .map_err(said)?;
        if page != expected {
            return Err(format!(
                "{} bytes from {from:#x} to {to:#x} are not those",
                bytes.len()
            ));
        }
    }
    refused(&edu, &both, ONLY_READ, 2, libc::EPERM)?;
    both.unmap(SOURCE)?;
    unread(&edu, &both, SOURCE, 0)?;
    both.unmap(DESTINATION)?;
    refused(&edu, &both, DESTINATION, 1, libc::EINVAL)?;
    println!("device: {ROUNDS} transfers there and back, 3 refused");
    Ok(())
}

/// Neither the device nor our path can read the page that was at an address: what the device has then, it
/// writes where it may.
fn unread(edu: &Edu, both: &Both, iova: u64, page: u64) -> Result<(), String> {
    let secret = [0xb7; 64];
    memory::write(PRIVATE.first + page * PAGE, &secret);
    edu.read(iova, secret.len())?;
    edu.write(DESTINATION, secret.len())?;
    let mut has = [0; 64];
    both.ours
        .space()
        .read(DESTINATION, &mut has)
        .map_err(said)?;
    if has.contains(&secret[0]) {
        return Err(format!("{iova:#x} was read though it is not mapped"));
    }
    match both.ours.space().read(iova, &mut has) {
        Err(error) if error.errno() == libc::EINVAL => Ok(()),
        other => Err(format!("our read of {iova:#x}: {other:?}")),
    }
}

/// Neither the device nor our path can write the page that is, or was, at an address.
fn refused(edu: &Edu, both: &Both, iova: u64, page: u64, errno: i32) -> Result<(), String> {
    let at = PRIVATE.first + page * PAGE;
    let before = [0x5a; 64];
    memory::write(at, &before);
    edu.write(iova, before.len())?;
    let ours = both.ours.space().write(iova, &[0; 64]);
    let mut after = [0; 64];
    memory::read(at, &mut after);
    if after != before {
        return Err(format!("{iova:#x} was written though it must not be"));
    }
    match ours {
        Err(error) if error.errno() == errno => Ok(()),
        other => Err(format!("our write to {iova:#x}: {other:?}")),
    }
}

fn said(error: impl std::fmt::Display) -> String {
    error.to_string()
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the guest of a vGPU decides the size or the number of: rings, batches, page tables, registers, traces.

use std::fmt::Debug;
use std::time::Duration;

use vfio_dma::gvt::trace::{AccessTrace, TraceError, TracedAccess};
use vfio_dma::gvt::{
    ring_context, ring_register, AddressingMode, ContextDescriptor, DeviceMap, EngineId, Error,
    RecordingEngine, SimulatedEngine, Step, Vgpu, VgpuConfig,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::inject::aside;

const PAGES: u32 = 1024;
const ENGINE: EngineId = EngineId::Bcs;
/// Pages of the guest, which its graphics pages are too.
const LRCA: u32 = 8;
const BATCHES: u64 = 40;
const LONG_BATCH: u64 = 42;
const RING: u64 = 64;
const ROOT: u64 = 100;
/// Batches of a workload, lists of which take more than a page.
const MANY: u64 = 140;

const BATCH_START: u32 = 0x1880_0001;
const BATCH_END: u32 = 0x0500_0000;
/// A command of the media pipeline of 1026 dwords.
const LONG_COMMAND: u32 = 0x7000_0400;

type Device = Vgpu<GuestMemoryMmap>;

/// A device that reaches small pages only: 2 MiB are a list of them.
struct SmallPages;

impl DeviceMap<()> for SmallPages {
    fn map(
        &self,
        gfn: u64,
        pages: usize,
        (): &(),
    ) -> Result<u64, Box<dyn std::error::Error + Send + Sync>> {
        match pages {
            1 => Ok(gfn << 12),
            _ => Err("too large".into()),
        }
    }

    fn unmap(&self, _: u64, _: usize) {}
}

fn device() -> Device {
    let memory = [(GuestAddress(0), PAGES as usize * 4096)];
    let memory = GuestMemoryMmap::from_ranges(&memory).unwrap();
    let config = VgpuConfig {
        ggtt_entries: PAGES,
        ..VgpuConfig::default()
    };
    let mut device = Vgpu::new(memory, (), (), config);
    device.set_device_map(SmallPages);
    for page in 0..PAGES {
        let entry = u64::from(page) << 12 | 1;
        device.write_ggtt_entry(page, entry).unwrap();
    }
    // Two levels of one entry, small pages behind 300 entries of the third, and 2 MiB.
    for level in 0..2 {
        write(&device, ROOT + level, &entry(ROOT + level + 1, 0));
    }
    let table = entry(ROOT + 3, 0);
    let third: Vec<u8> = (0..300).flat_map(|_| table.clone()).collect();
    write(&device, ROOT + 2, &third);
    device
        .memory()
        .write_slice(&entry(512, 0x80), GuestAddress((ROOT + 2) * 4096 + 300 * 8))
        .unwrap();
    write(&device, ROOT + 3, &entry(7, 0));
    device
}

fn entry(page: u64, flags: u64) -> Vec<u8> {
    (page << 12 | flags | 3).to_le_bytes().to_vec()
}

fn write(device: &Device, page: u64, bytes: &[u8]) {
    let at = GuestAddress(page * 4096);
    device.memory().write_slice(bytes, at).unwrap();
}

fn bytes(dwords: &[u32]) -> Vec<u8> {
    dwords
        .iter()
        .flat_map(|dword| dword.to_le_bytes())
        .collect()
}

/// Puts commands into the ring, and their context beside it.
fn fill(device: &Device, commands: &[u32]) {
    write(device, RING, &bytes(commands));
    let context = [
        (ring_context::TAIL, commands.len() as u32 * 4),
        (ring_context::START, (RING as u32) << 12),
        (ring_context::CTL, 15 << 12 | 1),
        (ring_context::PDP3_UDW + 0x38, (ROOT as u32) << 12),
    ];
    for (field, value) in context {
        let at = u64::from(LRCA + 1) * 4096 + field as u64;
        device.memory().write_obj(value, GuestAddress(at)).unwrap();
    }
}

fn submit(device: &mut Device) -> Result<(), Error> {
    let context = u64::from(ContextDescriptor::new(LRCA, 42, AddressingMode::Legacy64));
    for dword in [0, 0, (context >> 32) as u32, context as u32] {
        device.mmio_write(ENGINE.mmio_base() + ring_register::ELSP, dword)?;
    }
    Ok(())
}

/// May fail once, for want of memory, and does not when the engine was reset and it is done again.
fn again<T: Debug>(
    device: &mut Device,
    mut attempt: impl FnMut(&mut Device) -> Result<T, Error>,
) -> T {
    attempt(device).unwrap_or_else(|error| {
        assert_eq!(error.errno(), libc::ENOMEM, "{error}");
        assert_eq!(device.failsafe(), None);
        device.reset_engine(ENGINE);
        attempt(device).unwrap()
    })
}

pub fn workloads() {
    let mut device = aside(device);
    // Batches of the ring, one of which is long, and rings of more than a page.
    let mut commands: Vec<u32> = Vec::new();
    aside(|| {
        for batch in 0..MANY {
            let at = BATCHES * 4096 + batch * 8;
            device
                .memory()
                .write_obj(BATCH_END, GuestAddress(at))
                .unwrap();
            commands.extend([BATCH_START, at as u32, 0]);
        }
        commands.extend([BATCH_START, (LONG_BATCH * 4096) as u32, 0]);
        commands.extend([BATCH_START, (BATCHES * 4096) as u32, 0].repeat(300));
        commands.resize(commands.len().next_multiple_of(2), 0);
        write(&device, LONG_BATCH + 2, &bytes(&[BATCH_END]));
        fill(&device, &commands);
    });
    let run = |device: &mut Device| {
        submit(device)?;
        let done = device.run_next(ENGINE, &mut SimulatedEngine::new())?;
        Ok(done.map(|done| done.sequence))
    };
    again(&mut device, run).unwrap();
    // What was taken away is looked for in all tables, and pinned again.
    device.release_pins(0, u64::MAX);
    again(&mut device, run).unwrap();
    // More of them than a page of the queue's.
    again(&mut device, |device| {
        (0..32).try_for_each(|_| submit(device))
    });
    device.reset_engine(ENGINE);
    // Copies that an engine keeps: what it has no memory for is a fault of its own.
    again(&mut device, submit);
    let mut recording = RecordingEngine::new(SimulatedEngine::new());
    match device.run_next(ENGINE, &mut recording) {
        Ok(_) => assert_eq!(recording.jobs().len(), 1),
        Err(error) => assert_eq!(error.errno(), libc::EIO, "{error}"),
    }
    device.reset_engine(ENGINE);

    // Judged as one command, of more than a page; the engine does not know it.
    aside(|| fill(&device, &[&[LONG_COMMAND][..], &[0; 1025]].concat()));
    again(&mut device, submit);
    let error = device.run_next(ENGINE, &mut SimulatedEngine::new());
    assert_eq!(error.unwrap_err().errno(), libc::EIO);
    device.reset();
    assert_eq!((device.shadowed_tables(), device.pinned_leaves()), (0, 0));
}

pub fn registers() {
    let mut device = aside(device);
    for register in 0..2000 {
        again(&mut device, |device| {
            device.mmio_write(0x10_0000 + register * 4, register)
        });
    }
    assert_eq!(device.mmio_read(0x10_0000 + 4 * 1999), 1999);
}

pub fn traces() {
    let mut trace = AccessTrace::default();
    let access = TracedAccess {
        time: Duration::ZERO,
        vgpu: 0,
        step: Step::Scan,
        write: false,
        iova: 0,
        len: 8192,
    };
    fn again<T>(mut attempt: impl FnMut() -> Result<T, TraceError>) -> T {
        attempt().unwrap_or_else(|error| {
            assert_eq!(error.errno(), libc::ENOMEM, "{error}");
            attempt().unwrap()
        })
    }
    for _ in 0..200 {
        again(|| trace.push(access));
    }
    let stored = aside(|| {
        let mut stored = Vec::new();
        trace.write_to(&mut stored).unwrap();
        stored
    });
    let read = again(|| AccessTrace::from_bytes(&stored));
    assert_eq!(read, trace);
    let memory = [(GuestAddress(0), 8192)];
    let memory: GuestMemoryMmap = aside(|| GuestMemoryMmap::from_ranges(&memory).unwrap());
    assert_eq!(again(|| read.drive(&memory)).reads, 200);
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A mediated device with a vGPU: while it is open it holds its group, does DMA and pins through that, and lets go of
//! pins when the VMM unmaps.

use std::error::Error;
use std::sync::mpsc::{channel, Sender};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vfio_dma::group::{Container, Device, ExternalUser, Group, IommuType};
use vfio_dma::gvt::{self, ring_context, ring_register, AddressingMode, ContextDescriptor};
use vfio_dma::gvt::{EngineId, SimulatedEngine, Vgpu, VgpuConfig};
use vfio_dma::iommu::{Backing, Interest, IoAddressSpace};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};

const ENGINE: EngineId = EngineId::Bcs;
const SIZE: u64 = 0x10_0000;
/// A mapping of its own, which the GPU's page tables have.
const BUFFER: u64 = 0x8_0000;

/// What the thread that has the vGPU is told.
enum Event {
    GgttEntry(u32, u64),
    Register(u32, u32),
    Unmapping(u64, u64),
    Close,
}

/// Opens the device. Its group stays in its container until the thread has ended.
fn open(
    device: &Device,
    interrupt: Sender<usize>,
) -> Result<(Sender<Event>, JoinHandle<gvt::Result<()>>), vfio_dma::group::Error> {
    let user = ExternalUser::from_device(device)?;
    let (sender, events) = channel();
    // A notice comes on the thread that unmaps, which waits for the pins; the vGPU belongs to another one.
    let told = sender.clone();
    let notice = move |iova, size| drop(told.send(Event::Unmapping(iova, size)));
    user.register_notifier("vgpu0", Interest::Holder, Arc::new(notice))?;

    let mut vgpu = Vgpu::new(user.handle(), user, (), VgpuConfig::default());
    let thread = thread::spawn(move || {
        for event in events {
            match event {
                Event::GgttEntry(index, entry) => vgpu.write_ggtt_entry(index, entry)?,
                Event::Register(offset, value) => {
                    vgpu.mmio_write(offset, value)?;
                    while let Some(done) = vgpu.run_next(ENGINE, &mut SimulatedEngine::new())? {
                        println!("pages pinned: {}", vgpu.pinned_leaves());
                        let _ = interrupt.send(done.interrupts);
                    }
                }
                Event::Unmapping(iova, size) => vgpu.release_pins(iova, size),
                // The notice has a sender too: the channel does not end by itself.
                Event::Close => break,
            }
        }
        Ok(())
    });
    Ok((sender, thread))
}

fn main() -> Result<(), Box<dyn Error>> {
    // The VMM: guest memory in two mappings.
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), SIZE as usize)])?;
    let group = Group::new(26);
    let device = group.add_device("vgpu0")?;
    // The vGPU's thread may not get the processor for a while.
    let patient = IoAddressSpace::builder().unmap_deadline(Duration::from_secs(30));
    let (container, file) = (Container::open_with(patient), group.open()?);
    file.set_container(&container)?;
    container.set_iommu(IommuType::Type1v2)?;
    for (gpa, size) in [(0, BUFFER), (BUFFER, SIZE - BUFFER)] {
        let backing = Backing::from_guest_memory(&memory, GuestAddress(gpa), size as usize)?;
        container.map(gpa, backing, Permissions::ReadWrite)?;
    }
    let (interrupt, interrupted) = channel();
    let (vgpu, thread) = open(&device, interrupt)?;

    // The guest: page tables 0x10 to 0x13 of four levels, down to a page of the buffer.
    for (table, next) in [
        (0x10, 0x11),
        (0x11, 0x12),
        (0x12, 0x13),
        (0x13, BUFFER >> 12),
    ] {
        memory.write_obj::<u64>(next << 12 | 0b11, GuestAddress(table << 12))?;
    }
    // Status page 1, a ring in page 2, a context in pages 8 and 9, at the same graphics addresses.
    for page in [1, 2, 8, 9] {
        vgpu.send(Event::GgttEntry(page, u64::from(page) << 12 | 1))?;
    }
    let fields = [
        (ring_context::START, 2 << 12),
        (ring_context::TAIL, 160),
        (
            ring_context::PDP3_UDW + 7 * ring_context::PDP_STRIDE,
            0x10 << 12,
        ),
    ];
    for (field, value) in fields {
        memory.write_obj::<u32>(value, GuestAddress(0x9000 + field as u64))?;
    }
    let register = |offset, value| vgpu.send(Event::Register(ENGINE.mmio_base() + offset, value));
    register(ring_register::HWS_PGA, 1 << 12)?;
    let context = u64::from(ContextDescriptor::new(8, 42, AddressingMode::Legacy64));
    for dword in [0, 0, (context >> 32) as u32, context as u32] {
        register(ring_register::ELSP, dword)?;
    }
    println!("{} interrupts", interrupted.recv()?);

    // The VMM: the buffer goes when the vGPU has let go of it, and the group when the device is closed.
    println!(
        "{:#x} bytes unmapped",
        container.unmap(BUFFER, SIZE - BUFFER)?
    );
    println!("{}", file.unset_container().unwrap_err());
    vgpu.send(Event::Close)?;
    thread.join().map_err(|_| "the vGPU panicked")??;
    Ok(file.unset_container()?)
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A virtual machine whose memory is what an address space has: its processor and an emulated device see the same.
//!
//! `cargo run -p vfio-group --features kvm --example kvm_slots` (x86-64, with /dev/kvm)

use std::error::Error;
use std::sync::Arc;

use iommu_type1::{Backing, IoAddressSpace};
use kvm_ioctls::{Kvm, VcpuExit};
use vfio_group::{Group, KvmVfio, MemorySlots};
use vm_memory::Permissions::{Read, ReadWrite};

/// Adds one to the byte at 0x2000, then halts.
const CODE: [u8; 5] = [0xfe, 0x06, 0x00, 0x20, 0xf4];

fn main() -> Result<(), Box<dyn Error>> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            println!("/dev/kvm: {error}");
            return Ok(());
        }
    };
    let vm = Arc::new(kvm.create_vm()?);

    // Every mapping is a slot, from now on. The numbers are ours alone.
    let space = IoAddressSpace::new();
    let slots = MemorySlots::new(&space, vm.clone(), 0..kvm.get_nr_memslots() as u32)?;
    space.map(0x1000, Backing::anonymous(0x4000)?, ReadWrite)?;
    // Firmware: the guest reads it, a write of the guest is an exit.
    space.map(0xf_0000, Backing::anonymous(0x1_0000)?, Read)?;
    for slot in slots.slots() {
        println!("{slot:x?}");
    }

    // Groups are told of the machine before their devices are opened: ours by `add_group`, and those of the
    // kernel by `add`, which is KVM_DEV_VFIO_FILE_ADD.
    let vfio = KvmVfio::new(&vm)?;
    let group = Group::new(26);
    let member = vfio.add_group(&group);

    // The device's view: DMA at guest physical addresses.
    let dma = space.handle();
    dma.write(0x1000, &CODE)?;
    dma.write(0x2000, &[41])?;

    #[cfg(target_arch = "x86_64")]
    run(&vm)?;

    let mut byte = [0];
    dma.read(0x2000, &mut byte)?;
    println!("the processor has left {}", byte[0]);

    // The other way round: the group first, then the slots, then the machine.
    drop(member);
    drop(slots);
    Ok(())
}

/// Runs the processor in real mode until it halts.
#[cfg(target_arch = "x86_64")]
fn run(vm: &kvm_ioctls::VmFd) -> Result<(), Box<dyn Error>> {
    let mut vcpu = vm.create_vcpu(0)?;
    let mut segments = vcpu.get_sregs()?;
    for segment in [&mut segments.cs, &mut segments.ds] {
        (segment.base, segment.selector) = (0, 0);
    }
    vcpu.set_sregs(&segments)?;
    let mut registers = vcpu.get_regs()?;
    (registers.rip, registers.rflags) = (0x1000, 2);
    vcpu.set_regs(&registers)?;
    match vcpu.run()? {
        VcpuExit::Hlt => Ok(()),
        exit => Err(format!("{exit:?}").into()),
    }
}

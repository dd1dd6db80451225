// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A real virtual machine, whose processor writes what DMA reads, and the other way round.

#![cfg(all(feature = "kvm", target_arch = "x86_64", not(loom)))]

#[path = "common/deadline.rs"]
mod deadline;

use std::fs::File;
use std::sync::Arc;

use deadline::{must_end, skipped};
use iommu_type1::{page_size, Backing, IoAddressSpace};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vfio_group::{KvmVfio, MemorySlots};
use vm_memory::Permissions::{Read, ReadWrite};

/// What opening it fails with where it is not, is not for us, is not let into this container, or has no driver.
const MISSING: [i32; 5] = [
    libc::ENOENT,
    libc::EACCES,
    libc::EPERM,
    libc::ENODEV,
    libc::ENXIO,
];

/// KVM, or the reason why there is none; other errors are errors.
fn kvm() -> Option<Kvm> {
    match Kvm::new() {
        Ok(kvm) => Some(kvm),
        Err(error) if MISSING.contains(&error.errno()) => {
            skipped(&format!("/dev/kvm: {error}"));
            None
        }
        Err(error) => panic!("/dev/kvm: {error}"),
    }
}

/// Does something with a virtual machine, if there are any here. Whatever does not end there is left behind.
#[track_caller]
fn with_machine(test: impl FnOnce(Arc<VmFd>) + Send + 'static) {
    if let Some(kvm) = kvm() {
        let vm = Arc::new(kvm.create_vm().unwrap());
        must_end("what is done with a virtual machine", move || test(vm));
    }
}

/// Real mode, with all segments at 0.
fn processor(vm: &VmFd, at: u64) -> VcpuFd {
    let vcpu = vm.create_vcpu(0).unwrap();
    let mut segments = vcpu.get_sregs().unwrap();
    for segment in [&mut segments.cs, &mut segments.ds] {
        (segment.base, segment.selector) = (0, 0);
    }
    vcpu.set_sregs(&segments).unwrap();
    jump(&vcpu, at);
    vcpu
}

fn jump(vcpu: &VcpuFd, at: u64) {
    let mut registers = vcpu.get_regs().unwrap();
    (registers.rip, registers.rflags) = (at, 2);
    vcpu.set_regs(&registers).unwrap();
}

const CODE: u64 = 0x1000;
const DATA: u64 = 0x2000;
const ROM: u64 = 0x3000;

/// Adds one to the byte at `DATA`, then halts.
const INCREMENT: [u8; 5] = [0xfe, 0x06, 0x00, 0x20, 0xf4];
/// Writes 0x5a to `ROM`, then halts.
const WRITE_ROM: [u8; 6] = [0xc6, 0x06, 0x00, 0x30, 0x5a, 0xf4];

fn page() -> Backing {
    Backing::anonymous(page_size() as usize).unwrap()
}

/// Runs until it leaves by itself, and not for a signal (a debugger's, or that this process was stopped).
#[track_caller]
fn run(vcpu: &mut VcpuFd, check: impl FnOnce(VcpuExit<'_>)) {
    loop {
        match vcpu.run() {
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {}
            exit => return check(exit.unwrap()),
        }
    }
}

#[track_caller]
fn assert_halts(vcpu: &mut VcpuFd) {
    run(vcpu, |exit| {
        assert!(matches!(exit, VcpuExit::Hlt), "{exit:?}")
    });
}

#[track_caller]
fn assert_writes_to(vcpu: &mut VcpuFd, due: u64) {
    run(vcpu, |exit| {
        assert!(
            matches!(exit, VcpuExit::MmioWrite(at, _) if at == due),
            "{exit:?}"
        );
    });
}

#[test]
fn a_processor_writes_what_dma_reads() {
    with_machine(|vm| {
        let space = IoAddressSpace::new();
        space.map(CODE, page(), ReadWrite).unwrap();
        // One more comes before the slots, and the others after.
        let slots = MemorySlots::new(&space, vm.clone(), 0..8).unwrap();
        space.map(DATA, page(), ReadWrite).unwrap();
        space.map(ROM, page(), Read).unwrap();
        let dma = space.handle();

        let mut vcpu = processor(&vm, CODE);
        dma.write(CODE, &INCREMENT).unwrap();
        for due in [8, 9] {
            dma.write(DATA, &[due - 1]).unwrap();
            jump(&vcpu, CODE);
            assert_halts(&mut vcpu);
            let mut byte = [0];
            dma.read(DATA, &mut byte).unwrap();
            assert_eq!(byte, [due]);
        }

        // Another page at the same address: the processor sees that, and no longer the first.
        space.replace(DATA, page(), ReadWrite).unwrap();
        jump(&vcpu, CODE);
        assert_halts(&mut vcpu);
        let mut byte = [0];
        dma.read(DATA, &mut byte).unwrap();
        assert_eq!(byte, [1]);

        // What can only be read is not written, and says where.
        dma.write(CODE, &WRITE_ROM).unwrap();
        jump(&vcpu, CODE);
        assert_writes_to(&mut vcpu, ROM);
        assert_halts(&mut vcpu);
        dma.read(ROM, &mut byte).unwrap();
        assert_eq!(byte, [0]);

        // What is not mapped is no memory of the guest's.
        space.unmap(ROM, page_size()).unwrap();
        jump(&vcpu, CODE);
        assert_writes_to(&mut vcpu, ROM);
        assert_eq!(slots.slots().len(), 2);
    });
}

#[test]
fn kvm_logs_the_pages_that_a_processor_writes() {
    with_machine(|vm| {
        let space = IoAddressSpace::new();
        let slots = MemorySlots::new(&space, vm.clone(), 0..8).unwrap();
        space.map(CODE, page(), ReadWrite).unwrap();
        space.map(DATA, page(), ReadWrite).unwrap();
        space.write(CODE, &INCREMENT).unwrap();
        let mut vcpu = processor(&vm, CODE);
        slots.set_dirty_log(true).unwrap();
        assert_halts(&mut vcpu);
        let logged = slots.slots().into_iter().map(|slot| {
            let log = vm.get_dirty_log(slot.slot, slot.memory_size as usize);
            (slot.guest_phys_addr, log.unwrap()[0])
        });
        assert_eq!(logged.collect::<Vec<_>>(), [(CODE, 0), (DATA, 1)]);
        slots.set_dirty_log(false).unwrap();
    });
}

/// The kernel's own rules of slots are those that ours keep to.
#[test]
fn a_real_vm_refuses_what_it_has_no_slot_for() {
    let Some(kvm) = kvm() else { return };
    let vm = Arc::new(kvm.create_vm().unwrap());
    let most = kvm.get_nr_memslots() as u32;
    let space = IoAddressSpace::new();
    let _slots = MemorySlots::new(&space, vm, most - 1..most + 1).unwrap();
    space.map(DATA, page(), ReadWrite).unwrap();
    let refused = space.map(ROM, page(), ReadWrite).unwrap_err();
    assert_eq!(refused.errno(), libc::EINVAL, "{refused}");
    space.unmap(DATA, page_size()).unwrap();
    space.map(ROM, page(), ReadWrite).unwrap();
}

#[test]
fn kvm_has_one_vfio_device_which_takes_files_of_vfio() {
    with_machine(|vm| {
        let vfio = match KvmVfio::new(&vm) {
            Ok(vfio) => vfio,
            Err(error) if error.errno() == libc::ENODEV => {
                skipped("KVM has no VFIO");
                return;
            }
            Err(error) => panic!("{error}"),
        };
        assert_eq!(KvmVfio::new(&vm).unwrap_err().errno(), libc::EBUSY);
        let file = File::open("/dev/null").unwrap();
        assert_eq!(vfio.add(file).unwrap_err().errno(), libc::EINVAL);
    });
}

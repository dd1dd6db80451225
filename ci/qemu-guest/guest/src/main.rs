// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The first process of a guest whose GPU is served over vfio-user: it submits work as a driver does, and
//! checks every byte of what comes back against what it works out itself. docs/qemu-guest.md says more.

mod commands;
mod context;
mod device;
mod engine;
mod load;
mod machine;
mod memory;
mod pci;
mod tables;

use std::io;
use std::process::ExitCode;
use std::time::Instant;

use crate::device::Device;
use crate::load::{Load, Progress, Unmaps};
use crate::machine::Machine;
use crate::memory::{PAGE, PAGES};

/// Where the device finds the memory behind an IOMMU. A page table entry maps two mebibytes there.
const IOVA: u64 = 0x4000_0000;

/// How often a page is unmapped under a running batch.
const REVOKED: usize = 20;

fn main() -> ExitCode {
    let first = std::process::id() == 1;
    let done = run();
    match &done {
        Ok(()) => println!("finished: well"),
        Err(error) => println!("finished: {error}"),
    }
    if first {
        guest_init::end();
    }
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn run() -> io::Result<()> {
    guest_init::prepare()?;
    let number = |name| guest_init::parameter::<u64>(name);
    let submissions = number("submissions")?.unwrap_or(1000);
    let unmaps = number("unmaps")?.unwrap_or(0);
    let seed = number("seed")?.unwrap_or(1);
    let begun = Instant::now();
    let mut machine = if unmaps > 0 {
        behind_an_iommu(seed)?
    } else {
        with_physical_addresses(seed)?
    };
    println!("seed {seed}, interrupts by {}", machine.device.irq);
    let done = drive(&mut machine, submissions, unmaps);
    machine.memory.verify_all();
    let seconds = begun.elapsed().as_secs_f64();
    println!("{} interrupts, {seconds:.1} s", machine.interrupts);
    let load = machine.load.as_ref().map_or(0, |load| load.submissions);
    let verified = machine.memory.verified;
    println!(
        "guest: {} submissions, {} bytes verified, {} wrong",
        machine.submissions + load,
        verified.bytes,
        verified.wrong
    );
    done?;
    if !machine.has_seen_both(&machine.render) {
        return Err(io::Error::other("one of the two interrupts never came"));
    }
    if verified.wrong > 0 {
        return Err(io::Error::other("the device did something else"));
    }
    Ok(())
}

/// All that a guest does. Unmaps are for those that have an IOMMU.
fn drive(machine: &mut Machine, submissions: u64, unmaps: u64) -> io::Result<()> {
    if unmaps == 0 {
        return submit(machine, submissions);
    }
    submit(machine, submissions / 4)?;
    machine.device.use_msi()?;
    println!(
        "from submission {} on interrupts by {}",
        machine.submissions, machine.device.irq
    );
    submit_and_unmap(machine, submissions, unmaps)
}

/// A huge page, whose address the kernel tells.
fn with_physical_addresses(seed: u64) -> io::Result<Machine> {
    let device = Device::uio()?;
    let memory = memory::allocate(PAGES, true)?;
    let address = memory::physical(memory)?;
    Ok(Machine::new(device, memory, address, seed))
}

/// Each page a mapping of its own.
fn behind_an_iommu(seed: u64) -> io::Result<Machine> {
    let device = Device::vfio()?;
    let memory = memory::allocate(PAGES, false)?;
    if let Some(vfio) = &device.vfio {
        for at in 0..PAGES {
            let page = memory.wrapping_add(at * PAGE);
            load::map(&vfio.container, IOVA + (at * PAGE) as u64, page)?;
        }
    }
    Ok(Machine::new(device, memory, IOVA, seed))
}

fn submit(machine: &mut Machine, submissions: u64) -> io::Result<()> {
    while machine.submissions < submissions {
        machine.step()?;
    }
    Ok(())
}

/// The same beside a thread that unmaps other pages, while another engine is never idle. Then pages that
/// this engine writes are unmapped.
fn submit_and_unmap(machine: &mut Machine, submissions: u64, unmaps: u64) -> io::Result<()> {
    let mut load = Load::new(machine);
    load.submit(machine);
    let progress = Progress::of(load.engine(), machine);
    machine.load = Some(load);
    let thread = Unmaps::start(machine.container()?, progress)?;
    while machine.submissions < submissions || thread.in_flight() < unmaps {
        if !thread.is_running() {
            break;
        }
        machine.step()?;
    }
    let (all, in_flight) = thread.end()?;
    println!("unmaps: {all}, {in_flight} of them while a workload ran");
    let mut load = machine.load.take().expect("it was put there");
    while !load.is_done(machine) {
        machine.wait("blitter", |machine| load.is_done(machine))?;
    }
    load.complete(machine);
    let met = load::revoke(machine, &mut load, REVOKED)?;
    println!("pages unmapped under a running batch: {met} of {REVOKED}");
    if met == 0 {
        return Err(io::Error::other(
            "no batch still ran when its page was gone",
        ));
    }
    machine.load = Some(load);
    Ok(())
}

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
use std::sync::Arc;
use std::time::Instant;

use vfio_ioctls::VfioContainer;

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
    let (device, container) = match unmaps {
        0 => (Device::uio()?, None),
        _ => Device::vfio().map(|(device, container)| (device, Some(container)))?,
    };
    println!("seed {seed}, interrupts by {device}");
    let (memory, address) = match &container {
        None => with_a_physical_address()?,
        Some(container) => behind_an_iommu(container)?,
    };
    let mut machine = Machine::new(device, memory, address, seed);
    let done = match container {
        None => submit(&mut machine, submissions),
        Some(container) => submit_and_unmap(&mut machine, &container, submissions, unmaps),
    };
    if done.is_ok() {
        machine.memory.verify_all();
    }
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

/// A huge page, whose address the kernel tells.
fn with_a_physical_address() -> io::Result<(*mut u8, u64)> {
    let memory = memory::allocate(PAGES, true)?;
    Ok((memory, memory::physical(memory)?))
}

/// Each page a mapping of its own.
fn behind_an_iommu(container: &VfioContainer) -> io::Result<(*mut u8, u64)> {
    let memory = memory::allocate(PAGES, false)?;
    for at in (0..PAGES).map(|page| page * PAGE) {
        load::map(container, IOVA + at as u64, memory.wrapping_add(at))?;
    }
    Ok((memory, IOVA))
}

fn submit(machine: &mut Machine, submissions: u64) -> io::Result<()> {
    while machine.submissions < submissions {
        machine.step()?;
    }
    Ok(())
}

/// A quarter of it with INTx, the rest with messages beside a thread that unmaps other pages, while another
/// engine is never idle. Then pages that this engine writes are unmapped.
fn submit_and_unmap(
    machine: &mut Machine,
    container: &Arc<VfioContainer>,
    submissions: u64,
    unmaps: u64,
) -> io::Result<()> {
    submit(machine, submissions / 4)?;
    machine.device.use_msi()?;
    println!(
        "from submission {} on interrupts by {}",
        machine.submissions, machine.device
    );
    let mut load = Load::new(machine);
    load.submit(machine);
    let progress = Progress::of(load.engine(), machine);
    machine.load = Some(load);
    let thread = Unmaps::start(container.clone(), progress)?;
    while thread.is_running() && (machine.submissions < submissions || thread.in_flight() < unmaps)
    {
        machine.step()?;
    }
    let (all, in_flight) = thread.end()?;
    println!("unmaps: {all}, {in_flight} of them while a workload ran");
    let Some(mut load) = machine.load.take() else {
        return Ok(());
    };
    let ended = end(machine, &mut load, container);
    machine.load = Some(load);
    ended
}

fn end(machine: &mut Machine, load: &mut Load, container: &VfioContainer) -> io::Result<()> {
    if !load.is_done(machine) {
        machine.wait("the blitter", |machine| load.is_done(machine))?;
    }
    load.complete(machine);
    let met = load::revoke(machine, load, container, REVOKED)?;
    println!("pages unmapped under a running batch: {met} of {REVOKED}");
    match met {
        0 => Err(io::Error::other("no batch met that its page was gone")),
        _ => Ok(()),
    }
}

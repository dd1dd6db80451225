// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A real device on the same addresses: it reads what our path has written, and the other way round; and
//! what is not mapped for it is refused to both. Everything is mapped in our space alone, and in the kernel's
//! container by a mirror of it: one by our own ioctls, one by the crate vfio-ioctls.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::ptr;
use std::sync::Arc;

use guest_init::Given;
use iommu_type1::uapi::UserMemory;
use iommu_type1::{IoAddressSpace, IovaRanges};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vfio_group::hardware::{HardwareContainer, HardwareGroup};
use vfio_group::{IommuType, Mirror, SpaceOps};
use vfio_ioctls::{VfioContainer, VfioDevice, VfioOps};
use vm_memory::Permissions::{self, Read, ReadWrite};

use crate::edu::Edu;
use crate::memory::{self, PAGE, PRIVATE};
use crate::ours::OwnMemory;
use crate::setup::Setup;
use crate::vfio::Device;

/// Transfers each way. Each takes the device a tenth of a second.
const ROUNDS: usize = 8;

/// Addresses that the device reads from, writes to, and may not write to. It has 28 bits.
const SOURCE: u64 = 0x10_0000;
const DESTINATION: u64 = 0x80_3000;
const ONLY_READ: u64 = 0xff_f000;

/// Runs all of it.
pub fn run(given: &Given, setup: &Setup, seed: u64) -> Result<(), String> {
    by_our_ioctls(given, setup, seed)?;
    by_vfio_ioctls(given, setup, seed)
}

/// Permissions are kept; the mirror comes when something is mapped already.
fn by_our_ioctls(given: &Given, setup: &Setup, seed: u64) -> Result<(), String> {
    let container = Arc::new(HardwareContainer::open().map_err(said)?);
    let group = HardwareGroup::open(given.group).map_err(said)?;
    group.set_container(&container).map_err(said)?;
    container.set_iommu(IommuType::Type1v2).map_err(said)?;
    let space = space(&container, setup)?;
    map(&space, SOURCE, 0, ReadWrite)?;
    let mirror = Mirror::new(&space, container).map_err(said)?;
    map(&space, DESTINATION, 1, ReadWrite)?;
    map(&space, ONLY_READ, 2, Read)?;
    let edu = Edu::open(Device::from(group.device(&given.name).map_err(said)?))?;
    transfer(&edu, &space, seed)?;
    refused(&edu, &space, ONLY_READ, 2, libc::EPERM)?;
    unmap(&space, SOURCE)?;
    unread(&edu, &space, SOURCE, 0)?;
    unmap(&space, DESTINATION)?;
    refused(&edu, &space, DESTINATION, 1, libc::EINVAL)?;
    not_stuck(&mirror)?;
    println!("device: {ROUNDS} transfers there and back, 3 refused");
    Ok(())
}

/// `VfioDevice` is opened on our space, which is a container to it; what can only be read is refused.
fn by_vfio_ioctls(given: &Given, setup: &Setup, seed: u64) -> Result<(), String> {
    let container = Arc::new(VfioContainer::new(None).map_err(said)?);
    let space = IoAddressSpace::new();
    let ops = SpaceOps::mirrored(space.clone(), OwnMemory, container.clone()).map_err(said)?;
    let ops = Arc::new(ops);
    let path = Path::new("/sys/bus/pci/devices").join(&given.name);
    let device = VfioDevice::new(&path, ops.clone(), false).map_err(said)?;
    let own = HardwareContainer::of(&container).map_err(said)?;
    check_limits(&own, setup)?;
    for (iova, page) in [(SOURCE, 0), (DESTINATION, 1)] {
        let vaddr = PRIVATE.first + page * PAGE;
        let memory = ptr::with_exposed_provenance_mut(vaddr as usize);
        // SAFETY: the memory is there as long as this program, and nobody has references into it.
        unsafe { ops.vfio_dma_map(iova, PAGE as usize, memory) }.map_err(said)?;
    }
    match map(&space, ONLY_READ, 2, Read) {
        Err(error) if error.contains("instead of Read") => (),
        other => return Err(format!("a page to be read only: {other:?}")),
    }
    // SAFETY: the device is open.
    let fd = unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) };
    let file = File::from(fd.try_clone_to_owned().map_err(said)?);
    let edu = Edu::open(Device::from(file))?;
    transfer(&edu, &space, seed)?;
    ops.vfio_dma_unmap(DESTINATION, PAGE as usize)
        .map_err(said)?;
    refused(&edu, &space, DESTINATION, 1, libc::EINVAL)?;
    // With the last device the group leaves, and the kernel forgets what is still mapped.
    drop((edu, device));
    unmap(&space, SOURCE)?;
    not_stuck(ops.mirror().ok_or("no mirror")?)?;
    println!("device of vfio-ioctls: {ROUNDS} transfers there and back, 1 refused");
    Ok(())
}

/// A space with the limits of the hardware.
fn space(container: &HardwareContainer, setup: &Setup) -> Result<IoAddressSpace, String> {
    check_limits(container, setup)?;
    let limits = container.limits().map_err(said)?;
    let ranges = IovaRanges::new(&limits.iova_ranges, &[]).map_err(said)?;
    let builder = IoAddressSpace::builder().page_sizes(limits.page_sizes);
    Ok(builder.iova_ranges(ranges).build())
}

fn check_limits(container: &HardwareContainer, setup: &Setup) -> Result<(), String> {
    let limits = container.limits().map_err(said)?;
    let ranges = limits
        .iova_ranges
        .iter()
        .map(|range| (*range.start(), *range.end()));
    if limits.page_sizes == setup.page_sizes && ranges.eq(setup.ranges.iter().copied()) {
        Ok(())
    } else {
        Err(format!("{limits:x?} beside {setup:x?}"))
    }
}

fn map(space: &IoAddressSpace, iova: u64, page: u64, prot: Permissions) -> Result<(), String> {
    let vaddr = PRIVATE.first + page * PAGE;
    let memory = OwnMemory.backing(vaddr, PAGE, prot).map_err(said)?;
    space.map(iova, memory, prot).map_err(said)
}

fn unmap(space: &IoAddressSpace, iova: u64) -> Result<(), String> {
    space.unmap(iova, PAGE).map(drop).map_err(said)
}

fn not_stuck(mirror: &Mirror) -> Result<(), String> {
    match mirror.stuck() {
        stuck if stuck.is_empty() => Ok(()),
        stuck => Err(format!("the kernel still has {stuck:x?}")),
    }
}

/// What our path writes the device reads, and the other way round.
fn transfer(edu: &Edu, space: &IoAddressSpace, seed: u64) -> Result<(), String> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut expected = [rng.random::<u8>(); PAGE as usize];
    space.write(DESTINATION, &expected).map_err(said)?;
    for _ in 0..ROUNDS {
        let bytes: Vec<u8> = (0..rng.random_range(1..300))
            .map(|_| rng.random())
            .collect();
        let mut inside = || rng.random_range(0..PAGE - bytes.len() as u64);
        let (from, to) = (inside(), inside());
        space.write(SOURCE + from, &bytes).map_err(said)?;
        edu.read(SOURCE + from, bytes.len())?;
        edu.write(DESTINATION + to, bytes.len())?;
        expected[to as usize..][..bytes.len()].copy_from_slice(&bytes);
        let mut page = [0; PAGE as usize];
        space.read(DESTINATION, &mut page).map_err(said)?;
        if page != expected {
            return Err(format!(
                "{} bytes from {from:#x} to {to:#x} are not those",
                bytes.len()
            ));
        }
    }
    Ok(())
}

/// Neither the device nor our path can read the page that was at an address: what the device has then, it
/// writes where it may.
fn unread(edu: &Edu, space: &IoAddressSpace, iova: u64, page: u64) -> Result<(), String> {
    let secret = [0xb7; 64];
    memory::write(PRIVATE.first + page * PAGE, &secret);
    edu.read(iova, secret.len())?;
    edu.write(DESTINATION, secret.len())?;
    let mut has = [0; 64];
    space.read(DESTINATION, &mut has).map_err(said)?;
    if has.contains(&secret[0]) {
        return Err(format!("{iova:#x} was read though it is not mapped"));
    }
    match space.read(iova, &mut has) {
        Err(error) if error.errno() == libc::EINVAL => Ok(()),
        other => Err(format!("our read of {iova:#x}: {other:?}")),
    }
}

/// Neither the device nor our path can write the page that is, or was, at an address.
fn refused(
    edu: &Edu,
    space: &IoAddressSpace,
    iova: u64,
    page: u64,
    errno: i32,
) -> Result<(), String> {
    let at = PRIVATE.first + page * PAGE;
    let before = [0x5a; 64];
    memory::write(at, &before);
    edu.write(iova, before.len())?;
    let ours = space.write(iova, &[0; 64]);
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

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An address space below vm-memory's `IommuMemory`, for code that takes nothing else.

use std::error::Error;

use vfio_dma::iommu::{Backing, IoAddressSpace, IommuAdapter, Profile};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, IommuMemory, Permissions};

fn main() -> Result<(), Box<dyn Error>> {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10_0000)])?;
    let space = IoAddressSpace::builder().profile(Profile::Iommufd).build();

    // Mappings of guest memory carry the guest physical address they stand for, by themselves.
    let low = Backing::from_guest_memory(&memory, GuestAddress(0x3000), 0x1000)?;
    space.map(0x8000_0000, low, Permissions::ReadWrite)?;
    // Of other memory the VMM says it. The guest must have it there.
    let region = Backing::from_guest_memory(&memory, GuestAddress(0), 0x10_0000)?;
    let high = region.slice(0x7000, 0x1000)?;
    assert_eq!(high.guest_address(), Some(GuestAddress(0x7000)));
    space.map(0x8000_1000, high, Permissions::Read)?;

    let device = IommuMemory::new(memory.clone(), IommuAdapter::new(&space), true, ());
    device.write_slice(b"DMA!", GuestAddress(0x8000_0ffc))?;
    assert_eq!(&memory.read_obj::<[u8; 4]>(GuestAddress(0x3ffc))?, b"DMA!");
    let mut across = [0; 8];
    device.read_slice(&mut across, GuestAddress(0x8000_0ffc))?;

    // What is not mapped, not for this access, or nowhere in the guest is an error that says so.
    let refused = device.write_slice(b"DMA!", GuestAddress(0x8000_1000));
    println!("{}", refused.unwrap_err());
    space.map(
        0x9000_0000,
        Backing::anonymous(0x1000)?,
        Permissions::ReadWrite,
    )?;
    let nowhere = device.read_slice(&mut across, GuestAddress(0x9000_0000));
    println!("{}", nowhere.unwrap_err());
    Ok(())
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VMM with a real PCI device (vfio-ioctls) and an emulated one, which see the same memory.
//!
//! `cargo run -p vfio-group --features vfio-ioctls --example vfio_ioctls -- 0000:06:0d.0`

use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use iommu_type1::{IoAddressSpace, IovaRanges};
use vfio_group::hardware::HardwareContainer;
use vfio_group::SpaceOps;
use vfio_ioctls::{VfioContainer, VfioDevice, VfioOps};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    MemoryRegionAddress,
};

fn main() -> Result<(), Box<dyn Error>> {
    let Some(name) = std::env::args().nth(1) else {
        eprintln!("usage: vfio_ioctls PCI-ADDRESS (of a device bound to vfio-pci)");
        return Ok(());
    };

    // As before: guest memory, and a container.
    let ranges = [
        (GuestAddress(0), 64 << 20),
        (GuestAddress(1 << 32), 64 << 20),
    ];
    let memory = GuestMemoryMmap::<()>::from_ranges(&ranges)?;
    let container = Arc::new(VfioContainer::new(None)?);

    // New: the address space, in the container's place.
    let space = IoAddressSpace::new();
    let ops = SpaceOps::mirrored(space.clone(), memory.clone(), container.clone())?;
    let ops: Arc<dyn VfioOps> = Arc::new(ops);

    // As before, with `ops` for the container: it is that to vfio-ioctls.
    let path = Path::new("/sys/bus/pci/devices").join(name);
    let device = VfioDevice::new(&path, ops.clone(), false)?;

    // Once there is an IOMMU the kernel says what it can map; the space refuses the rest by name.
    let limits = HardwareContainer::of(&container)?.limits()?;
    space.set_iova_ranges(IovaRanges::new(&limits.iova_ranges, &[])?)?;

    // As before: whoever maps for devices (the VMM itself, a virtual IOMMU) does so by host addresses.
    for region in memory.iter() {
        let host = region.get_host_address(MemoryRegionAddress(0))?;
        // SAFETY: guest memory is accessed as memory that others change.
        unsafe { ops.vfio_dma_map(region.start_addr().0, region.len() as usize, host)? };
    }

    // New: an emulated device does DMA at the same addresses, with the same unmaps.
    let dma = space.handle();
    dma.write(0x1000, b"seen by both")?;
    let mut seen = [0; 12];
    memory.read_slice(&mut seen, GuestAddress(0x1000))?;
    assert_eq!(&seen, b"seen by both");
    println!("{} mappings", space.mappings());

    // Gone from the hardware first, then for whoever is in the middle of an access: when this returns nobody
    // reaches it.
    for region in memory.iter() {
        ops.vfio_dma_unmap(region.start_addr().0, region.len() as usize)?;
    }
    assert!(dma.write(0x1000, b"?").is_err());
    drop(device);
    Ok(())
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Adapters in the shape of cloud-hypervisor's traits: paste `Platform` there, and take its traits for those here.

use std::io;

use vfio_dma::iommu::{Error, IoAddressSpace, IommuAdapter};
use vm_memory::{iommu::MappedRange, GuestAddress, GuestMemoryMmap, Iommu, Permissions};

/// `vm_device::dma_mapping::ExternalDmaMapping`: what virtio-iommu and virtio-mem tell of.
trait ExternalDmaMapping: Send + Sync {
    fn map(&self, iova: u64, gpa: u64, size: u64) -> io::Result<()>;
    fn unmap(&self, iova: u64, size: u64) -> io::Result<()>;
}

/// `vm_virtio::AccessPlatform`: one guest physical address for a range, and the other way round.
trait AccessPlatform: Send + Sync + std::fmt::Debug {
    fn translate_gva(&self, base: u64, size: u64) -> io::Result<u64>;
    fn translate_gpa(&self, base: u64, size: u64) -> io::Result<u64>;
}

/// An address space, and the guest memory that it maps: a `GuestMemoryAtomic` where memory is added.
#[derive(Debug)]
struct Platform {
    space: IoAddressSpace,
    memory: GuestMemoryMmap<()>,
}

impl ExternalDmaMapping for Platform {
    /// The trait says nothing of permissions.
    fn map(&self, iova: u64, gpa: u64, size: u64) -> io::Result<()> {
        let (memory, from) = (&self.memory, GuestAddress(gpa));
        let prot = Permissions::ReadWrite;
        Ok(self
            .space
            .map_guest_memory(iova, memory, from, size, prot)?)
    }

    fn unmap(&self, iova: u64, size: u64) -> io::Result<()> {
        self.space.unmap(iova, size)?;
        Ok(())
    }
}

impl AccessPlatform for Platform {
    fn translate_gva(&self, base: u64, size: u64) -> io::Result<u64> {
        let iommu = IommuAdapter::new(&self.space);
        let found = iommu.translate(GuestAddress(base), size as usize, Permissions::Read);
        match found.map_err(io::Error::other)?.collect::<Vec<_>>()[..] {
            [MappedRange { base, .. }] => Ok(base.0),
            _ => Err(io::Error::other(format!("{base:#x} is not in one place"))),
        }
    }

    /// By a look at all mappings: for set-up, not for accesses.
    fn translate_gpa(&self, base: u64, size: u64) -> io::Result<u64> {
        let (snapshot, _) = self.space.snapshot()?;
        let mut mappings = snapshot.mappings.into_iter();
        let iova = mappings.find_map(|mapping| {
            let offset = base.checked_sub(mapping.backing?.guest_address?)?;
            let left = mapping.size.checked_sub(offset)?;
            (size <= left).then(|| mapping.iova + offset)
        });
        Ok(iova.ok_or(Error::NoRegion(base))?)
    }
}

fn main() -> io::Result<()> {
    let regions = [(GuestAddress(0), 0x8000), (GuestAddress(0x8000), 0x8000)];
    let memory = GuestMemoryMmap::from_ranges(&regions).map_err(io::Error::other)?;
    let space = IoAddressSpace::new();
    let platform = Platform { space, memory };
    platform.map(0x4000_0000, 0x7000, 0x2000)?;
    platform.map(0x4000_2000, 0x3000, 0x1000)?;
    assert_eq!(platform.translate_gva(0x4000_0ffc, 8)?, 0x7ffc);
    assert_eq!(platform.translate_gpa(0x3004, 8)?, 0x4000_2004);
    println!("{}", platform.translate_gva(0x4000_1ffc, 8).unwrap_err());
    platform.unmap(0x4000_0000, 0x3000)
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who is compared: each reads or changes mappings by one call that is not inlined.

pub mod ours;
pub mod peers;

use std::hint::black_box;

use iommu_type1::{Backing, IoAddressSpace, ReaderBarrier};
use vm_memory::{GuestAddress, GuestMemoryBackend, Permissions};

pub use peers::{LockedIotlb, LockedTree};

use crate::compare::Candidate;
use crate::workload::Workload;
use crate::world::World;

/// A way to read guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// Ours, by a handle.
    Handle,
    /// Ours, by a handle of a space with `ReaderBarrier::Membarrier`.
    HandleMembarrier,
    /// Ours, directly on the space.
    Shared,
    /// Ours, by a guard taken for each access.
    Guard,
    /// `GuestMemoryMmap` of one region: no translation.
    OneRegion,
    /// `GuestMemoryMmap` of 16 regions: no translation.
    Regions16,
    /// `GuestMemoryMmap` of one region, a page at a time.
    PageLoop,
    /// `GuestMemoryMmap` of 16 regions, a page at a time.
    PageLoop16,
    /// `GuestMemoryAtomic`, loaded for each access: no translation.
    Atomic,
    /// `IommuMemory` over a `RwLock<Iotlb>`.
    Iommu,
    /// A `RwLock<BTreeMap>` from I/O virtual to host addresses.
    Tree,
    /// A copy from the host address: the limit.
    Memcpy,
}

impl Reader {
    /// Everybody.
    pub const ALL: [Reader; 12] = [
        Reader::Handle,
        Reader::HandleMembarrier,
        Reader::Shared,
        Reader::Guard,
        Reader::OneRegion,
        Reader::Regions16,
        Reader::PageLoop,
        Reader::PageLoop16,
        Reader::Atomic,
        Reader::Iommu,
        Reader::Tree,
        Reader::Memcpy,
    ];

    /// Ours, by a handle of the space with this barrier.
    pub fn handle(barrier: ReaderBarrier) -> Self {
        match barrier {
            ReaderBarrier::Membarrier => Reader::HandleMembarrier,
            _ => Reader::Handle,
        }
    }

    /// Name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Reader::Handle => "handle",
            Reader::HandleMembarrier => "handle, membarrier",
            Reader::Shared => "shared path",
            Reader::Guard => "guard",
            Reader::OneRegion => "GuestMemoryMmap, 1 region",
            Reader::Regions16 => "GuestMemoryMmap, 16 regions",
            Reader::PageLoop => "page loop, 1 region",
            Reader::PageLoop16 => "page loop, 16 regions",
            Reader::Atomic => "GuestMemoryAtomic",
            Reader::Iommu => "IommuMemory",
            Reader::Tree => "RwLock<BTreeMap>",
            Reader::Memcpy => "memcpy",
        }
    }

    /// The candidate that reads `work` from `world`.
    ///
    /// # Panics
    ///
    /// The candidate panics where `work` is not mapped.
    pub fn reading<'a>(self, world: &'a World, work: &'a Workload) -> Candidate<'a> {
        let by_iova = &work.iovas;
        let by_gpa = &work.gpas;
        match self {
            Reader::Handle | Reader::HandleMembarrier => {
                let handle = self.space(world).handle();
                self.over(by_iova, work, move |at, buf| ours::handle(&handle, at, buf))
            }
            Reader::Shared => self.over(by_iova, work, |at, buf| {
                ours::shared(&world.space, at, buf);
            }),
            Reader::Guard => self.over(by_iova, work, |at, buf| {
                ours::guard(&world.space, at, buf);
            }),
            Reader::OneRegion => self.over(by_gpa, work, |at, buf| {
                peers::mmap(&world.memory.one_region, at, buf);
            }),
            Reader::Regions16 => self.over(by_gpa, work, |at, buf| {
                peers::mmap(&world.memory.regions_16, at, buf);
            }),
            Reader::PageLoop => self.over(by_gpa, work, |at, buf| {
                peers::page_loop(&world.memory.one_region, at, buf);
            }),
            Reader::PageLoop16 => self.over(by_gpa, work, |at, buf| {
                peers::page_loop(&world.memory.regions_16, at, buf);
            }),
            Reader::Atomic => self.over(by_gpa, work, |at, buf| {
                peers::atomic(&world.atomic, at, buf);
            }),
            Reader::Iommu => self.over(by_iova, work, |at, buf| {
                peers::iommu(&world.iommu, at, buf);
            }),
            Reader::Tree => self.over(by_iova, work, |at, buf| {
                world.tree.read(at, buf);
            }),
            Reader::Memcpy => {
                let host = world.memory.one_region.get_host_address(GuestAddress(0));
                let host = host.expect("memory from 0");
                self.over(by_gpa, work, move |at, buf| {
                    // SAFETY: a workload keeps `at + buf.len()` inside the one region of `world`,
                    // which is borrowed longer than this.
                    unsafe { peers::memcpy(host.add(at as usize), buf) };
                })
            }
        }
    }

    /// The space of ours that it reads.
    fn space(self, world: &World) -> &IoAddressSpace {
        match self {
            Reader::HandleMembarrier => &world.membarrier,
            _ => &world.space,
        }
    }

    fn over<'a>(
        self,
        addresses: &'a [u64],
        work: &Workload,
        mut read: impl FnMut(u64, &mut [u8]) + 'a,
    ) -> Candidate<'a> {
        let mut buf = PageAligned::new(work.size);
        let mut next = 0;
        Candidate::new(self.name(), move |n| {
            let buf = buf.bytes();
            for _ in 0..n {
                // As many addresses as a power of two: the mask costs nothing to speak of.
                read(addresses[next & (addresses.len() - 1)], buf);
                next += 1;
            }
            black_box(buf);
        })
    }

    /// What maps and unmaps a page that `work` does not touch, once a call; `None` where there is
    /// no such operation.
    pub fn churning(self, world: &World) -> Option<impl FnMut() + Send + '_> {
        let at = world.layout.elsewhere();
        let backing = Backing::from_guest_memory(&world.memory.one_region, GuestAddress(0), 4096);
        let backing = backing.expect("the first page");
        let host = backing.host_address() as usize;
        let churns = matches!(
            self,
            Reader::Handle
                | Reader::HandleMembarrier
                | Reader::Shared
                | Reader::Guard
                | Reader::Iommu
                | Reader::Tree
        );
        let space = self.space(world);
        churns.then_some(move || match self {
            Reader::Iommu => {
                let iotlb = world.iommu.iommu();
                iotlb.map(at, GuestAddress(0), 4096);
                iotlb.unmap(at, 4096);
            }
            Reader::Tree => {
                world.tree.map(at, host as *mut u8, 4096);
                world.tree.unmap(at);
            }
            _ => {
                space
                    .map(at, backing.clone(), Permissions::ReadWrite)
                    .expect("a free page");
                space.unmap(at, 4096).expect("nobody holds it");
            }
        })
    }
}

/// A buffer at the start of a page: how fast a copy is depends on it, so nobody gets a better one.
struct PageAligned {
    bytes: Vec<u8>,
    size: usize,
}

impl PageAligned {
    fn new(size: usize) -> Self {
        PageAligned {
            bytes: vec![0; size + 4096],
            size,
        }
    }

    fn bytes(&mut self) -> &mut [u8] {
        let start = self.bytes.as_ptr().align_offset(4096);
        &mut self.bytes[start..start + self.size]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::Pattern;
    use crate::world::Memory;

    #[test]
    fn all_who_translate_read_the_same_bytes() {
        let memory = Memory::new();
        for mappings in [1, 16, 1024] {
            let world = World::new(mappings, &memory);
            let work = Workload::new(&world.layout, Pattern::Spread, 3 * 4096);
            let handle = world.space.handle();
            for (&iova, &gpa) in work.iovas.iter().zip(&work.gpas) {
                let mut all = [[1; 3 * 4096], [2; 3 * 4096], [3; 3 * 4096], [4; 3 * 4096]];
                ours::handle(&handle, iova, &mut all[0]);
                peers::iommu(&world.iommu, iova, &mut all[1]);
                world.tree.read(iova, &mut all[2]);
                peers::page_loop(&world.memory.regions_16, gpa, &mut all[3]);
                assert!(all.iter().all(|bytes| *bytes == all[0]), "{iova:#x}");
            }
        }
    }

    #[test]
    fn everybody_reads_and_churns_across_mappings() {
        let memory = Memory::new();
        let world = World::new(65_535, &memory);
        let work = Workload::new(&world.layout, Pattern::Spread, 20 * 4096);
        for reader in Reader::ALL {
            reader.reading(&world, &work).run(2);
            if let Some(mut churn) = reader.churning(&world) {
                churn();
                churn();
            }
        }
        // Three of ours change the one space, the fourth the other.
        let churned = |space: &IoAddressSpace| space.stats().maps - space.stats().mappings;
        assert_eq!((churned(&world.space), churned(&world.membarrier)), (6, 2));
        assert_eq!(world.space.mappings(), 65_535);
    }
}

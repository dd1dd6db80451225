// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A virtqueue with one chain of descriptors, popped and read again and again.

use std::io::Read;

use vm_memory::{GuestAddressSpace, GuestMemory};

use iommu_type1::{IoAddressSpace, ReaderBarrier};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{Queue, QueueOwnedT, QueueT};

use crate::compare::Candidate;
use crate::workload::Layout;
use crate::world::World;

/// Descriptors of the chain, all for the device to read.
pub const DESCRIPTORS: u64 = 8;

const NEXT: u16 = 1;

/// Who reads a chain.
///
/// Rings and every buffer lie in mappings of their own, as far as there are that many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// Ours, by a guard taken for each chain.
    Guard,
    /// Ours, by a guard of a space with `ReaderBarrier::Membarrier`.
    GuardMembarrier,
    /// `GuestMemoryMmap` of one region: no translation.
    OneRegion,
    /// `IommuMemory` over a `RwLock<Iotlb>`.
    Iommu,
}

impl Device {
    /// Everybody.
    pub const ALL: [Device; 4] = [
        Device::Guard,
        Device::GuardMembarrier,
        Device::OneRegion,
        Device::Iommu,
    ];

    /// Ours, by a guard of the space with this barrier.
    pub fn guard(barrier: ReaderBarrier) -> Self {
        match barrier {
            ReaderBarrier::Membarrier => Device::GuardMembarrier,
            _ => Device::Guard,
        }
    }

    /// Name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Device::Guard => "guard",
            Device::GuardMembarrier => "guard, membarrier",
            Device::OneRegion => "GuestMemoryMmap, 1 region",
            Device::Iommu => "IommuMemory",
        }
    }

    /// The candidate that reads a chain of buffers of `len` bytes.
    ///
    /// # Panics
    ///
    /// The candidate panics where the chain cannot be read.
    pub fn reading(self, world: &World, len: u32) -> Candidate<'_> {
        let layout = &world.layout;
        let by_iova = || place(layout, |mapping| layout.iova(mapping));
        let by_gpa = || place(layout, |mapping| layout.gpa(mapping));
        let mut buf = vec![0; len as usize * DESCRIPTORS as usize];
        match self {
            Device::Guard | Device::GuardMembarrier => {
                let space = match self {
                    Device::GuardMembarrier => &world.membarrier,
                    _ => &world.space,
                };
                let mut queue = build(&*space.memory(), &by_iova(), self.rings(), len);
                Candidate::of(self.name(), move || {
                    through_guard(&mut queue, space, &mut buf);
                })
            }
            Device::OneRegion => {
                let memory = &world.memory.one_region;
                let mut queue = build(memory, &by_gpa(), self.rings(), len);
                Candidate::of(self.name(), move || {
                    read_chain(&mut queue, memory, &mut buf);
                })
            }
            Device::Iommu => {
                let memory = &world.iommu;
                let mut queue = build(memory, &by_iova(), self.rings(), len);
                Candidate::of(self.name(), move || {
                    read_chain(&mut queue, memory, &mut buf);
                })
            }
        }
    }

    /// Offset of the rings. It is the same memory for all: each has its own a few pages from the
    /// others'.
    fn rings(self) -> u64 {
        0x4000 + 0x2000 * self as u64
    }
}

/// Offset of the buffers, behind all rings.
const BUFFER: u64 = 0xc000;

/// Where the rings and the buffers are: the start of each one's mapping.
fn place(layout: &Layout, address: impl Fn(u64) -> u64) -> Vec<u64> {
    (0..=DESCRIPTORS)
        .map(|i| address(i * 100 % layout.mappings))
        .collect()
}

fn build<M: GuestMemory>(memory: &M, places: &[u64], rings: u64, len: u32) -> Queue {
    let start = places[0] + rings;
    let mock = MockSplitQueue::create(memory, vm_memory::GuestAddress(start), 16);
    let descriptors: Vec<_> = places[1..]
        .iter()
        .zip(1..)
        .map(|(place, i)| {
            let flags = if u64::from(i) < DESCRIPTORS { NEXT } else { 0 };
            // Where all are in one mapping they are next to each other.
            let address = place + BUFFER + u64::from(i) * u64::from(len);
            RawDescriptor::from(Descriptor::new(address, len, flags, i))
        })
        .collect();
    mock.add_desc_chains(&descriptors, 0).expect("room");
    mock.create_queue().expect("a valid queue")
}

#[inline(never)]
fn through_guard(queue: &mut Queue, space: &IoAddressSpace, buf: &mut [u8]) {
    let guard = space.memory();
    read_chain(queue, &*guard, buf);
}

#[inline(never)]
fn read_chain<M: GuestMemory>(queue: &mut Queue, memory: &M, buf: &mut [u8]) {
    queue.set_next_avail(0);
    let chain = queue.iter(memory).expect("a ready queue").next();
    let mut reader = chain.expect("a chain").reader(memory).expect("readable");
    reader.read_exact(buf).expect("all of it");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::Memory;

    #[test]
    fn a_chain_is_read_again_and_again_in_every_layout() {
        let memory = Memory::new();
        for mappings in [1, 16, 1024] {
            let world = World::new(mappings, &memory);
            for device in Device::ALL {
                device.reading(&world, 512).run(3);
            }
        }
    }
}

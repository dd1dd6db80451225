// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A virtqueue with one chain of descriptors, popped and read again and again.

use std::io::Read;

use vm_memory::{GuestAddressSpace, GuestMemory};

use iommu_type1::IoAddressSpace;
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

/// The candidates: our guard first, then `GuestMemoryMmap` of one region and `IommuMemory`.
///
/// Rings and every buffer of `len` bytes lie in mappings of their own, as far as there are that
/// many.
///
/// # Panics
///
/// The candidates panic where a chain cannot be read.
pub fn candidates(world: &World, len: u32) -> Vec<Candidate<'_>> {
    let layout = &world.layout;
    let by_iova = place(layout, |mapping| layout.iova(mapping));
    let by_gpa = place(layout, |mapping| layout.gpa(mapping));

    // It is the same memory for all: each has its rings a few pages from the others'.
    let mut queue = build(&*world.space.memory(), &by_iova, 0x4000, len);
    let mut mmap_queue = build(&world.memory.one_region, &by_gpa, 0x6000, len);
    let mut iommu_queue = build(&world.iommu, &by_iova, 0x8000, len);
    let mut buf = vec![0; len as usize * DESCRIPTORS as usize];
    let mut mmap_buf = buf.clone();
    let mut iommu_buf = buf.clone();
    vec![
        Candidate::of("guard", move || {
            through_guard(&mut queue, &world.space, &mut buf);
        }),
        Candidate::of("GuestMemoryMmap, 1 region", move || {
            read_chain(&mut mmap_queue, &world.memory.one_region, &mut mmap_buf);
        }),
        Candidate::of("IommuMemory", move || {
            read_chain(&mut iommu_queue, &world.iommu, &mut iommu_buf);
        }),
    ]
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
            for mut candidate in candidates(&world, 512) {
                candidate.run(3);
            }
        }
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device with a split queue behind a vIOMMU: virtio-queue as it is, on an address space. An unmap in the middle of a
//! request waits for the request.

use std::error::Error;
use std::io::{Read, Write};
use std::thread;
use std::time::Duration;

use vfio_dma::iommu::{page_size, Backing, IoAddressSpace};
use virtio_queue::desc::{split::Descriptor, RawDescriptor};
use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestAddressSpace, Permissions};

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Answers a request with its bytes in the other order. One guard for one request: what it has lent is returned when it
/// is dropped, and not before.
fn serve(space: &IoAddressSpace, queue: &mut Queue) -> Result<(), Box<dyn Error>> {
    let guard = space.memory();
    while let Some(chain) = queue.pop_descriptor_chain(guard.clone()) {
        let head = chain.head_index();
        let mut request = Vec::new();
        chain.clone().reader(&*guard)?.read_to_end(&mut request)?;
        request.reverse();
        let mut answer = chain.writer(&*guard)?;
        answer.write_all(&request)?;
        queue.add_used(&*guard, head, request.len() as u32)?;
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    // What the vIOMMU of the VMM does: each page that the guest maps is a mapping.
    let space = IoAddressSpace::builder()
        // A device's thread may not get the processor for a while.
        .unmap_deadline(Duration::from_secs(30))
        .build()
        .named("virtio-net");
    let page = page_size();
    for iova in (0..8).map(|number| 0x8000_0000 + number * page) {
        let memory = Backing::anonymous(page as usize)?;
        space.map(iova, memory, Permissions::ReadWrite)?;
    }
    // What the guest's driver does: a request and room for the answer, both across mappings.
    let (request, answer) = (0x8000_0000 + 4 * page - 3, 0x8000_0000 + 6 * page - 3);
    space.write(request, b"stressed")?;
    let guest_memory = space.memory();
    let guest = MockSplitQueue::create(&*guest_memory, GuestAddress(0x8000_0000), 16);
    let chain = [
        Descriptor::new(request, 8, NEXT, 1),
        Descriptor::new(answer, 8, WRITE, 0),
    ];
    guest.add_desc_chains(&chain.map(RawDescriptor::from), 0)?;
    let mut queue: Queue = guest.create_queue()?;
    drop(guest_memory);

    // The device, beside a guest that unmaps the answer's pages as soon as it likes.
    let device = space.clone();
    let device =
        thread::spawn(move || serve(&device, &mut queue).map_err(|error| error.to_string()));
    let mut bytes = [0; 8];
    while &bytes != b"desserts" {
        space.read(answer, &mut bytes)?;
    }
    let unmapped = space.unmap(answer - (page - 3), 2 * page)?;
    println!(
        "{} ({unmapped:#x} bytes unmapped, nobody uses them)",
        String::from_utf8_lossy(&bytes)
    );
    device.join().map_err(|_| "the device panicked")??;
    Ok(())
}

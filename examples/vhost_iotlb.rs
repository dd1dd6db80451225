// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A vhost back end behind a vIOMMU: rings and buffers are I/O virtual addresses, and what they stand for is asked of
//! the front end.

use std::error::Error;
use std::io::{self, Read};
use std::sync::mpsc::{channel, Sender};
use std::thread;
use std::time::Duration;

use vfio_dma::iommu::{page_size, Backing};
use vhost::{VhostAccess, VhostIotlbMsg, VhostIotlbType};
use vhost_iotlb::{message, MemRegion, MemTable, MissSink, VhostIotlb};
use virtio_queue::desc::{split::Descriptor, RawDescriptor};
use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap, Permissions};

/// Where the front end has the guest's memory, and how much that is.
const USERSPACE: u64 = 0x7f00_0000_0000;
const MEMORY: usize = 0x10_0000;
/// What the vIOMMU adds to a guest physical address, here for all.
const IOVA: u64 = 0x4000_0000;

/// Sends bytes to the front end, as a socket does.
struct Socket(Sender<[u8; message::SIZE]>);

impl MissSink for Socket {
    fn miss(&self, miss: &VhostIotlbMsg) -> io::Result<()> {
        self.0.send(message::encode(miss)).map_err(io::Error::other)
    }
}

/// A request: has the rings and then each buffer translated, holding nothing, and then uses them under one guard.
fn serve(iotlb: &VhostIotlb, queue: &mut Queue) -> Result<Vec<u8>, Box<dyn Error>> {
    let rings = [
        (queue.desc_table(), 16 * usize::from(queue.size())),
        (queue.avail_ring(), 6 + 2 * usize::from(queue.size())),
        (queue.used_ring(), 6 + 8 * usize::from(queue.size())),
    ];
    for (ring, len) in rings {
        iotlb.resolve(ring, len, Permissions::ReadWrite)?;
    }
    let chain = queue.pop_descriptor_chain(iotlb.space().memory());
    let buffers: Vec<_> = chain.ok_or("no chain")?.collect();
    for buffer in buffers {
        let access = match buffer.is_write_only() {
            true => Permissions::Write,
            false => Permissions::Read,
        };
        iotlb.resolve(buffer.addr().0, buffer.len() as usize, access)?;
    }
    // Popped again under the guard that keeps the request's memory: an invalidation waits for it.
    let guard = iotlb.space().memory();
    queue.set_next_avail(queue.next_avail().wrapping_sub(1));
    let chain = queue
        .pop_descriptor_chain(guard.clone())
        .ok_or("no chain")?;
    let (head, mut request) = (chain.head_index(), Vec::new());
    chain.reader(&*guard)?.read_to_end(&mut request)?;
    queue.add_used(&*guard, head, 0)?;
    Ok(request)
}

fn main() -> Result<(), Box<dyn Error>> {
    // The guest: a queue with a request over two pages, by I/O virtual addresses.
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(IOVA), MEMORY)])?;
    let buffer = IOVA + 0x8000 - 6;
    memory.write_slice(b"hello, device", GuestAddress(buffer))?;
    let guest = MockSplitQueue::create(&memory, GuestAddress(IOVA + 0x1000), 16);
    let request = Descriptor::new(buffer, 13, 0, 0);
    guest.add_desc_chains(&[RawDescriptor::from(request)], 0)?;
    let mut queue: Queue = guest.create_queue()?;

    // The back end, and the front end's memory in it.
    let (socket, misses) = channel();
    let iotlb = VhostIotlb::new(Socket(socket)).miss_deadline(Duration::from_secs(30));
    let backing = Backing::from_guest_memory(&memory, GuestAddress(IOVA), MEMORY)?;
    iotlb.set_mem_table(MemTable::new([MemRegion::new(USERSPACE, backing)])?)?;

    // The front end answers misses with pages; a thread reads its messages.
    let from_socket = iotlb.clone();
    thread::spawn(move || -> vhost_iotlb::Result<()> {
        for bytes in misses {
            let miss = message::decode(&bytes)?;
            from_socket.apply(&VhostIotlbMsg {
                size: page_size(),
                userspace_addr: USERSPACE + (miss.iova - IOVA),
                perm: VhostAccess::ReadWrite,
                msg_type: VhostIotlbType::Update,
                ..miss
            })?;
        }
        Ok(())
    });
    let request = serve(&iotlb, &mut queue)?;
    println!("request: {}", String::from_utf8_lossy(&request));
    Ok(())
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device with a split queue behind a vIOMMU: virtio-queue as it is, on our guard.

mod common;

use std::io::{Read, Write};
use std::thread;

use common::deadline::{ended, within};
use common::{at_once, patient};
use iommu_type1::{page_size, Backing, DmaGuard, IoAddressSpace, Profile};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::{GuestAddress, GuestAddressSpace, Permissions};

use Permissions::{Read as ReadOnly, ReadWrite};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Where the rings are, a page of it in each of several mappings.
const RINGS: u64 = 0x10;
/// Where the buffers are.
const BUFFERS: u64 = 0x40;
/// Pages of each.
const PAGES: u64 = 8;

fn p(pages: u64) -> u64 {
    pages * page_size()
}

/// Every page is a mapping of its own, as a guest behind a vIOMMU makes them, and the pages lie in memory in
/// another order.
fn space(profile: Profile) -> IoAddressSpace {
    let space = IoAddressSpace::builder().profile(profile).build();
    for start in [RINGS, BUFFERS] {
        let memory = Backing::anonymous(p(PAGES) as usize).unwrap();
        for page in 0..PAGES {
            let at = p(PAGES - 1 - page) as usize;
            let backing = memory.slice(at, page_size() as usize).unwrap();
            space.map(p(start + page), backing, ReadWrite).unwrap();
        }
    }
    space
}

/// A queue with one chain; its table begins at the end of a page, so it and the rings cross mappings.
fn queue(space: &IoAddressSpace, descriptors: &[(u64, u32, u16)]) -> Queue {
    let guard = space.memory();
    let start = p(RINGS + 1) - 32;
    let mock = MockSplitQueue::create(&*guard, GuestAddress(start), 16);
    let last = descriptors.len() - 1;
    let chain: Vec<_> = descriptors
        .iter()
        .enumerate()
        .map(|(i, (address, len, flags))| {
            let next = if i < last { NEXT } else { 0 };
            let descriptor = Descriptor::new(*address, *len, flags | next, i as u16 + 1);
            RawDescriptor::from(descriptor)
        })
        .collect();
    mock.add_desc_chains(&chain, 0).unwrap();
    mock.create_queue().unwrap()
}

fn pop(queue: &mut Queue, guard: &DmaGuard) -> DescriptorChain<DmaGuard> {
    assert!(queue.is_valid(&**guard));
    queue.pop_descriptor_chain(guard.clone()).expect("a chain")
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 251) as u8).collect()
}

#[test]
fn a_device_runs_unchanged_on_chains_that_cross_mappings() {
    for profile in [Profile::Type1v2, Profile::Iommufd, Profile::Iotlb] {
        let space = space(profile);
        // Both cross two ends of mappings.
        let from = p(BUFFERS + 1) - 100;
        let to = p(BUFFERS + 5) - 50;
        let len = p(1) as u32 + 300;
        let mut queue = queue(
            &space,
            &[(from, 60, 0), (from + 60, len - 60, 0), (to, len, WRITE)],
        );
        let sent = pattern(len as usize);
        space.write(from, &sent).unwrap();

        let guard = space.memory();
        let chain = pop(&mut queue, &guard);
        let head = chain.head_index();
        let mut reader = chain.clone().reader(&*guard).unwrap();
        let mut writer = chain.writer(&*guard).unwrap();
        assert_eq!(reader.available_bytes(), len as usize);
        let mut got = vec![0; len as usize];
        reader.read_exact(&mut got).unwrap();
        assert_eq!(got, sent);
        got.reverse();
        writer.write_all(&got).unwrap();
        queue.add_used(&*guard, head, len).unwrap();
        assert!(queue.pop_descriptor_chain(guard.clone()).is_none());

        let mut answer = vec![0; len as usize];
        space.read(to, &mut answer).unwrap();
        answer.reverse();
        assert_eq!(answer, sent, "{profile:?}");
        drop(guard);
        space.unmap_with(0, p(0x100), at_once()).unwrap();
        assert_eq!(space.mappings(), 0);
    }
}

#[test]
fn a_table_of_indirect_descriptors_crosses_mappings() {
    let space = space(Profile::Type1v2);
    let table = p(BUFFERS + 1) - 24;
    let buffer = p(BUFFERS + 3) - 8;
    for i in 0..2_u64 {
        let mut raw = Vec::new();
        raw.extend((buffer + 8 * i).to_le_bytes());
        raw.extend(8_u32.to_le_bytes());
        raw.extend(if i == 0 { NEXT } else { 0 }.to_le_bytes());
        raw.extend(1_u16.to_le_bytes());
        space.write(table + 16 * i, &raw).unwrap();
    }
    space.write(buffer, b"0123456789abcdef").unwrap();
    let mut queue = queue(&space, &[(table, 32, INDIRECT)]);
    let guard = space.memory();
    let mut reader = pop(&mut queue, &guard).reader(&*guard).unwrap();
    let mut got = [0; 16];
    reader.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"0123456789abcdef");
}

/// Behind vm-memory's `IommuMemory` an invalidation may end while a request still copies, as `Reader` and `Writer`
/// keep slices and let the IOTLB's guard go.
#[test]
fn an_unmap_in_the_middle_of_a_request_waits_for_it_and_no_other_unmap_does() {
    let space = space(Profile::Type1v2);
    let (from, to) = (p(BUFFERS + 1) - 8, p(BUFFERS + 4) - 8);
    let mut queue = queue(&space, &[(from, 16, 0), (to, 16, WRITE)]);
    space.write(from, b"before the unmap").unwrap();

    let guard = space.memory();
    let chain = pop(&mut queue, &guard);
    let mut reader = chain.clone().reader(&*guard).unwrap();
    let mut writer = chain.writer(&*guard).unwrap();
    let mut first = [0; 4];
    reader.read_exact(&mut first).unwrap();

    let unmapping = space.clone();
    let unmapper = thread::spawn(move || unmapping.unmap_with(p(BUFFERS), p(5), patient()));
    within("nobody else finds buffers that are being unmapped", || {
        space.read(from, &mut [0]).is_err()
    });
    let again = space.unmap_with(p(BUFFERS + 1), p(1), at_once());
    assert_eq!(again.unwrap_err().errno(), libc::EBUSY);
    // Elsewhere nobody has to wait, and what is free there is free at once.
    for page in [5, 6, 7] {
        let unmapped = space.unmap_with(p(BUFFERS + page), p(1), at_once());
        assert_eq!(unmapped.unwrap(), p(1));
    }
    let backing = Backing::anonymous(page_size() as usize).unwrap();
    space.map(p(BUFFERS + 6), backing, ReadOnly).unwrap();

    // The request goes on, over the end of a mapping.
    assert!(!unmapper.is_finished());
    let mut rest = [0; 12];
    reader.read_exact(&mut rest).unwrap();
    assert_eq!([&first[..], &rest].concat(), b"before the unmap");
    writer.write_all(b"while it unmaps ").unwrap();
    assert!(!unmapper.is_finished());
    drop(guard);
    let unmapped = ended("an unmap ends with the request", unmapper);
    assert_eq!(unmapped.unwrap(), p(5));
    assert_eq!(
        space.read(from, &mut [0]).unwrap_err().errno(),
        libc::EINVAL
    );
}

#[test]
fn a_request_that_does_not_end_is_named_at_the_deadline() {
    let space = space(Profile::Type1v2).named("virtio-blk");
    let from = p(BUFFERS + 1) - 8;
    let mut queue = queue(&space, &[(from, 16, 0)]);
    let guard = space.memory();
    let _reader = pop(&mut queue, &guard).reader(&*guard).unwrap();
    let error = space.unmap_with(p(BUFFERS), p(8), at_once()).unwrap_err();
    assert!(error.to_string().contains("virtio-blk leases"), "{error}");
    // The reader has pages 0 and 1, and these are what is left.
    assert!(matches!(error, iommu_type1::Error::Deadline { left, .. } if left == p(2)));
}

#[test]
fn a_chain_that_the_device_may_not_use_is_an_error() {
    let space = space(Profile::Type1v2);
    space.unmap(p(BUFFERS), p(2)).unwrap();
    let backing = Backing::anonymous(page_size() as usize).unwrap();
    space.map(p(BUFFERS), backing, ReadOnly).unwrap();
    let hole = p(BUFFERS + 1) - 8;
    let wrong = [(hole, 16, 0), (p(BUFFERS), 8, WRITE), (u64::MAX - 7, 16, 0)];
    for (address, len, flags) in wrong {
        let mut queue = queue(&space, &[(address, len, flags)]);
        let guard = space.memory();
        let chain = pop(&mut queue, &guard);
        match flags {
            WRITE => assert!(chain.writer(&*guard).is_err()),
            _ => assert!(chain.reader(&*guard).is_err()),
        }
    }
}

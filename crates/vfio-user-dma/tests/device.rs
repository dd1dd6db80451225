// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a device has of the table: vm-memory's traits, pins, what it is told.

mod common;

use std::io::{self, Cursor};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use common::deadline::ended;
use common::{memfd, Client, Served, Told, PAGE, READ_WRITE};
use iommu_type1::{Interest, PinPages};
use vfio_user_dma::wire::{command, flags, DmaAccess};
use vfio_user_dma::{AccessError, DmaTable, Error, TablePin};
use vm_memory::{Bytes, GuestAddress, Permissions};

/// Answers the next `questions` about memory from `base` on, but those that ask for the layout.
fn answer(client: &mut Client, memory: &mut [u8], base: u64, mut questions: usize) {
    while questions > 0 {
        let asked = client.receive();
        let (access, data) = DmaAccess::decode(&asked.body).unwrap();
        if access.count > u32::MAX.into() {
            client.reply(&asked, flags::ERROR, libc::EINVAL as u32, &[]);
            continue;
        }
        questions -= 1;
        let at = (access.address - base) as usize;
        let memory = &mut memory[at..at + access.count as usize];
        let mut body = asked.body[..DmaAccess::SIZE].to_vec();
        match asked.header.command {
            command::DMA_WRITE => memory.copy_from_slice(data),
            _ => body.extend_from_slice(memory),
        }
        client.reply(&asked, 0, 0, &body);
    }
}

#[test]
fn whatever_takes_guest_memory_takes_memory_of_both_kinds() {
    let mut served = Served::new();
    let file = memfd(1);
    assert_eq!(served.client.map(0x1000, PAGE, 0, Some(&file)), 0);
    assert_eq!(served.client.map(0x2000, PAGE, 0, None), 0);
    let dma = served.table.handle();
    let device = thread::spawn(move || {
        let edge = GuestAddress(0x1ffc);
        // Of both, up to where there is nothing.
        let (mut long, all) = (&[4_u8; 0x3000][..], 8 + PAGE as usize);
        let filled = dma.read_volatile_from(GuestAddress(0x1ff8), &mut long, 0x3000);
        assert_eq!((filled.unwrap(), long.len()), (all, 0x3000 - all));
        // Four bytes of each kind: one message each.
        dma.write_obj(0x1122_3344_5566_7788_u64, edge).unwrap();
        assert_eq!(dma.read_obj::<u64>(edge).unwrap(), 0x1122_3344_5566_7788);
        dma.store(7_u32, GuestAddress(0x1ff8), Ordering::Release)
            .unwrap();
        assert_eq!(
            dma.load::<u32>(GuestAddress(0x1ff8), Ordering::Acquire)
                .unwrap(),
            7
        );
        dma.store(9_u16, GuestAddress(0x2010), Ordering::Release)
            .unwrap();
        assert_eq!(
            dma.load::<u16>(GuestAddress(0x2010), Ordering::Acquire)
                .unwrap(),
            9
        );
        let mut source = &[3_u8; 16][..];
        dma.read_exact_volatile_from(GuestAddress(0x1ff8), &mut source, 16)
            .unwrap();
        let mut sink = Vec::new();
        dma.write_all_volatile_to(GuestAddress(0x1ff8), &mut sink, 16)
            .unwrap();
        assert_eq!(sink, [3; 16]);
        // Fewer bytes are no error where fewer may be.
        let mut short = &[5_u8; 4][..];
        assert_eq!(
            dma.read_volatile_from(GuestAddress(0x1000), &mut short, 8)
                .unwrap(),
            4
        );
        let error = dma
            .read_exact_volatile_from(GuestAddress(0x1000), &mut Cursor::new(vec![1; 3]), 8)
            .unwrap_err();
        assert!(
            matches!(error, Error::Stream { completed: 0, .. }),
            "{error}"
        );
        assert_eq!(
            Bytes::write(&dma, &[1; 8], GuestAddress(0x2ffc)).unwrap(),
            4
        );
        let nothing = dma.load::<u32>(GuestAddress(0x4000), Ordering::Acquire);
        assert_eq!(nothing.unwrap_err().errno(), libc::EINVAL);
        let askew = dma.load::<u32>(GuestAddress(0x1002), Ordering::Acquire);
        assert!(matches!(askew, Err(Error::Access { iova: 0x1002, .. })));
    });
    let mut memory = vec![0; PAGE as usize];
    answer(&mut served.client, &mut memory, 0x2000, 8);
    ended("accesses end when they are answered", device);
    assert_eq!(memory[..8], [3; 8]);
    assert_eq!(memory[0x10..0x12], [9, 0]);
    assert_eq!(memory[0x12..0xffc], [4; 0xfea]);
    assert_eq!(memory[0xffc..], [1; 4]);
    served.end().unwrap();
}

#[test]
fn streams_that_stop_say_how_far_they_came() {
    let table = DmaTable::new().unwrap();
    let size = 40 * PAGE as usize;
    let file = Some(memfd(40).into());
    table.map(READ_WRITE, 0, 0, size as u64, file).unwrap();
    let (dma, at) = (table.handle(), GuestAddress(PAGE));
    let (rest, more) = (size - PAGE as usize, size);
    let error = dma.read_exact_volatile_from(at, &mut &vec![1; more][..], more);
    assert_eq!(error.unwrap_err().completed(), rest);
    // What there is no room for stays where it is.
    let source = vec![2; more];
    let mut left = &source[..];
    let filled = dma.read_volatile_from(at, &mut left, more);
    assert_eq!((filled.unwrap(), left.len()), (rest, more - rest));
    let full = dma.read_volatile_from(GuestAddress(size as u64), &mut left, more);
    assert_eq!(full.unwrap_err().errno(), libc::EINVAL);
    assert_eq!(left.len(), more - rest);
    // What could not be handed on as a whole was not: whole pieces are.
    let mut sink = Vec::new();
    let error = dma.write_all_volatile_to(at, &mut sink, more).unwrap_err();
    assert_eq!(error.completed(), sink.len());
    let mut sink = Vec::new();
    let drained = dma.write_volatile_to(at, &mut sink, more).unwrap();
    assert_eq!(sink.len(), drained);
    assert!(sink.len() > more / 2 && sink.iter().all(|byte| *byte == 2));
}

#[test]
fn pins_are_let_go_by_their_notice_and_hold_nothing_without_a_file() {
    let table = DmaTable::builder()
        .unmap_deadline(Duration::from_millis(50))
        .build()
        .unwrap();
    let file = memfd(4);
    let fd = || Some(file.try_clone().unwrap().into());
    table.map(READ_WRITE, 0, 0x1000, 2 * PAGE, fd()).unwrap();
    table.map(1, 0, 0x3000, PAGE, None).unwrap();
    table.map(READ_WRITE, 0, 0x4000, PAGE, None).unwrap();
    let held: Arc<Mutex<Vec<TablePin>>> = Arc::default();
    let told = Arc::new(Mutex::new(Vec::new()));
    let notice = {
        let (held, told) = (held.clone(), told.clone());
        move |iova: u64, size: u64| {
            told.lock().unwrap().push((iova, size));
            held.lock().unwrap().clear();
        }
    };
    let pins = table.pins("gpu", Interest::Holder, Arc::new(notice));
    let pin = |iova, pages, prot| pins.pin_pages(iova, pages, prot);
    let both = Permissions::ReadWrite;
    let pinned = pin(0x1000, 2, both).unwrap();
    assert!(pinned.is_held());
    assert_eq!(pinned.pages().map(|pages| pages.npages()), Some(2));
    // Read only, of both kinds, beyond the end, nothing.
    for (iova, pages) in [
        (0x3000, 1),
        (0x3000, 2),
        (0x2000, 2),
        (0x4000, 2),
        (0x5000, 1),
    ] {
        assert!(pin(iova, pages, both).is_err(), "{iova:#x}");
    }
    assert!(pin(u64::MAX - PAGE + 1, 1, both).is_err());
    assert_eq!(pin(0x3000, 0, both).unwrap_err().errno(), libc::EINVAL);
    let kept = pin(0x3000, 2, Permissions::Read).unwrap();
    assert!(!kept.is_held() && kept.pages().is_none());
    assert_eq!(table.unmap(0, 0x3000, 2 * PAGE).unwrap(), 2 * PAGE);
    assert!(told.lock().unwrap().is_empty());

    let error = table.unmap(0, 0x1000, 2 * PAGE).unwrap_err();
    assert!(error.to_string().contains("gpu"), "{error}");
    drop(pinned);
    table.unmap(0, 0x1000, 2 * PAGE).unwrap();
    table.map(READ_WRITE, 0, 0x1000, PAGE, fd()).unwrap();
    let pinned = pin(0x1000, 1, both).unwrap();
    held.lock().unwrap().push(pinned);
    told.lock().unwrap().clear();
    assert_eq!(table.unmap(0, 0x1000, PAGE).unwrap(), PAGE);
    assert_eq!(*told.lock().unwrap(), [(0x1000, PAGE)]);
}

#[test]
fn what_waits_for_the_client_can_be_ended() {
    let mut served = Served::new();
    assert_eq!(served.client.map(0x1000, PAGE, 0, None), 0);
    let dma = served.table.handle();
    let device = thread::spawn(move || dma.read(0x1000, &mut [0; 4]));
    let asked = served.client.receive();
    served.table.cancel_messages();
    let error = ended("an access ends when messages are cancelled", device).unwrap_err();
    assert_eq!(error.errno(), libc::ECANCELED);
    assert!(matches!(
        error,
        Error::Access {
            cause: AccessError::Canceled,
            ..
        }
    ));
    served
        .client
        .reply(&asked, flags::ERROR, libc::EINVAL as u32, &[]);
    served.client.assert_in_step();
    served.end().unwrap();
}

#[test]
fn a_device_is_told_of_maps_and_unmaps_that_were_done() {
    let told = Arc::new(Mutex::new(Vec::new()));
    let (mut client, thread) = {
        let told = told.clone();
        common::serve_plain(move |_, what| {
            match what {
                Told::Mapped(address, size) => told.lock().unwrap().push((true, address, size)),
                Told::Unmapped(address, size) => told.lock().unwrap().push((false, address, size)),
                _ => {}
            }
            Ok(())
        })
    };
    assert_eq!(client.map(0x1000, PAGE, 0, None), 0);
    assert_eq!(client.map(0x1000, PAGE, 0, None), libc::EEXIST);
    assert_eq!(client.unmap(0, 0x1000, PAGE), Ok(PAGE));
    assert_eq!(client.unmap(0, 0x1000, 1), Err(libc::EINVAL));
    assert_eq!(client.unmap(2, 0, 0), Ok(0));
    drop(client);
    ended("a server ends with its client", thread).unwrap();
    let all = [
        (true, 0x1000, PAGE),
        (false, 0x1000, PAGE),
        (false, 0, u64::MAX),
    ];
    assert_eq!(*told.lock().unwrap(), all);
}

#[test]
fn errors_of_a_device_have_an_errno_also_in_words() {
    let errors: [(fn() -> io::Error, i32); 6] = [
        (|| io::Error::from_raw_os_error(libc::ENXIO), libc::ENXIO),
        (|| io::ErrorKind::InvalidInput.into(), libc::EINVAL),
        (|| io::ErrorKind::PermissionDenied.into(), libc::EPERM),
        (
            || io::Error::new(io::ErrorKind::ResourceBusy, "it runs"),
            libc::EBUSY,
        ),
        (|| io::ErrorKind::UnexpectedEof.into(), libc::EIO),
        (|| io::Error::other("the engine hangs"), libc::EIO),
    ];
    let (mut client, thread) = common::serve_plain(move |_, what| match what {
        Told::Read(index, _) => Err((errors[index as usize].0)()),
        _ => Ok(()),
    });
    for (index, (_, errno)) in errors.iter().enumerate() {
        assert_eq!(client.region_read(0, index as u64, 1), Err(*errno));
    }
    drop(client);
    ended("a server ends with its client", thread).unwrap();
}

#[cfg(feature = "sigbus")]
#[test]
fn a_client_that_shrinks_its_file_gets_errors_and_another_chance() {
    let table = DmaTable::builder().guard_files(true).build().unwrap();
    let file = memfd(4);
    let fd = || Some(file.try_clone().unwrap().into());
    table.map(READ_WRITE, 0, 0, 4 * PAGE, fd()).unwrap();
    table.write(0, &vec![1; 4 * PAGE as usize]).unwrap();
    file.set_len(PAGE).unwrap();
    let error = table.read(0, &mut vec![0; 4 * PAGE as usize]).unwrap_err();
    assert_eq!(
        (error.errno(), error.completed()),
        (libc::EFAULT, PAGE as usize)
    );
    file.set_len(4 * PAGE).unwrap();
    // Beside what is bad, the same file is good again.
    table.map(READ_WRITE, 0, 8 * PAGE, 4 * PAGE, fd()).unwrap();
    let mut bytes = [9; 4];
    table.read(9 * PAGE, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 4]);
    assert_eq!(
        table.read(PAGE, &mut bytes).unwrap_err().errno(),
        libc::EFAULT
    );
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Every message, right and wrong.

mod common;

use std::os::fd::AsFd;
use std::time::Duration;

use common::deadline::ended;
use common::{map_body, memfd, receive_fd, Client, Served, PAGE, READ_WRITE};
use vfio_user_dma::wire::{self, command, flags, Header};
use vfio_user_dma::{Capabilities, DmaTable, End, Error};

fn encoded(encode: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode(&mut bytes);
    bytes
}

#[test]
fn a_normal_life() {
    let table = DmaTable::new().unwrap();
    let mut served = Served::silent(table, |server| server);
    let client = &mut served.client;
    let reply = client.version(Capabilities::default());
    let (version, text) = wire::Version::decode(&reply.body).unwrap();
    assert_eq!((version.major, version.minor), (0, 0));
    let capabilities = Capabilities::parse(text).unwrap();
    assert_eq!(
        (capabilities.max_msg_fds, capabilities.max_data_xfer_size),
        (16, 1 << 20)
    );

    let info = wire::DeviceInfo {
        argsz: 16,
        ..Default::default()
    };
    let reply = client.call(
        command::DEVICE_GET_INFO,
        &encoded(|bytes| info.encode(bytes)),
    );
    let (info, _) = wire::DeviceInfo::decode(&reply.body).unwrap();
    assert_eq!((info.flags, info.num_regions, info.num_irqs), (3, 3, 2));

    let info = wire::IrqInfo {
        argsz: 16,
        index: 1,
        ..Default::default()
    };
    let reply = client.call(
        command::DEVICE_GET_IRQ_INFO,
        &encoded(|bytes| info.encode(bytes)),
    );
    let (info, _) = wire::IrqInfo::decode(&reply.body).unwrap();
    assert_eq!((info.flags, info.count), (9, 32));

    let memory = memfd(16);
    assert_eq!(client.map(0x10_0000, 4 * PAGE, 2 * PAGE, Some(&memory)), 0);
    assert_eq!(client.map(0x10_1000, PAGE, 0, Some(&memory)), libc::EEXIST);
    assert_eq!(client.map(0x10_1000, PAGE, 0, None), libc::EEXIST);
    let mut number = [0; 8];
    served.table.handle().read(0x10_1000, &mut number).unwrap();
    assert_eq!(u64::from_le_bytes(number), 3);
    assert_eq!(client.unmap(0, 0x10_0000, 2 * PAGE), Err(libc::EINVAL));
    assert_eq!(client.unmap(0, 0x10_0000, 4 * PAGE), Ok(4 * PAGE));
    assert_eq!(client.unmap(0, 0x10_0000, 4 * PAGE), Ok(0));

    client.assert_in_step();
    assert_eq!(client.region_read(1, 0, 4), Err(libc::ENXIO));
    assert_eq!(client.call(command::DEVICE_RESET, &[]).errno(), 0);
    let event = common::eventfd();
    let set = wire::IrqSet {
        argsz: 20,
        flags: 4 | 32,
        index: 1,
        start: 3,
        count: 1,
    };
    let body = encoded(|bytes| set.encode(bytes));
    assert_eq!(
        client
            .call_with(command::DEVICE_SET_IRQS, &body, &[event.as_fd()])
            .errno(),
        0
    );
    let seen = served.seen.clone();
    assert_eq!(served.end().unwrap(), End::Closed);
    let seen = seen.lock().unwrap();
    assert_eq!(seen[0], "reset");
    assert!(
        seen[1].starts_with("Trigger 1 3+1 Eventfd([IrqEventfd"),
        "{}",
        seen[1]
    );
}

#[test]
fn regions_that_can_be_mapped_in_parts() {
    let mut served = Served::new();
    let client = &mut served.client;
    let ask = |argsz| {
        let info = wire::RegionInfo {
            argsz,
            index: 1,
            ..Default::default()
        };
        encoded(|bytes| info.encode(bytes))
    };
    // Without room for the areas it says how much they take.
    let reply = client.call(command::DEVICE_GET_REGION_INFO, &ask(32));
    let (info, rest) = wire::RegionInfo::decode(&reply.body).unwrap();
    assert_eq!((info.argsz, info.cap_offset, rest.len()), (80, 0, 0));
    assert_eq!(
        (info.flags, info.size, info.offset),
        (1 | 2 | 4 | 8, 3 * PAGE, PAGE)
    );

    client.send(command::DEVICE_GET_REGION_INFO, &ask(80));
    let (first, fd) = receive_fd(&client.stream);
    assert!(fd.is_some());
    let mut rest = [0; 95];
    std::io::Read::read_exact(&mut client.stream, &mut rest).unwrap();
    let reply = [&[first][..], &rest].concat();
    let (info, caps) = wire::RegionInfo::decode(&reply[16..]).unwrap();
    assert_eq!((info.argsz, info.cap_offset), (80, 32));
    let (cap, areas) = wire::SparseMmap::decode(caps).unwrap();
    assert_eq!((cap.id, cap.version, cap.next, cap.nr_areas), (1, 1, 0, 2));
    let (area, _) = wire::SparseArea::decode(&areas[16..]).unwrap();
    assert_eq!((area.offset, area.size), (2 * PAGE, PAGE));
    client.assert_in_step();
    served.end().unwrap();
}

#[test]
fn every_command_with_wrong_sizes_is_an_error_and_nothing_worse() {
    let mut served = Served::new();
    let client = &mut served.client;
    let sizes = (0..=64).chain([
        4096,
        65535,
        (1 << 20) + 16,
        (1 << 20) + 48,
        (1 << 20) + 49,
        3 << 20,
    ]);
    for size in sizes {
        for command in (0..=20).chain([u16::MAX]) {
            for fill in [0, 0xff] {
                if (command, size) == (command::DEVICE_RESET, 0) {
                    continue;
                }
                let reply = client.call(command, &vec![fill; size]);
                // What happens to be right: an access of no bytes, a question with room for the answer.
                let harmless = match command {
                    command::REGION_READ | command::REGION_WRITE => size == 16 && fill == 0,
                    command::DEVICE_GET_INFO => (16..=24).contains(&size) && fill == 0xff,
                    _ => false,
                };
                assert_eq!(
                    reply.errno() == 0,
                    harmless,
                    "command {command}, {size} bytes of {fill}"
                );
                assert!(
                    matches!(reply.errno(), 0 | libc::EINVAL | libc::EOPNOTSUPP),
                    "{reply:?}"
                );
            }
        }
        client.assert_in_step();
    }
    assert!(!served.seen.lock().unwrap().contains(&"reset".to_owned()));
    served.end().unwrap();
}

#[test]
fn a_message_shorter_than_its_header_ends_the_connection() {
    for message_size in [0, 1, 15] {
        let mut served = Served::new();
        let header = Header {
            command: command::DEVICE_RESET,
            message_size,
            ..Header::default()
        };
        let bytes = encoded(|bytes| header.encode(bytes));
        common::send_with_fds(&served.client.stream, &bytes, &[]);
        assert!(served.client.try_receive().is_err());
        assert!(matches!(served.join(), Err(Error::Malformed(_))));
    }
}

#[test]
fn versions_that_are_none_can_be_tried_again() {
    let mut served = Served::silent(DmaTable::new().unwrap(), |server| server);
    let client = &mut served.client;
    assert_eq!(
        client.call(command::DEVICE_RESET, &[]).errno(),
        libc::EINVAL
    );
    assert_eq!(
        client
            .call(command::DMA_MAP, &map_body(3, 0, PAGE, 0))
            .errno(),
        libc::EINVAL
    );
    let wrong: [&[u8]; 12] = [
        b"",
        b"\0",
        b"\0\0\0",
        b"\x01\0\0\0",
        b"\0\0\0\0{",
        b"\0\0\0\0[]\0",
        b"\0\0\0\0{}\0\0",
        b"\0\0\0\0\xff\xfe\0",
        b"\0\0\0\0{\"capabilities\":7}\0",
        b"\0\0\0\0{\"capabilities\":{\"max_data_xfer_size\":0}}\0",
        b"\0\0\0\0{\"capabilities\":{\"max_data_xfer_size\":-1}}\0",
        b"\0\0\0\0{\"capabilities\":{\"max_msg_fds\":4294967296}}\0",
    ];
    for body in wrong {
        assert_eq!(
            client.call(command::VERSION, body).errno(),
            libc::EINVAL,
            "{body:?}"
        );
    }
    let deep = [&[0; 4][..], &[b'['; 4000]].concat();
    assert_eq!(client.call(command::VERSION, &deep).errno(), libc::EINVAL);
    assert_eq!(
        client.call(command::VERSION, &vec![b' '; 100_000]).errno(),
        libc::EINVAL
    );
    // Nothing but the numbers is a version too, and the newest of both is spoken.
    let reply = client.call(command::VERSION, &[0, 0, 9, 0]);
    assert_eq!((reply.errno(), &reply.body[..4]), (0, &[0, 0, 1, 0][..]));
    assert_eq!(
        client.version(Capabilities::default()).errno(),
        libc::EINVAL
    );
    client.assert_in_step();
    served.end().unwrap();
}

#[test]
fn what_needs_no_reply_gets_none() {
    let mut served = Served::new();
    let client = &mut served.client;
    for command in 0..20 {
        client.send_all(command, flags::NO_REPLY, &[0xff; 100], &[]);
    }
    client.send_all(
        command::DMA_MAP,
        flags::NO_REPLY,
        &map_body(READ_WRITE, 0, PAGE, 0),
        &[],
    );
    assert_eq!(client.unmap(0, 0, PAGE), Ok(PAGE));
    // Neither do replies to nothing.
    client.send_all(command::DMA_READ, flags::REPLY, &[0; 32], &[]);
    assert_eq!(
        client.call(command::DEVICE_GET_REGION_IO_FDS, &[]).errno(),
        libc::EOPNOTSUPP
    );
    assert_eq!(
        client.call(command::REGION_WRITE_MULTI, &[]).errno(),
        libc::EOPNOTSUPP
    );
    client.assert_in_step();
    served.end().unwrap();
}

#[test]
fn accesses_stay_inside_of_regions() {
    let mut served = Served::new();
    let client = &mut served.client;
    let size = 2 << 20;
    assert_eq!(client.region_read(0, size, 0), Ok(vec![]));
    assert_eq!(
        client.region_read(0, size - 4, 4).map(|data| data.len()),
        Ok(4)
    );
    for (region, offset, count) in [
        (0, size - 3, 4),
        (0, u64::MAX, 1),
        (0, 0, (1 << 20) + 1),
        (2, 0, 1),
        (3, 0, 1),
    ] {
        assert_eq!(client.region_read(region, offset, count), Err(libc::EINVAL));
    }
    assert_eq!(client.region_write(0, size - 3, &[1; 4]), libc::EINVAL);
    assert_eq!(client.region_write(2, 0, &[1; 4]), libc::EINVAL);
    client.assert_in_step();
    served.end().unwrap();
}

#[test]
fn interrupts_are_checked_as_the_kernel_checks_them() {
    let mut served = Served::new();
    let client = &mut served.client;
    let event = common::eventfd();
    let mut set = |flags, index, start, count, data: &[u8], fds: usize| {
        let set = wire::IrqSet {
            argsz: 20,
            flags,
            index,
            start,
            count,
        };
        let body = encoded(|bytes| {
            set.encode(bytes);
            bytes.extend_from_slice(data);
        });
        client
            .call_with(command::DEVICE_SET_IRQS, &body, &vec![event.as_fd(); fds])
            .errno()
    };
    let (none, boolean, eventfd, mask, trigger) = (1, 2, 4, 8, 32);
    assert_eq!(set(none | trigger, 1, 0, 0, &[], 0), 0);
    assert_eq!(set(boolean | trigger, 1, 0, 2, &[1, 0], 0), 0);
    assert_eq!(set(eventfd | trigger, 1, 30, 2, &[], 2), 0);
    assert_eq!(set(eventfd | trigger, 1, 30, 2, &[], 0), 0);
    for refused in [
        set(none | mask, 1, 0, 0, &[], 0),
        set(none | mask | trigger, 1, 0, 1, &[], 0),
        set(none | boolean | trigger, 1, 0, 1, &[], 0),
        set(trigger, 1, 0, 1, &[], 0),
        set(none, 1, 0, 1, &[], 0),
        set(64 | none | trigger, 1, 0, 1, &[], 0),
        set(boolean | trigger, 1, 0, 2, &[1], 0),
        set(none | trigger, 1, 0, 1, &[1], 0),
        set(eventfd | trigger, 1, 0, 2, &[], 1),
        set(eventfd | trigger, 1, 0, 0, &[], 0),
        set(none | trigger, 1, 31, 2, &[], 0),
        set(none | trigger, 1, u32::MAX, 2, &[], 0),
        set(none | trigger, 2, 0, 1, &[], 0),
    ] {
        assert_eq!(refused, libc::EINVAL);
    }
    // Any other file might keep the device when it writes there.
    let set = wire::IrqSet {
        argsz: 20,
        flags: eventfd | trigger,
        index: 1,
        start: 0,
        count: 1,
    };
    let body = encoded(|bytes| set.encode(bytes));
    let file = memfd(1);
    let reply = client.call_with(command::DEVICE_SET_IRQS, &body, &[file.as_fd()]);
    assert_eq!(reply.errno(), libc::EINVAL);
    assert_eq!(served.seen.lock().unwrap().len(), 4);
    served.client.assert_in_step();
    served.end().unwrap();
}

#[test]
fn a_client_that_stops_in_the_middle_is_cut_off() {
    let table = DmaTable::new().unwrap();
    let quick = |server: vfio_user_dma::Server| server.io_deadline(Duration::from_millis(50));
    // In the middle of a header, of a body, and of a body that nobody wants.
    for (size, sent) in [(100, 7), (100, 60), (u32::MAX, 100_000)] {
        let served = Served::with(table.clone(), quick, Capabilities::default());
        let header = Header {
            command: command::DEVICE_RESET,
            message_size: size,
            ..Header::default()
        };
        let mut bytes = encoded(|bytes| header.encode(bytes));
        bytes.resize(sent, 0);
        // One that is late in the middle of this is cut off then.
        let _ = std::io::Write::write_all(&mut &served.client.stream, &bytes);
        assert!(matches!(served.join(), Err(error) if error.errno() == libc::ETIMEDOUT));
    }
    // It may as well say nothing for longer than that.
    let mut served = Served::with(table, quick, Capabilities::default());
    std::thread::sleep(Duration::from_millis(200));
    served.client.assert_in_step();
    served.end().unwrap();
}

#[test]
fn a_client_may_be_given_all_the_time_there_is() {
    let patient = |server: vfio_user_dma::Server| server.io_deadline(Duration::MAX);
    let mut served = Served::with(DmaTable::new().unwrap(), patient, Capabilities::default());
    let header = Header {
        command: command::DEVICE_RESET,
        ..Header::default()
    };
    let bytes = wire::message(header, |_| ());
    for part in bytes.chunks(7) {
        common::send_with_fds(&served.client.stream, part, &[]);
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(served.client.receive().errno(), 0);
    served.end().unwrap();
}

#[test]
fn a_client_that_takes_no_answers_is_cut_off() {
    let quick = |server: vfio_user_dma::Server| server.io_deadline(Duration::from_millis(50));
    let served = Served::with(DmaTable::new().unwrap(), quick, Capabilities::default());
    served
        .client
        .stream
        .set_write_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let access = wire::RegionAccess {
        offset: 0,
        region: 0,
        count: 1 << 20,
    };
    let header = Header {
        command: command::REGION_READ,
        ..Header::default()
    };
    let bytes = wire::message(header, |bytes| access.encode(bytes));
    // Until the server has gone: it does not take all of it.
    let mut sent = 0;
    while std::io::Write::write_all(&mut &served.client.stream, &bytes).is_ok() {
        sent += 1;
        assert!(sent < 1_000_000);
    }
    assert!(matches!(served.join(), Err(error) if error.errno() == libc::ETIMEDOUT));
}

#[test]
fn a_client_that_goes_in_the_middle_of_an_answer_is_gone() {
    for received in [0, 1, 16, 40, 200_000] {
        let mut served = Served::new();
        let file = memfd(1);
        assert_eq!(served.client.map(0, PAGE, 0, Some(&file)), 0);
        let access = wire::RegionAccess {
            offset: 0,
            region: 0,
            count: 1 << 20,
        };
        let body = encoded(|bytes| access.encode(bytes));
        served.client.send(command::REGION_READ, &body);
        served.client.send(command::REGION_READ, &body);
        let mut bytes = vec![0; received];
        std::io::Read::read_exact(&mut served.client.stream, &mut bytes).unwrap();
        assert_eq!(served.end().unwrap(), End::Closed, "{received}");
    }
}

#[test]
fn migration_is_not_announced_also_to_a_client_that_migrates() {
    let mut served = Served::silent(DmaTable::new().unwrap(), |server| server);
    let reply = served.client.version(Capabilities {
        migration_pgsize: Some(PAGE),
        ..Capabilities::default()
    });
    assert_eq!(reply.errno(), 0);
    let text = &reply.body[wire::Version::SIZE..];
    assert!(!String::from_utf8_lossy(text).contains("migration"));
    assert_eq!(Capabilities::parse(text).unwrap().migration_pgsize, None);
    served.end().unwrap();
}

#[test]
fn a_client_is_told_of_fewer_mappings() {
    for (limit, told) in [(7, 7), (65535, 65535), (1 << 20, 65535)] {
        let table = DmaTable::builder().entry_limit(limit).build().unwrap();
        let mut served = Served::silent(table, |server| server);
        let reply = served.client.version(Capabilities::default());
        let capabilities = Capabilities::parse(&reply.body[wire::Version::SIZE..]).unwrap();
        assert_eq!(capabilities.max_dma_maps, told);
        served.end().unwrap();
    }
}

#[test]
fn it_stops_with_a_client() {
    let mut served = Served::new();
    served.client.assert_in_step();
    served.stopper.stop();
    assert_eq!(served.join().unwrap(), End::Stopped);
}

#[test]
fn a_server_takes_the_path_of_one_that_was_killed() {
    use std::os::unix::net::{UnixListener, UnixStream};
    use vfio_user_dma::Server;

    let path = std::env::temp_dir().join(format!("vfio-user-dma-test-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    // What is left of it: a socket on which nobody listens.
    drop(UnixListener::bind(&path).unwrap());
    for _ in 0..2 {
        let server = Server::bind(&path).unwrap();
        assert_eq!(Server::bind(&path).unwrap_err().errno(), libc::EADDRINUSE);
        let stopper = server.stopper();
        let table = DmaTable::new().unwrap();
        let mut device = common::Device::new(table.clone());
        let thread = std::thread::spawn(move || server.run(&mut device));
        // One client after the other; the first breaks the protocol.
        for broken in [true, false] {
            let mut client = Client::new(UnixStream::connect(&path).unwrap());
            assert_eq!(client.version(Capabilities::default()).errno(), 0);
            assert_eq!(client.map(0, PAGE, 0, Some(&memfd(1))), 0);
            if broken {
                common::send_with_fds(&client.stream, &[0; 16], &[]);
                assert!(client.try_receive().is_err());
            }
        }
        let mut client = Client::new(UnixStream::connect(&path).unwrap());
        assert_eq!(client.version(Capabilities::default()).errno(), 0);
        assert_eq!(client.unmap(0, 0, PAGE), Ok(0));
        stopper.stop();
        ended("a server ends when it is stopped", thread).unwrap();
        assert!(!path.exists());
    }
    // A server does not remove the socket of one that came after it.
    let first = Server::bind(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let second = Server::bind(&path).unwrap();
    drop(first);
    assert!(path.exists());
    drop(second);
    assert!(!path.exists());
    std::fs::write(&path, "no socket").unwrap();
    assert_eq!(Server::bind(&path).unwrap_err().errno(), libc::EADDRINUSE);
    std::fs::remove_file(&path).unwrap();
}

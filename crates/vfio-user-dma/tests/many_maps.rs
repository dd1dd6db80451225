// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! 65 536 mappings of a page each, and what is left when the client goes. Alone in its process, as it counts file
//! descriptors and mappings of memory.

mod common;

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;

use common::deadline::within;
use common::{map_body, memfd, Served, PAGE, READ_WRITE};
use vfio_user_dma::wire::{command, Header};
use vfio_user_dma::{Capabilities, DmaTable, End};

fn open_files() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

fn memory_mappings() -> usize {
    fs::read_to_string("/proc/self/maps")
        .unwrap()
        .lines()
        .count()
}

/// Most memory that the process ever had, in bytes.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmPeak:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// Waits until the server has taken all that was sent.
fn wait_until_taken(stream: &UnixStream) {
    within("the server takes what was sent", || {
        let mut left: libc::c_int = 0;
        // SAFETY: the kernel writes one integer.
        let result = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &mut left) };
        assert_eq!(result, 0);
        left == 0
    });
}

#[test]
fn nothing_is_left_of_a_client() {
    let before = open_files();

    // File descriptors where none belong, too many, and with messages that nobody keeps.
    let mut served = Served::new();
    let file = memfd(1);
    let map = map_body(READ_WRITE, 0, PAGE, 0);
    for fds in [2, 16, 17, 30, 60] {
        let fds = vec![file.as_fd(); fds];
        assert_eq!(
            served
                .client
                .call_with(command::DMA_MAP, &map, &fds)
                .errno(),
            libc::EINVAL
        );
        for command in (0..20).filter(|command| *command != command::DMA_MAP) {
            let reply = served.client.call_with(command, &[], &fds);
            assert!(matches!(reply.errno(), libc::EINVAL | libc::EOPNOTSUPP));
        }
        let reply = served
            .client
            .call_with(command::DMA_MAP, &vec![0; 2 << 20], &fds);
        assert_eq!(reply.errno(), libc::EINVAL);
    }
    assert_eq!(served.client.map(1, PAGE, 0, Some(&file)), libc::EINVAL);

    // A message that says it is huge takes no memory, and one that comes in pieces, each with file descriptors,
    // takes few of them.
    let (files, memory) = (open_files(), peak());
    for (message_size, fds) in [(u32::MAX, 0), (1 << 20, 16)] {
        let mut cut_off = Served::new();
        let header = Header {
            command: command::DMA_MAP,
            message_size,
            ..Header::default()
        };
        let mut bytes = Vec::new();
        header.encode(&mut bytes);
        common::send_with_fds(&cut_off.client.stream, &bytes, &[]);
        for _ in 0..50 {
            common::send_with_fds(&cut_off.client.stream, &[0], &vec![file.as_fd(); fds]);
            wait_until_taken(&cut_off.client.stream);
        }
        // The served end, the eventfds and the listener; what one message may have at most.
        assert!(open_files() <= files + 32 + 16, "{}", open_files() - files);
        assert!(peak() < memory + (1 << 30));
        cut_off
            .client
            .stream
            .shutdown(std::net::Shutdown::Write)
            .unwrap();
        assert!(cut_off.client.try_receive().is_err());
        cut_off.end().unwrap();
    }
    served.client.assert_in_step();
    let idle = open_files();
    // The whole file is mapped once, with one descriptor, however many pages of it are mapped.
    assert_eq!(served.client.map(0, PAGE, 0, Some(&file)), 0);
    assert_eq!(served.client.map(PAGE, PAGE, 0, Some(&file)), 0);
    assert_eq!(open_files(), idle + 1);
    assert_eq!(served.end().unwrap(), End::Closed);
    drop(file);
    assert_eq!(open_files(), before);

    // As many as the kernel allows by default, every other page of the file, so that nothing merges.
    let mut served = Served::new();
    let file = memfd(2 * 65536);
    let files = open_files();
    let mappings = memory_mappings();
    for page in 0..65536 {
        let errno = served
            .client
            .map(page * PAGE, PAGE, 2 * page * PAGE, Some(&file));
        assert_eq!(errno, if page < 65535 { 0 } else { libc::ENOSPC });
    }
    assert_eq!(served.table.mappings(), 65535);
    assert_eq!(open_files(), files + 1);
    assert!(memory_mappings() < mappings + 100);
    let mut bytes = [0; 2];
    served.table.read(PAGE, &mut bytes).unwrap();
    assert_eq!(bytes, [2, 0]);
    served.table.write(PAGE - 1, &[1; 4096]).unwrap();
    // One by one; the rest goes with the client.
    for page in 0..1000 {
        assert_eq!(served.client.unmap(0, page * PAGE, PAGE), Ok(PAGE));
    }
    assert_eq!(served.end().unwrap(), End::Closed);
    drop(file);
    assert_eq!(open_files(), before);

    // All of them where the limit allows.
    let table = DmaTable::builder().entry_limit(65536).build().unwrap();
    let mut served = Served::with(table, |server| server, Capabilities::default());
    let file = memfd(65536);
    for page in 0..65536 {
        let file = Some(&file).filter(|_| page % 2 == 0);
        assert_eq!(served.client.map(page * PAGE, PAGE, page * PAGE, file), 0);
    }
    assert_eq!(served.client.unmap(2, 0, 0), Ok(65536 * PAGE));
    assert_eq!(served.end().unwrap(), End::Closed);
    drop(file);
    assert_eq!(open_files(), before);
}

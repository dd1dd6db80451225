// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory without a file: the client is asked for it by messages, and need not answer.

use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;

use vfio_user_dma::wire::{command, flags, DmaAccess, NarrowDmaAccess};
use vfio_user_dma::{AccessError, Capabilities, DmaTable, End, Error, REQUEST_LIMIT};
use vm_memory::Permissions;

use crate::cause;
use crate::common::deadline::{ended, within};
use crate::common::{self, memfd, patient_table, Client, Reply, Served, Told, PAGE};

/// What a device waits for.
const ANSWERED: &str = "accesses end when they are answered";
/// A client that has its memory for itself.
struct Keeper<'a> {
    client: &'a mut Client,
    memory: Vec<u8>,
    base: u64,
    narrow: bool,
    /// Bytes of data in each message.
    sizes: Vec<usize>,
}

impl Keeper<'_> {
    /// Answers one question.
    fn answer(&mut self) {
        let asked = self.client.receive();
        let narrow = self.narrow && !asked.body.is_empty();
        let (wide, data) = DmaAccess::decode(&asked.body).unwrap();
        if wide.count > u32::MAX.into() && !narrow {
            return self
                .client
                .reply(&asked, flags::ERROR, libc::E2BIG as u32, &[]);
        }
        let count = wide.count as u32 as usize;
        self.sizes.push(count);
        let at = (wide.address - self.base) as usize;
        let memory = &mut self.memory[at..at + count];
        match (asked.header.command, narrow) {
            (command::DMA_WRITE, false) => {
                memory.copy_from_slice(data);
                self.client.reply(&asked, 0, 0, &asked.body[..16]);
            }
            (command::DMA_WRITE, true) => {
                assert_eq!(asked.body.len(), 16 + count);
                memory.copy_from_slice(&asked.body[12..][..count]);
                self.client.reply(&asked, 0, 0, &[]);
            }
            (_, false) => {
                let body = [&asked.body[..16], memory].concat();
                self.client.reply(&asked, 0, 0, &body);
            }
            (_, true) => {
                let mut body = [&asked.body[..NarrowDmaAccess::SIZE], memory].concat();
                body.resize(16 + count, 0);
                self.client.reply(&asked, 0, 0, &body);
            }
        }
    }
}

#[test]
fn memory_without_a_file_is_accessed_by_messages_of_the_agreed_size() {
    for narrow in [false, true] {
        let capabilities = Capabilities {
            max_data_xfer_size: 0x600,
            ..Capabilities::default()
        };
        let mut served = Served::with(patient_table(), |server| server, capabilities);
        let file = memfd(1);
        // Client, file, client: one access over all of them.
        assert_eq!(served.client.map(0x1_0000, PAGE, 7, None), 0);
        assert_eq!(served.client.map(0x1_1000, PAGE, 0, Some(&file)), 0);
        assert_eq!(served.client.map(0x1_2000, PAGE, 0, None), 0);
        let dma = served.table.handle();
        let device = thread::spawn(move || {
            let data: Vec<u8> = (0..0x2700_u32).map(|byte| byte as u8 | 1).collect();
            dma.write(0x1_0500, &data).unwrap();
            let mut back = vec![0; 0x2700];
            dma.read(0x1_0500, &mut back).unwrap();
            assert!(back == data);
        });
        let mut keeper = Keeper {
            client: &mut served.client,
            memory: vec![0; 0x3000],
            base: 0x1_0000,
            narrow,
            sizes: Vec::new(),
        };
        // One to find out how it lays them out.
        for _ in 0..9 {
            keeper.answer();
        }
        ended(ANSWERED, device);
        let once = [0x600, 0x500, 0x600, 0x600];
        let sizes: Vec<_> = keeper.sizes.into_iter().filter(|size| *size > 1).collect();
        assert_eq!(sizes, [once, once].concat());
        assert!(keeper.memory[..0x500].iter().all(|byte| *byte == 0));
        assert!(keeper.memory[0x500..0x1000]
            .iter()
            .all(|byte| byte & 1 == 1));
        assert!(keeper.memory[0x1000..0x2000].iter().all(|byte| *byte == 0));
        served.client.assert_in_step();
        served.end().unwrap();
    }
}

/// A device's thread reads 16 bytes while the client does as told.
fn read_while(
    table: DmaTable,
    client: impl FnOnce(&mut Client),
) -> (Result<Vec<u8>, Error>, Served) {
    let mut served = Served::with(table, |server| server, Capabilities::default());
    assert_eq!(served.client.map(0x1_0000, PAGE, 0, None), 0);
    let dma = served.table.handle();
    let device = thread::spawn(move || {
        let mut bytes = vec![0; 16];
        dma.read(0x1_0000, &mut bytes).map(|()| bytes)
    });
    client(&mut served.client);
    (ended("an access of a device", device), served)
}

/// The question how it lays messages out, answered as the protocol has it.
fn say_wide(client: &mut Client) -> Reply {
    let asked = client.receive();
    let (access, _) = DmaAccess::decode(&asked.body).unwrap();
    assert_eq!(
        (asked.header.command, access.count),
        (command::DMA_READ, (1 << 32) + 1)
    );
    client.reply(&asked, flags::ERROR, libc::EINVAL as u32, &[]);
    let asked = client.receive();
    let (access, _) = DmaAccess::decode(&asked.body).unwrap();
    assert_eq!((access.address, access.count), (0x1_0000, 16));
    asked
}

#[test]
fn a_deadline_may_be_never() {
    let never = DmaTable::builder().message_deadline(Duration::MAX);
    let (read, served) = read_while(never.build().unwrap(), |client| {
        let asked = say_wide(client);
        let body = [&asked.body[..], &[9; 16]].concat();
        client.reply(&asked, 0, 0, &body);
    });
    assert_eq!(read.unwrap(), [9; 16]);
    served.end().unwrap();
}

#[test]
fn the_client_is_served_while_the_device_waits_for_it() {
    let (read, served) = read_while(patient_table(), |client| {
        let asked = say_wide(client);
        // Replies are told from questions by their ids only; these have ids of their own.
        client.assert_in_step();
        assert_eq!(client.map(0x9_0000, PAGE, 0, Some(&memfd(1))), 0);
        let body = [&asked.body[..], &[9; 16]].concat();
        client.reply(&asked, 0, 0, &body);
    });
    assert_eq!(read.unwrap(), [9; 16]);
    served.end().unwrap();
}

#[test]
fn answers_that_are_none_fail_that_access_only() {
    type Body<'a> = &'a dyn Fn(&Reply) -> Vec<u8>;
    let wrong: [(u32, u32, Body<'_>); 8] = [
        (flags::ERROR, libc::ENXIO as u32, &|_| vec![]),
        (flags::ERROR, 0, &|_| vec![]),
        (flags::ERROR, u32::MAX, &|_| vec![]),
        (0, 0, &|_| vec![]),
        (0, 0, &|asked| [&asked.body[..], &[9; 15]].concat()),
        (0, 0, &|asked| [&asked.body[..], &[9; 17]].concat()),
        (0, 0, &|asked| {
            [&[1][..], &asked.body[1..], &[9; 16]].concat()
        }),
        (0, 0, &|_| vec![0; 1 << 20]),
    ];
    for (index, (flags, error, body)) in wrong.into_iter().enumerate() {
        let (read, mut served) = read_while(patient_table(), |client| {
            let asked = say_wide(client);
            let body = body(&asked);
            client.reply(&asked, flags, error, &body);
        });
        let errno = [libc::ENXIO, libc::EIO, libc::EIO]
            .get(index)
            .copied()
            .unwrap_or(libc::EPROTO);
        assert_eq!(read.unwrap_err().errno(), errno, "{index}");
        served.client.assert_in_step();
        served.end().unwrap();
    }
    // Another command's answer.
    let (read, served) = read_while(patient_table(), |client| {
        let mut asked = say_wide(client);
        asked.header.command = command::DMA_WRITE;
        client.reply(&asked, 0, 0, &[&asked.body[..], &[9; 16]].concat());
    });
    assert_eq!(read.unwrap_err().errno(), libc::EPROTO);
    served.end().unwrap();
}

#[test]
fn an_error_about_the_address_says_nothing_of_the_layout() {
    let (read, mut served) = read_while(patient_table(), |client| {
        let asked = client.receive();
        client.reply(&asked, flags::ERROR, libc::EFAULT as u32, &[]);
    });
    assert_eq!(read.unwrap_err().errno(), libc::EFAULT);
    // So the next access asks again.
    let dma = served.table.handle();
    let device = thread::spawn(move || dma.read(0x1_0000, &mut [0; 16]));
    let asked = say_wide(&mut served.client);
    served
        .client
        .reply(&asked, 0, 0, &[&asked.body[..], &[9; 16]].concat());
    ended(ANSWERED, device).unwrap();
    served.end().unwrap();
}

/// Says whether it is the question how the client lays messages out, and answers that as the protocol has it.
fn is_layout(client: &mut Client, asked: &Reply) -> bool {
    let (access, _) = DmaAccess::decode(&asked.body).unwrap();
    let is_layout = access.count > u32::MAX.into();
    if is_layout {
        client.reply(asked, flags::ERROR, libc::EINVAL as u32, &[]);
    }
    is_layout
}

#[test]
fn an_answer_that_never_comes_fails_at_the_deadline_and_is_nothing_when_it_comes() {
    let hasty = DmaTable::builder().message_deadline(Duration::from_millis(20));
    let hasty = hasty.build().unwrap();
    let mut served = Served::with(hasty, |server| server, Capabilities::default());
    assert_eq!(served.client.map(0x1_0000, PAGE, 0, None), 0);
    let dma = served.table.handle();
    // The client may be late itself: so until an answer came in time.
    let device = thread::spawn(move || {
        let mut deadlines = 0;
        loop {
            let mut bytes = [0; 16];
            match dma.read(0x1_0000, &mut bytes) {
                Ok(()) => return (deadlines, bytes),
                Err(error) => {
                    assert!(matches!(
                        cause::<()>(Err(error)),
                        (0, AccessError::Deadline(_))
                    ));
                    deadlines += 1;
                }
            }
        }
    });
    let client = &mut served.client;
    let next = |client: &mut Client| loop {
        let asked = client.receive();
        if !is_layout(client, &asked) {
            return asked;
        }
    };
    let with = |asked: &Reply, byte| [&asked.body[..], &[byte; 16]].concat();
    let late = next(client);
    // An answer to nothing is no answer.
    let mut wrong = late.header;
    wrong.message_id ^= 0x4000;
    let wrong = Reply {
        header: wrong,
        body: Vec::new(),
    };
    client.reply(&wrong, 0, 0, &with(&late, 9));
    // The next question has another id, so the late answer is not taken for its own.
    let asked = next(client);
    assert_ne!(asked.header.message_id, late.header.message_id);
    client.reply(&late, 0, 0, &with(&late, 1));
    client.reply(&asked, 0, 0, &with(&asked, 2));
    within("an answer comes in time", || {
        if has_message(client) {
            let asked = client.receive();
            if !is_layout(client, &asked) {
                client.reply(&asked, 0, 0, &with(&asked, 2));
            }
        }
        device.is_finished()
    });
    let (deadlines, bytes) = ended(ANSWERED, device);
    assert!(deadlines > 0);
    assert_eq!(bytes, [2; 16]);
    served.end().unwrap();
}

/// Whether there is something to receive by now.
fn has_message(client: &Client) -> bool {
    let mut fd = libc::pollfd {
        fd: client.stream.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one structure, which outlives the call.
    assert!(unsafe { libc::poll(&mut fd, 1, 1) } >= 0);
    fd.revents != 0
}

#[test]
fn what_is_awaited_of_a_silent_client_is_bounded() {
    let table = DmaTable::builder()
        .message_deadline(Duration::from_millis(1))
        .build()
        .unwrap();
    let mut served = Served::with(table, |server| server, Capabilities::default());
    assert_eq!(served.client.map(0, PAGE, 0, None), 0);
    // What the server had no time to send is given up. So until it had some.
    within("the client is asked", || {
        for _ in 0..300 {
            let (_, cause) = cause(served.table.read(0, &mut [0; 4]));
            assert!(matches!(cause, AccessError::Deadline(_)));
        }
        has_message(&served.client)
    });
    // What was wanted is sent before the answer to what comes now.
    served.client.send(command::DEVICE_RESET, &[]);
    let until_answered = || Some(served.client.receive()).filter(|it| !it.header.is_reply());
    let asked = std::iter::from_fn(until_answered).count();
    assert!((1..=64).contains(&asked), "{asked}");
    served.end().unwrap();
}

#[test]
fn accesses_that_wait_have_a_limit() {
    let mut served = Served::new();
    assert_eq!(served.client.map(0, PAGE, 0, None), 0);
    let table = served.table.clone();
    let waits = |_| {
        let table = table.clone();
        thread::spawn(move || cause(table.read(0, &mut [0; 4])).1)
    };
    let waiting: Vec<_> = (0..=REQUEST_LIMIT).map(waits).collect();
    // The others end with the client.
    within("the one that is too many does not wait", || {
        waiting.iter().any(|one| one.is_finished())
    });
    table.cancel_messages();
    let ends = waiting
        .into_iter()
        .map(|one| ended("an access ends when messages are cancelled", one));
    let refused = ends.filter(|end| matches!(end, AccessError::TooMany(REQUEST_LIMIT)));
    assert!(refused.count() >= 1);
    served.end().unwrap();
}

#[test]
fn a_client_that_goes_fails_what_is_awaited_of_it() {
    let mut served = Served::new();
    assert_eq!(served.client.map(0x1_0000, PAGE, 0, None), 0);
    let dma = served.table.handle();
    let device = thread::spawn(move || cause(dma.read(0x1_0ff0, &mut [0; 16])));
    served.client.receive();
    assert_eq!(served.end().unwrap(), End::Closed);
    assert!(matches!(
        ended("an access ends with the client", device),
        (0, AccessError::Disconnected)
    ));
}

#[test]
fn an_unmap_fails_what_is_awaited_of_its_range_and_nothing_else() {
    let (read, mut served) = read_while(patient_table(), |client| {
        let asked = say_wide(client);
        assert_eq!(client.map(0x2_0000, PAGE, 0, None), 0);
        assert_eq!(client.unmap(0, 0x2_0000, PAGE), Ok(PAGE));
        assert_eq!(client.unmap(0, 0x1_0000, PAGE), Ok(PAGE));
        client.reply(&asked, 0, 0, &[&asked.body[..], &[9; 16]].concat());
    });
    assert!(matches!(cause(read), (0, AccessError::Unmapped)));
    served.client.assert_in_step();
    assert!(matches!(
        cause(served.table.read(0x1_0000, &mut [0])),
        (0, AccessError::Space(_))
    ));
    served.end().unwrap();
}

#[test]
fn an_unmap_ends_what_somebody_awaits_who_holds_memory_of_its_range() {
    let mut served = Served::new();
    let file = memfd(1);
    assert_eq!(served.client.map(0, PAGE, 0, None), 0);
    assert_eq!(served.client.map(PAGE, PAGE, 0, Some(&file)), 0);
    let table = served.table.clone();
    let device = thread::spawn(move || {
        let space = table.space();
        let _held = space.scatter(PAGE, 8, Permissions::Read).unwrap();
        table.read(0, &mut [0])
    });
    served.client.receive();
    assert_eq!(served.client.unmap(0, 0, 2 * PAGE), Ok(2 * PAGE));
    let read = ended("an access ends with the unmap", device);
    assert!(matches!(cause(read), (0, AccessError::Unmapped)));
    served.end().unwrap();
}

#[test]
fn memory_without_a_file_is_not_for_the_thread_that_serves() {
    let (mut client, thread) = common::serve_plain(|table, what| match what {
        Told::Read(offset, data) => Ok(table.read(offset, data)?),
        _ => Ok(()),
    });
    assert_eq!(client.map(0x1000, PAGE, 0, None), 0);
    assert_eq!(client.region_read(0, 0x1000, 4), Err(libc::EDEADLK));
    assert_eq!(client.region_read(0, 0x3000, 4), Err(libc::EINVAL));
    drop(client);
    let end = ended("a server ends with its client", thread);
    assert_eq!(end.unwrap(), End::Closed);
}

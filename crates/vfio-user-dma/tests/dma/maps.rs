// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What may be mapped and by whom, and what an unmap takes away.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use iommu_type1::{Interest, PinPages};
use vfio_user_dma::wire::command;
use vfio_user_dma::{AccessError, Capabilities, DmaTable, End, Server, FILE_BYTES_LIMIT};
use vm_memory::Permissions;

use crate::cause;
use crate::common::deadline::{ended, must_end, skipped, within, DEADLINE};
use crate::common::{self, map_body, memfd, Served, PAGE, READ_WRITE};

#[test]
fn permissions_of_ranges_without_a_file() {
    let mut served = Served::new();
    assert_eq!(
        served
            .client
            .call(command::DMA_MAP, &map_body(1, 0x1000, PAGE, 0))
            .errno(),
        0
    );
    assert_eq!(
        served
            .client
            .call(command::DMA_MAP, &map_body(2, 0x2000, PAGE, 0))
            .errno(),
        0
    );
    assert!(matches!(
        cause(served.table.write(0x1000, &[1])),
        (0, AccessError::Permission)
    ));
    assert!(matches!(
        cause(served.table.read(0x2000, &mut [1])),
        (0, AccessError::Permission)
    ));
    served.end().unwrap();
}

#[test]
fn an_unmap_waits_for_who_holds_memory() {
    let table = DmaTable::builder()
        .unmap_deadline(Duration::from_millis(50))
        .build()
        .unwrap();
    let mut served = Served::with(table, |server| server, Capabilities::default());
    let file = memfd(3);
    for page in 0..3 {
        assert_eq!(
            served
                .client
                .map(page * PAGE, PAGE, page * PAGE, Some(&file)),
            0
        );
    }
    assert_eq!(served.client.map(3 * PAGE, PAGE, 0, None), 0);
    let held = served
        .table
        .space()
        .scatter(PAGE, 8, Permissions::ReadWrite)
        .unwrap();
    assert_eq!(served.client.unmap(0, 0, 4 * PAGE), Err(libc::EDEADLK));
    // What nobody holds is free, the rest is to be unmapped again.
    assert_eq!(served.table.mappings(), 1);
    assert_eq!(served.client.map(0, PAGE, 0, Some(&file)), 0);
    assert_eq!(served.client.map(PAGE, PAGE, 0, Some(&file)), libc::EEXIST);
    drop(held);
    assert_eq!(served.client.unmap(2, 0, 0), Ok(2 * PAGE));
    served.end().unwrap();
}

#[test]
fn a_client_gets_no_memory_of_the_one_before() {
    let table = DmaTable::builder()
        .unmap_deadline(Duration::from_millis(20))
        .build()
        .unwrap();
    let server = Server::from_listener(common::listener()).unwrap();
    let mut device = common::Device::new(table.clone());
    table.map(3, 0, 0, PAGE, Some(memfd(1).into())).unwrap();
    let held = table.space().scatter(0, 8, Permissions::Read).unwrap();
    assert!(table.clear().is_err());

    // The client has gone already, so that who serves it does not wait.
    let (_, theirs) = UnixStream::pair().unwrap();
    let error = server.serve(&theirs, &mut device).unwrap_err();
    assert_eq!(error.errno(), libc::EDEADLK);
    assert_eq!(table.mappings(), 1);
    drop(held);
    assert_eq!(server.serve(&theirs, &mut device).unwrap(), End::Closed);
    assert_eq!(table.mappings(), 0);
}

#[test]
fn unmaps_as_qemu_sends_them() {
    let mut served = Served::new();
    let client = &mut served.client;
    let file = memfd(4);
    // Up to 2^64, where nothing is, and where something is.
    assert_eq!(
        client.unmap(0, 0xfef0_0000, 0_u64.wrapping_sub(0xfef0_0000)),
        Ok(0)
    );
    let top = 0_u64.wrapping_sub(2 * PAGE);
    assert_eq!(client.map(top, PAGE, 0, Some(&file)), 0);
    assert_eq!(client.map(top + PAGE, PAGE, 0, None), 0);
    assert_eq!(client.map(top + PAGE, 2 * PAGE, 0, None), libc::EINVAL);
    served.table.write(top, &[5; 4]).unwrap();
    assert_eq!(
        client.unmap(0, 0xfef0_0000, 0_u64.wrapping_sub(0xfef0_0000)),
        Ok(2 * PAGE)
    );
    // All, by its flag; only as it is defined.
    assert_eq!(client.map(0, PAGE, 0, Some(&file)), 0);
    assert_eq!(client.unmap(2, 0, PAGE), Err(libc::EINVAL));
    assert_eq!(client.unmap(1, 0, PAGE), Err(libc::EOPNOTSUPP));
    assert_eq!(client.unmap(4, 0, PAGE), Err(libc::EINVAL));
    assert_eq!(client.unmap(0, 0, 0), Err(libc::EINVAL));
    assert_eq!(client.unmap(0, 1, PAGE), Err(libc::EINVAL));
    assert_eq!(client.unmap(0, PAGE, u64::MAX - PAGE + 1), Ok(0));
    assert_eq!(client.unmap(2, 0, 0), Ok(PAGE));
    assert_eq!(client.unmap(2, 0, 0), Ok(0));
    served.end().unwrap();
}

#[test]
fn all_of_the_64_bit_space_is_unmapped_as_one_byte_less() {
    let table = DmaTable::new().unwrap();
    let file = OwnedFd::from(memfd(1));
    table.map(READ_WRITE, 0, 0, PAGE, Some(file)).unwrap();
    let rest = u64::MAX - PAGE + 1;
    table.map(READ_WRITE, 0, PAGE, rest, None).unwrap();
    assert_eq!(table.clear().unwrap(), u64::MAX);
    assert_eq!(table.mappings(), 0);
}

#[test]
fn strict_unmaps_are_of_exactly_one_mapping() {
    let table = DmaTable::builder().strict_unmap(true).build().unwrap();
    table.map(READ_WRITE, 0, 0, PAGE, None).unwrap();
    table
        .map(READ_WRITE, 0, PAGE, PAGE, Some(memfd(1).into()))
        .unwrap();
    let errno = |result: vfio_user_dma::Result<u64>| result.map_err(|error| error.errno());
    assert_eq!(errno(table.unmap(0, 0, 2 * PAGE)), Err(libc::EINVAL));
    assert_eq!(errno(table.unmap(0, 2 * PAGE, PAGE)), Err(libc::ENOENT));
    assert_eq!(errno(table.unmap(0, PAGE, PAGE)), Ok(PAGE));
    assert_eq!(errno(table.unmap(0, 0, PAGE)), Ok(PAGE));
}

#[test]
fn maps_are_checked() {
    let table = DmaTable::builder().entry_limit(2).build().unwrap();
    let map = |flags, offset, address, size, fd: Option<OwnedFd>| {
        table
            .map(flags, offset, address, size, fd)
            .map_err(|error| error.errno())
    };
    let file = || Some(OwnedFd::from(memfd(2)));
    for (flags, offset, address, size) in [
        (0, 0, 0, PAGE),
        (4, 0, 0, PAGE),
        (u32::MAX, 0, 0, PAGE),
        (3, 0, 0, 0),
        (3, 0, 1, PAGE),
        (3, 0, 0, PAGE + 1),
        (3, 1, 0, PAGE),
        (3, 0, PAGE, 0_u64.wrapping_sub(PAGE) + PAGE / 2),
        (3, 0, 2 * PAGE, 0_u64.wrapping_sub(PAGE)),
    ] {
        assert_eq!(map(flags, offset, address, size, file()), Err(libc::EINVAL));
    }
    assert_eq!(map(3, PAGE, 0, 2 * PAGE, file()), Err(libc::EFAULT));
    assert_eq!(
        map(3, u64::MAX - PAGE + 1, 0, PAGE, file()),
        Err(libc::EFAULT)
    );
    assert_eq!(map(3, 0, 0, 1 << 63, file()), Err(libc::EFAULT));
    let read_only = std::fs::File::open("/proc/self/exe").unwrap();
    assert_eq!(
        map(3, 0, 0, PAGE, Some(read_only.into())),
        Err(libc::EACCES)
    );
    let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(map(1, 0, 0, PAGE, Some(socket.into())).is_err());
    assert_eq!((table.mappings(), table.space().mappings()), (0, 0));
    assert_eq!(map(3, 0, 0, PAGE, file()), Ok(()));
    assert_eq!(map(3, 0, PAGE, PAGE, None), Ok(()));
    assert_eq!(map(3, 0, PAGE, PAGE, None), Err(libc::EEXIST));
    assert_eq!(map(3, 0, 2 * PAGE, PAGE, None), Err(libc::ENOSPC));
}

#[test]
fn files_behind_mappings_are_limited() {
    if !may_open(FILES) {
        return;
    }
    let table = DmaTable::new().unwrap();
    for page in 0..256 {
        table
            .map(3, 0, page * PAGE, PAGE, Some(memfd(1).into()))
            .unwrap();
    }
    let one_more = || table.map(3, 0, 256 * PAGE, PAGE, Some(memfd(1).into()));
    assert_eq!(one_more().unwrap_err().errno(), libc::ENOSPC);
    table.unmap(0, 0, PAGE).unwrap();
    one_more().unwrap();
}

#[test]
fn a_file_that_has_grown_is_mapped_further() {
    let table = DmaTable::new().unwrap();
    let file = memfd(1);
    table
        .map(3, 0, 0, PAGE, Some(file.try_clone().unwrap().into()))
        .unwrap();
    file.set_len(2 * PAGE).unwrap();
    table
        .map(3, PAGE, PAGE, PAGE, Some(file.try_clone().unwrap().into()))
        .unwrap();
    table.write(PAGE - 2, &[1, 2, 3, 4]).unwrap();
    let mut bytes = [0; 4];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, PAGE - 2).unwrap();
    assert_eq!(bytes, [1, 2, 3, 4]);
}

#[test]
fn memory_that_the_client_has_mapped_privately_is_refused() {
    let mut served = Served::new();
    let map_here = |file: &std::fs::File, how| {
        // SAFETY: a new mapping, which nobody accesses.
        let address = unsafe {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(
                std::ptr::null_mut(),
                PAGE as usize,
                prot,
                how,
                std::os::fd::AsRawFd::as_raw_fd(file),
                0,
            )
        };
        assert_ne!(address, libc::MAP_FAILED);
    };
    let (private, shared) = (memfd(1), memfd(1));
    map_here(&private, libc::MAP_PRIVATE);
    map_here(&shared, libc::MAP_PRIVATE);
    map_here(&shared, libc::MAP_SHARED);
    assert_eq!(served.client.map(0, PAGE, 0, Some(&private)), libc::EINVAL);
    assert_eq!(served.client.map(0, PAGE, 0, Some(&shared)), 0);
    // Not mapped at all: nobody can tell.
    assert_eq!(served.client.map(PAGE, PAGE, 0, Some(&memfd(1))), 0);
    served.end().unwrap();

    let table = DmaTable::new().unwrap();
    table.set_client(Some(std::process::id() as i32));
    let error = table.map(3, 0, 0, PAGE, Some(private.into())).unwrap_err();
    assert!(error.to_string().contains("privately"), "{error}");
}

#[test]
fn seals_can_be_asked_for() {
    let table = DmaTable::builder().require_seals(true).build().unwrap();
    let file = memfd(1);
    let clone = || Some(OwnedFd::from(file.try_clone().unwrap()));
    assert_eq!(
        table.map(3, 0, 0, PAGE, clone()).unwrap_err().errno(),
        libc::EPERM
    );
    // SAFETY: takes no pointers.
    let sealed = unsafe {
        libc::fcntl(
            std::os::fd::AsRawFd::as_raw_fd(&file),
            libc::F_ADD_SEALS,
            libc::F_SEAL_SHRINK,
        )
    };
    assert_eq!(sealed, 0);
    table.map(3, 0, 0, PAGE, clone()).unwrap();
    // Nothing else is asked of a file that has none: its file system may be the client's, and never answer.
    let readable = std::fs::File::open("/dev/null").unwrap();
    let refused = table.map(3, 0, PAGE, PAGE, Some(readable.into()));
    assert_eq!(refused.unwrap_err().errno(), libc::EPERM);
}

/// A socket with much to send, whose closing waits until the other end, which comes with it, has taken that. An error
/// where there is no loopback interface.
fn lingering() -> std::io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut ours = TcpStream::connect(listener.local_addr()?)?;
    let (theirs, _) = listener.accept()?;
    ours.set_nonblocking(true).unwrap();
    while ours.write(&[0; 4096]).is_ok() {}
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: (10 * DEADLINE.as_secs()) as i32,
    };
    // SAFETY: the kernel reads as many bytes of the structure as it has.
    let set = unsafe {
        libc::setsockopt(
            ours.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            size_of_val(&linger) as u32,
        )
    };
    assert_eq!(set, 0);
    Ok((ours, theirs))
}

#[test]
fn nobody_waits_while_a_file_that_is_refused_is_closed() {
    let table = DmaTable::new().unwrap();
    let (ours, theirs) = match lingering() {
        Ok(socket) => socket,
        Err(error) => return skipped(&format!("no loopback: {error}")),
    };
    let fd = ours.as_raw_fd();
    let link = move || std::fs::read_link(format!("/proc/self/fd/{fd}")).ok();
    let open = link();
    let refused = {
        let table = table.clone();
        thread::spawn(move || table.map(1, 0, 0, PAGE, Some(ours.into())))
    };
    within("a file that is refused is closed", || link() != open);
    must_end("another map", move || table.map(3, 0, 0, PAGE, None)).unwrap();
    assert!(!refused.is_finished());
    drop(theirs);
    ended("a map of a socket", refused).unwrap_err();
}

/// Files that the tests of this program have open at a time, and some.
const FILES: u64 = 1000;

/// Whether this process may have so many files open; it says so where it may not.
fn may_open(files: u64) -> bool {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the kernel writes the structure.
    let found = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) };
    assert_eq!(found, 0);
    if limit.rlim_max < files {
        skipped(&format!("only {} files may be open", limit.rlim_max));
        return false;
    }
    limit.rlim_cur = limit.rlim_cur.max(files);
    // SAFETY: the structure lives, and nobody here relies on fewer files.
    let set = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) };
    assert_eq!(set, 0);
    true
}

#[test]
fn a_file_that_grows_again_and_again_is_as_many_files() {
    if !may_open(FILES) {
        return;
    }
    let table = DmaTable::new().unwrap();
    let file = memfd(1);
    let map = |page: u64| {
        file.set_len((page + 1) * PAGE).unwrap();
        let file = file.try_clone().unwrap();
        table.map(3, page * PAGE, page * PAGE, PAGE, Some(file.into()))
    };
    let refused = (0..1000).find_map(|page| Some((page, map(page).err()?)));
    let (page, error) = refused.unwrap();
    assert_eq!((page, error.errno()), (256, libc::ENOSPC));
    table.unmap(0, 0, PAGE).unwrap();
    map(256).unwrap();
}

#[test]
fn the_bytes_of_files_are_limited() {
    let table = DmaTable::new().unwrap();
    let limit = FILE_BYTES_LIMIT;
    let map = |page: u64, len: u64| {
        let file = memfd(1);
        file.set_len(len).unwrap();
        table.map(3, 0, page * PAGE, PAGE, Some(file.into()))
    };
    match map(0, limit - PAGE) {
        Err(error) if error.errno() == libc::ENOMEM => {
            return skipped("this process cannot have so many addresses");
        }
        mapped => mapped.unwrap(),
    }
    map(1, PAGE).unwrap();
    for len in [PAGE, limit, i64::MAX as u64 & !(PAGE - 1)] {
        assert_eq!(map(2, len).unwrap_err().errno(), libc::ENOSPC);
    }
    table.unmap(0, 0, PAGE).unwrap();
    map(2, limit - PAGE).unwrap();
}

#[test]
fn a_notice_may_look_at_a_table_whose_unmap_waits_in_vain() {
    let table = DmaTable::builder()
        .unmap_deadline(Duration::from_millis(1))
        .build()
        .unwrap();
    for page in [0, 1] {
        table
            .map(3, 0, page * PAGE, PAGE, Some(memfd(1).into()))
            .unwrap();
    }
    let looked = table.clone();
    let notice = move |_, _| {
        looked.mappings();
    };
    let pins = table.pins("a device", Interest::Holder, Arc::new(notice));
    let pinned = pins.pin_pages(0, 1, Permissions::Read).unwrap();
    let unmapped = table.clone();
    let unmap = move || unmapped.unmap(0, 0, 2 * PAGE);
    let result = must_end("an unmap ends whatever notices look at", unmap);
    assert_eq!(result.unwrap_err().errno(), libc::EDEADLK);
    // What nobody has pinned is gone, and is not in the way.
    assert_eq!(table.mappings(), 1);
    table.map(3, 0, PAGE, PAGE, Some(memfd(1).into())).unwrap();
    drop(pinned);
    table.unmap(0, 0, 2 * PAGE).unwrap();
    assert_eq!(table.mappings(), 0);
}

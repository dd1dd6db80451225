// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pinned pages under the kernel's limit of locked memory. One test: limit and locks are the process's.

#[path = "common/deadline.rs"]
mod deadline;

use std::sync::Arc;

use deadline::skipped;
use iommu_type1::{
    page_size, Backing, Error, Interest, IoAddressSpace, MemlockLimit, PinOptions, Pinner,
};
use vm_memory::Permissions::{Read, ReadWrite};

/// Bytes this process has locked, as the kernel counts them.
fn locked() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmLck:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    kib.unwrap().parse::<u64>().unwrap() * 1024
}

/// With no privileges: this thread no longer has any limit lifted. Says whether it may be that high.
fn set_limit(bytes: u64) -> bool {
    let limit = libc::rlimit {
        rlim_cur: bytes,
        rlim_max: libc::RLIM_INFINITY,
    };
    let mut now = limit;
    // SAFETY: both structures live; the limit of locked memory changes no memory.
    let set = unsafe {
        libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut now);
        now.rlim_cur = bytes.min(now.rlim_max);
        libc::setrlimit(libc::RLIMIT_MEMLOCK, &now)
    };
    assert_eq!(set, 0);
    now.rlim_cur == bytes
}

/// The capabilities of the thread: `CAP_IPC_LOCK` would lift the limit.
fn drop_capabilities() {
    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0];
    let none = [0_u32; 6];
    // SAFETY: header and data have the sizes of this version, and are only read.
    let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
    assert_eq!(result, 0);
}

fn space() -> (IoAddressSpace, Pinner) {
    let options = PinOptions::new().account(Arc::new(MemlockLimit));
    let space = IoAddressSpace::builder().pin_options(options).build();
    let pinner = space.pinner("p", Interest::Holder, Arc::new(|_, _| ()));
    (space, pinner)
}

#[test]
fn b05_pinned_pages_are_locked_once_and_within_the_limit() {
    let p = page_size();
    drop_capabilities();
    if !set_limit(4 * p) {
        return skipped("this process may not lock four pages");
    }
    assert_eq!(locked(), 0);
    let memory = Backing::anonymous(8 * p as usize).unwrap();
    let [(one, first), (two, second)] = [space(), space()];
    one.map(0, memory.clone(), ReadWrite).unwrap();
    one.map(0x100 * p, memory.clone(), ReadWrite).unwrap();
    two.map(0, memory, Read).unwrap();

    // The same host pages by two addresses and in two spaces.
    let low = first.pin_pages(0, 3, Read).unwrap();
    let high = first.pin_pages(0x101 * p, 2, Read).unwrap();
    let other = second.pin_list(&[2 * p, 3 * p, 2 * p], Read).unwrap();
    assert_eq!(locked(), 4 * p);
    drop(low);
    assert_eq!(locked(), 3 * p);
    drop(high);
    assert_eq!(locked(), 2 * p);

    // Beyond the limit nothing of the call stays locked.
    let error = first.pin_pages(0, 6, Read).unwrap_err();
    assert_eq!(error.errno(), libc::ENOMEM);
    assert_eq!(locked(), 2 * p);
    // Nor is anything unlocked that others have: the second page is refused, the next two are theirs.
    let last = first.pin_pages(7 * p, 1, Read).unwrap();
    match first.pin_pages(0, 4, Read).unwrap_err() {
        Error::Pin(page_pin::Error::Account { iova, errno }) => {
            assert_eq!((iova, errno), (p, libc::ENOMEM));
        }
        other => panic!("{other}"),
    }
    assert_eq!(locked(), 3 * p);
    drop(last);
    assert_eq!(locked(), 2 * p);
    let four = first.pin_pages(0, 4, Read).unwrap();
    assert_eq!(locked(), 4 * p);
    drop((four, other));
    assert_eq!(locked(), 0);

    set_limit(0);
    assert_eq!(
        first.pin_pages(0, 1, Read).unwrap_err().errno(),
        libc::EPERM
    );
    assert_eq!(one.unmap_all().unwrap(), 16 * p);
    assert_eq!(two.unmap_all().unwrap(), 8 * p);
}

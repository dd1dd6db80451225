// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The limit of locked memory: the kernel's mappings lock memory, ours do not, so the kernel is compared
//! with the contract alone. In a child, as what it gives up cannot be had back.

use std::io;

use vfio_bindings::bindings::vfio::VFIO_TYPE1v2_IOMMU;

use crate::memory::{PAGE, PRIVATE};
use crate::op::{Map, Unmap};
use crate::vfio::{Answer, Kernel};
use guest_init::Given;

/// Pages that the child may lock.
const LIMIT: u64 = 8;

/// Pages mapped at an IOVA, from a page of the private memory on, and what the kernel answers; no pages for
/// an unmap of what is there.
const ROWS: [(u64, u64, u64, Answer); 9] = [
    (0, LIMIT, 0, Ok(0)),
    (100, 1, 20, Err(libc::ENOMEM)),
    (0, 0, 0, Ok(0)),
    (0, LIMIT + 1, 0, Err(libc::ENOMEM)),
    (0, 4, 0, Ok(0)),
    // The same memory counts again.
    (10, 4, 0, Ok(0)),
    (20, 4, 0, Err(libc::ENOMEM)),
    (10, 0, 0, Ok(0)),
    (20, 4, 0, Ok(0)),
];

/// `struct __user_cap_header_struct` and the first of two `struct __user_cap_data_struct`.
#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Capabilities {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

const VERSION_3: u32 = 0x2008_0522;
const CAP_IPC_LOCK: u32 = 1 << 14;

/// Runs all of it.
pub fn run(given: &Given) -> Result<(), String> {
    let kernel = Kernel::new(given.group, VFIO_TYPE1v2_IOMMU)
        .map_err(|errno| format!("a container: errno {errno}"))?;
    // SAFETY: there is one thread, so the child may do anything.
    match unsafe { libc::fork() } {
        0 => {
            let done = restrict()
                .map_err(|error| error.to_string())
                .and_then(|()| rows(&kernel));
            if let Err(error) = &done {
                println!("locked memory: {error}");
            }
            // SAFETY: ends the child, and nothing of the parent's.
            unsafe { libc::_exit(i32::from(done.is_err())) }
        }
        -1 => Err(io::Error::last_os_error().to_string()),
        child => {
            let mut status = 0;
            // SAFETY: a child of ours, and a place for its status.
            let waited = unsafe { libc::waitpid(child, &mut status, 0) };
            if waited != child || status != 0 {
                return Err(format!(
                    "the child of the locked memory ended with {status:#x}"
                ));
            }
            println!("locked memory: {} rows as in the contract", ROWS.len());
            Ok(())
        }
    }
}

fn restrict() -> io::Result<()> {
    let rlim_cur = LIMIT * PAGE;
    let limit = libc::rlimit {
        rlim_cur,
        rlim_max: rlim_cur,
    };
    // SAFETY: reads a struct.
    if unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let mut data = [Capabilities::default(); 2];
    // SAFETY: the header says version 3, whose data are two structs.
    let got = unsafe { libc::syscall(libc::SYS_capget, &mut header, data.as_mut_ptr()) };
    data[0].effective &= !CAP_IPC_LOCK;
    data[0].permitted &= !CAP_IPC_LOCK;
    // SAFETY: as above.
    let set = unsafe { libc::syscall(libc::SYS_capset, &mut header, data.as_ptr()) };
    if got != 0 || set != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn rows(kernel: &Kernel) -> Result<(), String> {
    for (iova, pages, from, expected) in ROWS {
        let iova = iova * PAGE;
        let got = if pages == 0 {
            let (argsz, flags, size, bitmap) = (24, 0, 10 * PAGE, None);
            kernel
                .container()
                .unmap(&Unmap {
                    argsz,
                    flags,
                    iova,
                    size,
                    bitmap,
                })
                .result
        } else {
            let (argsz, flags, size) = (32, 3, pages * PAGE);
            let vaddr = PRIVATE.first + from * PAGE;
            kernel.container().map(&Map {
                argsz,
                flags,
                vaddr,
                iova,
                size,
            })
        };
        if got != expected {
            return Err(format!(
                "{pages} pages at {iova:#x}: {got:?}, not {expected:?}"
            ));
        }
    }
    Ok(())
}

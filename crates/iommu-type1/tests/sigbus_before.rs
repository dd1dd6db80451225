// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who had SIGBUS before gets what is not of guarded memory. A program of its own, because handlers are of the
//! process.

use std::fs::File;
use std::mem::zeroed;
use std::os::fd::FromRawFd;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};

use iommu_type1::{page_size, Backing, IoAddressSpace};
use vm_memory::{FileOffset, Permissions::ReadWrite};

static PASSED_ON: AtomicUsize = AtomicUsize::new(0);

extern "C" fn passed_on(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel gives the information of the signal.
    let address = unsafe { (*info).si_addr().addr() };
    PASSED_ON.store(address, Ordering::Relaxed);
    let page = address & !(page_size() as usize - 1);
    // SAFETY: the address that has just been missed is of memory of this test.
    unsafe {
        libc::mmap(
            ptr::without_provenance_mut(page),
            page_size() as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
            -1,
            0,
        );
    }
}

fn shortened() -> (Backing, File) {
    // SAFETY: the name ends with a NUL; the descriptor is new.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"guest".as_ptr(), 0)) };
    file.set_len(page_size()).unwrap();
    let part = FileOffset::new(file.try_clone().unwrap(), 0);
    let memory = Backing::file(part, page_size() as usize, ReadWrite).unwrap();
    (memory, file)
}

#[test]
fn who_had_the_signal_before_keeps_it() {
    // SAFETY: all zeros are a value of it.
    let mut action: libc::sigaction = unsafe { zeroed() };
    action.sa_sigaction = passed_on as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the handler has the signature that the flags say.
    let installed = unsafe { libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()) };
    assert_eq!(installed, 0);

    let (guarded, file) = shortened();
    let space = IoAddressSpace::new();
    space.map(0, guarded.guarded().unwrap(), ReadWrite).unwrap();
    file.set_len(0).unwrap();
    assert_eq!(
        space.read(0, &mut [0; 8]).unwrap_err().errno(),
        libc::EFAULT
    );
    assert_eq!(PASSED_ON.load(Ordering::Relaxed), 0);

    let (foreign, file) = shortened();
    file.set_len(0).unwrap();
    let at = foreign.host_address();
    // SAFETY: it is mapped; the handler above makes it good.
    assert_eq!(unsafe { at.add(8).read_volatile() }, 0);
    assert_eq!(PASSED_ON.load(Ordering::Relaxed), at.addr() + 8);
}

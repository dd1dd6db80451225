// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A kernel that tests stand in for: the C library's `ioctl` is defined here, and what has VFIO's numbers goes to
//! what a test has given.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::cell::RefCell;
use std::ffi::{c_int, c_void};
use std::panic::{catch_unwind, AssertUnwindSafe};

/// One call of `ioctl`.
pub struct Call {
    pub fd: c_int,
    pub number: u32,
    pub argument: *mut c_void,
}

impl Call {
    pub fn value(&self) -> usize {
        self.argument as usize
    }

    /// The number at `offset` of what the argument points to.
    pub fn get<T: Copy>(&self, offset: usize) -> T {
        // SAFETY: the argument points to a structure of the wrapper that has a `T` at `offset`.
        unsafe { self.argument.byte_add(offset).cast::<T>().read_unaligned() }
    }

    pub fn put<T>(&self, offset: usize, value: T) {
        // SAFETY: as above, of structures that the kernel writes to.
        unsafe {
            self.argument
                .byte_add(offset)
                .cast::<T>()
                .write_unaligned(value);
        }
    }
}

type Kernel = Box<dyn FnMut(&Call) -> Result<c_int, c_int>>;

thread_local! {
    static KERNEL: RefCell<Option<Kernel>> = const { RefCell::new(None) };
}

/// In place of the C library's: its callers pass the argument as one that varies, which is the same register.
#[no_mangle]
extern "C" fn ioctl(fd: c_int, request: libc::Ioctl, argument: *mut c_void) -> c_int {
    let number = request as u32;
    let call = Call {
        fd,
        number,
        argument,
    };
    let answer = KERNEL.with_borrow_mut(|kernel| match kernel {
        // What a test finds wrong in here cannot unwind any further; an error it does not expect is its end.
        Some(kernel) if number >> 8 == 0x3b => {
            Some(catch_unwind(AssertUnwindSafe(|| kernel(&call))).unwrap_or(Err(libc::EFAULT)))
        }
        _ => None,
    });
    match answer {
        Some(Ok(value)) => value,
        Some(Err(errno)) => {
            // SAFETY: errno is this thread's.
            unsafe { *libc::__errno_location() = errno };
            -1
        }
        // SAFETY: the caller's call, as it is.
        None => unsafe { libc::syscall(libc::SYS_ioctl, fd, request, argument) as c_int },
    }
}

/// From now on VFIO's calls of this thread are answered by `kernel`.
pub fn answer_with(kernel: impl FnMut(&Call) -> Result<c_int, c_int> + 'static) {
    KERNEL.set(Some(Box::new(kernel)));
}

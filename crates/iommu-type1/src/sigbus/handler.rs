// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The handler of SIGBUS.
//!
//! All that it does is async-signal-safe: atomics, and system calls by themselves.

use std::io;
use std::mem::{transmute, zeroed};
use std::ptr;
use std::sync::atomic::Ordering;
use std::sync::OnceLock;

use libc::{c_int, c_void, siginfo_t};
use vm_memory::mmap::MmapRegionError;

use super::guard::{SEEN, WATCHES};
use super::watches::Rest;
use crate::{Error, Result};

/// Who had the signal before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// Installs the handler, once. `len` is of the memory that wants it, for the error.
pub(super) fn install(len: usize) -> Result<()> {
    static INSTALLED: OnceLock<std::result::Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| try_install().map_err(|error| error.raw_os_error().unwrap_or(libc::EINVAL)))
        .map_err(|errno| Error::Mmap {
            len,
            source: MmapRegionError::Mmap(io::Error::from_raw_os_error(errno)),
        })
}

fn try_install() -> io::Result<()> {
    // SAFETY: all zeros are a value of it.
    let mut before: libc::sigaction = unsafe { zeroed() };
    // Known before ours can run: it may be in the middle of a fault as soon as it is there.
    // SAFETY: asks only.
    if unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), &mut before) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let _ = BEFORE.set(before);
    // SAFETY: as above.
    let mut ours: libc::sigaction = unsafe { zeroed() };
    ours.sa_sigaction = on_sigbus as *const () as usize;
    // On the thread's alternate stack, where it has one: the fault may have found little room.
    // What others send and the one before would have let pass ends no system call.
    ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    // SAFETY: the handler has the signature that the flags say, and does what handlers may do.
    if unsafe { libc::sigaction(libc::SIGBUS, &ours, ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

unsafe extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the location is the thread's own.
    let errno = unsafe { *libc::__errno_location() };
    // SAFETY: the kernel gives the information of the signal.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr().addr()) };
    // Memory that the machine has lost (BUS_MCEERR_AR) is not ours to replace.
    let caught = code == libc::BUS_ADRERR && catch(address);
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
    if !caught {
        // SAFETY: as this was called.
        unsafe { pass_on(signal, info, context) };
    }
}

/// Puts memory of nobody's where somebody misses a file's; says whether the access can go on.
fn catch(address: usize) -> bool {
    let Some(rest) = WATCHES.get().and_then(|watches| watches.fault(address)) else {
        return false;
    };
    // Before the memory is there: who finds it must find this.
    SEEN.store(true, Ordering::Release);
    replace(&rest)
}

fn replace(rest: &Rest) -> bool {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    let first = ptr::with_exposed_provenance_mut::<c_void>(rest.first);
    // SAFETY: these bytes are of a region that is watched, so it is mapped; what takes their place
    // allows as much. Somebody accesses the region, so it stays until this is done.
    let at = unsafe { libc::mmap(first, rest.len, rest.prot, flags, -1, 0) };
    at != libc::MAP_FAILED
}

/// A signal that is somebody else's.
///
/// # Safety
///
/// With the arguments of a handler of that signal.
unsafe fn pass_on(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    type Handler = unsafe extern "C" fn(c_int);
    type InfoHandler = unsafe extern "C" fn(c_int, *mut siginfo_t, *mut c_void);
    // By a process, or to tell of memory that is lost: not because of an access, which would fault again.
    // SAFETY: by the caller's promise.
    let code = unsafe { (*info).si_code };
    let sent = code <= 0 || code == libc::BUS_MCEERR_AO;
    let before = BEFORE.get();
    let handler = before.map_or(libc::SIG_DFL, |before| before.sa_sigaction);
    match before {
        Some(before) if handler != libc::SIG_DFL && handler != libc::SIG_IGN => {
            if before.sa_flags & libc::SA_SIGINFO != 0 {
                // SAFETY: what was installed with this flag has this signature.
                let handler = unsafe { transmute::<usize, InfoHandler>(handler) };
                // SAFETY: by the caller's promise.
                unsafe { handler(signal, info, context) };
            } else {
                // SAFETY: what was installed without that flag has this signature.
                let handler = unsafe { transmute::<usize, Handler>(handler) };
                // SAFETY: by the caller's promise.
                unsafe { handler(signal) };
            }
        }
        Some(_) if handler == libc::SIG_IGN && sent => {}
        _ => {
            // What the kernel does by itself: the access faults again when this returns. One that was sent is sent again.
            // SAFETY: all zeros are a value of it: the default.
            let default: libc::sigaction = unsafe { zeroed() };
            // SAFETY: these are async-signal-safe.
            unsafe {
                libc::sigaction(signal, &default, ptr::null_mut());
                if sent {
                    libc::raise(signal);
                }
            }
        }
    }
}

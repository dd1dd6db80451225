// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What stands for the kernel's `membarrier` in a model: a barrier in other threads, wherever they are.
//!
//! Loom has no such thing, so those threads help: each looks out in several places of an access whether a
//! barrier is asked for, and passes it there. The look is a relaxed load, which orders nothing and may miss
//! what was asked, so that the barrier falls into one place or another: before the access, between its
//! look at whether it is fenced and its announcement, between that and its look-up, before it uses what it
//! has found, behind its end. It never falls between two loads of one look-up.

use std::cell::Cell;
use std::io;

use loom::sync::atomic::{fence, AtomicU32, Ordering};
use loom::thread::{self, yield_now, JoinHandle};

/// Threads that are not there have passed every barrier.
const GONE: u32 = u32::MAX;

loom::lazy_static! {
    /// How many barriers were asked for.
    static ref ASKED: AtomicU32 = AtomicU32::new(0);
    /// Of these, how many were passed.
    static ref PASSED: AtomicU32 = AtomicU32::new(GONE);
}

loom::thread_local! {
    static IS_USER: Cell<bool> = Cell::new(false);
}

pub(crate) fn register() -> io::Result<()> {
    // What is made lazily is made before there are threads, and so orders none of them.
    PASSED.store(GONE, Ordering::Relaxed);
    ASKED.store(0, Ordering::Relaxed);
    Ok(())
}

/// The thread of a model in which the kernel puts barriers. There is one; accesses of others pass barriers
/// of their own.
///
/// It must not wait for a lock that an unmap has meanwhile, but [`away`].
pub(super) fn user<R: 'static>(accesses: impl FnOnce() -> R + 'static) -> JoinHandle<R> {
    PASSED.store(0, Ordering::Relaxed);
    thread::spawn(move || {
        IS_USER.with(|is_user| is_user.set(true));
        look_out();
        let result = accesses();
        PASSED.store(GONE, Ordering::Release);
        result
    })
}

/// For what may sleep: threads that do not run pass a barrier when they do again.
pub(super) fn away<R>(sleepy: impl FnOnce() -> R) -> R {
    PASSED.store(GONE, Ordering::Release);
    let result = sleepy();
    PASSED.store(0, Ordering::Relaxed);
    fence(Ordering::SeqCst);
    result
}

pub(crate) fn everywhere() -> io::Result<()> {
    fence(Ordering::SeqCst);
    let asked = ASKED.fetch_add(1, Ordering::Relaxed) + 1;
    // Between that and the look at who is away.
    fence(Ordering::SeqCst);
    while PASSED.load(Ordering::Acquire) < asked {
        yield_now();
    }
    fence(Ordering::SeqCst);
    Ok(())
}

pub(crate) fn here() {
    if IS_USER.with(Cell::get) {
        look_out();
    } else {
        fence(Ordering::SeqCst);
    }
}

/// Passes a barrier that is asked for, if this thread sees that already.
pub(super) fn look_out() {
    if IS_USER.with(Cell::get) {
        let asked = ASKED.load(Ordering::Relaxed);
        if asked > PASSED.load(Ordering::Relaxed) {
            fence(Ordering::SeqCst);
            PASSED.store(asked, Ordering::Release);
        }
    }
}

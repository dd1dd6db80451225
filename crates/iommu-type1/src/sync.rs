// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The locks, atomics and clock of this crate: std's, or loom's when the protocols are model-checked.
//!
//! A lock is taken also after a panic elsewhere: no critical section of this crate leaves its data
//! inconsistent at a step that can panic (allocation).

#[cfg(loom)]
pub(crate) use loom::{
    sync::atomic::{fence, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    sync::{Condvar, Mutex, MutexGuard},
    thread::yield_now,
};
#[cfg(loom)]
pub(crate) use page_pin::clock::now;
#[cfg(loom)]
use page_pin::clock::wait_timeout;
#[cfg(not(loom))]
pub(crate) use std::{
    sync::atomic::{fence, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    sync::{Condvar, Mutex, MutexGuard},
    thread::yield_now,
};

use std::sync::PoisonError;
#[cfg(not(loom))]
use std::time::Duration;
use std::time::Instant;

#[cfg(not(loom))]
pub(crate) fn now() -> Instant {
    Instant::now()
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for a signal until `deadline`; `None` once that has passed. `mutex` is what `guard` locks.
pub(crate) fn wait_until<'a, T>(
    condvar: &Condvar,
    mutex: &'a Mutex<T>,
    guard: MutexGuard<'a, T>,
    deadline: Instant,
) -> Option<MutexGuard<'a, T>> {
    let left = deadline.saturating_duration_since(now());
    (!left.is_zero()).then(|| wait_timeout(condvar, mutex, guard, left))
}

#[cfg(not(loom))]
fn wait_timeout<'a, T>(
    condvar: &Condvar,
    _mutex: &'a Mutex<T>,
    guard: MutexGuard<'a, T>,
    left: Duration,
) -> MutexGuard<'a, T> {
    let woken = condvar.wait_timeout(guard, left);
    woken.unwrap_or_else(PoisonError::into_inner).0
}

/// A clock that is read faster than the exact one, and as good for ages: nanoseconds, some milliseconds
/// coarse.
#[cfg(not(loom))]
pub(crate) fn coarse_nanos() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the structure can be written.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(loom)]
pub(crate) fn coarse_nanos() -> u64 {
    0
}

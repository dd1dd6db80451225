// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The locks and the clock of this crate: std's, or loom's when the protocol is model-checked.

#[cfg(loom)]
pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};
#[cfg(loom)]
pub(crate) use page_pin::clock::now;
#[cfg(loom)]
use page_pin::clock::wait_timeout;
#[cfg(not(loom))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};

use std::sync::PoisonError;
#[cfg(not(loom))]
use std::time::Duration;
use std::time::Instant;

#[cfg(not(loom))]
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// Locks, also after a panic elsewhere: no critical section of this crate leaves its data inconsistent at a step
/// that can panic (allocation).
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

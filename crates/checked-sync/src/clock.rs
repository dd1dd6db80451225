// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The time of a model: it stands still until the model lets it pass.

use std::sync::{OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::whose::lazy_static;
use crate::{lock, yield_now, AtomicU64, Condvar, Mutex, MutexGuard, Ordering};

/// Deadlines from here on never pass: whoever waits for one needs a signal to go on.
pub const NEVER: Duration = Duration::from_secs(1800);

lazy_static! {
    static ref PASSED: AtomicU64 = AtomicU64::new(0);
}

/// What time it is in the model.
pub fn now() -> Instant {
    static BEGUN: OnceLock<Instant> = OnceLock::new();
    let passed = Duration::from_secs(PASSED.load(Ordering::Relaxed));
    *BEGUN.get_or_init(Instant::now) + passed
}

/// Lets so many seconds pass.
pub fn pass(seconds: u64) {
    PASSED.fetch_add(seconds, Ordering::Relaxed);
}

/// A checker's condition variables never time out. Where the time may run out, this wakes up for no reason
/// instead, which condition variables may do, and the caller looks at the clock.
pub(crate) fn wait_timeout<'a, T>(
    condvar: &Condvar,
    mutex: &'a Mutex<T>,
    guard: MutexGuard<'a, T>,
    left: Duration,
) -> MutexGuard<'a, T> {
    if left < NEVER {
        drop(guard);
        yield_now();
        lock(mutex)
    } else {
        condvar.wait(guard).unwrap_or_else(PoisonError::into_inner)
    }
}

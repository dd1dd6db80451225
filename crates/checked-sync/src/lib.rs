// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The locks, atomics, thread-locals and the clock of the crates of `vfio-dma`: std's, or those of a model checker
//! (`--cfg loom`, `--cfg shuttle`), which so checks the code that runs.
//!
//! A part of those crates: it changes with them, and promises nothing to others.
//!
//! ```
//! use std::time::Duration;
//! use checked_sync::{lock, now, wait_until, Condvar, Mutex};
//!
//! let (answer, answered) = (Mutex::new(None::<u32>), Condvar::new());
//! let deadline = now() + Duration::from_millis(1);
//! let mut guard = lock(&answer);
//! while guard.is_none() {
//!     match wait_until(&answered, &answer, guard, deadline) {
//!         Some(woken) => guard = woken,
//!         None => return, // the time is up, and nobody has answered
//!     }
//! }
//! ```

#![forbid(unsafe_code)]

#[cfg(all(loom, shuttle))]
compile_error!("one checker at a time: build with --cfg loom or with --cfg shuttle, not with both");

#[cfg(any(loom, shuttle))]
pub mod clock;

#[cfg(loom)]
use loom as whose;
#[cfg(all(shuttle, not(loom)))]
use shuttle as whose;
#[cfg(not(any(loom, shuttle)))]
use std as whose;

use std::sync::PoisonError;
use std::time::{Duration, Instant};

pub use whose::{
    sync::atomic::{fence, AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    sync::{Condvar, Mutex, MutexGuard},
    thread::{current, yield_now, ThreadId},
};

#[cfg(loom)]
#[doc(hidden)]
pub use loom::thread_local as thread_local_of_loom;
#[cfg(not(loom))]
pub use whose::thread_local;

/// Loom's knows no constants.
#[cfg(loom)]
#[macro_export]
macro_rules! thread_local {
    ($(#[$attr:meta])* static $name:ident: $type:ty = const $init:block;) => {
        $crate::thread_local_of_loom! { $(#[$attr])* static $name: $type = $init; }
    };
}

/// Whether they are a checker's. What only saves time is smaller then, so that a model meets what else comes late.
pub const CHECKED: bool = cfg!(any(loom, shuttle));

/// A deadline beyond the clock's range is no deadline; a day is as good.
pub const LONGEST: Duration = Duration::from_secs(86_400);

#[cfg(any(loom, shuttle))]
pub use clock::now;
#[cfg(any(loom, shuttle))]
use clock::wait_timeout;

/// What time it is.
#[cfg(not(any(loom, shuttle)))]
#[inline]
pub fn now() -> Instant {
    Instant::now()
}

/// Locks, also after a panic elsewhere: no critical section of our crates leaves its data inconsistent at a step that
/// can panic (allocation), or runs foreign code between two changes that belong together.
#[inline]
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for a signal until `deadline`, or wakes up without one; `None` once the deadline has passed. `mutex` is what
/// `guard` locks.
#[inline]
pub fn wait_until<'a, T>(
    condvar: &Condvar,
    mutex: &'a Mutex<T>,
    guard: MutexGuard<'a, T>,
    deadline: Instant,
) -> Option<MutexGuard<'a, T>> {
    let left = deadline.saturating_duration_since(now());
    (!left.is_zero()).then(|| wait_timeout(condvar, mutex, guard, left))
}

#[cfg(not(any(loom, shuttle)))]
#[inline]
fn wait_timeout<'a, T>(
    condvar: &Condvar,
    _mutex: &'a Mutex<T>,
    guard: MutexGuard<'a, T>,
    left: Duration,
) -> MutexGuard<'a, T> {
    let woken = condvar.wait_timeout(guard, left);
    woken.unwrap_or_else(PoisonError::into_inner).0
}

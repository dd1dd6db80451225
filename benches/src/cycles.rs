// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The clock: time stamp counter cycles on x86-64, nanoseconds elsewhere.

use std::time::{Duration, Instant};

/// What [`now`] counts.
pub const UNIT: &str = if cfg!(target_arch = "x86_64") {
    "cycles"
} else {
    "ns"
};

/// The time, after everything before it has been executed and before anything behind it begins.
#[cfg(target_arch = "x86_64")]
#[inline]
pub fn now() -> u64 {
    use std::arch::x86_64::{_mm_lfence, _rdtsc};
    // SAFETY: every x86-64 processor has both instructions, and neither touches memory.
    unsafe {
        _mm_lfence();
        let now = _rdtsc();
        _mm_lfence();
        now
    }
}

/// The time since the first call.
#[cfg(not(target_arch = "x86_64"))]
pub fn now() -> u64 {
    use std::sync::OnceLock;

    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

/// [`UNIT`]s in a second, as the system's clock counts it.
pub fn per_second() -> f64 {
    let begun = Instant::now();
    let taken = of(|| while begun.elapsed() < Duration::from_millis(100) {});
    taken as f64 / begun.elapsed().as_secs_f64()
}

/// [`UNIT`]s of `op`, once.
pub fn of(op: impl FnOnce()) -> u64 {
    let start = now();
    op();
    now().saturating_sub(start)
}

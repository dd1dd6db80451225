// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where the time comes from.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A clock that never goes back.
///
/// Whoever decides by time is given one: a [`VirtualClock`] makes the decisions repeatable.
///
/// ```
/// use std::time::Duration;
/// use gvt_scheduler::policy::{Clock, VirtualClock};
///
/// let clock = VirtualClock::default();
/// clock.advance(Duration::from_millis(3));
/// assert_eq!(clock.now(), Duration::from_millis(3));
/// ```
pub trait Clock {
    /// Time since some moment that stays the same.
    fn now(&self) -> Duration;
}

impl<C: Clock + ?Sized> Clock for &C {
    fn now(&self) -> Duration {
        (**self).now()
    }
}

impl<C: Clock + ?Sized> Clock for Arc<C> {
    fn now(&self) -> Duration {
        (**self).now()
    }
}

/// The time since it was made, as the system counts it.
///
/// ```
/// use gvt_scheduler::policy::{Clock, MonotonicClock};
///
/// let clock = MonotonicClock::default();
/// assert!(clock.now() <= clock.now());
/// ```
#[derive(Clone, Copy, Debug)]
pub struct MonotonicClock(Instant);

impl Default for MonotonicClock {
    fn default() -> Self {
        MonotonicClock(Instant::now())
    }
}

impl Clock for MonotonicClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

/// Time that passes when it is told to, in nanoseconds from 0 to 584 years.
///
/// It is shared by reference or in an [`Arc`]; the front page of [`Clock`] has an example.
#[derive(Debug, Default)]
pub struct VirtualClock(AtomicU64);

impl VirtualClock {
    /// Lets time pass.
    pub fn advance(&self, by: Duration) {
        // Nobody learns anything else from the time, so it need not be ordered.
        let _ = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| {
                Some(now.saturating_add(nanoseconds(by)))
            });
    }

    /// Makes it `time`, unless it is later already.
    pub fn advance_to(&self, time: Duration) {
        self.0.fetch_max(nanoseconds(time), Ordering::Relaxed);
    }
}

impl Clock for VirtualClock {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed))
    }
}

/// What does not fit is the end of time.
pub(crate) fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtual_time_never_goes_back_nor_around() {
        let clock = Arc::new(VirtualClock::default());
        clock.advance_to(Duration::from_nanos(7));
        clock.advance_to(Duration::from_nanos(5));
        assert_eq!(clock.now(), Duration::from_nanos(7));
        clock.advance(Duration::MAX);
        assert_eq!(clock.now(), Duration::from_nanos(u64::MAX));
    }
}

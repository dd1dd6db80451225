// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whose workloads run: the time-based policy between vGPUs.
//!
//! One vGPU at a time owns all engines. [`TimeBased`] says which, by weights, and takes no time from
//! anywhere but its [`Clock`]: nothing here waits, and nothing is a thread.

mod clock;
mod error;
mod slice;
mod time_based;
mod weight;

pub(crate) use clock::nanoseconds;
pub use clock::{Clock, MonotonicClock, VirtualClock};
pub use error::PolicyError;
pub use time_based::{TimeBased, VgpuId};
pub use weight::Weight;

use std::time::Duration;

/// How often [`TimeBased::tick`] is meant to be called.
pub const TICK: Duration = Duration::from_millis(1);

/// For how long time is given out at once, to each vGPU by its weight.
pub const BALANCE_PERIOD: Duration = Duration::from_millis(100);

/// Periods after which credit and debt are forgotten: both live a second at most.
pub const STAGES: u32 = 10;

/// For how long after its start a vGPU comes before others, whatever it has used.
pub const START_PRIORITY: Duration = Duration::from_secs(2);

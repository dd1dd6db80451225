// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The time of one vGPU.

use crate::policy::clock::nanoseconds;
use crate::policy::{Weight, START_PRIORITY};
use crate::regs::EngineId;

/// What one vGPU has, has used, and wants to run. Times are nanoseconds.
#[derive(Clone, Debug)]
pub(super) struct Slice {
    pub(super) weight: Weight,
    pub(super) started: bool,
    /// When it comes before others no longer.
    priority_until: Option<u64>,
    /// What it gets in each period.
    allocated: i64,
    /// What is left of it: negative after a workload that outlasted it.
    pub(super) left: i64,
    pub(super) used: u64,
    since: u64,
    /// Whether a workload has begun since it got its turn.
    pub(super) has_begun: bool,
    /// Workloads that wait, by engine.
    pub(super) queued: [usize; EngineId::ALL.len()],
    pub(super) running: usize,
}

impl Slice {
    pub(super) fn new(weight: Weight) -> Self {
        Slice {
            weight,
            started: false,
            priority_until: None,
            allocated: 0,
            left: 0,
            used: 0,
            since: 0,
            has_begun: false,
            queued: [0; EngineId::ALL.len()],
            running: 0,
        }
    }

    pub(super) fn start(&mut self, now: u64) {
        self.started = true;
        self.priority_until = Some(now.saturating_add(nanoseconds(START_PRIORITY)));
    }

    /// Whether it has a workload, waiting or running.
    pub(super) fn has_workload(&self) -> bool {
        self.running > 0 || self.queued.iter().any(|queued| *queued > 0)
    }

    pub(super) fn has_priority(&mut self, now: u64) -> bool {
        self.priority_until = self.priority_until.filter(|until| now < *until);
        self.priority_until.is_some()
    }

    /// Gets its turn.
    pub(super) fn enter(&mut self, now: u64) {
        self.since = now;
        self.has_begun = false;
    }

    /// Pays for the time since it got its turn, or has last paid.
    pub(super) fn charge(&mut self, now: u64) {
        let spent = now.saturating_sub(self.since);
        self.used = self.used.saturating_add(spent);
        self.left = self.left.saturating_sub_unsigned(spent);
        self.since = now;
    }

    /// What it has used if it has had its turn until `now`.
    pub(super) fn used_until(&self, now: u64) -> u64 {
        self.used.saturating_add(now.saturating_sub(self.since))
    }

    /// Begins anew with what a period gives.
    pub(super) fn allocate(&mut self, nanoseconds: u64) {
        self.allocated = i64::try_from(nanoseconds).unwrap_or(i64::MAX);
        self.left = self.allocated;
    }

    /// Gets what a period gives on top of what is left.
    pub(super) fn replenish(&mut self) {
        self.left = self.left.saturating_add(self.allocated);
    }
}

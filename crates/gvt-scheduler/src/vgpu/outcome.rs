// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a vGPU says of submissions and workloads.

use crate::context::CopyStats;
use crate::descriptor::ContextDescriptor;
use crate::regs::EngineId;

/// What a write to the submission port queued.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Submission {
    /// The engine.
    pub engine: EngineId,
    /// Number of the first workload.
    pub sequence: u64,
    /// Workloads: one for each valid element.
    pub workloads: usize,
}

/// A workload that has run to its end.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct Completion {
    /// The number of its submission.
    pub sequence: u64,
    /// The engine.
    pub engine: EngineId,
    /// The context.
    pub descriptor: ContextDescriptor,
    /// What reading the pages of the context took.
    pub populate: CopyStats,
    /// What writing them back took; nothing when they were not.
    pub write_back: CopyStats,
    /// Whether the whole context was written back. It is not when one of its pages has no translation:
    /// then the pages before that may be, and nothing else of it.
    pub written_back: bool,
    /// Whether reading them was skipped, as the image still held them.
    pub skipped: bool,
    /// Context status events the guest was told of, at both ends of the workload.
    pub events: usize,
    /// Context-switch interrupts to inject: events of one transition share one.
    pub interrupts: usize,
    /// User interrupts to inject: one for each MI_USER_INTERRUPT that was executed.
    pub user_interrupts: u32,
}

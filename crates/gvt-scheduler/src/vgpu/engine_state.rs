// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a vGPU has once for each engine.

use std::collections::VecDeque;

use crate::context::{ShadowImage, SkipRecord};
use crate::descriptor::ContextDescriptor;
use crate::execlist::{ContextStatusBuffer, ElspPort, ExeclistState};
use crate::regs::ring_register;
use crate::workload::Workload;

/// The ports, the queue and the shadow image of an engine.
#[derive(Debug)]
pub(super) struct EngineState {
    pub(super) elsp: ElspPort,
    pub(super) execlist: ExeclistState,
    pub(super) csb: ContextStatusBuffer,
    pub(super) queue: VecDeque<Workload>,
    pub(super) image: ShadowImage,
    pub(super) skip: SkipRecord,
}

impl EngineState {
    pub(super) fn new(pages: usize) -> Self {
        Self {
            elsp: ElspPort::default(),
            execlist: ExeclistState::default(),
            csb: ContextStatusBuffer::default(),
            queue: VecDeque::new(),
            image: ShadowImage::new(pages),
            skip: SkipRecord::default(),
        }
    }

    /// As it was made, in the memory that it has.
    pub(super) fn reset(&mut self) {
        self.elsp = ElspPort::default();
        self.execlist = ExeclistState::default();
        self.csb = ContextStatusBuffer::default();
        self.queue.clear();
        self.image.clear();
        self.skip = SkipRecord::default();
    }

    /// Where the queued workloads of a context end. The head in guest memory lags behind it until
    /// they are complete.
    pub(super) fn queued_tail(&self, context: &ContextDescriptor) -> Option<u32> {
        let last = |workload: &&Workload| workload.descriptor.same_context(context);
        let last = self.queue.iter().rev().find(last)?;
        Some(last.ring.tail())
    }

    /// The value of a register that only the device writes, `register` being relative to the base.
    pub(super) fn status_register(&self, register: u32) -> Option<u32> {
        const UPPER: u32 = ring_register::EXECLIST_STATUS + 4;
        let [lower, upper] = self.execlist.status();
        match register {
            ring_register::EXECLIST_STATUS => Some(lower),
            UPPER => Some(upper),
            _ => self.csb.read(register),
        }
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! From a submission to queued workloads.

use page_pin::PinPages;

use crate::descriptor::ContextDescriptor;
use crate::error::{Error, Result};
use crate::guest_dma::{GuestDma, Port};
use crate::memory;
use crate::observe::{Observer, Step};
use crate::ppgtt::{PageTableRoot, Update};
use crate::regs::{EngineId, PAGE_SHIFT};
use crate::vgpu::{Submission, Vgpu};
use crate::workload::{RingContext, Workload};

impl<M: GuestDma, P: PinPages, O: Observer> Vgpu<M, P, O> {
    /// Queues a workload for each valid element, all of them or none.
    pub(super) fn submit(
        &mut self,
        engine: EngineId,
        elements: [ContextDescriptor; 2],
    ) -> Result<Submission> {
        check_elements(engine, &elements)?;
        let sequence = self.next_sequence;
        let queued = self.queued(engine);
        let workloads = elements.iter().filter(|element| element.valid()).count();
        let limit = self.config.max_queued;
        if queued.saturating_add(workloads) > limit {
            return Err(Error::TooManyWorkloads { engine, limit });
        }
        for (element, descriptor) in elements.into_iter().enumerate() {
            if !descriptor.valid() {
                continue;
            }
            let submission = (element == 0).then_some(elements);
            if let Err(error) = self.create(engine, descriptor, submission) {
                self.engines[engine as usize].queue.truncate(queued);
                self.next_sequence = sequence;
                return Err(error);
            }
        }
        Ok(Submission {
            engine,
            sequence,
            workloads,
        })
    }

    fn create(
        &mut self,
        engine: EngineId,
        descriptor: ContextDescriptor,
        submission: Option<[ContextDescriptor; 2]>,
    ) -> Result<()> {
        let sequence = self.next_sequence;
        let state = &mut self.engines[engine as usize];
        let mut port = Port {
            memory: &self.memory,
            observer: &mut self.observer,
            errors: self.config.errors,
        };
        port.observer.step(sequence, Step::Create);
        let lrca = descriptor.lrca();
        let ring_context = self
            .ggtt
            .translate((u64::from(lrca) + 1) << PAGE_SHIFT)
            .ok_or(Error::RingContextUnmapped { lrca })?;
        let fields = RingContext::read(&mut port, ring_context, engine)?;
        let ring = match state.queued_tail(&descriptor) {
            Some(tail) => fields.ring.with_head(tail),
            None => fields.ring,
        };
        ring.check(&self.ggtt)?;
        fields.check_batches(&self.ggtt)?;
        let root = PageTableRoot::new(descriptor.addressing_mode(), fields.pdps)?;
        let mut update = Update {
            shadow: &mut self.ppgtt,
            port: &mut port,
            pins: &self.pins,
        };
        update.run(root)?;

        let mut workload = Workload {
            sequence,
            descriptor,
            submission,
            ring_context,
            ring,
            root,
            indirect_ctx: fields.indirect_ctx(),
            per_ctx: fields.per_ctx(),
            commands: self.spare.pop().unwrap_or_default(),
            scanned: false,
        };
        let room = state.queue.try_reserve(1);
        room.map_err(|_| memory::no_memory::<Workload>(state.queue.len() + 1))?;
        if state.queue.is_empty() {
            port.observer.step(sequence, Step::Scan);
            workload.scan(&mut port, engine, &self.ggtt, &*self.auditor)?;
        }
        state.queue.push_back(workload);
        self.next_sequence = sequence.wrapping_add(1);
        Ok(())
    }
}

fn check_elements(engine: EngineId, elements: &[ContextDescriptor; 2]) -> Result<()> {
    if !elements[0].valid() {
        return Err(Error::EmptySubmission { engine });
    }
    let unprivileged = |element: &ContextDescriptor| element.valid() && !element.privilege();
    match elements.iter().position(unprivileged) {
        Some(element) => Err(Error::NotPrivileged { engine, element }),
        None => Ok(()),
    }
}

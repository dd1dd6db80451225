// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The run of one workload: populate, prepare, engine, complete.

use page_pin::PinPages;

use crate::context::{ContextPages, CopyStats, ShadowImage};
use crate::engine::{Engine, EngineJob};
use crate::error::{Error, Result};
use crate::execlist::Events;
use crate::ggtt::Ggtt;
use crate::memory::{DmaMemory, Port};
use crate::observe::{Observer, Step};
use crate::regs::{ring_register, EngineId, PAGE_MASK};
use crate::vgpu::engine_state::EngineState;
use crate::vgpu::{Completion, Vgpu, VgpuConfig};
use crate::workload::{ImageCopy, Workload};

impl<M: DmaMemory, P: PinPages, O: Observer> Vgpu<M, P, O> {
    pub(super) fn run(
        &mut self,
        engine: EngineId,
        workload: &mut Workload,
        hw: &mut dyn Engine,
    ) -> Result<Completion> {
        let (populate, skipped) = self.populate(engine, workload)?;
        let prepared = self.prepare(engine, workload)?;
        hw.run(EngineJob {
            engine,
            descriptor: workload.descriptor,
            sequence: workload.sequence,
            ring: &workload.commands.ring,
            indirect_ctx: &workload.commands.indirect_ctx,
            image: &mut self.engines[engine as usize].image,
        })
        .map_err(|source| Error::Engine { engine, source })?;
        let (write_back, completed) = self.complete(engine, workload)?;
        Ok(Completion {
            sequence: workload.sequence,
            engine,
            descriptor: workload.descriptor,
            populate,
            write_back,
            skipped,
            events: prepared + completed,
            interrupts: prepared.min(1) + completed.min(1),
        })
    }

    fn populate(&mut self, engine: EngineId, workload: &mut Workload) -> Result<(CopyStats, bool)> {
        let start = engine.mmio_base() + ring_register::START;
        self.registers.insert(start, workload.ring.start());
        let mut port = Port {
            memory: &self.memory,
            observer: &mut self.observer,
        };
        if !workload.scanned {
            port.observer.step(workload.sequence, Step::Scan);
            workload.scan(&mut port, &self.ggtt)?;
        }
        port.observer.step(workload.sequence, Step::Populate);
        let EngineState { image, skip, .. } = &mut self.engines[engine as usize];
        let mut copy = image_copy(&self.config, &self.ggtt, engine, workload, image);
        let skip = self.config.skip_unchanged.then_some(skip);
        let populated = copy.populate(&mut port, engine, skip)?;
        self.skips += u64::from(populated.1);
        Ok(populated)
    }

    /// Schedules the submission in, if the workload is its first; gives the number of events.
    fn prepare(&mut self, engine: EngineId, workload: &Workload) -> Result<usize> {
        self.observer.step(workload.sequence, Step::Prepare);
        let Some(elements) = workload.submission else {
            return Ok(0);
        };
        let execlist = &mut self.engines[engine as usize].execlist;
        let events = execlist.schedule_in(engine, elements)?;
        self.tell(engine, events)
    }

    /// Writes the context back and schedules it out; gives the number of events too.
    fn complete(&mut self, engine: EngineId, workload: &Workload) -> Result<(CopyStats, usize)> {
        let mut port = Port {
            memory: &self.memory,
            observer: &mut self.observer,
        };
        port.observer.step(workload.sequence, Step::Complete);
        let state = &mut self.engines[engine as usize];
        let copy = image_copy(&self.config, &self.ggtt, engine, workload, &mut state.image);
        let stats = copy.write_back(&mut port)?;
        let tail = workload.ring.tail();
        for register in [ring_register::HEAD, ring_register::TAIL] {
            self.registers.insert(engine.mmio_base() + register, tail);
        }
        let context = &workload.descriptor;
        let next = state.queue.front();
        if next.is_some_and(|next| next.descriptor.same_context(context)) {
            // Lite restore: to the hardware the context has not stopped.
            return Ok((stats, 0));
        }
        let events = state.execlist.schedule_out(engine, context)?;
        Ok((stats, self.tell(engine, events)?))
    }

    fn tell(&mut self, engine: EngineId, events: Events) -> Result<usize> {
        let hws_pga = self.mmio_read(engine.mmio_base() + ring_register::HWS_PGA);
        let status_page = self.ggtt.translate(u64::from(hws_pga) & !PAGE_MASK);
        let mut port = Port {
            memory: &self.memory,
            observer: &mut self.observer,
        };
        let csb = &mut self.engines[engine as usize].csb;
        let mut told = 0;
        for event in events.into_iter().flatten() {
            csb.push(event, status_page, &mut port)?;
            told += 1;
        }
        Ok(told)
    }
}

fn image_copy<'a>(
    config: &VgpuConfig,
    ggtt: &'a Ggtt,
    engine: EngineId,
    workload: &'a Workload,
    image: &'a mut ShadowImage,
) -> ImageCopy<'a> {
    let pages = engine.context_pages(config.generation);
    ImageCopy {
        workload,
        pages: ContextPages::new(ggtt, workload.descriptor.lrca(), pages),
        mode: config.copy_mode,
        image,
    }
}

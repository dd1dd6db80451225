// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The run of one workload: populate, prepare, engine, complete.

use page_pin::PinPages;

use crate::context::{ContextPages, CopyStats, ShadowImage};
use crate::engine::{Engine, EngineJob, Executed, JobMemory};
use crate::error::{Error, Result};
use crate::execlist::Events;
use crate::ggtt::Ggtt;
use crate::guest_dma::{GuestDma, Port};
use crate::observe::{Observer, Step};
use crate::ppgtt::Update;
use crate::regs::{ring_register, EngineId, PAGE_MASK};
use crate::vgpu::engine_state::EngineState;
use crate::vgpu::{Completion, Vgpu, VgpuConfig};
use crate::workload::{ImageCopy, Workload};

impl<M: GuestDma, P: PinPages, O: Observer> Vgpu<M, P, O> {
    pub(super) fn run(
        &mut self,
        engine: EngineId,
        workload: &mut Workload,
        hw: &mut dyn Engine,
    ) -> Result<Completion> {
        let (populate, skipped) = self.populate(engine, workload)?;
        let prepared = self.prepare(engine, workload)?;
        let executed = self.execute(engine, workload, hw)?;
        let write_back = self.write_back(engine, workload)?;
        let completed = self.complete(engine, workload)?;
        Ok(Completion {
            sequence: workload.sequence,
            engine,
            descriptor: workload.descriptor,
            populate,
            write_back: write_back.unwrap_or_default(),
            written_back: write_back.is_some(),
            skipped,
            events: prepared + completed,
            interrupts: prepared.min(1) + completed.min(1),
            user_interrupts: executed.user_interrupts,
        })
    }

    fn populate(&mut self, engine: EngineId, workload: &mut Workload) -> Result<(CopyStats, bool)> {
        let start = engine.mmio_base() + ring_register::START;
        self.store(start, workload.ring.start())?;
        let mut port = Port {
            memory: &self.memory,
            observer: &mut self.observer,
            errors: self.config.errors,
        };
        if !workload.scanned {
            port.observer.step(workload.sequence, Step::Scan);
            workload.scan(&mut port, engine, &self.ggtt, &*self.auditor)?;
        }
        port.observer.step(workload.sequence, Step::Populate);
        let EngineState { image, skip, .. } = &mut self.engines[engine as usize];
        let mut copy = image_copy(&self.config, &self.ggtt, engine, workload, image);
        let skip = self.config.skip_unchanged.then_some(skip);
        let populated = copy.populate(&mut port, engine, skip)?;
        self.skips += u64::from(populated.1);
        Ok(populated)
    }

    /// Brings the page tables up to date with what was written, and the pins with what was unmapped, since
    /// the workload was created. Schedules the submission in, if the workload is its first; gives the
    /// number of events.
    fn prepare(&mut self, engine: EngineId, workload: &Workload) -> Result<usize> {
        self.observer.step(workload.sequence, Step::Prepare);
        let mut port = Port {
            memory: &self.memory,
            observer: &mut self.observer,
            errors: self.config.errors,
        };
        let mut update = Update {
            shadow: &mut self.ppgtt,
            port: &mut port,
            pins: &self.pins,
        };
        update.run(workload.root)?;
        let Some(elements) = workload.submission else {
            return Ok(0);
        };
        let execlist = &mut self.engines[engine as usize].execlist;
        let events = execlist.schedule_in(engine, elements)?;
        self.tell(engine, events)
    }

    fn execute(
        &mut self,
        engine: EngineId,
        workload: &Workload,
        hw: &mut dyn Engine,
    ) -> Result<Executed> {
        let status_page = self.mmio_read(engine.mmio_base() + ring_register::HWS_PGA);
        let port = Port::strict(&self.memory, &mut self.observer);
        port.observer.step(workload.sequence, Step::Execute);
        let mut memory = JobMemory {
            port,
            ggtt: &self.ggtt,
            ppgtt: &self.ppgtt,
            root: workload.root,
        };
        hw.run(EngineJob {
            engine,
            descriptor: workload.descriptor,
            sequence: workload.sequence,
            ring: &workload.commands.ring,
            indirect_ctx: &workload.commands.indirect_ctx,
            per_ctx: workload.per_ctx,
            batches: &workload.commands.batches,
            status_page: u64::from(status_page) & !PAGE_MASK,
            image: &mut self.engines[engine as usize].image,
            memory: &mut memory,
        })
        .map_err(|source| Error::Engine { engine, source })
    }

    /// Writes the context back; `None` when a page of it has no translation.
    fn write_back(&mut self, engine: EngineId, workload: &Workload) -> Result<Option<CopyStats>> {
        self.observer.step(workload.sequence, Step::Complete);
        for (register, value) in [
            (ring_register::TAIL, workload.ring.tail()),
            (ring_register::HEAD, workload.ring.final_head()),
        ] {
            self.store(engine.mmio_base() + register, value)?;
        }
        let mut port = Port {
            memory: &self.memory,
            observer: &mut self.observer,
            errors: self.config.errors,
        };
        let EngineState { image, skip, .. } = &mut self.engines[engine as usize];
        let copy = image_copy(&self.config, &self.ggtt, engine, workload, image);
        match copy.write_back(&mut port) {
            Ok(stats) => Ok(Some(stats)),
            // The guest took the page away itself; the kernel goes on as well.
            Err(error @ Error::ContextPageUnmapped { .. }) => {
                log::warn!(
                    "workload {} is not written back: {error}",
                    workload.sequence
                );
                skip.forget();
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Schedules the context out; gives the number of events.
    fn complete(&mut self, engine: EngineId, workload: &Workload) -> Result<usize> {
        let state = &mut self.engines[engine as usize];
        let context = &workload.descriptor;
        let next = state.queue.front();
        if next.is_some_and(|next| next.descriptor.same_context(context)) {
            // Lite restore: to the hardware the context has not stopped.
            return Ok(0);
        }
        let events = state.execlist.schedule_out(engine, context)?;
        self.tell(engine, events)
    }

    fn tell(&mut self, engine: EngineId, events: Events) -> Result<usize> {
        let hws_pga = self.mmio_read(engine.mmio_base() + ring_register::HWS_PGA);
        let status_page = self.ggtt.translate(u64::from(hws_pga) & !PAGE_MASK);
        let mut port = Port {
            memory: &self.memory,
            observer: &mut self.observer,
            errors: self.config.errors,
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
        pages: ContextPages::new(ggtt, workload.descriptor.lrca(), pages).errors(config.errors),
        mode: config.copy_mode,
        image,
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest made by hand: its memory, and contexts in it.

#![allow(dead_code)]

use gvt_scheduler::{
    ring_context, ring_register, Access, AddressingMode, Completion, ContextDescriptor, Engine,
    EngineFault, EngineId, EngineJob, Error, Executed, GuestDma, Observer, SimulatedEngine, Step,
    Submission, Vgpu, VgpuConfig,
};
use page_pin::PinPages;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub const HWSP_PAGE: u32 = 1;
pub const RING_PAGE: u32 = 2;
pub const RING_PAGES: u32 = 4;
pub const REQUEST: u32 = 160;

/// Everything an observer is told.
#[derive(Debug, Default)]
pub struct Trace {
    pub accesses: Vec<(Step, Access)>,
    step: Option<Step>,
}

impl Observer for Trace {
    fn access(&mut self, access: &Access) {
        let step = self.step.expect("an access belongs to a step");
        self.accesses.push((step, *access));
    }

    fn step(&mut self, _: u64, step: Step) {
        self.step = Some(step);
    }
}

pub struct FaultyEngine;

impl Engine for FaultyEngine {
    fn run(&mut self, job: EngineJob<'_>) -> Result<Executed, EngineFault> {
        job.image.pages_mut().fill(0xee);
        Err(EngineFault::new("hang"))
    }
}

pub fn memory(size: usize) -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).unwrap()
}

/// A context of a guest, in its graphics memory.
#[derive(Clone, Copy, Debug)]
pub struct Context {
    pub engine: EngineId,
    pub lrca: u32,
    pub id: u32,
}

impl Context {
    pub fn descriptor(&self) -> ContextDescriptor {
        ContextDescriptor::new(self.lrca, self.id, AddressingMode::Legacy64)
    }
}

/// A vGPU of a guest whose memory is `memory`; graphics page `p` is guest page `p` unless said
/// otherwise.
pub struct Guest<P: PinPages = (), O: Observer = Trace> {
    pub memory: GuestMemoryMmap,
    pub vgpu: Vgpu<GuestMemoryMmap, P, O>,
}

impl Guest {
    pub fn new(config: VgpuConfig) -> Self {
        Guest::with(config, (), Trace::default())
    }

    /// What was accessed since the last call.
    pub fn take_trace(&mut self) -> Vec<(Step, Access)> {
        std::mem::take(&mut self.vgpu.observer_mut().accesses)
    }
}

impl<P: PinPages, O: Observer> Guest<P, O> {
    pub fn with(config: VgpuConfig, pins: P, observer: O) -> Self {
        let memory = memory(4 << 20);
        let config = VgpuConfig {
            ggtt_entries: 1024,
            ..config
        };
        let mut vgpu = Vgpu::new(memory.clone(), pins, observer, config);
        for page in 0..512 {
            vgpu.write_ggtt_entry(page, entry(page.into())).unwrap();
        }
        for engine in EngineId::ALL {
            vgpu.mmio_write(engine.mmio_base() + ring_register::HWS_PGA, HWSP_PAGE << 12)
                .unwrap();
        }
        Self { memory, vgpu }
    }

    /// A context with a ring that has one request in it.
    pub fn context(&mut self, engine: EngineId, lrca: u32, id: u32) -> Context {
        let context = Context { engine, lrca, id };
        self.set(&context, ring_context::START, RING_PAGE << 12);
        self.set(&context, ring_context::CTL, (RING_PAGES - 1) << 12 | 1);
        self.set(&context, ring_context::TAIL, REQUEST);
        context
    }

    pub fn field(&self, context: &Context, offset: usize) -> GuestAddress {
        GuestAddress((u64::from(context.lrca) + 1) << 12 | offset as u64)
    }

    pub fn set(&self, context: &Context, offset: usize, value: u32) {
        self.memory
            .write_obj(value, self.field(context, offset))
            .unwrap();
    }

    pub fn get(&self, context: &Context, offset: usize) -> u32 {
        self.memory.read_obj(self.field(context, offset)).unwrap()
    }

    pub fn set_root(&self, context: &Context, pml4: u64) {
        self.set(context, ring_context::PDP3_UDW + 48, (pml4 >> 32) as u32);
        self.set(context, ring_context::PDP3_UDW + 56, pml4 as u32);
    }

    pub fn submit(&mut self, contexts: &[Context]) -> Result<Submission, Error> {
        let descriptors: Vec<_> = contexts.iter().map(Context::descriptor).collect();
        submit(&mut self.vgpu, contexts[0].engine, &descriptors)
    }

    pub fn run(&mut self, engine: EngineId) -> Completion {
        self.vgpu
            .run_next(engine, &mut SimulatedEngine::without_commands())
            .unwrap()
            .expect("a workload is queued")
    }

    pub fn submit_and_run(&mut self, context: &Context) -> Completion {
        self.submit(&[*context]).unwrap();
        self.run(context.engine)
    }

    pub fn bytes(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(gpa))
            .unwrap();
        bytes
    }
}

pub fn entry(frame: u64) -> u64 {
    frame << 12 | 1
}

pub fn submit<M: GuestDma, P: PinPages, O: Observer>(
    vgpu: &mut Vgpu<M, P, O>,
    engine: EngineId,
    elements: &[ContextDescriptor],
) -> Result<Submission, Error> {
    let element = |i: usize| elements.get(i).copied().map_or(0, u64::from);
    let port = engine.mmio_base() + ring_register::ELSP;
    for dword in [element(1) >> 32, element(1), element(0) >> 32] {
        assert_eq!(vgpu.mmio_write(port, dword as u32).unwrap(), None);
    }
    vgpu.mmio_write(port, element(0) as u32)
        .map(|submission| submission.expect("the fourth dword submits"))
}

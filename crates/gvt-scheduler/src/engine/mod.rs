// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What executes a workload.

mod execute;
mod memory;
mod mix;
mod record;
mod registers;
mod sim;

pub use memory::EngineMemory;
pub(crate) use memory::JobMemory;
pub use record::{RecordedJob, RecordingEngine};
pub use sim::SimulatedEngine;

use std::fmt;

use crate::audit::CopiedBatch;
use crate::context::ShadowImage;
use crate::descriptor::ContextDescriptor;
use crate::error::EngineFault;
use crate::regs::EngineId;

/// One workload, ready to be executed.
pub struct EngineJob<'a> {
    /// The engine it is for.
    pub engine: EngineId,
    /// The context it runs in.
    pub descriptor: ContextDescriptor,
    /// The number of its submission: 0 for the first one of the vGPU.
    pub sequence: u64,
    /// Copy of the commands between head and tail of the ring.
    pub ring: &'a [u8],
    /// Copy of the indirect context batch; empty when there is none. It runs before the ring.
    pub indirect_ctx: &'a [u8],
    /// Address in the GGTT of the per-context batch, if there is one. It runs behind the indirect context
    /// batch and before the ring.
    pub per_ctx: Option<u64>,
    /// Copies of the batches in the GGTT that were audited: executed in the place of what stands there by
    /// now.
    pub batches: &'a [CopiedBatch],
    /// Address in the GGTT of the engine's hardware status page.
    pub status_page: u64,
    /// The context, which the engine changes.
    pub image: &'a mut ShadowImage,
    /// What the commands reach of guest memory. `&mut ()` reaches nothing.
    pub memory: &'a mut dyn EngineMemory,
}

impl fmt::Debug for EngineJob<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EngineJob")
            .field("engine", &self.engine)
            .field("descriptor", &self.descriptor)
            .field("sequence", &self.sequence)
            .field("ring", &self.ring.len())
            .field("indirect_ctx", &self.indirect_ctx.len())
            .field("per_ctx", &self.per_ctx)
            .field("batches", &self.batches.len())
            .field("status_page", &self.status_page)
            .finish_non_exhaustive()
    }
}

/// What an engine says of a workload that it has executed to the end.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Executed {
    /// How often the commands asked for an interrupt (MI_USER_INTERRUPT).
    pub user_interrupts: u32,
}

/// An engine: executes a workload on the shadow image, to its end.
///
/// ```
/// use gvt_scheduler::{Engine, EngineFault, EngineJob, Executed};
///
/// /// Executes nothing, but says what it was given.
/// struct Dummy;
///
/// impl Engine for Dummy {
///     fn run(&mut self, job: EngineJob<'_>) -> Result<Executed, EngineFault> {
///         println!("{:?} has {} bytes of commands", job.engine, job.ring.len());
///         Ok(Executed::default())
///     }
/// }
/// ```
pub trait Engine {
    /// Executes `job`.
    ///
    /// # Errors
    ///
    /// Why it could not be finished. Nothing of the image reaches the guest then, and no interrupt;
    /// [`Vgpu::run_next`](crate::Vgpu::run_next) says [`Error::Engine`](crate::Error::Engine) (EIO).
    fn run(&mut self, job: EngineJob<'_>) -> Result<Executed, EngineFault>;
}

impl<E: Engine + ?Sized> Engine for &mut E {
    fn run(&mut self, job: EngineJob<'_>) -> Result<Executed, EngineFault> {
        (**self).run(job)
    }
}

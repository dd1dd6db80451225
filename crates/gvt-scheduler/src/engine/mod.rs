// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What executes a workload.

mod sim;

pub use sim::SimulatedEngine;

use crate::context::ShadowImage;
use crate::descriptor::ContextDescriptor;
use crate::error::EngineFault;
use crate::regs::EngineId;

/// One workload, ready to be executed.
#[derive(Debug)]
pub struct EngineJob<'a> {
    /// The engine it is for.
    pub engine: EngineId,
    /// The context it runs in.
    pub descriptor: ContextDescriptor,
    /// The number of its submission: 0 for the first one of the vGPU.
    pub sequence: u64,
    /// Copy of the commands between head and tail of the ring.
    pub ring: &'a [u8],
    /// Copy of the indirect context batch; empty when there is none.
    pub indirect_ctx: &'a [u8],
    /// The context, which the engine changes.
    pub image: &'a mut ShadowImage,
}

/// An engine: executes a workload on the shadow image, to its end.
///
/// ```
/// use gvt_scheduler::{Engine, EngineFault, EngineJob};
///
/// /// Executes nothing, but says what it was given.
/// struct Dummy;
///
/// impl Engine for Dummy {
///     fn run(&mut self, job: EngineJob<'_>) -> Result<(), EngineFault> {
///         println!("{:?} has {} bytes of commands", job.engine, job.ring.len());
///         Ok(())
///     }
/// }
/// ```
pub trait Engine {
    /// Executes `job`. After a fault nothing of the image reaches the guest.
    fn run(&mut self, job: EngineJob<'_>) -> Result<(), EngineFault>;
}

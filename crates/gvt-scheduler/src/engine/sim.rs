// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An engine without a GPU.

use crate::context::ShadowImage;
use crate::engine::execute::Execution;
use crate::engine::mix::mix;
use crate::engine::{Engine, EngineJob, Executed};
use crate::error::EngineFault;
use crate::regs::ring_context;

/// Stands in for a GPU: executes the commands with which contexts are switched, memory is written and
/// the driver is told, and changes the context in a way that can be worked out elsewhere.
///
/// # Commands
/// The indirect context batch, the per-context batch and the ring are executed in this order:
///
/// | command | what it does |
/// |---|---|
/// | MI_NOOP, MI_ARB_CHECK, MI_ARB_ON_OFF | nothing |
/// | MI_BATCH_BUFFER_START | from the ring: calls a batch, in the GGTT or PPGTT; from a batch: jumps to another, or calls one of the second level (bit 22), from which one can only return |
/// | MI_BATCH_BUFFER_END | returns from a batch |
/// | MI_STORE_DATA_IMM | writes four bytes, or eight (bit 21) |
/// | MI_FLUSH_DW, PIPE_CONTROL | write immediate data, or as eight bytes the time stamp the context began with; bit 21 writes to the status page. A MI_FLUSH_DW of four dwords writes four bytes, everything else eight |
/// | MI_LOAD_REGISTER_IMM | sets registers that live in the image (below); others are ignored |
/// | MI_USER_INTERRUPT | counts in [`Executed::user_interrupts`] |
///
/// Anything else is a fault: other commands, other lengths, an address without translation, a use of
/// the GGTT by a batch in the PPGTT (such batches come from unprivileged programs), and a command
/// beyond [`STEP_LIMIT`](Self::STEP_LIMIT).
///
/// # Context
/// - Under restore inhibit pages `2..n` are zero before, and the bit (not its mask) is cleared.
/// - Registers that live in the image are those of the ring context but for HEAD, TAIL, START and CTL,
///   and those in lists of MI_LOAD_REGISTER_IMM behind it in page 1. Of the ring context, a vGPU writes back
///   only context control and time stamp. The context control takes the bits that its upper half selects.
/// - The time stamp advances by `1000 + s`, with submission number `s`.
/// - The vGPU sets HEAD to TAIL in memory.
/// - With [`mix_context`](Self::mix_context), every byte of pages `2..n` and behind the ring context of
///   page 1 is changed at the end, which shows each page that was mixed up, lost or left stale. Byte `i` of
///   page `p` of the object becomes `rotate_left(byte, 1) ^ (0x5a + 31 p + 7 i + 3 (i >> 8) + 113 s)`.
///
/// ```
/// use gvt_scheduler::{ContextDescriptor, Engine, EngineId, EngineJob, ShadowImage, SimulatedEngine};
///
/// let mut image = ShadowImage::new(3);
/// let mut run = |engine: &mut SimulatedEngine, ring: &[u32]| {
///     let ring: Vec<u8> = ring.iter().flat_map(|dword| dword.to_le_bytes()).collect();
///     engine.run(EngineJob {
///         engine: EngineId::Rcs,
///         descriptor: ContextDescriptor::default(),
///         sequence: 5,
///         ring: &ring,
///         indirect_ctx: &[],
///         per_ctx: None,
///         batches: &[],
///         status_page: 0,
///         image: &mut image,
///         memory: &mut (),
///     })
/// };
/// // MI_USER_INTERRUPT, MI_NOOP
/// let executed = run(&mut SimulatedEngine::new(), &[0x0100_0000, 0]).unwrap();
/// assert_eq!(executed.user_interrupts, 1);
/// // MI_SEMAPHORE_WAIT
/// let fault = run(&mut SimulatedEngine::new(), &[0x0e00_0002, 0, 0, 0]).unwrap_err();
/// assert_eq!(fault.to_string(), "MI_SEMAPHORE_WAIT (0x0e000002) in the ring is not simulated");
/// assert_eq!(image.ctx_timestamp(), 1005);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct SimulatedEngine {
    /// No command is executed at all without a limit.
    step_limit: Option<u32>,
    mix: bool,
}

impl SimulatedEngine {
    /// Commands of a workload that are executed unless another limit is [set](Self::step_limit). A batch
    /// may jump to itself, so there has to be one; most workloads have less than a hundred, apart from what
    /// a driver pads its batches with.
    pub const STEP_LIMIT: u32 = 1 << 18;

    /// An engine that executes commands.
    pub const fn new() -> Self {
        Self {
            step_limit: Some(Self::STEP_LIMIT),
            mix: false,
        }
    }

    /// An engine that executes no command but mixes the context: for recordings whose commands are a
    /// real GPU's.
    pub const fn without_commands() -> Self {
        Self {
            step_limit: None,
            mix: true,
        }
    }

    /// Executes at most `steps` commands of a workload; one more is a fault. A MI_LOAD_REGISTER_IMM counts as one
    /// for each register.
    pub const fn step_limit(self, steps: u32) -> Self {
        Self {
            step_limit: Some(steps),
            ..self
        }
    }

    /// Whether every byte of the engine context is changed at the end.
    pub const fn mix_context(self, mix: bool) -> Self {
        Self { mix, ..self }
    }
}

impl Default for SimulatedEngine {
    fn default() -> Self {
        Self::new()
    }
}

impl Engine for SimulatedEngine {
    fn run(&mut self, mut job: EngineJob<'_>) -> Result<Executed, EngineFault> {
        restore(job.image);
        let executed = match self.step_limit {
            Some(steps) => Execution::new(&mut job, steps).run()?,
            None => Executed::default(),
        };
        let image = job.image;
        let ticks = 1000u32.wrapping_add(job.sequence as u32);
        image.set_ctx_timestamp(image.ctx_timestamp().wrapping_add(ticks));
        if self.mix {
            mix(image, job.sequence);
        }
        Ok(executed)
    }
}

fn restore(image: &mut ShadowImage) {
    if image.restore_inhibit() {
        image.pages_mut().fill(0);
        image.set_ctx_ctrl(image.ctx_ctrl() & !ring_context::RESTORE_INHIBIT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::descriptor::ContextDescriptor;
    use crate::regs::EngineId;

    fn run(image: &mut ShadowImage, sequence: u64) {
        SimulatedEngine::without_commands()
            .run(EngineJob {
                engine: EngineId::Rcs,
                descriptor: ContextDescriptor::default(),
                sequence,
                ring: &[0xff; 7],
                indirect_ctx: &[],
                per_ctx: Some(0),
                batches: &[],
                status_page: 0,
                image,
                memory: &mut (),
            })
            .unwrap();
    }

    #[test]
    fn the_time_stamp_advances_and_wraps() {
        for sequence in [0, 1, 77, u64::MAX] {
            let mut image = ShadowImage::new(2);
            image.set_ctx_timestamp(u32::MAX);
            run(&mut image, sequence);
            let expected = 999u32.wrapping_add(sequence as u32);
            assert_eq!(image.ctx_timestamp(), expected, "{sequence}");
        }
    }

    #[test]
    fn restore_inhibit_starts_from_zero_and_is_cleared() {
        let mut dirty = ShadowImage::new(3);
        dirty.pages_mut().fill(0xff);
        dirty.set_ctx_ctrl(0x0001_0001);
        let mut clean = ShadowImage::new(3);
        clean.set_ctx_ctrl(0x0001_0000);
        for image in [&mut dirty, &mut clean] {
            run(image, 3);
            assert_eq!(image.ctx_ctrl(), 0x0001_0000);
        }
        assert!(dirty.pages() == clean.pages());
        // What was saved is restored.
        dirty.pages_mut().fill(0xff);
        for image in [&mut dirty, &mut clean] {
            run(image, 4);
        }
        assert!(dirty.pages() != clean.pages());
    }
}

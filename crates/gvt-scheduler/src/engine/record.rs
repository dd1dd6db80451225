// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An engine that keeps what it was given.

use crate::audit::CopiedBatch;
use crate::descriptor::ContextDescriptor;
use crate::engine::{Engine, EngineJob, Executed};
use crate::error::{EngineFault, Error};
use crate::memory;
use crate::regs::EngineId;

/// A job that was executed, and how that ended.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RecordedJob {
    /// The engine it was for.
    pub engine: EngineId,
    /// The context it ran in.
    pub descriptor: ContextDescriptor,
    /// The number of its submission.
    pub sequence: u64,
    /// The commands of the ring.
    pub ring: Vec<u8>,
    /// The commands of the indirect context batch.
    pub indirect_ctx: Vec<u8>,
    /// Address of the per-context batch.
    pub per_ctx: Option<u64>,
    /// Copies of batches in the GGTT.
    pub batches: Vec<CopiedBatch>,
    /// What the engine said.
    pub result: Result<Executed, EngineFault>,
}

/// Hands jobs to another engine, and keeps them: for tests, and to see what a guest runs.
///
/// What is kept grows with each job until it is [taken](Self::take), up to [`BYTES_LIMIT`](Self::BYTES_LIMIT).
///
/// ```
/// use gvt_scheduler::{ContextDescriptor, Engine, EngineId, EngineJob, RecordingEngine, ShadowImage};
/// use gvt_scheduler::SimulatedEngine;
///
/// let mut engine = RecordingEngine::new(SimulatedEngine::new());
/// engine.run(EngineJob {
///     engine: EngineId::Bcs,
///     descriptor: ContextDescriptor::default(),
///     sequence: 0,
///     ring: &[0; 8],
///     indirect_ctx: &[],
///     per_ctx: None,
///     batches: &[],
///     status_page: 0,
///     image: &mut ShadowImage::new(2),
///     memory: &mut (),
/// })?;
/// let jobs = engine.take();
/// assert_eq!((jobs.len(), &jobs[0].ring[..]), (1, &[0; 8][..]));
/// assert!(jobs[0].result.is_ok());
/// # Ok::<(), gvt_scheduler::EngineFault>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct RecordingEngine<E> {
    inner: E,
    jobs: Vec<RecordedJob>,
    /// What they take, with their commands.
    bytes: usize,
}

impl<E> RecordingEngine<E> {
    /// Bytes of jobs that are kept. A guest decides how many jobs there are, of up to 3 MiB each: one for which there is
    /// no room is not executed, and fails until the others are [taken](Self::take).
    pub const BYTES_LIMIT: usize = 64 << 20;

    /// Keeps what `inner` is given.
    pub const fn new(inner: E) -> Self {
        Self {
            inner,
            jobs: Vec::new(),
            bytes: 0,
        }
    }

    /// The jobs since the last [`take`](Self::take), in order.
    pub fn jobs(&self) -> &[RecordedJob] {
        &self.jobs
    }

    /// Gives the jobs away.
    pub fn take(&mut self) -> Vec<RecordedJob> {
        self.bytes = 0;
        std::mem::take(&mut self.jobs)
    }

    /// The engine that executes.
    pub fn inner_mut(&mut self) -> &mut E {
        &mut self.inner
    }
}

impl<E: Engine> Engine for RecordingEngine<E> {
    fn run(&mut self, job: EngineJob<'_>) -> Result<Executed, EngineFault> {
        let bytes = self.bytes.saturating_add(bytes_of(&job));
        let limit = Self::BYTES_LIMIT;
        if bytes > limit {
            let full = format!("jobs of {bytes:#x} bytes are more than are kept: {limit:#x}");
            return Err(EngineFault::new(full));
        }
        let mut recorded = RecordedJob {
            engine: job.engine,
            descriptor: job.descriptor,
            sequence: job.sequence,
            ring: memory::copy(job.ring)?,
            indirect_ctx: memory::copy(job.indirect_ctx)?,
            per_ctx: job.per_ctx,
            batches: copies(job.batches)?,
            result: Ok(Executed::default()),
        };
        memory::reserve(&mut self.jobs, 1)?;
        let result = self.inner.run(job);
        recorded.result.clone_from(&result);
        self.jobs.push(recorded);
        self.bytes = bytes;
        result
    }
}

fn copies(batches: &[CopiedBatch]) -> Result<Vec<CopiedBatch>, Error> {
    let mut copies = Vec::new();
    memory::reserve(&mut copies, batches.len())?;
    for CopiedBatch { gma, bytes } in batches {
        let (gma, bytes) = (*gma, memory::copy(bytes)?);
        copies.push(CopiedBatch { gma, bytes });
    }
    Ok(copies)
}

/// What it takes to keep a job.
fn bytes_of(job: &EngineJob<'_>) -> usize {
    let batches = job.batches.iter();
    let batches = batches.map(|batch| size_of::<CopiedBatch>() + batch.bytes.len());
    size_of::<RecordedJob>() + job.ring.len() + job.indirect_ctx.len() + batches.sum::<usize>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::ShadowImage;

    struct Idle;

    impl Engine for Idle {
        fn run(&mut self, _: EngineJob<'_>) -> Result<Executed, EngineFault> {
            Ok(Executed::default())
        }
    }

    #[test]
    fn a_guest_cannot_have_any_number_of_bytes_kept() {
        const LIMIT: usize = RecordingEngine::<Idle>::BYTES_LIMIT;
        let ring = vec![0; LIMIT / 8];
        let mut engine = RecordingEngine::new(Idle);
        let run = |engine: &mut RecordingEngine<Idle>| {
            engine.run(EngineJob {
                engine: EngineId::Bcs,
                descriptor: ContextDescriptor::default(),
                sequence: 0,
                ring: &ring,
                indirect_ctx: &[],
                per_ctx: None,
                batches: &[],
                status_page: 0,
                image: &mut ShadowImage::new(2),
                memory: &mut (),
            })
        };
        // What the jobs themselves take leaves no room for an eighth.
        for _ in 0..7 {
            run(&mut engine).unwrap();
        }
        let full = run(&mut engine).unwrap_err();
        assert_eq!(
            (
                engine.jobs().len(),
                full.to_string().contains("more than are kept")
            ),
            (7, true)
        );
        assert_eq!(engine.take().len(), 7);
        run(&mut engine).unwrap();
    }
}

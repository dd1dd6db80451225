// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who looks at a guest's commands before an engine gets them.

mod batch;
mod error;
mod mi;

pub use batch::CopiedBatch;
pub use error::{CommandError, CommandPlace, CommandProblem};
pub use mi::MiAuditor;

use crate::error::Result;
use crate::ggtt::Ggtt;
use crate::memory;
use crate::regs::EngineId;

/// The commands of a workload as they were copied from the guest, to be judged.
///
/// What an auditor reads besides can be changed by the guest until it is executed. A batch that was judged
/// is therefore [kept](Self::keep_batch) as it was read, and the engine is given that copy.
pub struct Scan<'a> {
    /// The engine the workload is for.
    pub engine: EngineId,
    /// The commands between head and tail of the ring.
    pub ring: &'a [u8],
    /// The indirect context batch; empty when there is none.
    pub indirect_ctx: &'a [u8],
    /// Address in the GGTT of the per-context batch, if there is one.
    pub per_ctx: Option<u64>,
    pub(crate) ggtt: &'a Ggtt,
    pub(crate) memory: &'a mut dyn ReadGgtt,
    pub(crate) batches: &'a mut Vec<CopiedBatch>,
}

/// Guest memory through the GGTT.
pub(crate) trait ReadGgtt {
    fn read(&mut self, gma: u64, buf: &mut [u8]) -> Result<()>;
}

impl Scan<'_> {
    /// Whether `len` bytes from `gma` lie in one part of the vGPU's graphics memory.
    pub fn owns(&self, gma: u64, len: u64) -> bool {
        self.ggtt.owns(gma, len)
    }

    /// Reads guest memory through the GGTT.
    ///
    /// # Errors
    ///
    /// `EFAULT` if part of it has no translation or cannot be read.
    pub fn read(&mut self, gma: u64, buf: &mut [u8]) -> Result<()> {
        self.memory.read(gma, buf)
    }

    /// Has the engine execute this copy when the commands start the batch in the GGTT that it is of.
    ///
    /// # Errors
    ///
    /// [`Error::NoMemory`](crate::Error::NoMemory) (ENOMEM).
    pub fn keep_batch(&mut self, batch: CopiedBatch) -> Result<()> {
        memory::push(self.batches, batch)
    }

    /// The batches that were kept.
    pub fn batches(&self) -> &[CopiedBatch] {
        self.batches
    }
}

impl std::fmt::Debug for Scan<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scan")
            .field("engine", &self.engine)
            .field("ring", &self.ring.len())
            .field("indirect_ctx", &self.indirect_ctx.len())
            .field("per_ctx", &self.per_ctx)
            .field("batches", &self.batches.len())
            .finish_non_exhaustive()
    }
}

/// Judges the commands of workloads.
///
/// A vGPU begins with a [`MiAuditor`]; [`Vgpu::set_auditor`](crate::Vgpu::set_auditor) puts another in its
/// place. `()` lets everything pass.
///
/// ```
/// use gvt_scheduler::{CommandAuditor, MiAuditor, Result, Scan};
///
/// /// Says what is submitted, and judges as usual.
/// struct Loud(MiAuditor);
///
/// impl CommandAuditor for Loud {
///     fn audit(&self, scan: &mut Scan<'_>) -> Result<()> {
///         println!("{:?}: {} bytes of commands", scan.engine, scan.ring.len());
///         self.0.audit(scan)
///     }
/// }
/// # use gvt_scheduler::{Vgpu, VgpuConfig};
/// # use vm_memory::GuestMemoryMmap;
/// # let memory = GuestMemoryMmap::<()>::new();
/// let mut vgpu = Vgpu::new(memory, (), (), VgpuConfig::default());
/// vgpu.set_auditor(Loud(MiAuditor::new()));
/// ```
pub trait CommandAuditor {
    /// Judges the commands of one workload.
    ///
    /// # Errors
    ///
    /// What is wrong with them. The workload is refused, and with `EBADRQC` or `EFAULT` the vGPU enters
    /// [failsafe mode](crate::Vgpu::failsafe).
    fn audit(&self, scan: &mut Scan<'_>) -> Result<()>;
}

impl CommandAuditor for () {
    fn audit(&self, _: &mut Scan<'_>) -> Result<()> {
        Ok(())
    }
}

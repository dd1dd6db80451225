// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a policy is asked for and cannot do.

use crate::policy::VgpuId;
use crate::regs::EngineId;

/// Why a policy refuses.
///
/// ```
/// use gvt_scheduler::policy::Weight;
///
/// assert_eq!(Weight::new(0).unwrap_err().errno(), libc::EINVAL);
/// ```
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// A weight is not one of 1 to 16.
    #[error("weight {weight} is not one of 1 to 16")]
    Weight {
        /// The weight.
        weight: u8,
    },
    /// There is no such vGPU, or none any more.
    #[error("there is no {vgpu}")]
    NoVgpu {
        /// What was asked for.
        vgpu: VgpuId,
    },
    /// A vGPU that is started, or whose workload runs, cannot be removed.
    #[error("{vgpu} is started, or a workload of it runs")]
    InUse {
        /// The vGPU.
        vgpu: VgpuId,
    },
    /// Nothing runs on an engine.
    #[error("nothing runs on {engine:?}")]
    Idle {
        /// The engine.
        engine: EngineId,
    },
}

impl PolicyError {
    /// What the kernel would return.
    pub fn errno(&self) -> i32 {
        match self {
            PolicyError::Weight { .. } | PolicyError::Idle { .. } => libc::EINVAL,
            PolicyError::NoVgpu { .. } => libc::ENODEV,
            PolicyError::InUse { .. } => libc::EBUSY,
        }
    }
}

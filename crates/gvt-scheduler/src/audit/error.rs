// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is wrong with a command.

use std::fmt;

use crate::command::name;

/// Where a command stands.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CommandPlace {
    /// In the ring.
    Ring,
    /// In the indirect context batch.
    IndirectCtx,
    /// In a batch in the GGTT.
    Batch {
        /// Graphics address of the batch.
        gma: u64,
    },
}

impl fmt::Display for CommandPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CommandPlace::Ring => f.write_str("the ring"),
            CommandPlace::IndirectCtx => f.write_str("the indirect context batch"),
            CommandPlace::Batch { gma } => write!(f, "the batch at GGTT address {gma:#x}"),
        }
    }
}

/// What is wrong with a command.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CommandProblem {
    /// No engine has such a command.
    #[error("is unknown")]
    Unknown,
    /// The command is not for guests.
    #[error("is forbidden")]
    Forbidden,
    /// The command has another length than it can have.
    #[error("has {dwords} dwords")]
    Length {
        /// Its length.
        dwords: usize,
    },
    /// The commands end before the command does.
    #[error("does not end there")]
    Truncated,
    /// The command uses graphics memory that is not the vGPU's.
    #[error("uses {len:#x} bytes at {gma:#x} outside the graphics memory of the vGPU")]
    Address {
        /// Graphics address in the GGTT.
        gma: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The command loads a register that the device has not.
    #[error("loads register {register:#x} beyond the register space")]
    Register {
        /// Offset in the MMIO BAR.
        register: u32,
    },
    /// The command starts a batch of the second level from elsewhere than the first, or any from the
    /// second.
    #[error("starts a batch from the wrong level")]
    BatchStart,
    /// The command ends a batch and stands in none.
    #[error("ends no batch")]
    BatchEnd,
    /// The batches of the workload are longer than is looked at.
    #[error("lies beyond the {limit:#x} bytes of batches that are looked at")]
    TooLong {
        /// Bytes of batches of a workload that are looked at.
        limit: usize,
    },
}

/// A command that is refused.
///
/// ```
/// use gvt_scheduler::{CommandError, CommandPlace, CommandProblem};
///
/// let error = CommandError {
///     header: 0x0e00_0002,
///     place: CommandPlace::Ring,
///     offset: 0x40,
///     problem: CommandProblem::Forbidden,
/// };
/// assert_eq!(error.to_string(), "MI_SEMAPHORE_WAIT (0x0e000002) at byte 0x40 of the ring is forbidden");
/// assert_eq!(error.errno(), libc::EBADRQC);
/// ```
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{} ({header:#010x}) at byte {offset:#x} of {place} {problem}", name(*.header).unwrap_or("command"))]
pub struct CommandError {
    /// First dword of the command.
    pub header: u32,
    /// Where it stands.
    pub place: CommandPlace,
    /// At which byte there; in the ring from the head on.
    pub offset: usize,
    /// What is wrong with it.
    pub problem: CommandProblem,
}

impl CommandError {
    /// The error number the kernel's command parser has for this.
    pub fn errno(&self) -> i32 {
        match self.problem {
            CommandProblem::Length { .. } if name(self.header) == Some("MI_LOAD_REGISTER_IMM") => {
                libc::EFAULT
            }
            CommandProblem::Unknown | CommandProblem::Forbidden | CommandProblem::Length { .. } => {
                libc::EBADRQC
            }
            CommandProblem::Truncated
            | CommandProblem::Address { .. }
            | CommandProblem::Register { .. }
            | CommandProblem::BatchStart
            | CommandProblem::BatchEnd
            | CommandProblem::TooLong { .. } => libc::EFAULT,
        }
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Commands as the engines of generations 8 and 9 read them: how long they are, and what those say
//! that a vGPU looks at.

mod decode;
mod length;
pub(crate) mod opcode;

pub(crate) use decode::{BatchStart, Operation, Store, Target, Value};
pub(crate) use length::{length, name};

/// Which translation table an address goes through.
///
/// ```
/// use gvt_scheduler::Gtt;
///
/// assert_eq!(Gtt::Global.to_string(), "GGTT");
/// assert_eq!(Gtt::PerProcess.to_string(), "PPGTT");
/// ```
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Gtt {
    /// The vGPU's [`Ggtt`](crate::Ggtt).
    Global,
    /// The page tables of the context.
    PerProcess,
}

impl std::fmt::Display for Gtt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Gtt::Global => "GGTT",
            Gtt::PerProcess => "PPGTT",
        })
    }
}

/// The dwords of commands; what is left over is none.
pub(crate) fn dwords(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    bytes
        .chunks_exact(4)
        .map(|bytes| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

/// The dword at byte `at` of commands.
pub(crate) fn dword_at(bytes: &[u8], at: usize) -> Option<u32> {
    dwords(bytes.get(at..)?).next()
}

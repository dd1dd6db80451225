// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Batches that were judged, as they were then.

/// A copy of a batch in the GGTT.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct CopiedBatch {
    /// Graphics address of its first command.
    pub gma: u64,
    /// Its commands, to the one that leaves it.
    pub bytes: Vec<u8>,
}

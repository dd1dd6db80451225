// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A workload: one element of a submission, from the guest's ring context to its copied commands.

mod image;
mod ring_context;

pub(crate) use image::ImageCopy;
pub(crate) use ring_context::RingContext;

use vm_memory::GuestAddress;

use crate::descriptor::ContextDescriptor;
use crate::error::{Error, Result};
use crate::ggtt::Ggtt;
use crate::guest_dma::{GuestDma, Port};
use crate::observe::{AccessKind, Observer};
use crate::ppgtt::PageTableRoot;
use crate::ring::{page_pieces, Ring};
use crate::workload::ring_context::IndirectCtx;

/// A queued workload.
#[derive(Debug)]
pub(crate) struct Workload {
    pub(crate) sequence: u64,
    pub(crate) descriptor: ContextDescriptor,
    /// Both elements of the submission, in the workload of element 0.
    pub(crate) submission: Option<[ContextDescriptor; 2]>,
    /// Where page 1 of the context object is.
    pub(crate) ring_context: GuestAddress,
    pub(crate) ring: Ring,
    pub(crate) root: PageTableRoot,
    pub(crate) indirect_ctx: IndirectCtx,
    /// Graphics address of the per-context batch.
    pub(crate) per_ctx: Option<u64>,
    /// The copied commands, once they are scanned.
    pub(crate) commands: Commands,
    pub(crate) scanned: bool,
}

/// Copies of what a workload executes. The buffers are used again by later workloads.
#[derive(Debug, Default)]
pub(crate) struct Commands {
    pub(crate) ring: Vec<u8>,
    pub(crate) indirect_ctx: Vec<u8>,
}

impl Workload {
    /// Copies the commands, by reads that do not cross a page.
    pub(crate) fn scan<M: GuestDma, O: Observer>(
        &mut self,
        port: &mut Port<'_, M, O>,
        ggtt: &Ggtt,
    ) -> Result<()> {
        copy_pieces(port, ggtt, self.ring.pieces(), &mut self.commands.ring)?;
        let batch = page_pieces(self.indirect_ctx.gma, self.indirect_ctx.len);
        copy_pieces(port, ggtt, batch, &mut self.commands.indirect_ctx)?;
        self.scanned = true;
        Ok(())
    }
}

fn copy_pieces<M: GuestDma, O: Observer>(
    port: &mut Port<'_, M, O>,
    ggtt: &Ggtt,
    pieces: impl Iterator<Item = (u64, usize)>,
    copy: &mut Vec<u8>,
) -> Result<()> {
    copy.clear();
    for (gma, len) in pieces {
        let gpa = ggtt.translate(gma).ok_or(Error::BufferUnmapped { gma })?;
        let at = copy.len();
        copy.resize(at + len, 0);
        port.read(AccessKind::Ring, gpa, &mut copy[at..])?;
    }
    Ok(())
}

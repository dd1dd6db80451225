// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A workload: one element of a submission, from the guest's ring context to its copied commands.

mod image;
mod ring_context;

pub(crate) use image::ImageCopy;
pub(crate) use ring_context::RingContext;

use vm_memory::GuestAddress;

use crate::audit::{CommandAuditor, CopiedBatch, ReadGgtt, Scan};
use crate::descriptor::ContextDescriptor;
use crate::error::{Error, Result};
use crate::ggtt::Ggtt;
use crate::guest_dma::{GuestDma, Port};
use crate::memory;
use crate::observe::{AccessKind, Observer};
use crate::ppgtt::PageTableRoot;
use crate::regs::EngineId;
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
    /// Batches in the GGTT that the auditor has kept.
    pub(crate) batches: Vec<CopiedBatch>,
}

impl Workload {
    /// Copies the commands, by reads that do not cross a page, and has them judged.
    pub(crate) fn scan<M: GuestDma, O: Observer>(
        &mut self,
        port: &mut Port<'_, M, O>,
        engine: EngineId,
        ggtt: &Ggtt,
        auditor: &dyn CommandAuditor,
    ) -> Result<()> {
        let Commands {
            ring,
            indirect_ctx,
            batches,
        } = &mut self.commands;
        copy_pieces(port, ggtt, self.ring.pieces(), ring)?;
        let batch = page_pieces(self.indirect_ctx.gma, self.indirect_ctx.len);
        copy_pieces(port, ggtt, batch, indirect_ctx)?;
        batches.clear();
        auditor.audit(&mut Scan {
            engine,
            ring,
            indirect_ctx,
            per_ctx: self.per_ctx,
            ggtt,
            memory: &mut ScanMemory { port, ggtt },
            batches,
        })?;
        self.scanned = true;
        Ok(())
    }
}

/// What an auditor reads: the GGTT, as a part of the scan.
struct ScanMemory<'a, 'b, M, O> {
    port: &'a mut Port<'b, M, O>,
    ggtt: &'a Ggtt,
}

impl<M: GuestDma, O: Observer> ReadGgtt for ScanMemory<'_, '_, M, O> {
    fn read(&mut self, gma: u64, mut buf: &mut [u8]) -> Result<()> {
        for (gma, len) in page_pieces(gma, buf.len()) {
            let (piece, rest) = buf.split_at_mut(len);
            let gpa = self
                .ggtt
                .translate(gma)
                .ok_or(Error::BufferUnmapped { gma })?;
            self.port.read(AccessKind::Ring, gpa, piece)?;
            buf = rest;
        }
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
        memory::grow(copy, len)?;
        port.read(AccessKind::Ring, gpa, &mut copy[at..])?;
    }
    Ok(())
}

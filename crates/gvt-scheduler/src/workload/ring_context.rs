// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a workload takes from the guest's ring context when it is created.

use vm_memory::GuestAddress;

use crate::error::{Error, Result};
use crate::ggtt::Ggtt;
use crate::guest_dma::{GuestDma, Port};
use crate::observe::{AccessKind, Observer};
use crate::regs::{ring_context, EngineId, PAGE_MASK};
use crate::ring::Ring;

/// A cache line: what the device fetches of a batch at least.
const CACHE_LINE: u64 = 64;

/// The batch that runs between restoring a context and its commands.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct IndirectCtx {
    pub(crate) gma: u64,
    /// Length in bytes, 0 to 4032; 0 when there is none.
    pub(crate) len: usize,
}

/// The fields of a ring context, as they were read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RingContext {
    pub(crate) ring: Ring,
    /// PDP0 to PDP3.
    pub(crate) pdps: [u64; 4],
    bb_per_ctx: u32,
    indirect_ctx: u32,
}

impl RingContext {
    /// Reads the fields one by one in the kernel's order: 13 dwords, 15 on the render engine.
    pub(crate) fn read<M: GuestDma, O: Observer>(
        port: &mut Port<'_, M, O>,
        at: GuestAddress,
        engine: EngineId,
    ) -> Result<Self> {
        let mut read = |offset| port.read_u32(AccessKind::ContextDword, field(at, offset));
        let head = read(ring_context::HEAD)?;
        let tail = read(ring_context::TAIL)?;
        let start = read(ring_context::START)?;
        let ctl = read(ring_context::CTL)?;
        // Read here as the kernel does; what counts is its value when the context is populated.
        read(ring_context::CTX_CTRL)?;
        let [mut bb_per_ctx, mut indirect_ctx] = [0; 2];
        if engine.has_workaround_batches() {
            bb_per_ctx = read(ring_context::BB_PER_CTX)?;
            indirect_ctx = read(ring_context::INDIRECT_CTX)?;
        }
        let mut pdps = [0; 4];
        let mut offset = ring_context::PDP3_UDW;
        for pdp in pdps.iter_mut().rev() {
            let upper = read(offset)?;
            let lower = read(offset + ring_context::PDP_STRIDE)?;
            *pdp = u64::from(upper) << 32 | u64::from(lower);
            offset += 2 * ring_context::PDP_STRIDE;
        }
        Ok(Self {
            ring: Ring::new(head, tail, start, ctl),
            pdps,
            bb_per_ctx,
            indirect_ctx,
        })
    }

    /// The indirect context batch: address in bits 31:6, cache lines in bits 5:0.
    pub(crate) fn indirect_ctx(&self) -> IndirectCtx {
        IndirectCtx {
            gma: u64::from(self.indirect_ctx & !0x3f),
            len: (self.indirect_ctx & 0x3f) as usize * CACHE_LINE as usize,
        }
    }

    /// Where the per-context batch begins, if there is one (bit 0).
    pub(crate) fn per_ctx(&self) -> Option<u64> {
        let valid = self.bb_per_ctx & 1 != 0;
        valid.then_some(u64::from(self.bb_per_ctx) & !PAGE_MASK)
    }

    /// The batches of the render engine are in the vGPU's graphics memory.
    pub(crate) fn check_batches(&self, ggtt: &Ggtt) -> Result<()> {
        let IndirectCtx { gma, len } = self.indirect_ctx();
        if len > 0 {
            let name = "indirect context batch";
            check_owned(ggtt, name, gma, len as u64)?;
            if gma & PAGE_MASK != 0 {
                return Err(Error::NotPageAligned { name, gma });
            }
        }
        if let Some(gma) = self.per_ctx() {
            check_owned(ggtt, "per-context batch", gma, CACHE_LINE)?;
        }
        Ok(())
    }
}

/// Where a field of the ring context is.
pub(crate) fn field(ring_context: GuestAddress, offset: usize) -> GuestAddress {
    // A translated page address has 46 bits.
    GuestAddress(ring_context.0 + offset as u64)
}

fn check_owned(ggtt: &Ggtt, name: &'static str, gma: u64, len: u64) -> Result<()> {
    if ggtt.owns(gma, len) {
        Ok(())
    } else {
        Err(Error::OutsideGraphicsMemory { name, gma, len })
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Engines, register offsets and the fields of the ring context.

/// Size of a page of graphics memory, in bytes.
pub const PAGE_SIZE: usize = 4096;
/// Size of the register space at the beginning of the MMIO BAR.
pub(crate) const REGISTER_SPACE: u32 = 0x20_0000;
pub(crate) const PAGE_SHIFT: u32 = 12;
pub(crate) const PAGE_MASK: u64 = PAGE_SIZE as u64 - 1;

/// The generation of the graphics device that is modelled.
///
/// ```
/// use gvt_scheduler::{EngineId, Generation};
///
/// assert_eq!(EngineId::Rcs.context_pages(Generation::Gen9), 22);
/// assert_eq!(EngineId::Rcs.context_pages(Generation::Gen8), 19);
/// ```
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Generation {
    /// Broadwell.
    Gen8,
    /// Skylake and its successors.
    #[default]
    Gen9,
}

/// A command streamer of the device.
///
/// ```
/// use gvt_scheduler::EngineId;
///
/// assert_eq!(EngineId::Vcs.mmio_base(), 0x12000);
/// assert_eq!(EngineId::from_mmio(0x12230), Some((EngineId::Vcs, 0x230)));
/// assert_eq!(EngineId::from_mmio(0x40000), None);
/// ```
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum EngineId {
    /// Render.
    Rcs,
    /// First video decoder.
    Vcs,
    /// Second video decoder.
    Vcs2,
    /// Video enhancement.
    Vecs,
    /// Blitter.
    Bcs,
}

impl EngineId {
    /// Every engine.
    pub const ALL: [EngineId; 5] = [
        EngineId::Rcs,
        EngineId::Vcs,
        EngineId::Vcs2,
        EngineId::Vecs,
        EngineId::Bcs,
    ];

    /// Offset of the engine's registers in the MMIO BAR.
    pub const fn mmio_base(self) -> u32 {
        match self {
            EngineId::Rcs => 0x2000,
            EngineId::Vcs => 0x12000,
            EngineId::Vcs2 => 0x1c000,
            EngineId::Vecs => 0x1a000,
            EngineId::Bcs => 0x22000,
        }
    }

    /// Number of pages of a context object, the per-process status page and the ring context's page
    /// included. Pages `2..n` are the engine context.
    pub const fn context_pages(self, generation: Generation) -> usize {
        match (self, generation) {
            (EngineId::Rcs, Generation::Gen8) => 19,
            (EngineId::Rcs, Generation::Gen9) => 22,
            _ => 2,
        }
    }

    /// The engine whose 4 KiB of registers hold `offset`, and the offset from its base.
    pub fn from_mmio(offset: u32) -> Option<(EngineId, u32)> {
        Self::ALL
            .into_iter()
            .find(|engine| offset & !0xfff == engine.mmio_base())
            .map(|engine| (engine, offset & 0xfff))
    }

    /// Which of the GT interrupt registers ([`interrupt_register`]) has the bits of this engine, and by how many
    /// bits they are shifted there.
    pub const fn gt_interrupt(self) -> (u32, u32) {
        match self {
            EngineId::Rcs => (0, 0),
            EngineId::Bcs => (0, 16),
            EngineId::Vcs => (1, 0),
            EngineId::Vcs2 => (1, 16),
            EngineId::Vecs => (3, 0),
        }
    }

    /// The bit of this engine in [`MASTER_IRQ`](interrupt_register::MASTER_IRQ).
    pub const fn master_interrupt(self) -> u32 {
        match self {
            EngineId::Rcs => 1 << 0,
            EngineId::Bcs => 1 << 1,
            EngineId::Vcs => 1 << 2,
            EngineId::Vcs2 => 1 << 3,
            EngineId::Vecs => 1 << 6,
        }
    }

    pub(crate) const fn has_workaround_batches(self) -> bool {
        matches!(self, EngineId::Rcs)
    }
}

/// Registers of an engine, as offsets from [`EngineId::mmio_base`].
pub mod ring_register {
    /// RING_TAIL.
    pub const TAIL: u32 = 0x30;
    /// RING_HEAD.
    pub const HEAD: u32 = 0x34;
    /// RING_START.
    pub const START: u32 = 0x38;
    /// RING_CTL.
    pub const CTL: u32 = 0x3c;
    /// HWS_PGA: graphics address of the hardware status page.
    pub const HWS_PGA: u32 = 0x80;
    /// The execlist submission port; takes four dwords.
    pub const ELSP: u32 = 0x230;
    /// EXECLIST_STATUS, lower dword; the upper one follows.
    pub const EXECLIST_STATUS: u32 = 0x234;
    /// First entry of the context status buffer.
    pub const CONTEXT_STATUS_BUFFER: u32 = 0x370;
    /// Read and write pointer of the context status buffer.
    pub const CONTEXT_STATUS_POINTER: u32 = 0x3a0;
}

/// Interrupt registers of the device, as offsets in the MMIO BAR, and their bits.
pub mod interrupt_register {
    /// Which of the others have something; bit 31 lets interrupts through.
    pub const MASTER_IRQ: u32 = 0x4_4200;
    /// Bit of [`MASTER_IRQ`].
    pub const MASTER_CONTROL: u32 = 1 << 31;
    /// ISR of GT interrupt register 0; its IMR, IIR and IER follow, then those of the next.
    pub const GT_ISR: u32 = 0x4_4300;
    /// Distance of two GT interrupt registers.
    pub const GT_STRIDE: u32 = 0x10;
    /// How many there are.
    pub const GT_COUNT: u32 = 4;
    /// MI_USER_INTERRUPT, to be shifted by [`EngineId::gt_interrupt`](super::EngineId::gt_interrupt).
    pub const USER: u32 = 1 << 0;
    /// An event is in the context status buffer, to be shifted likewise.
    pub const CONTEXT_SWITCH: u32 = 1 << 8;
}

/// Fields of the ring context, as byte offsets of their values in page 1 of a context object.
pub mod ring_context {
    /// CTX_CONTEXT_CONTROL, a masked register.
    pub const CTX_CTRL: usize = 0x0c;
    /// RING_HEAD.
    pub const HEAD: usize = 0x14;
    /// RING_TAIL.
    pub const TAIL: usize = 0x1c;
    /// RING_START.
    pub const START: usize = 0x24;
    /// RING_CTL.
    pub const CTL: usize = 0x2c;
    /// BB_PER_CTX_PTR, of the render engine.
    pub const BB_PER_CTX: usize = 0x64;
    /// RCS_INDIRECT_CTX, of the render engine.
    pub const INDIRECT_CTX: usize = 0x6c;
    /// RCS_INDIRECT_CTX_OFFSET, of the render engine.
    pub const INDIRECT_CTX_OFFSET: usize = 0x74;
    /// CTX_TIMESTAMP.
    pub const TIMESTAMP: usize = 0x8c;
    /// PDP3_UDW, the first of the eight dwords PDP3_UDW, PDP3_LDW .. PDP0_UDW, PDP0_LDW.
    pub const PDP3_UDW: usize = 0x94;
    /// Distance of two of these eight dwords.
    pub const PDP_STRIDE: usize = 8;
    /// Size of the ring context; what follows in the page belongs to the engine context.
    pub const SIZE: usize = 0xd0;
    /// Bit of [`CTX_CTRL`] that says that there is no engine context to restore yet.
    pub const RESTORE_INHIBIT: u32 = 1 << 0;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_base_belongs_to_its_engine() {
        for engine in EngineId::ALL {
            assert_eq!(EngineId::from_mmio(engine.mmio_base()), Some((engine, 0)));
            assert_eq!(
                EngineId::from_mmio(engine.mmio_base() + 0xfff),
                Some((engine, 0xfff))
            );
        }
        assert_eq!(EngineId::from_mmio(u32::MAX), None);
    }

    #[test]
    fn ring_context_ends_behind_its_last_field() {
        let pdp0_ldw = ring_context::PDP3_UDW + 7 * ring_context::PDP_STRIDE;
        assert_eq!(pdp0_ldw, 0xcc);
        assert_eq!(ring_context::SIZE, pdp0_ldw + 4);
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which registers live in a context, and where.

use crate::command::{length, opcode};
use crate::context::ShadowImage;
use crate::regs::{ring_context, EngineId};

const CTX_CTRL: u32 = 0x244;

/// Registers of the ring context, as offsets from the engine's base, and the byte of page 1 where each
/// has its value. HEAD, TAIL, START and CTL are not among them: those of a running ring are the device's.
const RING_CONTEXT: [(u32, usize); 19] = [
    (CTX_CTRL, ring_context::CTX_CTRL),
    (0x168, 0x34),
    (0x140, 0x3c),
    (0x110, 0x44),
    (0x11c, 0x4c),
    (0x114, 0x54),
    (0x118, 0x5c),
    (0x1c0, ring_context::BB_PER_CTX),
    (0x1c4, ring_context::INDIRECT_CTX),
    (0x1c8, ring_context::INDIRECT_CTX_OFFSET),
    (0x3a8, ring_context::TIMESTAMP),
    (0x28c, ring_context::PDP3_UDW),
    (0x288, ring_context::PDP3_UDW + ring_context::PDP_STRIDE),
    (0x284, ring_context::PDP3_UDW + 2 * ring_context::PDP_STRIDE),
    (0x280, ring_context::PDP3_UDW + 3 * ring_context::PDP_STRIDE),
    (0x27c, ring_context::PDP3_UDW + 4 * ring_context::PDP_STRIDE),
    (0x278, ring_context::PDP3_UDW + 5 * ring_context::PDP_STRIDE),
    (0x274, ring_context::PDP3_UDW + 6 * ring_context::PDP_STRIDE),
    (0x270, ring_context::PDP3_UDW + 7 * ring_context::PDP_STRIDE),
];

/// A command loads a register: its new value stands in the image, if the register lives there.
pub(super) fn load(image: &mut ShadowImage, engine: EngineId, register: u32, value: u32) {
    let relative = register.wrapping_sub(engine.mmio_base());
    if relative == CTX_CTRL {
        let mask = value >> 16;
        let old = image.ctx_ctrl();
        image.set_ctx_ctrl(old & !mask | value & mask);
    } else if let Some((_, at)) = RING_CONTEXT.iter().find(|(known, _)| *known == relative) {
        image.set_dword(*at, value);
    } else if let Some(at) = in_engine_context(image, register) {
        image.set_dword(at, value);
    }
}

/// Where in page 1, behind the ring context, a register has its value: a context is a list of
/// MI_LOAD_REGISTER_IMM with MI_NOOP between them, and ends at the first other command.
fn in_engine_context(image: &ShadowImage, register: u32) -> Option<usize> {
    let end = image.page1().len();
    let mut at = ring_context::SIZE;
    while at + 4 <= end {
        let header = image.dword(at);
        match opcode::mi(header)? {
            opcode::NOOP => at += 4,
            opcode::LOAD_REGISTER_IMM => {
                let next = at + 4 * length(header)?;
                let mut values = (at + 4..next).step_by(8).map(|pair| (pair, pair + 4));
                let found =
                    values.find(|(pair, value)| value + 4 <= end && image.dword(*pair) == register);
                if let Some((_, value)) = found {
                    return Some(value);
                }
                at = next;
            }
            _ => return None,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::regs::PAGE_SIZE;

    const BCS: EngineId = EngineId::Bcs;

    #[test]
    fn registers_of_the_ring_context_are_those_of_the_engine() {
        let mut image = ShadowImage::new(2);
        load(&mut image, BCS, 0x223a8, 77);
        load(&mut image, BCS, 0x23a8, 88);
        assert_eq!(image.ctx_timestamp(), 77);
        load(&mut image, BCS, 0x22270, 0x5000);
        assert_eq!(image.dword(0xcc), 0x5000);
        load(&mut image, BCS, 0x2228c, 1);
        assert_eq!(image.dword(0x94), 1);
    }

    #[test]
    fn the_context_control_is_masked() {
        let mut image = ShadowImage::new(2);
        image.set_ctx_ctrl(0x0009_0001);
        load(&mut image, BCS, 0x22244, 0x0008_ffff);
        assert_eq!(image.ctx_ctrl(), 0x0009_0009);
        load(&mut image, BCS, 0x22244, 0x0001_0000);
        assert_eq!(image.ctx_ctrl(), 0x0009_0008);
    }

    #[test]
    fn a_register_of_the_engine_context_is_where_its_list_has_it() {
        let mut image = ShadowImage::new(2);
        for (at, value) in [
            (0x104, 0x1100_0003),
            (0x108, 0x20c8),
            (0x10c, 1),
            (0x110, 0x20d8),
            (0x114, 2),
            (0x11c, 0x0500_0000),
            (0x120, 0x1100_0001),
            (0x124, 0x7000),
        ] {
            image.set_dword(at, value);
        }
        load(&mut image, EngineId::Rcs, 0x20d8, 9);
        assert_eq!((image.dword(0x10c), image.dword(0x114)), (1, 9));
        // Behind the end of the list.
        load(&mut image, EngineId::Rcs, 0x7000, 9);
        assert_eq!(image.dword(0x128), 0);
    }

    #[test]
    fn a_list_that_leaves_the_page_ends_with_it() {
        let mut image = ShadowImage::new(2);
        for at in (ring_context::SIZE..PAGE_SIZE).step_by(4) {
            image.set_dword(at, 0);
        }
        image.set_dword(PAGE_SIZE - 8, 0x1100_00ff);
        image.set_dword(PAGE_SIZE - 4, 0x7000);
        let before = image.page1().to_vec();
        load(&mut image, EngineId::Rcs, 0x7000, 9);
        assert_eq!(image.page1()[..], before);
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An engine without a GPU.

use crate::context::ShadowImage;
use crate::engine::{Engine, EngineJob};
use crate::error::EngineFault;
use crate::regs::{ring_context, PAGE_SIZE};

/// Stands in for a GPU: executes no command, but changes every byte of the engine context in a way
/// that shows each page which was mixed up, lost or left stale.
///
/// With submission number `s`, page `p` of the object and byte `i` of the page, a byte becomes
/// `rotate_left(byte, 1) ^ (0x5a + 31 p + 7 i + 3 (i >> 8) + 113 s)`, in the pages `2..n` and behind the
/// ring context of page 1. The time stamp advances by `1000 + s`. Under restore inhibit pages `2..n`
/// count as zero before, and the bit (not its mask) is cleared.
///
/// ```
/// use gvt_scheduler::{ContextDescriptor, Engine, EngineId, EngineJob, ShadowImage, SimulatedEngine};
///
/// let mut image = ShadowImage::new(3);
/// SimulatedEngine
///     .run(EngineJob {
///         engine: EngineId::Rcs,
///         descriptor: ContextDescriptor::default(),
///         sequence: 0,
///         ring: &[],
///         indirect_ctx: &[],
///         image: &mut image,
///     })
///     .unwrap();
/// assert_eq!(image.pages()[0], 0x5a + 31 * 2);
/// assert_eq!(image.ctx_timestamp(), 1000);
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct SimulatedEngine;

impl Engine for SimulatedEngine {
    fn run(&mut self, job: EngineJob<'_>) -> Result<(), EngineFault> {
        let EngineJob {
            sequence, image, ..
        } = job;
        restore(image);
        mix(image.page1_rest_mut(), ring_context::SIZE, 1, sequence);
        for (page, bytes) in image.pages_mut().chunks_exact_mut(PAGE_SIZE).enumerate() {
            mix(bytes, 0, page + 2, sequence);
        }
        let ticks = 1000u32.wrapping_add(sequence as u32);
        image.set_ctx_timestamp(image.ctx_timestamp().wrapping_add(ticks));
        Ok(())
    }
}

fn restore(image: &mut ShadowImage) {
    if image.restore_inhibit() {
        image.pages_mut().fill(0);
        image.set_ctx_ctrl(image.ctx_ctrl() & !ring_context::RESTORE_INHIBIT);
    }
}

/// Changes the bytes that begin at byte `first` of page `page`. Only the low eight bits of the sum
/// count, so it is built of bytes.
fn mix(bytes: &mut [u8], first: usize, page: usize, sequence: u64) {
    let base = 0x5au8
        .wrapping_add((page as u8).wrapping_mul(31))
        .wrapping_add((sequence as u8).wrapping_mul(113));
    for (i, byte) in (first..).zip(bytes) {
        let key = base
            .wrapping_add((i as u8).wrapping_mul(7))
            .wrapping_add(((i >> 8) as u8).wrapping_mul(3));
        *byte = byte.rotate_left(1) ^ key;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::descriptor::ContextDescriptor;
    use crate::regs::EngineId;

    fn run(image: &mut ShadowImage, sequence: u64) {
        SimulatedEngine
            .run(EngineJob {
                engine: EngineId::Rcs,
                descriptor: ContextDescriptor::default(),
                sequence,
                ring: &[],
                indirect_ctx: &[],
                image,
            })
            .unwrap();
    }

    fn expected(old: u8, page: u64, i: u64, s: u64) -> u8 {
        let key = 0x5au64
            .wrapping_add(31 * page)
            .wrapping_add(7 * i)
            .wrapping_add(s.wrapping_mul(113))
            .wrapping_add((i >> 8) * 3);
        old.rotate_left(1) ^ key as u8
    }

    #[test]
    fn every_byte_changes_as_documented() {
        for sequence in [0, 1, 77, 256, u64::MAX] {
            let mut image = ShadowImage::new(5);
            let fill = |bytes: &mut [u8]| {
                for (i, byte) in bytes.iter_mut().enumerate() {
                    *byte = (i * 13 + 5) as u8;
                }
            };
            fill(image.pages_mut());
            fill(image.page1_mut());
            image.set_ctx_ctrl(0);
            image.set_ctx_timestamp(u32::MAX);
            let before = image.clone();
            run(&mut image, sequence);
            for (i, (new, old)) in image.pages().iter().zip(before.pages()).enumerate() {
                let (page, i) = (i as u64 / 4096 + 2, i as u64 % 4096);
                assert_eq!(*new, expected(*old, page, i, sequence));
            }
            for i in ring_context::SIZE..PAGE_SIZE {
                let old = before.page1()[i];
                assert_eq!(image.page1()[i], expected(old, 1, i as u64, sequence));
            }
            assert_eq!(
                image.ctx_timestamp(),
                999u32.wrapping_add(sequence as u32),
                "{sequence}"
            );
        }
    }

    #[test]
    fn restore_inhibit_starts_from_zero_and_is_cleared() {
        let mut image = ShadowImage::new(3);
        image.pages_mut().fill(0xff);
        image.set_ctx_ctrl(0x0001_0001);
        run(&mut image, 3);
        assert_eq!(image.ctx_ctrl(), 0x0001_0000);
        assert_eq!(image.pages()[9], expected(0, 2, 9, 3));
        let once = image.pages()[9];
        run(&mut image, 4);
        assert_eq!(image.pages()[9], expected(once, 2, 9, 4));
    }
}

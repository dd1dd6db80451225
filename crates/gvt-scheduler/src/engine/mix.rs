// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A change of every byte of an engine context that can be worked out elsewhere.

use crate::context::ShadowImage;
use crate::regs::{ring_context, PAGE_SIZE};

/// Changes pages `2..n` and what follows the ring context in page 1.
pub(super) fn mix(image: &mut ShadowImage, sequence: u64) {
    mix_bytes(image.page1_rest_mut(), ring_context::SIZE, 1, sequence);
    for (page, bytes) in image.pages_mut().chunks_exact_mut(PAGE_SIZE).enumerate() {
        mix_bytes(bytes, 0, page + 2, sequence);
    }
}

/// Changes the bytes that begin at byte `first` of page `page`. Only the low eight bits of the sum
/// count, so it is built of bytes.
fn mix_bytes(bytes: &mut [u8], first: usize, page: usize, sequence: u64) {
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
            let before = image.clone();
            mix(&mut image, sequence);
            for (i, (new, old)) in image.pages().iter().zip(before.pages()).enumerate() {
                let (page, i) = (i as u64 / 4096 + 2, i as u64 % 4096);
                assert_eq!(*new, expected(*old, page, i, sequence));
            }
            assert_eq!(image.page1()[..0xd0], before.page1()[..0xd0]);
            for i in ring_context::SIZE..PAGE_SIZE {
                let old = before.page1()[i];
                assert_eq!(image.page1()[i], expected(old, 1, i as u64, sequence));
            }
        }
    }
}

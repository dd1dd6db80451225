// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest's ring buffer: where it is, and in which pieces its commands are read.

use crate::error::{Error, Result};
use crate::ggtt::Ggtt;
use crate::regs::{PAGE_MASK, PAGE_SIZE};

/// A ring buffer as its context describes it. The commands to run are in `head..tail`.
///
/// ```
/// use gvt_scheduler::Ring;
///
/// // A ring of two pages whose commands wrap.
/// let ring = Ring::new(0x1fe0, 0x20, 0x10_0000, 0x1001);
/// let pieces: Vec<_> = ring.pieces().collect();
/// assert_eq!(pieces, [(0x10_1fe0, 0x20), (0x10_0000, 0x20)]);
/// ```
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Ring {
    head: u32,
    tail: u32,
    start: u32,
    size: u32,
    /// Bits 31:21 of HEAD, where they stand there.
    wraps: u32,
}

impl Ring {
    /// Bits 20:2 of HEAD.
    const HEAD_MASK: u32 = 0x001f_fffc;
    /// Bits 31:21 of HEAD: how often the head has gone around the ring, modulo 2048.
    const WRAPS_MASK: u32 = 0xffe0_0000;
    const ONE_WRAP: u32 = 1 << 21;
    /// Bits 20:3 of TAIL.
    const TAIL_MASK: u32 = 0x001f_fff8;
    /// Bits 20:12 of CTL: the size, less one page.
    const SIZE_MASK: u32 = 0x001f_f000;

    /// Takes the values of the registers HEAD, TAIL, START and CTL.
    pub const fn new(head: u32, tail: u32, start: u32, ctl: u32) -> Self {
        Self {
            head: head & Self::HEAD_MASK,
            tail: tail & Self::TAIL_MASK,
            start,
            size: (ctl & Self::SIZE_MASK) + PAGE_SIZE as u32,
            wraps: head & Self::WRAPS_MASK,
        }
    }

    /// Offset of the first command, in bytes.
    pub const fn head(&self) -> u32 {
        self.head
    }

    /// Offset of the end of the last command, in bytes.
    pub const fn tail(&self) -> u32 {
        self.tail
    }

    /// Graphics address of the ring.
    pub const fn start(&self) -> u32 {
        self.start
    }

    /// Size of the ring in bytes: 4 KiB to 2 MiB.
    pub const fn size(&self) -> u32 {
        self.size
    }

    /// Bytes between head and tail.
    pub const fn used(&self) -> u32 {
        if self.head <= self.tail {
            self.tail - self.head
        } else {
            self.tail + self.size.saturating_sub(self.head)
        }
    }

    /// The commands as `(graphics address, length)`, in order; no piece crosses a page.
    pub fn pieces(&self) -> impl Iterator<Item = (u64, usize)> {
        let (before, behind) = if self.head <= self.tail {
            (self.head..self.tail, 0..0)
        } else {
            (self.head..self.size, 0..self.tail)
        };
        let start = u64::from(self.start);
        [before, behind]
            .into_iter()
            .flat_map(move |part| page_pieces(start + u64::from(part.start), part.len()))
    }

    /// The register HEAD when the commands have run: the tail, and the wraps counted on.
    pub(crate) fn final_head(&self) -> u32 {
        let wraps = if self.tail < self.head {
            self.wraps.wrapping_add(Self::ONE_WRAP)
        } else {
            self.wraps
        };
        wraps | self.tail
    }

    /// The ring from `head` on: where an earlier workload of the context, still queued, ends.
    pub(crate) fn with_head(self, head: u32) -> Self {
        Self { head, ..self }
    }

    pub(crate) fn check(&self, ggtt: &Ggtt) -> Result<()> {
        let (gma, len) = (u64::from(self.start), u64::from(self.size));
        if gma & PAGE_MASK != 0 {
            return Err(Error::NotPageAligned { name: "ring", gma });
        }
        if !ggtt.owns(gma, len) {
            return Err(Error::OutsideGraphicsMemory {
                name: "ring",
                gma,
                len,
            });
        }
        if self.head >= self.size || self.tail >= self.size {
            return Err(Error::RingPointer {
                head: self.head,
                tail: self.tail,
                size: self.size,
            });
        }
        Ok(())
    }
}

/// Cuts `len` bytes from `gma` at the pages. Takes 32-bit graphics addresses and lengths.
pub(crate) fn page_pieces(gma: u64, len: usize) -> impl Iterator<Item = (u64, usize)> {
    let mut next = gma;
    let mut left = len;
    std::iter::from_fn(move || {
        let piece = left.min(PAGE_SIZE - (next & PAGE_MASK) as usize);
        let at = next;
        next += piece as u64;
        left -= piece;
        (piece > 0).then_some((at, piece))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(head: u32, tail: u32, pages: u32) -> Vec<(u64, usize)> {
        let ring = Ring::new(head, tail, 0x8000, (pages - 1) << 12 | 1);
        let pieces: Vec<_> = ring.pieces().collect();
        let sum: usize = pieces.iter().map(|(_, len)| len).sum();
        assert_eq!(sum, ring.used() as usize);
        pieces
    }

    #[test]
    fn an_empty_ring_has_no_pieces() {
        assert!(pieces(0x40, 0x40, 1).is_empty());
    }

    #[test]
    fn one_request_in_a_page_is_one_piece() {
        assert_eq!(pieces(0x40, 0xe0, 1), [(0x8040, 0xa0)]);
    }

    #[test]
    fn pieces_end_at_pages() {
        assert_eq!(
            pieces(0xff0, 0x2010, 4),
            [(0x8ff0, 0x10), (0x9000, 0x1000), (0xa000, 0x10)]
        );
    }

    #[test]
    fn commands_wrap_at_the_end_of_the_ring() {
        assert_eq!(pieces(0xf80, 0x20, 1), [(0x8f80, 0x80), (0x8000, 0x20)]);
        assert_eq!(pieces(0xf80, 0, 1), [(0x8f80, 0x80)]);
    }

    #[test]
    fn registers_are_masked() {
        let ring = Ring::new(u32::MAX, u32::MAX, 0, u32::MAX);
        assert_eq!(ring.head(), 0x1f_fffc);
        assert_eq!(ring.tail(), 0x1f_fff8);
        assert_eq!(ring.size(), 0x20_0000);
        assert_eq!(Ring::new(0x0020_0010, 0, 0, 0).head(), 0x10);
    }

    #[test]
    fn the_head_counts_its_wraps() {
        let wraps = |count: u32| count << 21;
        for (head, tail, expected) in [
            (0x40, 0xe0, 0xe0),
            (wraps(5) | 0x40, 0xe0, wraps(5) | 0xe0),
            (wraps(5) | 0x40, 0x40, wraps(5) | 0x40),
            (wraps(5) | 0xf80, 0x20, wraps(6) | 0x20),
            (wraps(2047) | 0xf80, 0x20, 0x20),
        ] {
            let ring = Ring::new(head, tail, 0, 0);
            assert_eq!(ring.final_head(), expected, "{head:#x}");
        }
    }

    #[test]
    fn a_ring_is_checked_against_the_graphics_memory() {
        let ggtt = Ggtt::new(4);
        assert!(Ring::new(0, 8, 0x3000, 0).check(&ggtt).is_ok());
        for (head, tail, start, ctl) in [
            (0, 8, 0x3008, 0),
            (0, 8, 0x3000, 0x1000),
            (0x1000, 8, 0, 0),
            (0, 0x1000, 0, 0),
            (0, 0, 0xffff_f000, u32::MAX),
        ] {
            let error = Ring::new(head, tail, start, ctl).check(&ggtt).unwrap_err();
            assert_eq!(error.errno(), libc::EINVAL, "{error}");
        }
    }
}

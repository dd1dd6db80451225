// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Those who unmap pages, take them away, and map them again with something new in them.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::thread;

use iommu_type1::UnmapOptions;

use super::deadline::DEADLINE;
use super::memory::{Span, BLOCKS};
use super::overlap::{has_moved_on, is_used, Met};
use super::random::Random;
use super::{Stress, UNMAPPERS};

const BLOCKS_EACH: usize = BLOCKS / UNMAPPERS;

/// How many ranges an unmapper looks at for one that is used.
const AIMS: usize = 64;
/// How often an unmapper gives the processor away for somebody who may be late.
const PATIENCE: usize = 100;

impl Stress {
    pub fn unmap(&self, number: usize) {
        let mut random = Random::new(400 + number);
        let options = UnmapOptions::new().deadline(DEADLINE);
        let blocks = number * BLOCKS_EACH..(number + 1) * BLOCKS_EACH;
        while self.goes_on() && !self.is_enough() {
            let span = self.aim(&mut random, blocks.clone());
            let mut callers = self.board.callers(span.mask());
            let before = u64::from(!callers.is_empty()) << Met::CallBefore as u64;
            let unmapped = self.space.unmap_with(span.iova(), span.len as u64, options);
            assert_eq!(unmapped.unwrap(), span.len as u64);
            span.touched().for_each(|page| self.memory.take_away(page));

            // It stays away until whoever was or is seen on it has had the processor: a late access
            // would be made now.
            callers.extend(self.board.callers(span.mask()));
            for _ in 0..PATIENCE {
                if callers.iter().all(has_moved_on) {
                    break;
                }
                thread::yield_now();
            }
            for _ in 0..random.below(500) {
                std::hint::spin_loop();
            }
            let met = before | self.met[number].swap(0, Ordering::Relaxed);
            self.board.unmapped(met);
            span.touched().for_each(|page| self.map(page));
        }
    }

    /// Pages to be unmapped: where somebody is seen, or anywhere if nobody is.
    fn aim(&self, random: &mut Random, blocks: Range<usize>) -> Span {
        let seats = match random.below(2) {
            0 => &self.board.inline[..],
            _ => &self.board.leases[..],
        };
        let mut span = Span::pages(random, blocks.clone());
        for _ in 0..AIMS {
            if is_used(seats, span.mask()) {
                break;
            }
            span = Span::pages(random, blocks.clone());
            random.sometimes_yield();
        }
        span
    }

    fn is_enough(&self) -> bool {
        self.board.unmaps.load(Ordering::Relaxed) >= self.unmaps && self.board.reads() >= self.reads
    }
}

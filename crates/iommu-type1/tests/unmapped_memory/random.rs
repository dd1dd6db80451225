// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Numbers without a pattern, at next to no cost, so that threads spend their time in accesses.

use std::thread;

/// An xorshift generator.
pub struct Random(u64);

impl Random {
    pub fn new(seed: usize) -> Self {
        Random(0x9e37_79b9_7f4a_7c15 ^ (seed as u64 + 1))
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % bound
    }
    /// Gives the processor away now and then.
    pub fn sometimes_yield(&mut self) {
        if self.below(16) == 0 {
            thread::yield_now();
        }
    }
}

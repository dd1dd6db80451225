// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The differences that are as they should be. Each says where the contract is not ours to follow; one
//! that is never met has no place here, and one that is met often hides something.

use super::op::{Map, Memory, Op, Outcome};
use super::FILE_PAGES;
use crate::memory::PAGE;

/// What they are, and which part of the contract each belongs to.
pub const REASONS: [&str; 2] = [
    "an unmap that fails at a cut: the kernel has removed what comes before, we remove nothing (iommufd, UNMAP)",
    "a file that ends before what is mapped: EINVAL, EFAULT as of all memory of ours (iommufd, MAP_FILE)",
];

const REMOVED: usize = 0;
const END_OF_FILE: usize = 1;

/// Most operations that a reason may explain, one in so many.
const RARE: u64 = 100;

/// How often each reason was met.
#[derive(Debug, Default)]
pub struct Explained([u64; REASONS.len()]);

impl Explained {
    /// Counts an unmap that has removed something and failed.
    pub fn removed(&mut self) {
        self.0[REMOVED] += 1;
    }

    /// Whether there is a reason for what an operation did differently, which is counted.
    pub fn explain(&mut self, op: &Op, kernel: &Outcome, ours: &Outcome) -> bool {
        let Op::Map(Map { memory: Memory::File(from), length, .. }) = op else {
            return false;
        };
        let behind = from.saturating_add(*length) > FILE_PAGES * PAGE;
        let (kernel, ours) = (kernel.result, ours.result);
        let holds = behind && kernel == Err(libc::EINVAL) && ours == Err(libc::EFAULT);
        self.0[END_OF_FILE] += u64::from(holds);
        holds
    }

    /// Differences explained.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Prints how often each was met, and returns those met never or too often.
    pub fn check(&self, operations: u64) -> Vec<String> {
        let mut wrong = Vec::new();
        for (reason, met) in REASONS.iter().zip(self.0) {
            println!("iommufd: explained: {met} times {reason}");
            if met == 0 || met > operations / RARE {
                wrong.push(format!("{met} of {operations} explained by: {reason}"));
            }
        }
        wrong
    }
}

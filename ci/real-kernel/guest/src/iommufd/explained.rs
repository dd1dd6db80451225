// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The differences that are as they should be. Each says where the contract is not ours to follow; one
//! that is never met has no place here, and one that is met often hides something.

use super::op::{Copied, Map, Memory, Op, Outcome, READ, WRITE};
use super::rules::Area;
use super::FILE_PAGES;
use crate::memory::PAGE;

/// What they are, and the part of the contract that each belongs to: a row of docs/kernel.md.
pub const REASONS: [(&str, &str); 3] = [
    (
        "an unmap that fails at a cut: the kernel has removed what comes before, we remove nothing",
        "`IOMMU_IOAS_UNMAP`",
    ),
    (
        "a file that ends before what is mapped: EINVAL, EFAULT as of all memory of ours",
        "`IOMMU_IOAS_MAP_FILE`",
    ),
    (
        "a copy that may do more than what it is copied from: only the first map of the memory counts",
        "`IOMMU_IOAS_COPY`",
    ),
];

const REMOVED: usize = 0;
const END_OF_FILE: usize = 1;
const MORE_THAN_SOURCE: usize = 2;

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

    /// Whether there is a reason for what an operation did differently, which is counted. `sources` is what a copy
    /// finds.
    pub fn explain(&mut self, op: &Op, kernel: &Outcome, ours: &Outcome, sources: &[Area]) -> bool {
        let (kernel, ours) = (kernel.result, ours.result);
        let reason = match op {
            Op::Map(Map {
                memory: Memory::File(from),
                length,
                ..
            }) if from.saturating_add(*length) > FILE_PAGES * PAGE
                && (kernel, ours) == (Err(libc::EINVAL), Err(libc::EFAULT)) =>
            {
                END_OF_FILE
            }
            Op::Copy(copy)
                if is_more(copy, sources) && (kernel, ours) == (Ok(()), Err(libc::EPERM)) =>
            {
                MORE_THAN_SOURCE
            }
            _ => return false,
        };
        self.0[reason] += 1;
        true
    }

    /// Differences explained.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Prints how often each was met, and returns those met never or too often.
    pub fn check(&self, operations: u64) -> Vec<String> {
        let mut wrong = Vec::new();
        for ((reason, section), met) in REASONS.iter().zip(self.0) {
            println!("iommufd: explained: {met} times {reason} ({section})");
            if met == 0 || met > operations / RARE {
                wrong.push(format!("{met} of {operations} explained by: {reason}"));
            }
        }
        wrong
    }
}

/// Whether a copy is for more than what it finds.
fn is_more(copy: &Copied, sources: &[Area]) -> bool {
    let wanted = copy.flags & (READ | WRITE);
    sources.iter().any(|area| wanted & !area.flags != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_a_section_of_the_contract() {
        let contract = include_str!("../../../../../docs/kernel.md");
        for (_, section) in REASONS {
            let row = format!("\n| {section} |");
            assert!(contract.contains(&row), "{section}");
        }
    }

    #[test]
    fn what_is_never_met_or_often_is_wrong() {
        let found = Explained([0, 10, 11]).check(1000);
        assert_eq!(found.len(), 2, "{found:?}");
    }
}

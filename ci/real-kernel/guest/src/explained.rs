// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The differences that are as they should be. Each says where the contract is not ours to follow; one
//! that is never met has no place here, and one that is met often hides something.

use crate::live::Live;
use crate::memory::PAGE;
use crate::op::{Op, Outcome};

/// A kind of difference.
#[derive(Debug)]
pub struct Reason {
    /// What it is.
    pub name: &'static str,
    /// The part of the contract that it belongs to: a row of docs/kernel.md.
    pub section: &'static str,
    holds: fn(&Op, &Outcome, &Outcome, &Live) -> bool,
}

/// All of them.
pub const REASONS: [Reason; 1] = [Reason {
    // The kernel copies whole words: it clears or keeps what was in the buffer for pages behind the end of
    // a mapping, and what an earlier call has shifted past that end shows there as dirty. Ours writes the
    // bits of pages that are mapped, and no others.
    name: "bits of pages that are not mapped",
    section: "`VFIO_IOMMU_DIRTY_PAGES`: `GET_BITMAP`",
    holds: only_unmapped_pages,
}];

/// Most operations that a reason may explain, one in so many.
const RARE: u64 = 100;

/// How often each reason was met.
#[derive(Debug, Default)]
pub struct Explained([u64; REASONS.len()]);

impl Explained {
    /// Counts a reason for what an operation did differently, `None` where there is none.
    pub fn explain(
        &mut self,
        op: &Op,
        kernel: &Outcome,
        ours: &Outcome,
        live: &Live,
    ) -> Option<&'static Reason> {
        let at = REASONS
            .iter()
            .position(|reason| (reason.holds)(op, kernel, ours, live))?;
        self.0[at] += 1;
        Some(&REASONS[at])
    }

    /// Differences explained.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Prints how often each was met, and returns those met never or too often.
    pub fn check(&self, operations: u64) -> Vec<String> {
        let mut wrong = Vec::new();
        for (Reason { name, section, .. }, met) in REASONS.iter().zip(self.0) {
            println!("explained: {met} times {name} ({section})");
            if met == 0 || met > operations / RARE {
                wrong.push(format!("{met} of {operations} explained by: {name}"));
            }
        }
        wrong
    }
}

fn only_unmapped_pages(op: &Op, kernel: &Outcome, ours: &Outcome, live: &Live) -> bool {
    let (iova, size) = match op {
        Op::Unmap(unmap) => (unmap.iova, unmap.size),
        Op::Dirty(dirty) => (dirty.iova, dirty.size),
        Op::Map(_) | Op::Info(_) | Op::Extension(_) => return false,
    };
    let same = Outcome {
        words: ours.words.clone(),
        ..kernel.clone()
    };
    if kernel.result.is_err() || same != *ours {
        return false;
    }
    let both = kernel.words.iter().zip(&ours.words);
    let mut bits = both.zip(0_u64..).flat_map(|((kernel, ours), word)| {
        let differ = kernel ^ ours;
        (0..64)
            .filter(move |bit| differ >> bit & 1 != 0)
            .map(move |bit| word * 64 + bit)
    });
    bits.all(|page| {
        // Whole words are written, as many as the range has pages in.
        let (pages, address) = (size / PAGE, iova.saturating_add(page * PAGE));
        page < pages.next_multiple_of(64) && (page >= pages || live.is_free(address, address))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::PRIVATE;
    use crate::op::{Bitmap, Dirty, Map};

    #[test]
    fn each_has_a_section_of_the_contract() {
        let contract = include_str!("../../../../docs/kernel.md");
        for Reason { section, .. } in REASONS {
            let row = format!("\n| {section} |");
            assert!(contract.contains(&row), "{section}");
        }
    }

    #[test]
    fn what_is_never_met_or_often_is_wrong() {
        for (met, operations, wrong) in [(0, 1000, 1), (1, 1000, 0), (10, 1000, 0), (11, 1000, 1)] {
            let found = Explained([met]).check(operations);
            assert_eq!(found.len(), wrong, "{met}: {found:?}");
        }
    }

    #[test]
    fn only_bits_of_unmapped_pages_of_the_range_are_explained() {
        let mut live = Live::default();
        let (argsz, flags, vaddr) = (32, 3, PRIVATE.first);
        let (iova, size) = (0x2000, 0x2000);
        let map = Op::Map(Map {
            argsz,
            flags,
            vaddr,
            iova,
            size,
        });
        live.note(&map, &Outcome::plain(Ok(0)));
        let (pgsize, fill) = (PAGE, 0);
        let bitmap = Bitmap {
            pgsize,
            size: 8,
            fill,
        };
        let get = Op::Dirty(Dirty {
            argsz: 48,
            flags: 4,
            iova: 0x1000,
            size: 0x4000,
            bitmap,
        });
        let words = |words: &[u64]| Outcome {
            words: words.to_vec(),
            ..Outcome::plain(Ok(0))
        };
        let explains = |kernel: &[u64], ours: &[u64]| {
            only_unmapped_pages(&get, &words(kernel), &words(ours), &live)
        };
        assert!(explains(&[0b01_0110, 0], &[0b00_0110, 0]));
        assert!(explains(&[0b00_0110, 0], &[u64::MAX, 0]));
        assert!(!explains(&[0b00_0010, 0], &[0b00_0110, 0]), "a mapped page");
        assert!(
            !explains(&[0b00_0110, 1], &[0b00_0110, 0]),
            "a word behind the range"
        );
    }
}

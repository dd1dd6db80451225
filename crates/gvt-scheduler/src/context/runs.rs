// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which pages of a context are copied by one call.

use vm_memory::GuestAddress;

use crate::context::ContextPages;
use crate::error::{Error, Result};
use crate::regs::PAGE_SIZE;

/// The first page of the engine context.
pub(super) const FIRST_PAGE: usize = 2;

/// How the pages of a context are put together to calls.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum CopyMode {
    /// One call a page.
    PerPage,
    /// One call for each longest run of pages whose guest addresses ascend without a gap.
    #[default]
    Coalesced,
    /// As [`Coalesced`](Self::Coalesced), and one scatter list for each longest run of pages whose guest
    /// addresses descend without a gap.
    Scattered,
    /// The kernel's loop, for comparison only: it never transfers the last page of a context unless
    /// that page continues a run or is the only one.
    UpstreamTail,
}

/// Pages that one call copies: adjacent in guest memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Run {
    /// First page, as page of the context object.
    pub first_page: usize,
    /// Number of pages; at least 1.
    pub pages: usize,
    /// Lowest guest address: of the first page, or of the last one of a descending run.
    pub gpa: GuestAddress,
    /// Whether each page lies below the one before.
    pub descending: bool,
}

impl Run {
    /// Length in bytes.
    pub fn bytes(&self) -> usize {
        self.pages.saturating_mul(PAGE_SIZE)
    }

    /// Takes in the next page if it continues the run.
    fn extend(&mut self, gpa: GuestAddress, mode: CopyMode) -> bool {
        let above = self.gpa.0.checked_add(self.bytes() as u64);
        let below = self.gpa.0.checked_sub(PAGE_SIZE as u64);
        if !self.descending && above == Some(gpa.0) {
            self.pages += 1;
            return true;
        }
        let may_descend = mode == CopyMode::Scattered && (self.descending || self.pages == 1);
        if may_descend && below == Some(gpa.0) {
            self.descending = true;
            self.gpa = gpa;
            self.pages += 1;
            return true;
        }
        false
    }
}

/// The runs of a context's pages, in order; made by [`ContextPages::runs`].
///
/// When a page does not translate, the iterator gives the error and ends. As in the kernel the pages
/// of the run that was open are then in no run, those of earlier runs have been given.
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    pages: ContextPages<'a>,
    mode: CopyMode,
    next: usize,
}

impl<'a> Runs<'a> {
    pub(super) fn new(pages: ContextPages<'a>, mode: CopyMode) -> Self {
        Self {
            pages,
            mode,
            next: FIRST_PAGE,
        }
    }

    fn translate_next(&mut self) -> Result<GuestAddress> {
        let page = self.next;
        let gpa = self.pages.translate(page);
        if gpa.is_none() {
            self.next = self.pages.end();
        }
        gpa.ok_or(Error::ContextPageUnmapped {
            lrca: self.pages.lrca(),
            page,
        })
    }

    fn longest_run(&mut self) -> Result<Run> {
        let mut run = Run {
            first_page: self.next,
            pages: 1,
            gpa: self.translate_next()?,
            descending: false,
        };
        self.next += 1;
        while self.mode != CopyMode::PerPage && self.next < self.pages.end() {
            if !run.extend(self.translate_next()?, self.mode) {
                break;
            }
            self.next += 1;
        }
        Ok(run)
    }

    /// Upstream ends with the last page, even when that has only just opened a run.
    fn drop_lone_tail(&mut self) {
        if self.mode == CopyMode::UpstreamTail && self.next == self.pages.end() - 1 {
            self.next = self.pages.end();
        }
    }
}

impl Iterator for Runs<'_> {
    type Item = Result<Run>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next >= self.pages.end() {
            return None;
        }
        let run = self.longest_run();
        if run.is_ok() {
            self.drop_lone_tail();
        }
        Some(run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ggtt::Ggtt;

    const A: u64 = 0x10;
    const B: u64 = 0x20;
    const C: u64 = 0x30;

    fn runs(frames: &[u64], mode: CopyMode) -> Vec<(usize, usize, u64)> {
        let mut ggtt = Ggtt::new(64);
        for (i, frame) in frames.iter().enumerate() {
            ggtt.write_entry(8 + 2 + i as u32, frame << 12 | 1).unwrap();
        }
        ContextPages::new(&ggtt, 8, 2 + frames.len())
            .runs(mode)
            .map(|run| run.unwrap())
            .map(|run| (run.first_page, run.pages, run.gpa.0 >> 12))
            .collect()
    }

    #[test]
    fn only_page_is_kept_by_every_mode() {
        for mode in [
            CopyMode::PerPage,
            CopyMode::Coalesced,
            CopyMode::Scattered,
            CopyMode::UpstreamTail,
        ] {
            assert_eq!(runs(&[A], mode), [(2, 1, A)]);
        }
    }

    #[test]
    fn adjacent_last_page_is_kept_by_upstream() {
        let adjacent = [A, A + 1];
        assert_eq!(runs(&adjacent, CopyMode::Coalesced), [(2, 2, A)]);
        assert_eq!(runs(&adjacent, CopyMode::UpstreamTail), [(2, 2, A)]);
        assert_eq!(
            runs(&adjacent, CopyMode::PerPage),
            [(2, 1, A), (3, 1, A + 1)]
        );
    }

    #[test]
    fn lone_last_page_is_lost_by_upstream() {
        assert_eq!(runs(&[A, B], CopyMode::Coalesced), [(2, 1, A), (3, 1, B)]);
        assert_eq!(runs(&[A, B], CopyMode::UpstreamTail), [(2, 1, A)]);
    }

    #[test]
    fn lone_last_page_behind_a_run_is_lost_by_upstream() {
        let frames = [A, A + 1, C];
        assert_eq!(runs(&frames, CopyMode::Coalesced), [(2, 2, A), (4, 1, C)]);
        assert_eq!(runs(&frames, CopyMode::UpstreamTail), [(2, 2, A)]);
    }

    #[test]
    fn run_at_the_end_is_kept_by_upstream() {
        let frames = [A, C, C + 1];
        let all = [(2, 1, A), (3, 2, C)];
        assert_eq!(runs(&frames, CopyMode::Coalesced), all);
        assert_eq!(runs(&frames, CopyMode::UpstreamTail), all);
    }

    #[test]
    fn descending_and_equal_pages_do_not_merge() {
        assert_eq!(
            runs(&[A + 1, A, A], CopyMode::Coalesced),
            [(2, 1, A + 1), (3, 1, A), (4, 1, A)]
        );
    }

    #[test]
    fn a_scatter_list_has_one_direction() {
        let frames = [B + 2, B + 1, B, B + 1, B + 2, C, C, C - 1];
        assert_eq!(
            runs(&frames, CopyMode::Scattered),
            [(2, 3, B), (5, 2, B + 1), (7, 1, C), (8, 2, C - 1)]
        );
        assert_eq!(
            runs(&frames, CopyMode::Coalesced),
            [
                (2, 1, B + 2),
                (3, 1, B + 1),
                (4, 3, B),
                (7, 1, C),
                (8, 1, C),
                (9, 1, C - 1)
            ]
        );
    }

    #[test]
    fn a_context_without_engine_pages_has_no_runs() {
        let ggtt = Ggtt::new(64);
        for n in 0..=2 {
            assert!(ContextPages::new(&ggtt, 8, n)
                .runs(CopyMode::Coalesced)
                .next()
                .is_none());
        }
    }

    #[test]
    fn an_unmapped_page_takes_its_open_run_along() {
        let mut ggtt = Ggtt::new(64);
        for (page, frame) in [(2, A), (3, B), (4, B + 1)] {
            ggtt.write_entry(8 + page, frame << 12 | 1).unwrap();
        }
        let pages = ContextPages::new(&ggtt, 8, 7);
        let mut runs = pages.runs(CopyMode::Coalesced);
        assert_eq!(runs.next().unwrap().unwrap().pages, 1);
        let error = runs.next().unwrap().unwrap_err();
        assert!(matches!(error, Error::ContextPageUnmapped { page: 5, .. }));
        assert!(runs.next().is_none());
    }
}

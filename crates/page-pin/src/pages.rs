// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which pages a request names.

use std::ops::RangeInclusive;

/// A non-empty range of page numbers, inclusive at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageRange {
    pub(crate) first: u64,
    pub(crate) last: u64,
}

impl PageRange {
    pub(crate) fn only(page: u64) -> Self {
        PageRange {
            first: page,
            last: page,
        }
    }

    pub(crate) fn contains(self, page: u64) -> bool {
        (self.first..=self.last).contains(&page)
    }
}

/// The pages of one pin, one at least.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Pages {
    Range(PageRange),
    /// In the order they were asked for, maybe more than once.
    List(Box<[u64]>),
}

impl Pages {
    pub(crate) fn len(&self) -> usize {
        match self {
            Pages::Range(range) => (range.last - range.first) as usize + 1,
            Pages::List(list) => list.len(),
        }
    }

    pub(crate) fn get(&self, index: usize) -> Option<u64> {
        match self {
            Pages::Range(range) => (range.first..=range.last).nth(index),
            Pages::List(list) => list.get(index).copied(),
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        let (range, list): (Option<RangeInclusive<u64>>, &[u64]) = match self {
            Pages::Range(range) => (Some(range.first..=range.last), &[]),
            Pages::List(list) => (None, list),
        };
        range.into_iter().flatten().chain(list.iter().copied())
    }

    /// Each page once, in ascending order, and how often it is named.
    pub(crate) fn counted(&self) -> Vec<(u64, u64)> {
        let mut sorted: Vec<u64> = self.iter().collect();
        sorted.sort_unstable();
        let runs = sorted.chunk_by(|one, other| one == other);
        runs.map(|run| (run[0], run.len() as u64)).collect()
    }

    /// The ranges that it consists of when unpins have to be exact.
    pub(crate) fn exact(&self) -> Vec<(PageRange, u64)> {
        match self {
            Pages::Range(range) => vec![(*range, 1)],
            Pages::List(_) => {
                let pages = self.counted().into_iter();
                pages
                    .map(|(page, times)| (PageRange::only(page), times))
                    .collect()
            }
        }
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which pages a request names.

use std::ops::RangeInclusive;

use crate::{Error, Result};

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
        // One of the two is empty.
        let (range, list): (_, &[u64]) = match self {
            Pages::Range(range) => (range.first..=range.last, &[]),
            Pages::List(list) => (RangeInclusive::new(1, 0), list),
        };
        range.chain(list.iter().copied())
    }

    /// The pages at these addresses.
    pub(crate) fn list(iovas: &[u64], page_size: u64) -> Result<Self> {
        let mut list = reserved(iovas.len())?;
        list.extend(iovas.iter().map(|iova| iova / page_size));
        Ok(Pages::List(list.into_boxed_slice()))
    }

    /// Each page once, in ascending order, and how often it is named.
    pub(crate) fn counted(&self) -> Result<Vec<(u64, u64)>> {
        let mut counted: Vec<(u64, u64)> = reserved(self.len())?;
        counted.extend(self.iter().map(|page| (page, 1)));
        counted.sort_unstable();
        counted.dedup_by(|again, first| {
            let is_same = again.0 == first.0;
            first.1 += u64::from(is_same);
            is_same
        });
        Ok(counted)
    }

    /// The ranges that it consists of when unpins have to be exact, each as often as it is named.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = PageRange> + '_ {
        let (range, list): (_, &[u64]) = match self {
            Pages::Range(range) => (Some(*range), &[]),
            Pages::List(list) => (None, list),
        };
        range
            .into_iter()
            .chain(list.iter().copied().map(PageRange::only))
    }

    /// The same, each once and how often it is named.
    pub(crate) fn exact(&self) -> Result<Vec<(PageRange, u64)>> {
        if let Pages::Range(range) = self {
            return Ok(vec![(*range, 1)]);
        }
        let counted = self.counted()?;
        let mut exact = reserved(counted.len())?;
        let ranges = counted.into_iter();
        exact.extend(ranges.map(|(page, times)| (PageRange::only(page), times)));
        Ok(exact)
    }
}

/// A list with room for so many values: how many is up to who pins.
pub(crate) fn reserved<T>(values: usize) -> Result<Vec<T>> {
    let mut list = Vec::new();
    list.try_reserve_exact(values)
        .map_err(|_| Error::NoMemory {
            bytes: values.saturating_mul(size_of::<T>()),
        })?;
    Ok(list)
}

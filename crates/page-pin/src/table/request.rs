// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which pages a request means, and whether it may be asked.

use super::Shared;
use crate::pages::{PageRange, Pages};
use crate::{Error, Result};

impl Shared {
    pub(crate) fn page_size(&self) -> u64 {
        self.page_size
    }

    /// The page of an address. A shift, as every unmap asks and a division takes ten times as long.
    #[inline]
    pub(super) fn page_of(&self, iova: u64) -> u64 {
        iova >> self.page_size.trailing_zeros()
    }

    pub(super) fn max_pages(&self) -> usize {
        self.options.max_pages_of(self.page_size)
    }

    /// The pages of a request that has to be aligned.
    pub(crate) fn range(&self, iova: u64, npages: usize) -> Result<PageRange> {
        let page_size = self.page_size;
        if npages == 0 {
            return Err(Error::Empty { iova });
        }
        if iova % page_size != 0 {
            return Err(Error::Misaligned { iova, page_size });
        }
        let max = self.max_pages();
        if npages > max {
            return Err(Error::TooMany { npages, max });
        }
        let first = self.page_of(iova);
        first
            .checked_add(npages as u64 - 1)
            .filter(|last| *last <= self.page_of(u64::MAX))
            .map(|last| PageRange { first, last })
            .ok_or(Error::Overflow { iova, npages })
    }

    /// As [`range`](Shared::range) of pages that may lie anywhere.
    pub(crate) fn list(&self, iovas: &[u64]) -> Result<Pages> {
        let page_size = self.page_size;
        if iovas.is_empty() {
            return Err(Error::Empty { iova: 0 });
        }
        let (npages, max) = (iovas.len(), self.max_pages());
        if npages > max {
            return Err(Error::TooMany { npages, max });
        }
        match iovas.iter().find(|iova| **iova % page_size != 0) {
            Some(&iova) => Err(Error::Misaligned { iova, page_size }),
            None => Pages::list(iovas, page_size),
        }
    }

    /// The pages that `size` bytes from `iova` touch; `None` for an empty or wrapping range.
    pub(super) fn covering(&self, iova: u64, size: u64) -> Option<PageRange> {
        let last = iova.checked_add(size.checked_sub(1)?)?;
        Some(PageRange {
            first: self.page_of(iova),
            last: self.page_of(last),
        })
    }
}

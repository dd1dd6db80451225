// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Dirty pages in the shape that the kernel gives them: a bitmap that begins at the address asked for.

use super::DirtyPages;
use crate::range::{self, page_shift, IovaRange};
use crate::{Error, Result};

/// Pages that one word tells apart.
const WORD: u64 = u64::BITS as u64;

/// A bitmap of a range of addresses in words of the caller: bit 0 of the first word is the first page.
///
/// As in the kernel, what is not mapped is left as it was, word by word: a mapping that ends in the middle of
/// a word clears the rest of it, one that begins there keeps what is below.
///
/// ```
/// use iommu_type1::{Backing, DirtyBitmap, IoAddressSpace};
/// use vm_memory::Permissions;
///
/// let space = IoAddressSpace::new();
/// space.map(0x10_0000, Backing::anonymous(0x8000)?, Permissions::ReadWrite)?;
/// space.start_dirty_tracking()?;
/// space.write(0x10_0fff, &[1, 2])?;
///
/// let mut words = [0];
/// space.take_dirty_bitmap(&mut DirtyBitmap::new(0x10_0000, 0x8000, 0x1000, &mut words)?)?;
/// assert_eq!(words, [0b11]);
/// # Ok::<(), iommu_type1::Error>(())
/// ```
#[derive(Debug)]
pub struct DirtyBitmap<'a> {
    range: IovaRange,
    page_size: u64,
    words: &'a mut [u64],
}

impl<'a> DirtyBitmap<'a> {
    /// A bitmap of `size` bytes from `iova`, a bit for each `page_size` of them.
    ///
    /// # Errors
    ///
    /// [`Error::Empty`] (EINVAL), [`Error::Overflow`] (EOVERFLOW), [`Error::BitmapPageSize`] (EINVAL):
    /// `page_size` is not a power of two, or smaller than the host's. [`Error::BitmapSize`] (EINVAL): there are
    /// not words enough.
    pub fn new(iova: u64, size: u64, page_size: u64, words: &'a mut [u64]) -> Result<Self> {
        let range = IovaRange::new(iova, size)?;
        let least = range::page_size();
        if !page_size.is_power_of_two() || page_size < least {
            return Err(Error::BitmapPageSize {
                page_size,
                unit: least,
            });
        }
        let needed = (range.last - range.first) / page_size / WORD + 1;
        if (words.len() as u64) < needed {
            return Err(Error::BitmapSize {
                pages: size / page_size,
                bytes: words.len() as u64 * 8,
            });
        }
        Ok(DirtyBitmap {
            range,
            page_size,
            words,
        })
    }

    /// First address.
    pub fn iova(&self) -> u64 {
        self.range.first
    }

    /// Bytes that it is of.
    pub fn size(&self) -> u64 {
        self.range.size()
    }

    /// Bytes that a bit stands for.
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// Sets the bits of all that was mapped where `pages` come from and lies in the range.
    pub fn fill(&mut self, pages: &DirtyPages) {
        for mapped in &pages.mapped {
            self.clear(*mapped);
        }
        for (first, marks) in &pages.words {
            self.set(*first, *marks);
        }
    }

    fn bit(&self, iova: u64) -> u64 {
        (iova - self.range.first) / self.page_size
    }

    /// Clears the words of a mapping, but for what is below it in its first.
    fn clear(&mut self, mapped: IovaRange) {
        if !self.range.contains_all(mapped) {
            return;
        }
        let (first, last) = (self.bit(mapped.first), self.bit(mapped.last));
        let words = &mut self.words[(first / WORD) as usize..=(last / WORD) as usize];
        words[0] &= (1 << (first % WORD)) - 1;
        words[1..].fill(0);
    }

    /// Sets the bits of the page at `first` and the 63 host pages behind it.
    fn set(&mut self, first: u64, marks: u64) {
        let pages = (0..WORD).filter(|page| marks >> page & 1 == 1);
        for iova in pages.map(|page| first + (page << page_shift())) {
            if self.range.contains(iova) {
                let bit = self.bit(iova);
                self.words[(bit / WORD) as usize] |= 1 << (bit % WORD);
            }
        }
    }
}

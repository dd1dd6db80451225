// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pages in host memory that lie the other way round in guest memory.

use std::ops::Range;

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};

use crate::regs::PAGE_SIZE;

/// A stream over whole pages, the last page first; within a page bytes ascend. It is the host's side
/// of one access to a run of descending pages: guest memory goes through it from its lowest address
/// on.
#[derive(Debug)]
pub(crate) struct FromLastPage<B> {
    pages: B,
    done: usize,
}

impl<B: AsRef<[u8]>> FromLastPage<B> {
    /// `pages` is a multiple of the page size long.
    pub(crate) fn new(pages: B) -> Self {
        FromLastPage { pages, done: 0 }
    }

    /// Calls `copy` with each page's part of the next `len` bytes, where they are in the pages and in
    /// the whole; gives how many bytes there were.
    fn each_page(
        &mut self,
        len: usize,
        mut copy: impl FnMut(&mut B, Range<usize>, usize) -> Result<(), VolatileMemoryError>,
    ) -> Result<usize, VolatileMemoryError> {
        let size = self.pages.as_ref().len();
        let first = self.done;
        let end = size.min(first.saturating_add(len));
        while self.done < end {
            let offset = self.done % PAGE_SIZE;
            let len = (end - self.done).min(PAGE_SIZE - offset);
            let at = size - PAGE_SIZE - (self.done - offset) + offset;
            copy(&mut self.pages, at..at + len, self.done - first)?;
            self.done += len;
        }
        Ok(end - first)
    }
}

// As much as there is at once: who asks takes less for the end of the stream.
impl WriteVolatile for FromLastPage<&mut [u8]> {
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        guest: &VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        self.each_page(guest.len(), |pages, at, offset| {
            guest.subslice(offset, at.len())?.copy_to(&mut pages[at]);
            Ok(())
        })
    }
}

impl ReadVolatile for FromLastPage<&[u8]> {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        guest: &mut VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        self.each_page(guest.len(), |pages, at, offset| {
            guest.subslice(offset, at.len())?.copy_from(&pages[at]);
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_any_length_come_from_the_last_page_on() {
        let pages: Vec<u8> = (0..3 * PAGE_SIZE)
            .map(|i| (i / PAGE_SIZE * 16 + i % 7) as u8)
            .collect();
        let expected: Vec<u8> = pages.rchunks(PAGE_SIZE).flatten().copied().collect();
        for piece in [1, 1000, PAGE_SIZE, PAGE_SIZE + 1, 4 * PAGE_SIZE] {
            let mut guest = vec![0; pages.len()];
            let mut stream = FromLastPage::new(&pages[..]);
            let mut filled = 0;
            while filled < guest.len() {
                let end = guest.len().min(filled + piece);
                let mut slice = VolatileSlice::from(&mut guest[filled..end]);
                assert_eq!(stream.read_volatile(&mut slice).unwrap(), end - filled);
                filled = end;
            }
            assert!(guest == expected, "{piece}");
            let mut rest = [0; 1];
            assert_eq!(
                stream
                    .read_volatile(&mut VolatileSlice::from(&mut rest[..]))
                    .unwrap(),
                0
            );

            let mut back = vec![0; pages.len()];
            let mut stream = FromLastPage::new(&mut back[..]);
            for bytes in guest.chunks_mut(piece) {
                stream
                    .write_all_volatile(&VolatileSlice::from(bytes))
                    .unwrap();
            }
            assert!(back == pages, "{piece}");
        }
    }
}

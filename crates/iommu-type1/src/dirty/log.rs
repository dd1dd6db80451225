// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The bits of one mapping, one a host page.
//!
//! # Why nothing is lost
//!
//! Bits are set after the bytes are written. Whoever takes the bits clears them and then waits for the
//! inline accesses that run. So an inline access need not touch a bit that it finds set: either it is
//! waited for, and its bytes are there for whoever took the bit, or it begins later and finds the bit
//! cleared. Slices that were lent are not waited for: they set the bit whatever it was.

use std::fmt;
use std::ops::RangeInclusive;
use std::ptr;

use checked_sync::{AtomicPtr, AtomicU64, Ordering};

use crate::memory;
use crate::range::page_shift;
use crate::Result;

/// Pages that one word tells apart.
pub(super) const WORD: usize = u64::BITS as usize;

/// The tag of bits that are kept; bits without it are those of a tracking that has ended.
const ON: usize = 1;

/// # Invariants
///
/// Null, or a box of as many words as the mapping's pages need, made into a raw pointer. Offsets and
/// pages given to it lie inside the mapping. The box goes with the mapping and not before: a slice that
/// was lent may be marking.
pub(crate) struct DirtyLog(AtomicPtr<AtomicU64>);

impl DirtyLog {
    pub(crate) fn new() -> Self {
        DirtyLog(AtomicPtr::new(ptr::null_mut()))
    }

    /// Memory of the bits of so many pages.
    pub(crate) fn bytes(pages: usize) -> usize {
        pages.div_ceil(WORD) * size_of::<AtomicU64>()
    }

    #[inline]
    pub(crate) fn is_on(&self) -> bool {
        self.0.load(Ordering::Acquire).addr() & ON != 0
    }

    /// Begins to keep bits, none of them set, for a mapping of so many pages.
    ///
    /// For the one who maps and unmaps, as `stop`.
    ///
    /// # Errors
    ///
    /// [`Error::NoMemory`](crate::Error::NoMemory).
    pub(crate) fn start(&self, pages: usize) -> Result<()> {
        let raw = self.0.load(Ordering::Relaxed);
        if raw.addr() & ON != 0 {
            return Ok(());
        }
        let words = if raw.is_null() {
            let zeros = (0..pages.div_ceil(WORD)).map(|_| AtomicU64::new(0));
            // As many as were reserved: nothing is allocated once more.
            Box::into_raw(memory::collect(zeros)?.into_boxed_slice()).cast()
        } else {
            for index in 0..pages.div_ceil(WORD) {
                // SAFETY: by the invariant.
                unsafe { &*raw.add(index) }.store(0, Ordering::Relaxed);
            }
            raw
        };
        self.0
            .store(words.map_addr(|addr| addr | ON), Ordering::Release);
        Ok(())
    }

    /// Forgets what was kept.
    pub(crate) fn stop(&self) {
        let raw = self.0.load(Ordering::Relaxed);
        self.0
            .store(raw.map_addr(|addr| addr & !ON), Ordering::Release);
    }

    /// Marks `len` bytes from `offset` by an inline access, after it has written them.
    #[inline]
    pub(crate) fn mark_inline(&self, offset: usize, len: usize) {
        self.for_each_word(offset, len, |word, mask| {
            if word.load(Ordering::Relaxed) & mask != mask {
                word.fetch_or(mask, Ordering::AcqRel);
            }
        });
    }

    /// Marks `len` bytes from `offset` by the holder of a slice, after they were written.
    pub(crate) fn mark_lent(&self, offset: usize, len: usize) {
        self.for_each_word(offset, len, |word, mask| {
            word.fetch_or(mask, Ordering::AcqRel);
        });
    }

    /// Whether the page of a byte is marked.
    pub(crate) fn dirty_at(&self, offset: usize) -> bool {
        let mut dirty = false;
        self.for_each_word(offset, 1, |word, mask| {
            dirty = word.load(Ordering::Acquire) & mask != 0;
        });
        dirty
    }

    /// Clears the marks of a mapping of so many pages, and gives each word that had some to `taken`, with
    /// its index.
    pub(super) fn take(&self, pages: usize, mut taken: impl FnMut(usize, u64)) {
        self.for_each_word_of(0..=pages - 1, |index, word, mask| {
            // A word without a mark need not be written.
            if word.load(Ordering::Acquire) & mask != 0 {
                taken(index, word.fetch_and(!mask, Ordering::AcqRel) & mask);
            }
        });
    }

    /// As `take`, one page at a time.
    pub(crate) fn take_pages(&self, pages: usize, mut taken: impl FnMut(usize)) {
        self.take(pages, |index, marks| {
            let is_marked = |bit: &usize| marks >> bit & 1 == 1;
            (0..WORD)
                .filter(is_marked)
                .for_each(|bit| taken(index * WORD + bit));
        });
    }

    /// The words of marks of a mapping of so many pages, which stay.
    pub(crate) fn look(&self, pages: usize, mut seen: impl FnMut(u64)) {
        self.for_each_word_of(0..=pages - 1, |_, word, mask| {
            seen(word.load(Ordering::Acquire) & mask);
        });
    }

    /// Sets marks that were taken.
    pub(crate) fn put_back(&self, index: usize, marks: u64) {
        self.for_each_word_of(index * WORD..=index * WORD, |_, word, _| {
            word.fetch_or(marks, Ordering::AcqRel);
        });
    }

    /// Gives back the memory of a mapping of so many pages, to which nobody refers any more.
    pub(crate) fn free(&mut self, pages: usize) {
        let raw = self.words();
        if !raw.is_null() {
            let words = ptr::slice_from_raw_parts_mut(raw, pages.div_ceil(WORD));
            // SAFETY: by the invariant; nobody marks, as nobody refers to the mapping.
            drop(unsafe { Box::from_raw(words) });
            self.0 = AtomicPtr::new(ptr::null_mut());
        }
    }

    fn words(&self) -> *mut AtomicU64 {
        self.0.load(Ordering::Acquire).map_addr(|addr| addr & !ON)
    }

    #[inline]
    fn for_each_word(&self, offset: usize, len: usize, mut op: impl FnMut(&AtomicU64, u64)) {
        if len > 0 {
            let first = offset >> page_shift();
            let last = (offset + (len - 1)) >> page_shift();
            self.for_each_word_of(first..=last, |_, word, mask| op(word, mask));
        }
    }

    /// Visits the words of `pages` with their index and the bits that are meant; none where no bits
    /// are kept.
    #[inline]
    fn for_each_word_of(
        &self,
        pages: RangeInclusive<usize>,
        mut op: impl FnMut(usize, &AtomicU64, u64),
    ) {
        let raw = self.0.load(Ordering::Acquire);
        if raw.addr() & ON == 0 {
            return;
        }
        let words = raw.map_addr(|addr| addr & !ON);
        let (first, last) = (*pages.start(), *pages.end());
        for index in first / WORD..=last / WORD {
            let low = first.max(index * WORD) % WORD;
            let high = last.min(index * WORD + (WORD - 1)) % WORD;
            let mask = (u64::MAX << low) & (u64::MAX >> (WORD - 1 - high));
            // SAFETY: by the invariant the pages have a word each, which lives as long as `self`.
            op(index, unsafe { &*words.add(index) }, mask);
        }
    }
}

impl fmt::Debug for DirtyLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DirtyLog").field(&self.is_on()).finish()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::range::page_size;

    /// The word behind the last would be memory of somebody else.
    #[test]
    fn takes_and_looks_at_no_page_behind_the_last() {
        let mut log = DirtyLog::new();
        log.start(3).unwrap();
        log.put_back(0, u64::MAX);
        let (mut seen, mut taken) = (Vec::new(), Vec::new());
        log.look(3, |marks| seen.push(marks));
        log.take(3, |index, marks| taken.push((index, marks)));
        assert_eq!((seen, taken), (vec![0b111], vec![(0, 0b111)]));
        log.free(3);
    }

    #[test]
    fn no_bytes_mark_no_page() {
        let mut log = DirtyLog::new();
        log.start(1).unwrap();
        log.mark_inline(0, 0);
        log.mark_lent(0, 0);
        assert!(!log.dirty_at(0));
        log.free(1);
    }

    proptest! {
        #[test]
        fn marks_and_takes_what_a_set_of_pages_does(
            pages in 1..300_usize,
            steps in prop::collection::vec((any::<bool>(), any::<usize>(), any::<usize>(), any::<bool>()), 1..40)
        ) {
            let mut log = DirtyLog::new();
            let mut expected = BTreeSet::new();
            log.mark_lent(0, 1);
            log.start(pages).unwrap();
            let size = pages * page_size() as usize;
            for (mark, a, b, inline) in steps {
                if mark {
                    let offset = a % size;
                    let len = b % (size - offset + 1);
                    if inline {
                        log.mark_inline(offset, len);
                    } else {
                        log.mark_lent(offset, len);
                    }
                    if len > 0 {
                        expected.extend(offset >> page_shift()..=(offset + len - 1) >> page_shift());
                    }
                } else {
                    let mut taken = BTreeSet::new();
                    log.take(pages, |index, marks| {
                        let bits = (0..WORD).filter(|bit| marks >> bit & 1 == 1);
                        taken.extend(bits.map(|bit| index * WORD + bit));
                        if inline {
                            log.put_back(index, marks);
                        }
                    });
                    prop_assert_eq!(&taken, &expected);
                    if !inline {
                        expected.clear();
                    }
                }
                for page in 0..pages {
                    prop_assert_eq!(log.dirty_at(page << page_shift()), expected.contains(&page));
                }
            }
            log.stop();
            log.start(pages).unwrap();
            prop_assert!((0..pages).all(|page| !log.dirty_at(page << page_shift())));
            log.free(pages);
        }
    }
}

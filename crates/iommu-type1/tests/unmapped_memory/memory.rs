// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory: where its pages lie, what stands in them, and taking them away.
//!
//! Every 8-byte word names its page. *Sealed* words carry the page's generation as well, and change
//! only while the page is unmapped and was given back. *Open* words carry none, so accesses may write
//! them at any time, with what stands there already.

use std::sync::atomic::{AtomicU64, Ordering};

use iommu_type1::{page_size, Backing};
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MemoryRegionAddress};

use super::random::Random;
use super::slow_log::SlowLog;

/// Pages with neighbouring IOVAs, each a mapping of its own. Blocks are far from each other, and
/// small: so nodes of the table come and go.
pub const BLOCK_PAGES: usize = 2;
pub const BLOCKS: usize = 4;
pub const PAGES: usize = BLOCKS * BLOCK_PAGES;

/// Open and sealed words take turns, this many each; the ends of a block are open.
const RUN: usize = 32;
const WORD: usize = size_of::<u64>();
/// Above it stands the page, below it the generation.
const PAGE_SHIFT: u32 = 48;

pub fn page_bytes() -> usize {
    page_size() as usize
}

pub fn block_bytes() -> usize {
    BLOCK_PAGES * page_bytes()
}

/// A page of the whole memory as its mapping's IOVA, and back.
pub fn iova_of(page: usize) -> u64 {
    let (block, index) = (page / BLOCK_PAGES, page % BLOCK_PAGES);
    ((block as u64 + 1) << 30) + index as u64 * page_size()
}

pub fn page_at(iova: u64) -> usize {
    let block = (iova >> 30) as usize - 1;
    block * BLOCK_PAGES + (iova % (1 << 30) / page_size()) as usize
}

/// Words of one block.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    block: usize,
    /// In bytes from the start of the block, as the length.
    offset: usize,
    pub len: usize,
}

impl Span {
    /// Whole pages of one of the `blocks`.
    pub fn pages(random: &mut Random, blocks: std::ops::Range<usize>) -> Self {
        let block = blocks.start + random.below(blocks.len());
        let first = random.below(BLOCK_PAGES);
        let count = 1 + random.below(BLOCK_PAGES - first);
        Span {
            block,
            offset: first * page_bytes(),
            len: count * page_bytes(),
        }
    }

    /// Up to 256 bytes, often across two pages; now and then a whole block, so that accesses take
    /// longer than an unmap too.
    pub fn to_read(random: &mut Random) -> Self {
        let block = random.below(BLOCKS);
        if random.below(16) == 0 {
            return Span {
                block,
                offset: 0,
                len: block_bytes(),
            };
        }
        let words = 1 + random.below(RUN);
        let offset = match random.below(4) {
            0 => (1 + random.below(BLOCK_PAGES - 1)) * page_bytes() - random.below(words) * WORD,
            _ => random.below(block_bytes() / WORD - words) * WORD,
        };
        Span {
            block,
            offset,
            len: words * WORD,
        }
    }

    /// Open words, often across two pages.
    pub fn to_write(random: &mut Random) -> Self {
        let middle = match random.below(2) {
            0 => (1 + random.below(BLOCK_PAGES - 1)) * page_bytes(),
            _ => (1 + random.below(block_bytes() / WORD / (2 * RUN) - 1)) * 2 * RUN * WORD,
        };
        let first = random.below(RUN);
        let words = 1 + random.below(RUN - first);
        Span {
            block: random.below(BLOCKS),
            offset: middle - RUN / 2 * WORD + first * WORD,
            len: words * WORD,
        }
    }

    pub fn iova(&self) -> u64 {
        iova_of(self.block * BLOCK_PAGES) + self.offset as u64
    }

    /// The pages it touches.
    pub fn touched(&self) -> std::ops::RangeInclusive<usize> {
        let first = self.block * BLOCK_PAGES;
        let last = self.offset + self.len - 1;
        first + self.offset / page_bytes()..=first + last / page_bytes()
    }

    /// The pages it touches, a bit each.
    pub fn mask(&self) -> u64 {
        self.touched().fold(0, |mask, page| mask | 1 << page)
    }

    /// Page and openness of the words from its start on.
    fn words(&self) -> impl Iterator<Item = (usize, bool)> {
        let first_page = self.block * BLOCK_PAGES;
        // A shift: this is what users spend most of their time with.
        let page_shift = (page_bytes() / WORD).trailing_zeros();
        (self.offset / WORD..(self.offset + self.len) / WORD).map(move |word| {
            let page = first_page + (word >> page_shift);
            (page, (word + RUN / 2) % (2 * RUN) < RUN)
        })
    }

    /// What stands in open words.
    pub fn fill_open(&self, bytes: &mut [u8]) {
        for (word, (page, open)) in bytes.chunks_exact_mut(WORD).zip(self.words()) {
            assert!(open, "{self:?} is not for writing");
            word.copy_from_slice(&content(page, 0).to_ne_bytes());
        }
    }
}

fn content(page: usize, generation: u64) -> u64 {
    (page as u64 + 1) << PAGE_SHIFT | generation
}

pub struct Memory {
    region: GuestRegionMmap<SlowLog>,
    /// The newest generation of a page that is gone: an unmap of it has returned.
    gone: [AtomicU64; PAGES],
}

impl Memory {
    pub fn new() -> Self {
        let bytes = PAGES * page_bytes();
        let region = GuestRegionMmap::<SlowLog>::from_range(GuestAddress(0), bytes, None).unwrap();
        region.bitmap().look_at(region.as_ptr());
        Memory {
            region,
            gone: Default::default(),
        }
    }

    /// Neighbours in IOVAs are none in memory.
    fn offset(page: usize) -> usize {
        page * 7 % PAGES * page_bytes()
    }

    /// Accessible memory of a page with a new generation in it, to be mapped.
    pub fn renew(&self, page: usize) -> Backing {
        self.protect(page, libc::PROT_READ | libc::PROT_WRITE);
        let whole = Span {
            block: page / BLOCK_PAGES,
            offset: page % BLOCK_PAGES * page_bytes(),
            len: page_bytes(),
        };
        let generation = self.gone[page].load(Ordering::Relaxed) + 1;
        let bytes: Vec<u8> = whole
            .words()
            .flat_map(|(page, open)| content(page, if open { 0 } else { generation }).to_ne_bytes())
            .collect();
        let offset = Memory::offset(page) as u64;
        self.region
            .write_slice(&bytes, MemoryRegionAddress(offset))
            .unwrap();
        Backing::from_region(&self.region, offset, page_bytes()).unwrap()
    }

    /// Takes a page away that is unmapped: from now on its generation is a thing of the past, and
    /// whoever touches it is killed.
    pub fn take_away(&self, page: usize) {
        self.gone[page].fetch_add(1, Ordering::Release);
        self.protect(page, libc::PROT_NONE);
    }

    fn protect(&self, page: usize, prot: libc::c_int) {
        let address = self.region.as_ptr().wrapping_add(Memory::offset(page));
        // SAFETY: a page inside the region, which belongs to this test; it is only accessed through
        // raw copies. That none of them comes while it is inaccessible is what the test is about.
        let result = unsafe { libc::mprotect(address.cast(), page_bytes(), prot) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    }

    /// Begins to look at memory: made before the access is.
    pub fn look(&self, span: Span) -> Look {
        let mut gone = [0; BLOCK_PAGES];
        for page in span.touched() {
            gone[page % BLOCK_PAGES] = self.gone[page].load(Ordering::Acquire);
        }
        Look {
            span,
            gone,
            seen: [0; BLOCK_PAGES],
        }
    }
}

/// What one access, or one lease, may see: of each page one generation, and none that was gone
/// before.
#[derive(Debug)]
pub struct Look {
    span: Span,
    gone: [u64; BLOCK_PAGES],
    /// 0 for a page that was not seen yet.
    seen: [u64; BLOCK_PAGES],
}

impl Look {
    /// `bytes` are what was read from the start of the span.
    pub fn check(&mut self, bytes: &[u8]) {
        for (word, (page, open)) in bytes.chunks_exact(WORD).zip(self.span.words()) {
            let word = u64::from_ne_bytes(word.try_into().unwrap());
            let generation = word % (1 << PAGE_SHIFT);
            assert_eq!(
                word - generation,
                content(page, 0),
                "not page {page}: {self:x?}"
            );
            if open {
                assert_eq!(generation, 0, "page {page}: {self:x?}");
                continue;
            }
            let index = page % BLOCK_PAGES;
            if self.seen[index] == 0 {
                self.seen[index] = generation;
            }
            assert_eq!(
                generation, self.seen[index],
                "a mix of page {page}: {self:x?}"
            );
            assert!(
                generation > self.gone[index],
                "page {page} of the past: {self:x?}"
            );
        }
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The nodes of the table: words that are empty, a mapping, or a node below.
//!
//! A word is a tagged pointer. The alignment of a node leaves six bits free, in which stands how far an
//! address is shifted to find the node's word for it: a look-up loads nothing of a node but one word.
//! The alignment of a mapping leaves three, which are not all zero in any such shift.
//!
//! A node of level 0 has a second word for each page, a [`PageWord`]: an access that stays inside
//! of the page needs nothing of the mapping but that.

use std::alloc::Layout;
use std::cell::Cell;
use std::ops::Range;
use std::ptr;

#[cfg(any(loom, shuttle))]
use checked_sync::AtomicBool;
use checked_sync::{AtomicPtr, Ordering, CHECKED};

use super::pages::Pages;
use super::spares::Spares;
use crate::mapping::{Mapping, PageWord};
use crate::range::page_shift;

/// Bits of a page number that one node resolves.
const BITS: u32 = if CHECKED { 2 } else { 9 };
const FANOUT: usize = 1 << BITS;

/// Bits of a word that tell a node from a mapping.
const IS_NODE: usize = align_of::<Mapping>() - 1;
/// Bits of a word that are not of the node's address.
const TAG: usize = align_of::<Node>() - 1;

/// The tag of a node. One more than needed, so that no level's is without a bit of [`IS_NODE`];
/// [`address`] makes up for it.
const fn tag(level: u32) -> usize {
    (level * BITS + 1) as usize
}

/// Levels there can be: page numbers have 52 bits at most.
const LEVELS: u32 = 52_u32.div_ceil(BITS);

const _: () = {
    let mut level = 0;
    while level < LEVELS {
        assert!(tag(level) & IS_NODE != 0 && tag(level) <= TAG);
        level += 1;
    }
};

/// Points to a word's target; the tag tells which.
pub(super) type Raw = *mut ();

#[derive(Clone, Copy)]
pub(super) enum Word {
    Empty,
    Mapping(*const Mapping),
    Node(*const Node),
}

impl Word {
    #[inline]
    pub(super) fn decode(raw: Raw) -> Word {
        if is_node(raw) {
            Word::Node(node(raw))
        } else if raw.is_null() {
            Word::Empty
        } else {
            Word::Mapping(raw.cast_const().cast())
        }
    }
}

#[inline]
pub(super) fn is_node(raw: Raw) -> bool {
    raw.addr() & IS_NODE != 0
}

/// The node of a word that is one.
#[inline]
pub(super) fn node(raw: Raw) -> *const Node {
    raw.map_addr(|addr| addr & !TAG).cast_const().cast()
}

/// Whether the node of this word has a word a page.
#[inline]
pub(super) fn is_leaf(raw: Raw) -> bool {
    raw.addr() & TAG == tag(0)
}

/// An address as [`index`] takes it.
#[inline]
pub(super) fn address(iova: u64) -> u64 {
    iova >> (page_shift() - 1)
}

/// Which word of this word's node is that of an [`address`].
#[inline]
pub(super) fn index(raw: Raw, address: u64) -> usize {
    (address >> (raw.addr() & TAG)) as usize % FANOUT
}

pub(super) fn mapping_word(mapping: *const Mapping) -> Raw {
    mapping.cast_mut().cast()
}

/// Words for the pages of an aligned block; `level` 0 has one page a word.
///
/// Everything but `slots` belongs to the writer.
#[repr(C, align(64))]
pub(super) struct Node {
    pub(super) slots: [AtomicPtr<()>; FANOUT],
    /// Words that are not empty.
    used: Cell<usize>,
    /// Mappings in the node and below.
    mappings: Cell<usize>,
    level: u32,
    /// Whether it stays though it tells nothing apart ([`super::Table::take`]).
    pub(super) kept: Cell<bool>,
    /// First page of the block.
    first: u64,
    /// The next of those that were unlinked.
    pub(super) next: Cell<*mut Node>,
    /// In a model memory is not given back but marked, so that an access that comes late is seen.
    #[cfg(any(loom, shuttle))]
    freed: AtomicBool,
}

/// A node of level 0.
///
/// # Invariants
///
/// `pages` has a word for each page that `node` has a mapping for, null for every other.
#[repr(C)]
struct Leaf {
    node: Node,
    pages: [AtomicPtr<()>; FANOUT],
}

impl Node {
    /// A node for the smallest block that resolves `low` from `high`, two different pages, made of one that is
    /// [spare](Spares).
    pub(super) fn separating(low: u64, high: u64, spares: &mut Spares) -> *mut Node {
        let level = separating_level(low, high);
        let node = Node {
            slots: empty(),
            used: Cell::new(0),
            mappings: Cell::new(0),
            level,
            kept: Cell::new(false),
            first: low >> block_bits(level) << block_bits(level),
            next: Cell::new(ptr::null_mut()),
            #[cfg(any(loom, shuttle))]
            freed: AtomicBool::new(false),
        };
        if level > 0 {
            let raw = spares.take(false).cast::<Node>();
            // SAFETY: memory for a node, which nobody else has.
            unsafe { raw.write(node) };
            return raw;
        }
        let pages = empty();
        let raw = spares.take(true).cast::<Leaf>();
        // SAFETY: memory for a node of level 0, which nobody else has.
        unsafe { raw.write(Leaf { node, pages }) };
        raw.cast()
    }

    /// Gives back the memory of a node that nothing refers to.
    ///
    /// # Safety
    ///
    /// The node came from [`separating`](Node::separating), is in no table, and no access that may
    /// have seen it runs.
    pub(super) unsafe fn free(node: *mut Node) {
        #[cfg(not(any(loom, shuttle)))]
        // SAFETY: the caller's promise; nodes of level 0 were made as leaves.
        unsafe {
            if (*node).level > 0 {
                drop(Box::from_raw(node));
            } else {
                drop(Box::from_raw(node.cast::<Leaf>()));
            }
        }
        #[cfg(any(loom, shuttle))]
        // SAFETY: never freed in a model.
        unsafe { &(*node).freed }.store(true, Ordering::Relaxed);
    }

    /// Memory it takes.
    pub(super) fn bytes(&self) -> usize {
        layout(self.level == 0).size()
    }

    /// The word for a page, as an access reads it.
    ///
    /// # Safety
    ///
    /// The node stays allocated during the call.
    #[inline]
    pub(super) unsafe fn load(node: *const Node, index: usize) -> Raw {
        #[cfg(any(loom, shuttle))]
        // SAFETY: never freed in a model.
        assert!(
            !unsafe { &(*node).freed }.load(Ordering::Relaxed),
            "a node read after it was freed"
        );
        // SAFETY: the caller's promise.
        unsafe { &(*node).slots[index] }.load(Ordering::Acquire)
    }

    /// The word of the page of `iova` in a node of level 0, as an access reads it. Levels above may have
    /// been left out: a page of another block has no word here.
    ///
    /// # Safety
    ///
    /// The node is of level 0 and stays allocated during the call.
    #[inline]
    pub(super) unsafe fn load_page(node: *const Node, iova: u64, index: usize) -> PageWord {
        #[cfg(any(loom, shuttle))]
        // SAFETY: never freed in a model.
        assert!(
            !unsafe { &(*node).freed }.load(Ordering::Relaxed),
            "a node read after it was freed"
        );
        // SAFETY: the caller's promise; nodes of level 0 were made as leaves.
        let leaf = unsafe { &*node.cast::<Leaf>() };
        if (iova >> page_shift()).wrapping_sub(leaf.node.first) >= FANOUT as u64 {
            return PageWord::NONE;
        }
        PageWord::from_raw(leaf.pages[index].load(Ordering::Acquire))
    }

    /// Says what accesses find at a page.
    ///
    /// # Safety
    ///
    /// As [`load_page`](Node::load_page).
    pub(super) unsafe fn store_page(node: *const Node, index: usize, word: PageWord) {
        // SAFETY: the caller's promise; nodes of level 0 were made as leaves.
        let page = unsafe { &(*node.cast::<Leaf>()).pages[index] };
        page.store(word.into_raw(), Ordering::Release);
    }

    /// The word that refers to a node.
    pub(super) fn word(node: *const Node, level: u32) -> Raw {
        node.cast_mut()
            .cast::<()>()
            .map_addr(|addr| addr | tag(level))
    }

    pub(super) fn level(&self) -> u32 {
        self.level
    }

    /// The pages it has words for.
    pub(super) fn span(&self) -> Pages {
        Pages {
            first: self.first,
            last: self.first + ((1 << block_bits(self.level)) - 1),
        }
    }

    /// Index of the word for a page.
    pub(super) fn index(&self, page: u64) -> usize {
        (page >> (self.level * BITS)) as usize % FANOUT
    }

    /// Indices of the words for pages that lie in its block.
    pub(super) fn indices(&self, pages: Pages) -> Range<usize> {
        self.index(pages.first)..self.index(pages.last) + 1
    }

    /// Indices of the words for whatever of the pages lies in its block; `None` where nothing does.
    pub(super) fn met(&self, pages: Pages) -> Option<Range<usize>> {
        let span = self.span();
        let overlaps = span.overlaps(pages);
        overlaps.then(|| self.indices(pages.clamp(span)))
    }

    /// The pages of the word at `index`.
    pub(super) fn block_at(&self, index: usize) -> Pages {
        let bits = self.level * BITS;
        let first = self.first + ((index as u64) << bits);
        Pages {
            first,
            last: first + ((1 << bits) - 1),
        }
    }

    pub(super) fn mappings(&self) -> usize {
        self.mappings.get()
    }

    /// Counts mappings that came into the node.
    pub(super) fn enter(&self, mappings: usize) {
        self.mappings.set(self.mappings.get() + mappings);
    }

    /// Counts a mapping that left the node.
    pub(super) fn leave(&self) {
        self.mappings.set(self.mappings.get() - 1);
    }

    /// Counts a word that became used, or empty.
    pub(super) fn changed(&self, was_empty: bool, is_empty: bool) {
        let used = self.used.get() + usize::from(was_empty) - usize::from(is_empty);
        self.used.set(used);
    }

    /// The word that can stand in place of this node, if it tells nothing apart.
    pub(super) fn instead(&self) -> Option<Raw> {
        if self.mappings.get() > 1 && self.used.get() > 1 {
            return None;
        }
        let words = self.slots.iter().map(|slot| slot.load(Ordering::Relaxed));
        let mut words = words.filter(|raw| !raw.is_null());
        let first = words.next().unwrap_or(ptr::null_mut());
        // Nodes that are kept have words though there may be no mapping in them: they go before this one.
        words.all(|raw| raw == first).then_some(first)
    }
}

/// The layout of a kind of node.
pub(super) fn layout(is_leaf: bool) -> Layout {
    if is_leaf {
        Layout::new::<Leaf>()
    } else {
        Layout::new::<Node>()
    }
}

/// The level of the smallest block with two different pages.
pub(super) fn separating_level(low: u64, high: u64) -> u32 {
    (63 - (low ^ high).leading_zeros()) / BITS
}

/// The pages of the word of a level that has this page, as `Node::block_at` says.
pub(super) fn block_of(page: u64, level: u32) -> Pages {
    let bits = level * BITS;
    let first = page >> bits << bits;
    Pages {
        first,
        last: first + ((1 << bits) - 1),
    }
}

fn empty() -> [AtomicPtr<()>; FANOUT] {
    std::array::from_fn(|_| AtomicPtr::new(ptr::null_mut()))
}

/// Bits of a page number inside the block of a node: fewer than 64, as page numbers have 52 at most
/// and a level adds no more than it resolves.
fn block_bits(level: u32) -> u32 {
    (level + 1) * BITS
}

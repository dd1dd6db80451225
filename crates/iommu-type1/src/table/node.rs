// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The nodes of the table: words that are empty, a mapping, or a node below.
//!
//! A word is a tagged pointer. Bit 0 tells a node from a mapping; a node's level stands in bits 1
//! to 5, which its alignment leaves free, so that a look-up loads nothing of a node but one word.

use std::cell::Cell;
use std::ptr;

use crate::mapping::Mapping;
use crate::sync::{AtomicPtr, Ordering};

/// Bits of a page number that one node resolves.
pub(super) const BITS: u32 = if cfg!(loom) { 2 } else { 9 };
pub(super) const FANOUT: usize = 1 << BITS;

const NODE: usize = 1;
const LEVEL_SHIFT: u32 = 1;
const TAG: usize = 63;

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
    raw.addr() & NODE != 0
}

/// The node of a word that is one.
#[inline]
pub(super) fn node(raw: Raw) -> *const Node {
    raw.map_addr(|addr| addr & !TAG).cast_const().cast()
}

/// The lowest bit of a page number that the node of this word resolves.
#[inline]
pub(super) fn shift(raw: Raw) -> u32 {
    ((raw.addr() & TAG) >> LEVEL_SHIFT) as u32 * BITS
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
    /// First page of the block.
    first: u64,
    /// In a model memory is not given back but marked, so that an access that comes late is seen.
    #[cfg(loom)]
    freed: loom::sync::atomic::AtomicBool,
}

impl Node {
    /// A node for the smallest block that resolves `low` from `high`, two different pages.
    pub(super) fn separating(low: u64, high: u64) -> Box<Node> {
        let level = (63 - (low ^ high).leading_zeros()) / BITS;
        let first = low >> block_bits(level) << block_bits(level);
        Box::new(Node {
            slots: std::array::from_fn(|_| AtomicPtr::new(ptr::null_mut())),
            used: Cell::new(0),
            mappings: Cell::new(0),
            level,
            first,
            #[cfg(loom)]
            freed: loom::sync::atomic::AtomicBool::new(false),
        })
    }

    /// Gives back the memory of a node that nothing refers to.
    ///
    /// # Safety
    ///
    /// The node came out of a box, is in no table, and no access that may have seen it runs.
    pub(super) unsafe fn free(node: *mut Node) {
        #[cfg(not(loom))]
        // SAFETY: the caller's promise.
        drop(unsafe { Box::from_raw(node) });
        #[cfg(loom)]
        // SAFETY: never freed in a model.
        unsafe { &(*node).freed }.store(true, Ordering::Relaxed);
    }

    /// The word for a page, as an access reads it.
    ///
    /// # Safety
    ///
    /// The node stays allocated during the call.
    #[inline]
    pub(super) unsafe fn load(node: *const Node, index: usize) -> Raw {
        #[cfg(loom)]
        // SAFETY: never freed in a model.
        assert!(
            !unsafe { &(*node).freed }.load(Ordering::Relaxed),
            "a node read after it was freed"
        );
        // SAFETY: the caller's promise.
        unsafe { &(*node).slots[index] }.load(Ordering::Acquire)
    }

    /// The word that refers to a node.
    pub(super) fn word(node: *const Node, level: u32) -> Raw {
        node.cast_mut()
            .cast::<()>()
            .map_addr(|addr| addr | NODE | (level as usize) << LEVEL_SHIFT)
    }

    pub(super) fn level(&self) -> u32 {
        self.level
    }

    pub(super) fn first(&self) -> u64 {
        self.first
    }

    pub(super) fn last(&self) -> u64 {
        self.first + ((1 << block_bits(self.level)) - 1)
    }

    /// Index of the word for a page.
    pub(super) fn index(&self, page: u64) -> usize {
        (page >> (self.level * BITS)) as usize % FANOUT
    }

    /// First and last page of the word at `index`.
    pub(super) fn block_at(&self, index: usize) -> (u64, u64) {
        let bits = self.level * BITS;
        let first = self.first + ((index as u64) << bits);
        (first, first + ((1 << bits) - 1))
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
        let mut words = self.slots.iter().map(|slot| slot.load(Ordering::Relaxed));
        Some(words.find(|raw| !raw.is_null()).unwrap_or(ptr::null_mut()))
    }
}

/// Bits of a page number inside the block of a node: fewer than 64, as page numbers have 52 at most
/// and a level adds no more than it resolves.
fn block_bits(level: u32) -> u32 {
    (level + 1) * BITS
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How a mapping comes into the table: what nodes that takes, and their publication.

use std::sync::Arc;

use checked_sync::{AtomicPtr, Ordering};

use super::narrow;
use super::node::{block_of, mapping_word, separating_level, Node, Raw, Word};
use super::pages::Pages;
use super::spares::{Needed, Spares};
use crate::mapping::Mapping;
use crate::{Error, Result};

/// Makes a mapping that overlaps no other reachable from `root`; returns the bytes of nodes that took.
pub(super) fn insert(root: &AtomicPtr<()>, mapping: Arc<Mapping>) -> Result<usize> {
    let pages = Pages::of(mapping.range);
    let (raw, block) = narrow(root, pages);
    let needed = needed(raw, pages, block);
    let spares = Spares::new(needed).map_err(|bytes| Error::NoMemory { bytes })?;
    let mut inserter = Inserter {
        mapping: Arc::into_raw(mapping),
        bytes: 0,
        spares,
    };
    inserter.insert(root, pages, Pages::ALL);
    debug_assert!(inserter.spares.are_used_up());
    Ok(inserter.bytes)
}

/// How many nodes it takes to put a mapping into a word, where `pages` are those of it that fall into the word's
/// `block`: what [`Inserter::insert`] does, without doing it.
fn needed(raw: Raw, pages: Pages, block: Pages) -> Needed {
    match Word::decode(raw) {
        Word::Empty => Needed::default(),
        Word::Mapping(other) => {
            // SAFETY: reachable, and only the writer removes.
            let others = Pages::of(unsafe { (*other).range }).clamp(block);
            needed_beside(pages, others)
        }
        Word::Node(below) => {
            // SAFETY: reachable, and only the writer removes.
            let below = unsafe { &*below };
            let span = below.span();
            if !span.contains(pages) {
                let level =
                    separating_level(pages.first.min(span.first), pages.last.max(span.last));
                let block = block_of(span.first, level);
                let above = Needed::one(level);
                return match pages.overlaps(block) {
                    true => above.and(needed(raw, pages.clamp(block), block)),
                    false => above,
                };
            }
            if below.level() == 0 {
                return Needed::default();
            }
            // Only where it ends it can meet others.
            let (first, last) = (below.index(pages.first), below.index(pages.last));
            if first == last {
                let raw = below.slots[first].load(Ordering::Relaxed);
                return needed(raw, pages, below.block_at(first));
            }
            let at = |index: usize| {
                let block = below.block_at(index);
                let raw = below.slots[index].load(Ordering::Relaxed);
                needed(raw, pages.clamp(block), block)
            };
            at(first).and(at(last))
        }
    }
}

/// How many nodes it takes to tell two mappings apart that have these pages in a block.
fn needed_beside(one: Pages, other: Pages) -> Needed {
    let (mut low, mut high) = match one.first < other.first {
        true => (one, other),
        false => (other, one),
    };
    let mut nodes = Needed::default();
    loop {
        let level = separating_level(low.first, high.last);
        nodes = nodes.and(Needed::one(level));
        let block = block_of(high.first, level);
        if level == 0 || !low.overlaps(block) {
            return nodes;
        }
        (low, high) = (low.clamp(block), high.clamp(block));
    }
}

struct Inserter {
    mapping: *const Mapping,
    /// Of the nodes that were made.
    bytes: usize,
    spares: Spares,
}

impl Inserter {
    /// Puts the mapping into `slot`, where `pages` are those of it that fall into the slot's
    /// `block`. What is published is complete.
    fn insert(&mut self, slot: &AtomicPtr<()>, pages: Pages, block: Pages) {
        let raw = slot.load(Ordering::Relaxed);
        match Word::decode(raw) {
            Word::Empty => slot.store(mapping_word(self.mapping), Ordering::Release),
            Word::Mapping(other) => {
                // SAFETY: reachable, and only the writer removes.
                let others = Pages::of(unsafe { (*other).range }).clamp(block);
                let node = self.node_for(pages, others);
                let own = std::mem::replace(&mut self.mapping, other);
                // Into words that are empty: no node is needed for that.
                self.insert_below(node, others);
                self.mapping = own;
                self.insert_below(node, pages);
                publish(slot, node);
            }
            Word::Node(raw_below) => {
                // SAFETY: reachable, and only the writer removes.
                let below = unsafe { &*raw_below };
                let span = below.span();
                if span.contains(pages) {
                    self.insert_below(raw_below, pages);
                } else {
                    let raw_node = self.node_for(pages, span);
                    // SAFETY: just made.
                    let node = unsafe { &*raw_node };
                    node.slots[node.index(span.first)].store(raw, Ordering::Relaxed);
                    node.changed(true, false);
                    node.enter(below.mappings());
                    self.insert_below(raw_node, pages);
                    publish(slot, raw_node);
                }
            }
        }
    }

    /// Puts the mapping into a node, which is reachable or about to be.
    fn insert_below(&mut self, raw: *const Node, pages: Pages) {
        // SAFETY: only the writer, which this is, frees nodes.
        let node = unsafe { &*raw };
        node.enter(1);
        for index in node.indices(pages) {
            let slot = &node.slots[index];
            let was_empty = slot.load(Ordering::Relaxed).is_null();
            let block = node.block_at(index);
            self.insert(slot, pages.clamp(block), block);
            if node.level() == 0 {
                // SAFETY: the mapping lives, the node is of level 0.
                unsafe { Node::store_page(raw, index, (*self.mapping).page_word(block.first)) };
            }
            node.changed(was_empty, false);
        }
    }

    fn node_for(&mut self, one: Pages, other: Pages) -> *const Node {
        let (low, high) = (one.first.min(other.first), one.last.max(other.last));
        let node = Node::separating(low, high, &mut self.spares);
        // SAFETY: just made.
        self.bytes += unsafe { &*node }.bytes();
        node
    }
}

fn publish(slot: &AtomicPtr<()>, node: *const Node) {
    // SAFETY: the caller has made it.
    let level = unsafe { &*node }.level();
    slot.store(Node::word(node, level), Ordering::Release);
}

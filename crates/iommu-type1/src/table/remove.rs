// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How a mapping leaves the table, and the nodes that tell nothing apart without it.

use std::ptr;

use checked_sync::{AtomicPtr, Ordering};

use super::node::{Node, Word};
use super::pages::Pages;
use super::unlinked::Unlinked;
use crate::mapping::{Mapping, PageWord};

/// Takes a mapping out of `slot`, and every node that has nothing to tell apart any more; without a list for
/// these they stay, and are kept.
pub(super) fn remove(
    slot: &AtomicPtr<()>,
    target: *const Mapping,
    pages: Pages,
    mut unlinked: Option<&mut Unlinked>,
) {
    match Word::decode(slot.load(Ordering::Relaxed)) {
        Word::Mapping(mapping) if ptr::eq(mapping, target) => {
            slot.store(ptr::null_mut(), Ordering::Release);
        }
        Word::Empty | Word::Mapping(_) => {}
        Word::Node(raw) => {
            // SAFETY: reachable, and only the writer, which this is, removes.
            let node = unsafe { &*raw };
            let Some(met) = node.met(pages) else {
                return;
            };
            for index in met {
                let below = &node.slots[index];
                let was_empty = below.load(Ordering::Relaxed).is_null();
                if node.level() == 0 {
                    // SAFETY: of level 0, and allocated as above.
                    unsafe { Node::store_page(raw, index, PageWord::NONE) };
                }
                remove(below, target, pages, unlinked.as_deref_mut());
                let is_empty = below.load(Ordering::Relaxed).is_null();
                node.changed(false, !was_empty && is_empty);
            }
            node.leave();
            match unlinked {
                Some(unlinked) if !node.kept.get() => unlink(slot, raw, unlinked),
                Some(_) => {}
                None => node.kept.set(true),
            }
        }
    }
}

/// Takes a node out of `slot` if it tells nothing apart.
fn unlink(slot: &AtomicPtr<()>, raw: *const Node, unlinked: &mut Unlinked) {
    // SAFETY: reachable, and only the writer, which this is, removes.
    if let Some(word) = unsafe { &*raw }.instead() {
        slot.store(word, Ordering::Release);
        unlinked.push(raw.cast_mut());
    }
}

/// Ends that nodes of `slot` and below are kept, and takes those out that have nothing to tell apart.
pub(super) fn settle(slot: &AtomicPtr<()>, pages: Pages, unlinked: &mut Unlinked) {
    let Word::Node(raw) = Word::decode(slot.load(Ordering::Relaxed)) else {
        return;
    };
    // SAFETY: reachable, and only the writer, which this is, removes.
    let node = unsafe { &*raw };
    let Some(met) = node.met(pages) else {
        return;
    };
    if node.level() > 0 {
        for index in met {
            let below = &node.slots[index];
            let was_empty = below.load(Ordering::Relaxed).is_null();
            settle(below, pages, unlinked);
            let is_empty = below.load(Ordering::Relaxed).is_null();
            node.changed(false, !was_empty && is_empty);
        }
    }
    node.kept.set(false);
    unlink(slot, raw, unlinked);
}

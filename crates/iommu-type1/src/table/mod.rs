// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The live mappings of a space, found without a lock.
//!
//! A radix tree over page numbers. A word that only one mapping falls into points to that mapping,
//! however little of the word's block it covers: levels in which nothing differs are left out, and a
//! mapping of a terabyte is one word where it has no neighbours. A look-up therefore ends at the one
//! mapping that *could* contain an address, and compares once; or, where mappings are so close that
//! their pages are told apart, at a word with the page's host address, and not even that.
//!
//! Writers are serialised by the caller. What they unlink stays valid for accesses that are running
//! ([`crate::grace`]); it is handed out as [`Unlinked`] and must outlive them.

mod insert;
mod node;
mod pages;
mod remove;
mod spares;
#[cfg(all(test, not(loom)))]
mod tests;
mod unlinked;

use std::fmt;
use std::ops::ControlFlow;
use std::ptr;
use std::sync::Arc;

use checked_sync::{AtomicPtr, Ordering};

use crate::grace::Inside;
use crate::mapping::{Mapping, PageWord};
use crate::range::IovaRange;
use crate::Result;
use insert::insert;
use node::{address, index, is_leaf, is_node, node, Node, Raw, Word};
use pages::Pages;
use remove::{remove, settle};

pub(crate) use unlinked::Unlinked;

/// # Invariants
///
/// - A mapping word is an `Arc` turned into a raw pointer, one reference for all the words of it.
/// - A node word is a node of [`Node::separating`], and the only one to that node.
/// - A page word is one of the mapping that the node has for the page.
/// - What was reachable stays allocated until no access that may have seen it runs.
pub(crate) struct Table {
    root: AtomicPtr<()>,
}

// SAFETY: the words refer to `Mapping`s and `Node`s. `Mapping` is `Send` and `Sync`; of a node
// readers touch only the atomic words, the rest is the writer's, and writers are serialised.
unsafe impl Send for Table {}
// SAFETY: as above.
unsafe impl Sync for Table {}

/// How a look-up ends.
pub(crate) enum Found<'a> {
    /// All there is to know of the page, or else its mapping.
    Page(PageWord, Beside<'a>),
    /// The only mapping that may contain the address.
    Mapping(Option<&'a Mapping>),
}

/// The word beside a page's.
#[derive(Clone, Copy)]
pub(crate) struct Beside<'a> {
    /// Allocated for all of the lifetime.
    node: *const Node,
    index: usize,
    _inside: Inside<'a>,
}

impl<'a> Beside<'a> {
    /// The only mapping that may contain the address.
    #[inline]
    pub(crate) fn mapping(self) -> Option<&'a Mapping> {
        // SAFETY: `node` is a node of level 0, which has no nodes below; what it has is allocated while
        // the access runs that has found it.
        unsafe {
            let raw = Node::load(self.node, self.index);
            raw.cast::<Mapping>().cast_const().as_ref()
        }
    }
}

impl Table {
    pub(crate) fn new() -> Self {
        Table {
            root: AtomicPtr::new(ptr::null_mut()),
        }
    }

    /// What an access at `iova` needs, which stays while it runs.
    #[inline]
    pub(crate) fn lookup<'a>(&self, iova: u64, inside: Inside<'a>) -> Found<'a> {
        let address = address(iova);
        let mut raw = self.root.load(Ordering::Acquire);
        while is_node(raw) {
            let index = index(raw, address);
            // SAFETY: by the invariants of `Table` the node is allocated while this access runs.
            unsafe {
                if is_leaf(raw) {
                    let node = node(raw);
                    let beside = Beside {
                        node,
                        index,
                        _inside: inside,
                    };
                    return Found::Page(Node::load_page(node, iova, index), beside);
                }
                raw = Node::load(node(raw), index);
            }
        }
        // SAFETY: not a node, so null or a mapping, which is allocated while this access runs.
        Found::Mapping(unsafe { raw.cast::<Mapping>().cast_const().as_ref() })
    }

    /// The mapping that contains `iova`, which stays while the access runs.
    #[inline]
    pub(crate) fn find<'a>(&self, iova: u64, _inside: Inside<'a>) -> Option<&'a Mapping> {
        let address = address(iova);
        let mut raw = self.root.load(Ordering::Acquire);
        while is_node(raw) {
            let index = index(raw, address);
            // SAFETY: by the invariants of `Table` the node is allocated while this access runs.
            raw = unsafe { Node::load(node(raw), index) };
        }
        // SAFETY: not a node, so null or a mapping, which is allocated while this access runs.
        let mapping: Option<&Mapping> = unsafe { raw.cast::<Mapping>().cast_const().as_ref() };
        mapping.filter(|mapping| mapping.range.contains(iova))
    }

    /// Another reference to a mapping that an access has found.
    pub(crate) fn share(mapping: &Mapping) -> Arc<Mapping> {
        let raw = ptr::from_ref(mapping);
        // SAFETY: every mapping that `find` returns is in an `Arc` of which the table has a
        // reference that cannot go while the access runs; this adds one and takes it.
        unsafe {
            Arc::increment_strong_count(raw);
            Arc::from_raw(raw)
        }
    }

    /// Makes a mapping that overlaps no other reachable; returns the bytes of nodes that took.
    ///
    /// # Errors
    ///
    /// [`Error::NoMemory`](crate::Error::NoMemory), before any access could find the mapping.
    pub(crate) fn insert(&self, mapping: Arc<Mapping>) -> Result<usize> {
        insert(&self.root, mapping)
    }

    /// Says again what accesses find at the pages of a mapping that is in the table.
    pub(crate) fn refresh(&self, mapping: &Mapping) {
        refresh(&self.root, mapping, Pages::of(mapping.range));
    }

    /// Makes a mapping unreachable and returns the table's reference to it.
    pub(crate) fn remove(&self, mapping: &Mapping, unlinked: &mut Unlinked) -> Arc<Mapping> {
        self.remove_to(mapping, Some(unlinked))
    }

    /// As [`remove`](Table::remove), but all nodes stay until [`settle`](Table::settle) of the same range: until
    /// then what was taken can be inserted again without memory, if everything that came since is removed before.
    pub(crate) fn take(&self, mapping: &Mapping) -> Arc<Mapping> {
        self.remove_to(mapping, None)
    }

    /// Takes the nodes of a range out that tell nothing apart any more.
    pub(crate) fn settle(&self, range: IovaRange, unlinked: &mut Unlinked) {
        settle(&self.root, Pages::of(range), unlinked);
    }

    fn remove_to(&self, mapping: &Mapping, unlinked: Option<&mut Unlinked>) -> Arc<Mapping> {
        let target = ptr::from_ref(mapping);
        remove(&self.root, target, Pages::of(mapping.range), unlinked);
        // SAFETY: the caller found the mapping in this table, so its words held one reference, and
        // they are gone now.
        unsafe { Arc::from_raw(target) }
    }

    /// Visits the mappings that share a page with `range`, in order.
    ///
    /// For writers: nothing can be removed meanwhile.
    pub(crate) fn visit<B>(
        &self,
        range: IovaRange,
        mut visit: impl FnMut(&Mapping) -> ControlFlow<B>,
    ) -> Option<B> {
        let mut last: *const Mapping = ptr::null();
        let pages = Pages::of(range);
        walk(&self.root, pages, &mut |mapping: *const Mapping| {
            // The words of a mapping follow each other.
            if ptr::eq(mapping, last) {
                return ControlFlow::Continue(());
            }
            last = mapping;
            // SAFETY: reachable, and nothing is removed during the caller's turn as the writer.
            let mapping = unsafe { &*mapping };
            if Pages::of(mapping.range).overlaps(pages) {
                visit(mapping)
            } else {
                ControlFlow::Continue(())
            }
        })
    }

    /// As `visit`, up to the first error.
    pub(crate) fn try_visit(
        &self,
        range: IovaRange,
        mut visit: impl FnMut(&Mapping) -> Result<()>,
    ) -> Result<()> {
        let failed = self.visit(range, |mapping| match visit(mapping) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => ControlFlow::Break(error),
        });
        failed.map_or(Ok(()), Err)
    }
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table").finish_non_exhaustive()
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        // Nobody else refers to the table any more: nothing runs that could see what is freed.
        let mut unlinked = Unlinked::default();
        let mut rest = Some(IovaRange::ALL);
        while let Some(range) = rest {
            let first = self.visit(range, |mapping| ControlFlow::Break(Table::share(mapping)));
            let Some(mapping) = first else { break };
            drop(self.remove(&mapping, &mut unlinked));
            let behind = mapping.range.last.checked_add(1);
            rest = behind.map(|first| IovaRange { first, ..range });
        }
    }
}

/// Says again what accesses find at the pages of a mapping in `slot` and below.
fn refresh(slot: &AtomicPtr<()>, mapping: &Mapping, pages: Pages) {
    let Word::Node(raw) = Word::decode(slot.load(Ordering::Relaxed)) else {
        return;
    };
    // SAFETY: reachable, and nothing is removed during the caller's turn as the writer.
    let node = unsafe { &*raw };
    for index in node.met(pages).into_iter().flatten() {
        if node.level() == 0 {
            let page = node.block_at(index).first;
            // SAFETY: of level 0, and allocated as above.
            unsafe { Node::store_page(raw, index, mapping.page_word(page)) };
        } else {
            refresh(&node.slots[index], mapping, pages);
        }
    }
}

fn walk<B>(
    slot: &AtomicPtr<()>,
    pages: Pages,
    visit: &mut impl FnMut(*const Mapping) -> ControlFlow<B>,
) -> Option<B> {
    match Word::decode(narrow(slot, pages).0) {
        Word::Empty => None,
        Word::Mapping(mapping) => visit(mapping).break_value(),
        Word::Node(node) => {
            // SAFETY: reachable, and nothing is removed during the caller's turn as the writer.
            let node = unsafe { &*node };
            node.met(pages)?
                .find_map(|index| walk(&node.slots[index], pages, visit))
        }
    }
}

/// The last word on the way to some pages, from `slot`, that all of them fall into, with its block: the way's most
/// common end.
fn narrow(slot: &AtomicPtr<()>, pages: Pages) -> (Raw, Pages) {
    let (mut raw, mut block) = (slot.load(Ordering::Relaxed), Pages::ALL);
    while is_node(raw) {
        // SAFETY: reachable, and nothing is removed during the caller's turn as the writer.
        let node = unsafe { &*node(raw) };
        let index = node.index(pages.first);
        let below = node.block_at(index);
        if !below.contains(pages) {
            break;
        }
        (raw, block) = (node.slots[index].load(Ordering::Relaxed), below);
    }
    (raw, block)
}

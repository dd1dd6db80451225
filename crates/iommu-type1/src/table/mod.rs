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

mod node;

use std::fmt;
use std::mem::ManuallyDrop;
use std::ops::ControlFlow;
use std::ptr;
use std::sync::Arc;

use checked_sync::{AtomicPtr, Ordering};

use crate::grace::Inside;
use crate::mapping::{Mapping, PageWord};
use crate::range::{page_shift, IovaRange};
use crate::{Error, Result};
use node::{
    address, block_of, index, is_leaf, is_node, mapping_word, node, separating_level, Needed, Node,
    Raw, Spares, Word,
};

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

/// Pages `first..=last`.
#[derive(Clone, Copy)]
pub(super) struct Pages {
    first: u64,
    last: u64,
}

impl Pages {
    fn of(range: IovaRange) -> Self {
        Pages {
            first: range.first >> page_shift(),
            last: range.last >> page_shift(),
        }
    }

    const ALL: Pages = Pages {
        first: 0,
        last: u64::MAX,
    };

    fn clamp(self, to: Pages) -> Pages {
        Pages {
            first: self.first.max(to.first),
            last: self.last.min(to.last),
        }
    }

    fn overlaps(self, other: Pages) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    fn contains(self, other: Pages) -> bool {
        self.first <= other.first && other.last <= self.last
    }
}

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

/// What a removal has made unreachable. Accesses that are running may still see it: it must be kept
/// until a grace period has passed.
///
/// # Invariants
///
/// A list of nodes in which each knows the next, and `last` is the last, if there are any. They are not boxes: a
/// box would claim that nobody else reads the node.
pub(crate) struct Unlinked {
    first: *mut Node,
    last: *mut Node,
    bytes: usize,
}

// SAFETY: unlinked nodes belong to whoever has them; only running accesses still read their words.
unsafe impl Send for Unlinked {}

impl Default for Unlinked {
    fn default() -> Self {
        Unlinked {
            first: ptr::null_mut(),
            last: ptr::null_mut(),
            bytes: 0,
        }
    }
}

impl Unlinked {
    pub(crate) fn append(&mut self, other: Unlinked) {
        let other = ManuallyDrop::new(other);
        if other.first.is_null() {
            return;
        }
        if self.first.is_null() {
            self.first = other.first;
        } else {
            // SAFETY: by the invariant, and only who has the list looks at `next`.
            unsafe { &*self.last }.next.set(other.first);
        }
        self.last = other.last;
        self.bytes += other.bytes;
    }

    fn push(&mut self, node: *mut Node) {
        // SAFETY: the caller has just unlinked it: it is allocated, and in no other list.
        let bytes = unsafe { &*node }.bytes();
        self.append(Unlinked {
            first: node,
            last: node,
            bytes,
        });
    }

    /// Memory of it.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Unlinked {
    fn drop(&mut self) {
        let mut node = self.first;
        while !node.is_null() {
            // SAFETY: by the invariant.
            let next = unsafe { &*node }.next.get();
            // SAFETY: `remove` took the only word of it away, and by the contract of this type no
            // access that saw it runs any more.
            unsafe { Node::free(node) };
            node = next;
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
    /// [`Error::NoMemory`], before any access could find the mapping.
    pub(crate) fn insert(&self, mapping: Arc<Mapping>) -> Result<usize> {
        let pages = Pages::of(mapping.range);
        let (raw, block) = self.first_met(pages);
        let needed = needed(raw, pages, block);
        let spares = Spares::new(needed).map_err(|bytes| Error::NoMemory { bytes })?;
        let mut inserter = Inserter {
            mapping: Arc::into_raw(mapping),
            bytes: 0,
            spares,
        };
        inserter.insert(&self.root, pages, Pages::ALL);
        debug_assert!(inserter.spares.are_used_up());
        Ok(inserter.bytes)
    }

    /// The first word on the way to some pages that is not a node which has all of them below one word; the most
    /// common way to the end of [`needed`].
    fn first_met(&self, pages: Pages) -> (Raw, Pages) {
        let (mut raw, mut block) = (self.root.load(Ordering::Relaxed), Pages::ALL);
        while is_node(raw) {
            // SAFETY: reachable, and only the writer removes.
            let node = unsafe { &*node(raw) };
            let (first, last) = (node.index(pages.first), node.index(pages.last));
            if first != last || node.level() == 0 || !node.span().contains(pages) {
                break;
            }
            (raw, block) = (
                node.slots[first].load(Ordering::Relaxed),
                node.block_at(first),
            );
        }
        (raw, block)
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
        for index in node.index(pages.first)..=node.index(pages.last) {
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

/// Takes a mapping out of `slot`, and every node that has nothing to tell apart any more; without a list for
/// these they stay, and are kept.
fn remove(
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
            let span = node.span();
            if !span.overlaps(pages) {
                return;
            }
            let pages = pages.clamp(span);
            for index in node.index(pages.first)..=node.index(pages.last) {
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
fn settle(slot: &AtomicPtr<()>, pages: Pages, unlinked: &mut Unlinked) {
    let Word::Node(raw) = Word::decode(slot.load(Ordering::Relaxed)) else {
        return;
    };
    // SAFETY: reachable, and only the writer, which this is, removes.
    let node = unsafe { &*raw };
    let span = node.span();
    if !span.overlaps(pages) {
        return;
    }
    let pages = pages.clamp(span);
    if node.level() > 0 {
        for index in node.index(pages.first)..=node.index(pages.last) {
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

/// Says again what accesses find at the pages of a mapping in `slot` and below.
fn refresh(slot: &AtomicPtr<()>, mapping: &Mapping, pages: Pages) {
    let Word::Node(raw) = Word::decode(slot.load(Ordering::Relaxed)) else {
        return;
    };
    // SAFETY: reachable, and nothing is removed during the caller's turn as the writer.
    let node = unsafe { &*raw };
    let span = node.span();
    if !span.overlaps(pages) {
        return;
    }
    let pages = pages.clamp(span);
    for index in node.index(pages.first)..=node.index(pages.last) {
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
    match Word::decode(slot.load(Ordering::Relaxed)) {
        Word::Empty => None,
        Word::Mapping(mapping) => visit(mapping).break_value(),
        Word::Node(node) => {
            // SAFETY: reachable, and nothing is removed during the caller's turn as the writer.
            let node = unsafe { &*node };
            let span = node.span();
            if !span.overlaps(pages) {
                return None;
            }
            let pages = pages.clamp(span);
            (node.index(pages.first)..=node.index(pages.last))
                .find_map(|index| walk(&node.slots[index], pages, visit))
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use vm_memory::Permissions;

    use super::*;
    use crate::grace::Grace;
    use crate::{Backing, ReaderBarrier};

    /// A table and what it must hold: last address and identity by first address.
    struct Checked {
        table: Table,
        grace: Grace,
        bytes: usize,
        expected: BTreeMap<u64, (u64, *const Mapping)>,
    }

    impl Checked {
        fn new() -> Self {
            Checked {
                table: Table::new(),
                grace: Grace::new(ReaderBarrier::Fence),
                bytes: 0,
                expected: BTreeMap::new(),
            }
        }

        fn overlap(&self, range: IovaRange) -> Option<u64> {
            let before = self.expected.range(..=range.last).next_back();
            before
                .filter(|(_, (last, _))| *last >= range.first)
                .map(|(first, _)| *first)
        }

        fn insert(&mut self, range: IovaRange) {
            let found = self
                .table
                .visit(range, |mapping| ControlFlow::Break(mapping.range));
            assert_eq!(found.is_some(), self.overlap(range).is_some());
            if found.is_none() {
                let mapping = Mapping::new(
                    range,
                    Permissions::Read,
                    Backing::for_model(()),
                    crate::PermissionPolicy::Strict,
                    crate::mapping_set::SetId::NONE,
                );
                let mapping = Arc::new(mapping);
                self.expected
                    .insert(range.first, (range.last, Arc::as_ptr(&mapping)));
                self.bytes += self.table.insert(mapping).unwrap();
            }
        }

        fn remove(&mut self, at: usize) {
            let Some((&first, &(_, raw))) =
                self.expected.iter().nth(at % self.expected.len().max(1))
            else {
                return;
            };
            let mapping = self
                .grace
                .enter_shared(|inside| Table::share(self.table.find(first, inside).unwrap()));
            assert_eq!(Arc::as_ptr(&mapping), raw);
            let mut unlinked = Unlinked::default();
            drop(self.table.remove(&mapping, &mut unlinked));
            assert_eq!(Arc::strong_count(&mapping), 1);
            self.bytes -= unlinked.bytes();
            self.expected.remove(&first);
        }

        /// As an exchange does: takes several neighbours, and puts them back if that is in vain.
        fn take(&mut self, at: usize, count: usize, is_in_vain: bool) {
            let from = at % self.expected.len().max(1);
            let neighbours = self.expected.iter().skip(from).take(count);
            let firsts: Vec<u64> = neighbours.map(|(first, _)| *first).collect();
            let find = |first: &u64| {
                let mapping = self
                    .grace
                    .enter_shared(|inside| Table::share(self.table.find(*first, inside).unwrap()));
                drop(self.table.take(&mapping));
                mapping
            };
            let taken: Vec<_> = firsts.iter().map(find).collect();
            for mapping in &taken {
                if is_in_vain {
                    assert_eq!(self.table.insert(mapping.clone()).unwrap(), 0);
                } else {
                    self.expected.remove(&mapping.range.first);
                }
            }
            let mut unlinked = Unlinked::default();
            for mapping in &taken {
                self.table.settle(mapping.range, &mut unlinked);
            }
            self.bytes -= unlinked.bytes();
            let references = 1 + usize::from(is_in_vain);
            assert!(taken
                .iter()
                .all(|mapping| Arc::strong_count(mapping) == references));
        }

        fn check(&self, probes: &[u64]) {
            let ends = self.expected.iter().flat_map(|(first, (last, _))| {
                [
                    first.wrapping_sub(1),
                    *first,
                    first + (last - first) / 2,
                    *last,
                    last.wrapping_add(1),
                ]
            });
            for iova in ends.chain(probes.iter().copied()) {
                let before = self.expected.range(..=iova).next_back();
                let expected = before
                    .filter(|(_, (last, _))| *last >= iova)
                    .map(|(_, (_, raw))| *raw);
                let found = self
                    .grace
                    .enter_shared(|inside| self.table.find(iova, inside).map(ptr::from_ref));
                assert_eq!(found, expected, "{iova:#x}");
                self.check_lookup(iova, expected);
            }
            let mut visited = Vec::new();
            self.table.visit(IovaRange::ALL, |mapping| {
                visited.push((
                    mapping.range.first,
                    (mapping.range.last, ptr::from_ref(mapping)),
                ));
                ControlFlow::<()>::Continue(())
            });
            assert!(visited.into_iter().eq(self.expected.clone()));
            if self.expected.len() < 2 {
                assert_eq!(self.bytes, 0, "nodes that tell nothing apart");
            }
        }
    }

    impl Checked {
        /// A look-up ends at the mapping, or at the word that stands for its page.
        fn check_lookup(&self, iova: u64, expected: Option<*const Mapping>) {
            // SAFETY: still in the table, which nobody changes.
            let expected = expected.map(|raw| unsafe { &*raw });
            self.grace
                .enter_shared(|inside| match self.table.lookup(iova, inside) {
                    Found::Page(word, beside) => {
                        let found = beside.mapping();
                        let found = found.filter(|mapping| mapping.range.contains(iova));
                        assert_eq!(found.map(ptr::from_ref), expected.map(ptr::from_ref));
                        let of_mapping =
                            expected.map(|mapping| mapping.page_word(iova >> page_shift()));
                        assert_eq!(
                            word.into_raw(),
                            of_mapping.unwrap_or(PageWord::NONE).into_raw()
                        );
                    }
                    Found::Mapping(found) => {
                        let found = found.filter(|mapping| mapping.range.contains(iova));
                        assert_eq!(found.map(ptr::from_ref), expected.map(ptr::from_ref));
                    }
                });
        }
    }

    /// Page ranges of every size, near each other and near the ends of the space.
    fn range() -> impl Strategy<Value = IovaRange> {
        let pages = u64::MAX >> page_shift();
        let base = prop_oneof![
            4 => 0..40_u64,
            3 => (0..1200_u64).prop_map(|n| 0x10_0000 + n * 512),
            2 => 0..=pages,
            1 => (0..40_u64).prop_map(move |n| pages - n),
        ];
        let length = prop_oneof![6 => 1..6_u64, 2 => 1..5000_u64, 1 => 1..=pages];
        (base, length).prop_map(move |(first, length)| {
            let last = first.saturating_add(length - 1).min(pages);
            IovaRange {
                first: first << page_shift(),
                last: (last << page_shift()) | ((1 << page_shift()) - 1),
            }
        })
    }

    proptest! {
        #[test]
        fn finds_what_a_sorted_map_finds(
            steps in prop::collection::vec((range(), 0..8_u8, any::<usize>(), any::<u64>()), 1..60)
        ) {
            let mut checked = Checked::new();
            for (range, step, at, probe) in steps {
                match step {
                    _ if checked.expected.is_empty() => checked.insert(range),
                    0..4 => checked.insert(range),
                    4..6 => checked.remove(at),
                    _ => checked.take(at, 1 + at % 9, step == 6),
                }
                checked.check(&[probe, range.first, range.last]);
            }
            while !checked.expected.is_empty() {
                checked.remove(0);
                checked.check(&[]);
            }
        }
    }

    #[test]
    fn nodes_without_mappings_that_are_kept_hide_nothing() {
        let page = 1 << page_shift();
        let mut checked = Checked::new();
        // Three nodes side by side, which are emptied at once, and a word behind them.
        for i in [0, 1, 512, 513, 1024, 1025, 1536] {
            let first = i * page;
            checked.insert(IovaRange {
                first,
                last: first + page - 1,
            });
        }
        checked.take(0, 6, true);
        checked.check(&[]);
        checked.take(0, 6, false);
        checked.check(&[]);
    }

    #[test]
    fn sparse_and_large_mappings_take_few_nodes() {
        let page = 1 << page_shift();
        let mut checked = Checked::new();
        for i in 0..4096 {
            let first = i * 512 * page;
            checked.insert(IovaRange {
                first,
                last: first + page - 1,
            });
        }
        // A word each: 8 full nodes, and one above them.
        assert_eq!(checked.bytes, 9 * size_of::<Node>());

        let mut checked = Checked::new();
        let tib = IovaRange {
            first: 1 << 40,
            last: (1 << 41) - 1,
        };
        checked.insert(tib);
        assert_eq!(checked.bytes, 0);
        checked.insert(IovaRange {
            first: tib.first - page,
            last: tib.first - 1,
        });
        checked.insert(IovaRange {
            first: tib.last + 1,
            last: tib.last + page,
        });
        assert!(
            checked.bytes <= 10 * size_of::<Node>(),
            "{} bytes",
            checked.bytes
        );
        checked.check(&[tib.first, tib.last]);
    }
}

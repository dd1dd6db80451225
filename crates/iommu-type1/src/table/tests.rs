// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The table against a sorted map.

use std::collections::BTreeMap;

use proptest::prelude::*;
use vm_memory::Permissions;

use super::*;
use crate::grace::Grace;
use crate::range::page_shift;
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
        let Some((&first, &(_, raw))) = self.expected.iter().nth(at % self.expected.len().max(1))
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

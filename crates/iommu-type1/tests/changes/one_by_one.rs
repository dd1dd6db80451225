// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Random lists do what their changes do one by one.

use std::collections::BTreeMap;

use iommu_type1::{Change, IoAddressSpace, Profile};
use proptest::prelude::*;
use vm_memory::Permissions::{self, Read, ReadWrite, Write};

use crate::{byte, iotlb, memory, p, revoke, unmap};

/// Pages that the properties are about.
const PAGES: u64 = 12;
const LIMIT: usize = 8;

#[derive(Clone, Debug)]
enum Op {
    Map(u64, u64, u8, Permissions),
    Unmap(u64, u64),
    All,
}

fn op() -> impl Strategy<Value = Op> {
    let range = || (0..PAGES, 1..5_u64);
    let prot = prop::sample::select(vec![Read, Write, ReadWrite]);
    prop_oneof![
        6 => (range(), any::<u8>(), prot).prop_map(|((page, n), byte, prot)| Op::Map(page, n, byte, prot)),
        4 => range().prop_map(|(page, n)| Op::Unmap(page, n)),
        1 => Just(Op::All),
    ]
}

/// What is mapped: by page the byte, the permissions, and a number for each run of pages that is one mapping.
type Oracle = BTreeMap<u64, (u8, Permissions, usize)>;

fn apply(oracle: &mut Oracle, op: &Op, next: &mut usize) {
    *next += 1;
    match op {
        Op::Map(page, pages, byte, prot) => {
            for i in 0..*pages {
                oracle.insert(page + i, (byte.wrapping_add(i as u8), *prot, *next));
            }
        }
        Op::Unmap(page, pages) => oracle.retain(|at, _| at < page || *at >= page + pages),
        Op::All => oracle.clear(),
    }
}

/// Runs of neighbours with the same number are mappings.
fn entries(oracle: &Oracle) -> usize {
    let mut last = None;
    oracle
        .iter()
        .filter(|(page, (_, _, number))| {
            let before = last.replace((**page, *number));
            before != Some((**page - u64::from(**page > 0), *number)) || **page == 0
        })
        .count()
}

fn change(op: &Op) -> Change {
    match *op {
        Op::Map(page, pages, byte, prot) => Change::Map {
            iova: p(page),
            backing: memory(pages, byte),
            prot,
        },
        Op::Unmap(page, pages) => unmap(page, pages),
        Op::All => Change::UnmapAll,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn a_list_is_as_its_changes_one_by_one_also_over_what_was_revoked(
        revoked in prop::collection::btree_map(0..PAGES, 1..4_u64, 0..3),
        list in prop::collection::vec(op(), 1..6),
    ) {
        let [at_once, one_by_one] = [(); 2].map(|()| iotlb());
        for space in [&at_once, &one_by_one] {
            for (page, pages) in &revoked {
                if (*page..page + pages).all(|page| byte(space, page) == Err(libc::EAGAIN)) {
                    drop(revoke(space, *page, *pages));
                }
            }
        }
        let changes: Vec<_> = list.iter().map(change).collect();
        if changes.iter().all(|change| one_by_one.change([change.clone()]).is_ok()) {
            at_once.change(changes).unwrap();
            prop_assert_eq!(at_once.mappings(), one_by_one.mappings());
            prop_assert_eq!(at_once.stats().leaving, one_by_one.stats().leaving);
            for page in 0..PAGES + 5 {
                prop_assert_eq!(byte(&at_once, page), byte(&one_by_one, page), "page {}", page);
            }
        }
    }

    #[test]
    fn a_list_is_as_its_changes_one_by_one(lists in prop::collection::vec(prop::collection::vec(op(), 0..6), 1..8)) {
        let space = IoAddressSpace::builder().profile(Profile::Iotlb).entry_limit(LIMIT).build();
        let mut oracle = Oracle::new();
        let mut next = 0;
        for list in lists {
            let mut after = oracle.clone();
            list.iter().for_each(|op| apply(&mut after, op, &mut next));
            match space.change(list.iter().map(change)) {
                Ok(()) => oracle = after,
                Err(error) => {
                    prop_assert_eq!(error.errno(), libc::ENOSPC, "{}", error);
                    prop_assert!(entries(&after) > LIMIT, "{} entries", entries(&after));
                }
            }
            prop_assert_eq!(space.mappings(), entries(&oracle));
            for page in 0..PAGES + 5 {
                let expected = match oracle.get(&page) {
                    None => Err(libc::EAGAIN),
                    Some((_, Write, _)) => Err(libc::EPERM),
                    Some((byte, _, _)) => Ok(*byte),
                };
                prop_assert_eq!(byte(&space, page), expected, "page {}", page);
            }
        }
    }
}

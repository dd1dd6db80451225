// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Lists of changes of an IOTLB: all at once or none, and the last has the say.

mod common;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use common::deadline::{ended, within};
use common::{at_once, beside_an_unmap};
use iommu_type1::{
    page_size, Backing, Change, Error, HolderKind, Interest, IoAddressSpace, Profile, ScatterList,
    UnmapOptions, UnmapPolicy,
};
use proptest::prelude::*;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::Permissions::{self, Read, ReadWrite, Write};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemory, ReadVolatile, VolatileMemoryError,
    VolatileSlice,
};

/// Pages that the properties are about.
const PAGES: u64 = 12;
const LIMIT: usize = 8;

fn iotlb() -> IoAddressSpace {
    IoAddressSpace::builder().profile(Profile::Iotlb).build()
}

fn p(pages: u64) -> u64 {
    pages * page_size()
}

/// Memory with another byte in each page, the first of which is `byte`.
fn memory(pages: u64, byte: u8) -> Backing {
    let backing = Backing::anonymous(p(pages) as usize).unwrap();
    let space = IoAddressSpace::new();
    space.map(0, backing.clone(), ReadWrite).unwrap();
    for page in 0..pages {
        space
            .write(p(page), &[byte.wrapping_add(page as u8)])
            .unwrap();
    }
    backing
}

fn map(page: u64, pages: u64, byte: u8) -> Change {
    Change::Map {
        iova: p(page),
        backing: memory(pages, byte),
        prot: ReadWrite,
    }
}

fn unmap(page: u64, pages: u64) -> Change {
    Change::Unmap {
        iova: p(page),
        size: p(pages),
    }
}

fn byte(space: &IoAddressSpace, page: u64) -> Result<u8, i32> {
    let mut found = [0];
    let read = space.read(p(page), &mut found);
    read.map(|()| found[0]).map_err(|error| error.errno())
}

#[test]
fn a_full_table_can_be_emptied() {
    let limit = 64 << 10;
    let space = IoAddressSpace::builder()
        .profile(Profile::Iotlb)
        .table_limit(limit)
        .build();
    // Pairs that only a node of their own tells apart.
    let full = (0..64).find_map(|pair| {
        let pair = [map(512 * pair, 1, 1), map(512 * pair + 1, 1, 2)];
        space.change(pair).err()
    });
    assert!(matches!(full, Some(Error::TableLimit { .. })), "{full:?}");
    space.change([unmap(0, 1)]).unwrap();
    assert_eq!(byte(&space, 0), Err(libc::EAGAIN));
    space.change([Change::UnmapAll]).unwrap();
    assert_eq!(space.mappings(), 0);
    space.change([map(0, 1, 7)]).unwrap();
    assert_eq!(byte(&space, 0), Ok(7));
}

/// What is replaced and still used counts as entries.
#[test]
fn a_full_list_of_entries_can_be_emptied() {
    let space = IoAddressSpace::builder()
        .profile(Profile::Iotlb)
        .entry_limit(1)
        .build();
    space.change([map(0, 1, 1)]).unwrap();
    let list = space.scatter(0, 4, ReadWrite).unwrap();
    let refused = space.change_with([map(0, 1, 2)], at_once());
    assert!(matches!(refused, Err(Error::Deadline { .. })));
    for changes in [[unmap(0, 1)], [Change::UnmapAll]] {
        let refused = space.change_with(changes, at_once());
        assert!(matches!(refused, Err(Error::Deadline { .. })));
        assert_eq!(byte(&space, 0), Err(libc::EAGAIN));
    }
    drop(list);
    space.change([Change::UnmapAll]).unwrap();
    space.change([map(0, 1, 3)]).unwrap();
}

#[test]
fn other_profiles_know_no_lists_of_changes() {
    for profile in [Profile::Type1v1, Profile::Type1v2, Profile::Iommufd] {
        let space = IoAddressSpace::builder().profile(profile).build();
        let error = space.change([map(0, 1, 0)]).unwrap_err();
        assert!(matches!(error, Error::NotInProfile(_)), "{error}");
    }
}

#[test]
fn the_last_has_the_say() {
    let space = iotlb();
    space
        .change([
            map(0, 8, 10),
            unmap(2, 2),
            map(3, 2, 50),
            unmap(9, 1),
            map(9, 1, 90),
        ])
        .unwrap();
    let found: Vec<_> = (0..10).map(|page| byte(&space, page)).collect();
    let miss = Err(libc::EAGAIN);
    let expected = [
        Ok(10),
        Ok(11),
        miss,
        Ok(50),
        Ok(51),
        Ok(15),
        Ok(16),
        Ok(17),
        miss,
        Ok(90),
    ];
    assert_eq!(found, expected);
    assert_eq!(space.mappings(), 4);
    space
        .change([map(0, 1, 1), Change::UnmapAll, map(5, 1, 2)])
        .unwrap();
    assert_eq!((space.mappings(), byte(&space, 5)), (1, Ok(2)));
}

#[test]
fn what_is_wrong_in_one_changes_nothing() {
    let space = IoAddressSpace::builder()
        .profile(Profile::Iotlb)
        .entry_limit(3)
        .build();
    space.change([map(0, 4, 1)]).unwrap();
    let size = page_size();
    let wrong = [
        (Change::Unmap { iova: 1, size }, libc::EINVAL),
        (Change::Unmap { iova: 0, size: 0 }, libc::EINVAL),
        (
            Change::Unmap {
                iova: 0_u64.wrapping_sub(size),
                size: 2 * size,
            },
            libc::EOVERFLOW,
        ),
        (
            Change::Map {
                iova: 0,
                backing: memory(1, 0),
                prot: Permissions::No,
            },
            libc::EINVAL,
        ),
        // Of four pages two stay apart, and there would be four mappings.
        (map(10, 1, 0), libc::ENOSPC),
    ];
    for (wrong, errno) in wrong {
        let error = space
            .change([map(1, 2, 7), wrong, map(8, 1, 3)])
            .unwrap_err();
        assert_eq!(error.errno(), errno, "{error}");
        assert_eq!((space.mappings(), byte(&space, 1)), (1, Ok(2)));
    }
    space.change([map(1, 2, 7)]).unwrap();
    assert_eq!(space.mappings(), 3);
    space.change([]).unwrap();
}

#[test]
fn users_of_all_that_goes_are_waited_for_and_named_once() {
    for policy in [UnmapPolicy::Revoked, UnmapPolicy::Restore] {
        let space = iotlb().named("queue 7");
        space.change([map(0, 6, 10), map(8, 1, 80)]).unwrap();
        let list = space.scatter(p(5), 4, ReadWrite).unwrap();
        let changes = [unmap(0, 1), map(2, 1, 20), unmap(4, 1), unmap(8, 1)];
        let error = space
            .change_with(changes, at_once().policy(policy))
            .unwrap_err();
        let Error::Deadline { left, holders, .. } = &error else {
            panic!("{error}");
        };
        assert_eq!(*left, p(3));
        let kinds: Vec<_> = holders.iter().map(|holder| holder.kind).collect();
        assert_eq!(kinds, [HolderKind::Lease]);
        let found: Vec<_> = [0, 1, 2, 3, 4, 8].map(|page| byte(&space, page)).into();
        let miss = Err(libc::EAGAIN);
        match policy {
            UnmapPolicy::Restore => {
                assert_eq!(found, [10, 11, 12, 13, 14, 80].map(Ok));
            }
            _ => assert_eq!(found, [miss, Ok(11), Ok(20), Ok(13), miss, miss]),
        }
        // The addresses can be used, and who unmaps them waits for whom this has waited for.
        space.change_with([map(0, 1, 1)], at_once()).ok();
        let waits = space.change_with([unmap(0, 1)], at_once());
        assert!(matches!(waits, Err(Error::Deadline { .. })), "{waits:?}");
        drop(list);
        space.change([unmap(0, 1)]).unwrap();
        space.change([Change::UnmapAll]).unwrap();
        assert_eq!(space.mappings(), 0);
    }
}

#[test]
fn everything_includes_what_was_revoked_in_vain() {
    let space = iotlb();
    space.change([map(0, 1, 1)]).unwrap();
    let guard = space.memory();
    let slice = guard.get_slices(GuestAddress(0), 8, ReadWrite).unwrap();
    let slice = slice.map(Result::unwrap).next().unwrap();
    let refused = space.unmap_with(0, p(1), at_once());
    assert_eq!(refused.unwrap_err().errno(), libc::EDEADLK);
    let refused = space.change_with([Change::UnmapAll], at_once());
    assert_eq!(refused.unwrap_err().errno(), libc::EDEADLK);
    assert_eq!(slice.len(), 8);
    drop(guard);
    space.change([Change::UnmapAll]).unwrap();
    assert_eq!(space.mappings(), 0);
    space.change([map(0, 1, 2)]).unwrap();
}

/// Has some pages mapped and revoked in vain: `None` as soon as nobody uses them.
fn revoke(space: &IoAddressSpace, page: u64, pages: u64) -> Option<ScatterList> {
    space.change([map(page, pages, 1)]).unwrap();
    let list = space.scatter(p(page), 4, ReadWrite).unwrap();
    let refused = space.unmap_with(p(page), p(pages), at_once());
    assert_eq!(refused.unwrap_err().errno(), libc::EDEADLK);
    Some(list)
}

#[test]
fn a_list_completes_what_was_revoked_in_vain() {
    for policy in [UnmapPolicy::Revoked, UnmapPolicy::Restore] {
        for changes in [
            vec![unmap(4, 2)],
            vec![unmap(3, 2), unmap(5, 9)],
            vec![unmap(4, 2), map(4, 3, 9)],
            vec![Change::UnmapAll, map(5, 1, 9)],
            vec![map(0, 1, 9), Change::UnmapAll],
        ] {
            let space = iotlb();
            let list = revoke(&space, 4, 2);
            assert_eq!(byte(&space, 4), Err(libc::EBUSY));
            let options = at_once().policy(policy);
            let refused = space.change_with(changes.clone(), options);
            let Err(Error::Deadline { left, holders, .. }) = refused else {
                panic!("{refused:?}");
            };
            assert_eq!((left, holders.len()), (p(2), 1));
            drop(list);
            space.change_with(changes.clone(), options).unwrap();
            assert_eq!(space.stats().leaving, 0);
            let is_mapped = |page| {
                let of = |change: &Change| matches!(change, Change::Map { iova, backing, .. } if (*iova..*iova + backing.len() as u64).contains(&p(page)));
                matches!(changes.last(), Some(last) if of(last))
            };
            for page in 0..8 {
                let found = byte(&space, page);
                assert_eq!(found.is_ok(), is_mapped(page), "{page} {found:?}");
                assert!(found.is_ok() || found == Err(libc::EAGAIN));
            }
            space.change([map(4, 2, 1)]).unwrap();
        }
    }
}

#[test]
fn what_was_revoked_stays_where_a_list_does_not_unmap_all_of_it() {
    let space = iotlb();
    drop(revoke(&space, 4, 4));
    for changes in [
        vec![unmap(4, 3)],
        vec![map(4, 4, 9)],
        vec![unmap(4, 2), map(6, 2, 9)],
        vec![unmap(4, 3), unmap(8, 9), map(20, 1, 9)],
    ] {
        let error = space.change(changes).unwrap_err();
        assert!(matches!(error, Error::Unmapping { .. }), "{error}");
        assert_eq!((space.mappings(), space.stats().leaving), (1, 1));
    }
    space.change([unmap(4, 2), unmap(6, 2)]).unwrap();
    assert_eq!(space.stats().leaving, 0);
}

#[test]
fn everything_leaves_out_what_another_unmap_is_about() {
    let space = iotlb();
    space.change([map(0, 1, 1), map(4, 2, 1)]).unwrap();
    beside_an_unmap(&space, p(4), p(2), || {
        space.change([Change::UnmapAll, map(1, 1, 2)]).unwrap();
        assert_eq!(space.stats().leaving, 1);
        for changes in [vec![unmap(4, 2)], vec![Change::UnmapAll, map(5, 1, 2)]] {
            let error = space.change(changes).unwrap_err();
            assert!(matches!(error, Error::Unmapping { .. }), "{error}");
        }
    });
    assert_eq!((space.mappings(), space.stats().leaving), (1, 0));
}

#[test]
fn who_uses_what_was_replaced_before_is_named_once_for_all_holes() {
    let space = iotlb();
    space.change([map(0, 9, 1)]).unwrap();
    let list = space.scatter(0, 4, ReadWrite).unwrap();
    space.change_with([map(0, 9, 2)], at_once()).unwrap_err();
    let holes = [unmap(1, 1), unmap(3, 2), unmap(8, 1)];
    let refused = space.change_with(holes, at_once()).unwrap_err();
    let Error::Deadline { holders, .. } = &refused else {
        panic!("{refused}");
    };
    assert_eq!(holders.len(), 1, "{refused}");
    drop(list);
    space.change([unmap(8, 1)]).unwrap();
    assert_eq!(space.stats().leaving, 0);
}

#[test]
fn what_was_changed_meanwhile_is_not_put_back() {
    let space = iotlb();
    space.change([map(0, 2, 1)]).unwrap();
    let list = space.scatter(0, 4, ReadWrite).unwrap();
    let other = space.clone();
    let changer = thread::spawn(move || {
        let options = UnmapOptions::new()
            .deadline(Duration::from_millis(300))
            .policy(UnmapPolicy::Restore);
        other.change_with([unmap(0, 2)], options)
    });
    within("nobody finds what is being unmapped", || {
        byte(&space, 0).is_err() || changer.is_finished()
    });
    space.change([map(1, 1, 9)]).unwrap();
    assert!(ended("a change ends at its deadline", changer).is_err());
    assert_eq!(
        (byte(&space, 0), byte(&space, 1)),
        (Err(libc::EAGAIN), Ok(9))
    );
    drop(list);
    space.change([Change::UnmapAll]).unwrap();
    assert_eq!(space.mappings(), 0);
}

/// A reader that changes the space in the middle of the access that called it.
struct Inside(IoAddressSpace);

impl ReadVolatile for Inside {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let space = &self.0;
        // Whoever uses what goes would be waited for, this access too.
        for change in [map(0, 1, 1), unmap(2, 1), Change::UnmapAll] {
            let error = space.change([change]).unwrap_err();
            assert!(matches!(error, Error::InsideAccess { .. }), "{error}");
        }
        space.change([map(8, 1, 8), unmap(9, 1)]).unwrap();
        Ok(buf.len())
    }
}

#[test]
fn changes_from_inside_an_access_are_refused_where_they_would_wait() {
    let space = iotlb();
    space.change([map(0, 1, 0), map(2, 1, 0)]).unwrap();
    let mut inside = Inside(space.clone());
    let handle = space.handle();
    handle
        .read_volatile_from(GuestAddress(0), &mut inside, 8)
        .unwrap();
    assert_eq!(space.mappings(), 3);
}

/// As [`Inside`], where all there is was revoked in vain.
struct InsideOfRevoked(IoAddressSpace);

impl ReadVolatile for InsideOfRevoked {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let space = self.0.clone();
        let unmap = thread::spawn(move || space.unmap_with(0, p(1), at_once()));
        let refused = ended("an unmap ends at its deadline", unmap).unwrap_err();
        assert_eq!(refused.errno(), libc::EDEADLK);
        let error = self.0.change([Change::UnmapAll]).unwrap_err();
        assert!(matches!(error, Error::InsideAccess { .. }), "{error}");
        Ok(buf.len())
    }
}

#[test]
fn what_was_revoked_in_vain_is_not_waited_for_from_inside_an_access() {
    let space = iotlb();
    space.change([map(0, 1, 0)]).unwrap();
    let mut inside = InsideOfRevoked(space.clone());
    let handle = space.handle();
    handle
        .read_volatile_from(GuestAddress(0), &mut inside, 8)
        .unwrap();
    space.change([Change::UnmapAll]).unwrap();
    assert_eq!(space.mappings(), 0);
}

#[test]
fn pins_of_each_part_are_told() {
    let space = iotlb();
    space.change([map(0, 4, 1)]).unwrap();
    let told = Arc::new(std::sync::Mutex::new(Vec::new()));
    let heard = told.clone();
    let notice = move |iova, size| heard.lock().unwrap().push((iova, size));
    let pinner = space.pinner("pinner", Interest::All, Arc::new(notice));
    let pinned = pinner.pin_pages(p(2), 1, ReadWrite).unwrap();
    space.change([unmap(0, 1), unmap(3, 1)]).unwrap();
    assert_eq!(*told.lock().unwrap(), [(0, p(1)), (p(3), p(1))]);
    let error = space.change_with([unmap(1, 2)], at_once()).unwrap_err();
    assert!(error.to_string().contains("pinner"), "{error}");
    drop(pinned);
    space.change([Change::UnmapAll]).unwrap();
    assert_eq!(space.mappings(), 0);
}

#[test]
fn an_access_finds_no_hole_where_both_have_something() {
    let space = iotlb();
    space.change([map(0, 8, 0)]).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let reader = {
        let (space, stop) = (space.clone(), stop.clone());
        thread::spawn(move || {
            let handle = space.handle();
            let mut bytes = vec![0; p(8) as usize];
            let mut reads = 0;
            while !stop.load(Ordering::Relaxed) {
                handle.read(0, &mut bytes).unwrap();
                reads += 1;
            }
            reads
        })
    };
    for round in 0..2000_u64 {
        let page = round % 7;
        let changes = [
            map(page, 1, 1),
            unmap(page, 2),
            map(page, 2, 3),
            unmap(20, 1),
        ];
        space.change(changes).unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    assert!(ended("a reader ends when it is told to", reader) > 0);
}

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

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which addresses may be mapped, and addresses for mappings that may be anywhere.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use iommu_type1::{
    page_size, Backing, Error, IoAddressSpace, IovaRanges, Profile, UnmapOptions, UnmapPolicy,
};
use proptest::prelude::*;
use vm_memory::Permissions::{self, ReadWrite};

fn page() -> Backing {
    pages(1)
}

fn pages(count: u64) -> Backing {
    Backing::anonymous((count * page_size()) as usize).unwrap()
}

/// Ranges of pages, inclusive at their end.
fn bytes(ranges: &[(u64, u64)]) -> Vec<RangeInclusive<u64>> {
    let p = page_size();
    let ranges = ranges.iter();
    ranges
        .map(|(first, last)| first * p..=last * p + (p - 1))
        .collect()
}

fn ranges(allowed: &[(u64, u64)], reserved: &[(u64, u64)]) -> IovaRanges {
    IovaRanges::new(&bytes(allowed), &bytes(reserved)).unwrap()
}

fn within(ranges: IovaRanges) -> IoAddressSpace {
    IoAddressSpace::builder().iova_ranges(ranges).build()
}

#[test]
fn ranges_are_checked() {
    let refused = |allowed: &[RangeInclusive<u64>], reserved: &[RangeInclusive<u64>]| {
        let error = IovaRanges::new(allowed, reserved).unwrap_err();
        (error.errno(), error.to_string())
    };
    assert_eq!(
        refused(&[0..=9, 20..=20], &[]),
        (
            libc::EINVAL,
            "0x14 to 0x14 is no range of addresses that may be mapped".into()
        )
    );
    #[allow(clippy::reversed_empty_ranges)]
    let backwards = 30..=20;
    assert_eq!(refused(&[], &[backwards]).0, libc::EINVAL);
    let overlap = "the ranges 0x0 to 0x9 and from 0x9 overlap".to_string();
    assert_eq!(refused(&[9..=15, 0..=9], &[]), (libc::EINVAL, overlap));
    assert_eq!(refused(&[], &[0..=u64::MAX, 5..=6]).0, libc::EINVAL);
    assert_eq!(
        refused(&[0..=9, 20..=29], &[40..=50, 10..=20]),
        (
            libc::EADDRINUSE,
            "0x14 to 0x1d is in the way of 0xa to 0x14".into()
        )
    );
    IovaRanges::new(&[20..=29, 0..=9], &[10..=19, 30..=u64::MAX]).unwrap();
}

#[test]
fn what_may_be_mapped_is_what_is_allowed_or_not_reserved() {
    assert_eq!(IovaRanges::default().usable(), []);
    let usable = |allowed, reserved| ranges(allowed, reserved).usable();
    assert_eq!(
        usable(&[(8, 9), (0, 3)], &[(5, 6)]),
        bytes(&[(0, 3), (8, 9)])
    );
    let top = u64::MAX / page_size();
    assert_eq!(usable(&[], &[(5, 6)]), bytes(&[(0, 4), (7, top)]));
    assert_eq!(
        usable(&[], &[(0, 6), (7, 8), (top, top)]),
        bytes(&[(9, top - 1)])
    );
}

#[test]
fn mappings_are_inside_one_range() {
    let p = page_size();
    let outside = |space: &IoAddressSpace, first: u64, count| {
        let error = space.map(first * p, pages(count), ReadWrite).unwrap_err();
        assert!(matches!(error, Error::OutsideRanges { iova, size }
            if (iova, size) == (first * p, count * p)));
        assert_eq!(error.errno(), libc::EINVAL);
        assert_eq!(space.mappings(), 0);
    };
    let space = within(ranges(&[(4, 7), (8, 11)], &[]));
    for (first, count) in [(0, 1), (3, 1), (3, 2), (7, 2), (4, 8), (11, 2), (12, 1)] {
        outside(&space, first, count);
    }
    space.map(4 * p, pages(4), ReadWrite).unwrap();
    space.map(8 * p, pages(4), ReadWrite).unwrap();

    let space = within(ranges(&[], &[(4, 7)]));
    for (first, count) in [(3, 2), (4, 1), (5, 2), (7, 1), (7, 2), (3, 6)] {
        outside(&space, first, count);
    }
    space.map(3 * p, page(), ReadWrite).unwrap();
    space.map(8 * p, page(), ReadWrite).unwrap();
    space.map(u64::MAX - (p - 1), page(), ReadWrite).unwrap();
}

/// However something is mapped.
#[test]
fn b26_nothing_is_done_for_a_mapping_beyond_the_ranges() {
    let p = page_size();
    let space = within(ranges(&[(0, 15)], &[]));
    let batch = [(0, page(), ReadWrite), (15 * p, pages(2), ReadWrite)];
    assert_eq!(space.map_batch(batch).unwrap_err().errno(), libc::EINVAL);
    assert_eq!((space.mappings(), space.stats().maps), (0, 0));

    // Also where it would replace something.
    let space = IoAddressSpace::builder()
        .profile(Profile::Iotlb)
        .iova_ranges(ranges(&[(0, 15)], &[]))
        .build();
    space.map(14 * p, pages(2), ReadWrite).unwrap();
    space.write(15 * p, &[7]).unwrap();
    let error = space.map(15 * p, pages(2), ReadWrite).unwrap_err();
    assert_eq!(error.errno(), libc::EINVAL);
    let mut byte = [0];
    space.read(15 * p, &mut byte).unwrap();
    assert_eq!((byte, space.mappings()), ([7], 1));
}

#[test]
fn ranges_change_at_once_or_not_at_all() {
    let p = page_size();
    let first = ranges(&[(4, 7), (12, 15)], &[(8, 9)]);
    let space = within(first.clone());
    space.map(5 * p, pages(2), ReadWrite).unwrap();
    for other in [
        ranges(&[(0, 3)], &[]),
        ranges(&[(4, 5), (6, 7)], &[]),
        ranges(&[], &[(6, 6)]),
    ] {
        let error = space.set_iova_ranges(other).unwrap_err();
        assert!(matches!(error, Error::RangeInUse { .. }), "{error}");
        assert_eq!(error.errno(), libc::EADDRINUSE);
        assert_eq!(space.iova_ranges(), first);
    }
    let second = ranges(&[(5, 6)], &[]);
    space.set_iova_ranges(second.clone()).unwrap();
    assert_eq!(space.iova_ranges(), second);
    assert_eq!(space.info().iova_ranges, bytes(&[(5, 6)]));
    let error = space.map(12 * p, page(), ReadWrite).unwrap_err();
    assert_eq!(error.errno(), libc::EINVAL);

    // What has not left yet is in the way.
    let list = space.scatter(5 * p, 1, ReadWrite).unwrap();
    let at_once = UnmapOptions::new().deadline(Duration::ZERO);
    space.unmap_with(5 * p, 2 * p, at_once).unwrap_err();
    space.set_iova_ranges(first.clone()).unwrap();
    let error = space.set_iova_ranges(ranges(&[], &[(5, 5)])).unwrap_err();
    assert_eq!(error.errno(), libc::EADDRINUSE);
    drop(list);
    space.unmap(5 * p, 2 * p).unwrap();
    space.set_iova_ranges(ranges(&[], &[(5, 5)])).unwrap();
}

/// Memory of so many pages whose host address is `offset` pages behind a multiple of 2 MiB.
fn aligned(count: u64, offset: u64) -> Backing {
    const LARGE: u64 = 2 << 20;
    use vm_memory::{GuestAddress, GuestRegionMmap, MmapRegion};
    let (size, p) = (count * page_size(), page_size());
    let region = MmapRegion::<()>::new((size + 2 * LARGE) as usize).unwrap();
    let start = (region.as_ptr().addr() as u64).wrapping_neg() % LARGE + offset * p;
    let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
    Backing::from_region(&region, start, size as usize).unwrap()
}

#[test]
fn addresses_are_aligned_as_memory_is() {
    let p = page_size();
    let space = IoAddressSpace::new();
    let lowest = |iova: u64| iova & iova.wrapping_neg();
    let mut found = Vec::new();
    for (count, offset, alignment) in [
        (1, 0, p),
        (3, 0, 4 * p),
        (4, 1, p),
        (4, 2, 2 * p),
        (5, 4, 4 * p),
        (1024, 0, 2 << 20),
        (513, 0, 2 << 20),
    ] {
        let iova = space
            .map_anywhere(aligned(count, offset), ReadWrite)
            .unwrap();
        assert_ne!(iova, 0);
        assert!(
            lowest(iova) >= alignment.min(count.next_power_of_two() * p),
            "{iova:#x}"
        );
        found.push(iova);
    }
    // One page never lies at 0, and comes right behind.
    assert_eq!(found[0], p);
    assert_eq!(space.mappings(), 7);
}

#[test]
fn what_cannot_be_mapped_has_no_address() {
    let p = page_size();
    let space = IoAddressSpace::builder()
        .entry_limit(2)
        .iova_ranges(ranges(&[(0, 4), (8, 9)], &[]))
        .build();
    let errno = |backing, prot| space.map_anywhere(backing, prot).unwrap_err().errno();
    assert_eq!(errno(page(), Permissions::No), libc::EINVAL);
    let error = space.map_anywhere(pages(5), ReadWrite).unwrap_err();
    assert!(matches!(error, Error::NoRoom { size, .. } if size == 5 * p));
    assert_eq!(error.errno(), libc::ENOSPC);
    assert_eq!(space.mappings(), 0);
    assert_eq!(space.map_anywhere(aligned(2, 0), ReadWrite).unwrap(), 8 * p);
    assert_eq!(space.map_anywhere(aligned(2, 1), ReadWrite).unwrap(), p);
    let error = space.map_anywhere(page(), ReadWrite).unwrap_err();
    assert!(matches!(error, Error::EntryLimit { .. }), "{error}");
    // New ranges are known at once.
    space.unmap_all().unwrap();
    space.set_iova_ranges(ranges(&[(100, 101)], &[])).unwrap();
    assert_eq!(
        space.map_anywhere(aligned(2, 1), ReadWrite).unwrap(),
        100 * p
    );
    assert_eq!(errno(page(), ReadWrite), libc::ENOSPC);
}

#[test]
fn addresses_that_leave_are_not_given_away() {
    let p = page_size();
    let space = within(ranges(&[(4, 5)], &[]));
    let first = space.map_anywhere(page(), ReadWrite).unwrap();
    let second = space.map_anywhere(page(), ReadWrite).unwrap();
    assert_eq!(first + second, 9 * p);
    let list = space.scatter(first, 1, ReadWrite).unwrap();
    let at_once = UnmapOptions::new().deadline(Duration::ZERO);
    for policy in [UnmapPolicy::Revoked, UnmapPolicy::Restore] {
        space
            .unmap_with(first, p, at_once.policy(policy))
            .unwrap_err();
        let error = space.map_anywhere(page(), ReadWrite).unwrap_err();
        assert_eq!(error.errno(), libc::ENOSPC);
    }
    drop(list);
    space.unmap(first, p).unwrap();
    assert_eq!(space.map_anywhere(page(), ReadWrite).unwrap(), first);
}

/// What is known of gaps is a hint: others map where they like, and leave.
#[test]
fn gaps_that_are_none_any_more_are_not_given_away() {
    let p = page_size();
    let space = within(ranges(&[(0, 4)], &[]));
    assert_eq!(space.map_anywhere(page(), ReadWrite).unwrap(), p);
    space.map(2 * p, pages(3), ReadWrite).unwrap();
    let list = space.scatter(2 * p, 1, ReadWrite).unwrap();
    let at_once = UnmapOptions::new().deadline(Duration::ZERO);
    space.unmap_with(2 * p, 3 * p, at_once).unwrap_err();
    let error = space.map_anywhere(page(), ReadWrite).unwrap_err();
    assert_eq!(error.errno(), libc::ENOSPC);
    drop(list);
    space.unmap_all().unwrap();

    // A gap behind address 0 is found again, too.
    space.map(0, pages(5), ReadWrite).unwrap();
    space.map_anywhere(page(), ReadWrite).unwrap_err();
    space.unmap_all().unwrap();
    assert_eq!(space.map_anywhere(page(), ReadWrite).unwrap(), p);
}

/// One place is free at a time, in a space of many.
#[test]
fn a_space_that_is_nearly_full_goes_on() {
    let p = page_size();
    const COUNT: u64 = 4096;
    let space = within(ranges(&[(1, COUNT)], &[]));
    let memory = page();
    for _ in 0..COUNT {
        space.map_anywhere(memory.clone(), ReadWrite).unwrap();
    }
    for turn in 0..2 * COUNT {
        let free = 1 + turn * 2654435761 % COUNT;
        if turn % 512 == 0 {
            let error = space.map_anywhere(memory.clone(), ReadWrite).unwrap_err();
            assert_eq!(error.errno(), libc::ENOSPC);
        }
        space.unmap(free * p, p).unwrap();
        let found = space.map_anywhere(memory.clone(), ReadWrite).unwrap();
        assert_eq!(found, free * p);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Anywhere { count: u64, offset: u64 },
    At { first: u64, count: u64 },
    Unmap { index: prop::sample::Index },
    UnmapRange { first: u64, count: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (1..6_u64, 0..8_u64).prop_map(|(count, offset)| Step::Anywhere { count, offset }),
        2 => (0..48_u64, 1..4_u64).prop_map(|(first, count)| Step::At { first, count }),
        4 => any::<prop::sample::Index>().prop_map(|index| Step::Unmap { index }),
        1 => (0..48_u64, 1..16_u64).prop_map(|(first, count)| Step::UnmapRange { first, count }),
    ]
}

/// Takes pages out of mappings, by first page and count; parts on both sides stay.
fn cut(mapped: &mut BTreeMap<u64, u64>, first: u64, count: u64) {
    let end = first + count;
    for (at, size) in std::mem::take(mapped) {
        if at < first {
            mapped.insert(at, size.min(first - at));
        }
        if at + size > end {
            let start = at.max(end);
            mapped.insert(start, at + size - start);
        }
    }
}

proptest! {
    /// Against a map of pages: an address is right, and where none is given there is none.
    #[test]
    fn addresses_are_free_and_given_while_there_are_any(
        iotlb in any::<bool>(),
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let p = page_size();
        // Ranges that touch are not one.
        let allowed = [(0, 12), (13, 30), (32, 47)];
        let profile = if iotlb { Profile::Iotlb } else { Profile::Type1v2 };
        let space = IoAddressSpace::builder()
            .profile(profile)
            .iova_ranges(ranges(&allowed, &[]))
            .build();
        let mut mapped: BTreeMap<u64, u64> = BTreeMap::new();
        let is_free = |mapped: &BTreeMap<u64, u64>, first: u64, count: u64| {
            mapped.iter().all(|(at, size)| at + size <= first || first + count <= *at)
        };
        for step in steps {
            match step {
                Step::Anywhere { count, offset } => {
                    let backing = aligned(count, offset);
                    let of_host = if offset == 0 { 512 } else { 1 << offset.trailing_zeros() };
                    let alignment = count.next_power_of_two().min(of_host);
                    let fits = |first: u64| {
                        first > 0 && first % alignment == 0 && is_free(&mapped, first, count)
                            && allowed.iter().any(|(low, high)| first >= *low && first + count - 1 <= *high)
                    };
                    match space.map_anywhere(backing, ReadWrite) {
                        Ok(iova) => {
                            prop_assert_eq!(iova % p, 0);
                            prop_assert!(fits(iova / p), "{:#x}", iova);
                            mapped.insert(iova / p, count);
                        }
                        Err(error) => {
                            prop_assert_eq!(error.errno(), libc::ENOSPC);
                            prop_assert!(!(0..48).any(fits));
                        }
                    }
                }
                Step::At { first, count } => {
                    if is_free(&mapped, first, count) && space.map(first * p, pages(count), ReadWrite).is_ok() {
                        mapped.insert(first, count);
                    }
                }
                Step::Unmap { index } => {
                    if !mapped.is_empty() {
                        let at = index.index(mapped.len());
                        let (first, count) = mapped.iter().nth(at).map(|(f, c)| (*f, *c)).unwrap();
                        space.unmap(first * p, count * p).unwrap();
                        mapped.remove(&first);
                    }
                }
                Step::UnmapRange { first, count } => {
                    if space.unmap(first * p, count * p).is_ok() {
                        cut(&mut mapped, first, count);
                    }
                }
            }
        }
    }
}

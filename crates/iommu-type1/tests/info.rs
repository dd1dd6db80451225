// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What `VFIO_IOMMU_GET_INFO` says: values, the kernel's bytes, and bytes of anybody.

use iommu_type1::{page_size, Backing, Error, Info, IoAddressSpace, IovaRanges};
use proptest::prelude::*;
use vm_memory::Permissions::ReadWrite;

/// The answer of a space to a user with room for everything.
fn answer(info: &Info) -> Vec<u8> {
    let mut buf = vec![0; 4096];
    buf[..4].copy_from_slice(&4096_u32.to_ne_bytes());
    info.encode(&mut buf).unwrap();
    buf
}

fn put(bytes: &mut [u8], offset: usize, value: u32) {
    bytes[offset..offset + 4].copy_from_slice(&value.to_ne_bytes());
}

#[test]
fn a_space_says_what_can_be_mapped() {
    let p = page_size();
    let space = IoAddressSpace::new();
    let info = space.info();
    assert_eq!(info.page_sizes, !(p - 1));
    let migration = info.migration.unwrap();
    assert_eq!(
        (migration.page_sizes, migration.max_dirty_bitmap_size),
        (p, 256 << 20)
    );
    assert_eq!((info.dma_avail, info.iova_ranges), (Some(65535), vec![]));
    let page = Backing::anonymous(p as usize).unwrap();
    space.map(0, page, ReadWrite).unwrap();
    assert_eq!(space.info().dma_avail, Some(65534));

    // Sizes below the host page are hidden, and it stands for them.
    for (given, expected) in [
        (p / 2 + (p << 9), p + (p << 9)),
        (p / 2, p),
        (0, p),
        (p << 9, p << 9),
    ] {
        let space = IoAddressSpace::builder().page_sizes(given).build();
        assert_eq!(space.info().page_sizes, expected);
        assert_eq!(
            space.info().migration.unwrap().page_sizes,
            expected & expected.wrapping_neg()
        );
    }
    let ranges = IovaRanges::new(&[0..=0xffff], &[]).unwrap();
    let space = IoAddressSpace::builder()
        .iova_ranges(ranges)
        .entry_limit(usize::MAX)
        .build();
    assert_eq!(space.info().dma_avail, Some(u32::MAX));
    assert_eq!(space.info().iova_ranges, [0..=0xffff]);
}

#[test]
fn what_is_not_there_is_left_out() {
    let empty = Info::default();
    let buf = answer(&empty);
    assert_eq!(buf[4..8], 1_u32.to_ne_bytes());
    assert_eq!(buf[16..], vec![0; 4096 - 16]);
    assert_eq!(Info::decode(&buf).unwrap(), empty);
    // A kernel before there were capabilities.
    assert_eq!(Info::decode(&buf[..16]).unwrap(), empty);
    // One that had no room for them, in a struct of the first version.
    let mut short = 16_u32.to_ne_bytes().to_vec();
    short.resize(16, 0);
    let info = IoAddressSpace::new().info();
    info.encode(&mut short).unwrap();
    let decoded = Info::decode(&short).unwrap();
    assert_eq!(
        (decoded.page_sizes, decoded.dma_avail),
        (info.page_sizes, None)
    );
}

fn refused(bytes: &[u8]) -> usize {
    match Info::decode(bytes) {
        Err(error @ Error::InfoChain { offset }) => {
            assert_eq!(error.errno(), libc::EINVAL);
            offset
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn hostile_chains_are_errors() {
    let ranges = IovaRanges::new(&[0..=0xffff, 0x2_0000..=0x2_ffff], &[]).unwrap();
    let space = IoAddressSpace::builder().iova_ranges(ranges).build();
    let good = answer(&space.info());
    assert_eq!(refused(&[]), 4);
    assert_eq!(refused(&good[..12]), 8);
    let with = |offset, value| {
        let mut bytes = good.clone();
        put(&mut bytes, offset, value);
        bytes
    };
    // The first inside of the struct, behind the end, at the very end.
    assert_eq!(refused(&with(16, 8)), 8);
    assert_eq!(refused(&with(16, 4096)), 4096);
    assert_eq!(refused(&with(16, u32::MAX)), u32::MAX as usize);
    assert_eq!(refused(&with(16, 4090)), 4094);
    // The next is the same, one before it, or inside of it.
    for next in [24, 20, 1, 48] {
        assert_eq!(refused(&with(24 + 4, next)), next as usize);
    }
    // More ranges than there are bytes.
    assert_eq!(refused(&with(72 + 8, u32::MAX)), 4096);
    // A known capability of a version that is not, and one of nobody.
    let mut other = with(24, 2 << 16 | 2);
    put(&mut other, 56, 1 << 16 | 77);
    let info = Info::decode(&other).unwrap();
    assert_eq!((info.migration, info.dma_avail), (None, None));
    assert_eq!(info.iova_ranges.len(), 2);
}

fn info() -> impl Strategy<Value = Info> {
    let ranges = prop::collection::vec((any::<u64>(), any::<u64>()), 0..6);
    let migrates = any::<bool>();
    let avail = prop::option::of(any::<u32>());
    (any::<u64>(), migrates, avail, ranges).prop_map(|(page_sizes, migrates, avail, ranges)| {
        let mut info = Info::default();
        info.page_sizes = page_sizes;
        info.dma_avail = avail;
        info.iova_ranges = ranges.into_iter().map(|(one, other)| one..=other).collect();
        if migrates {
            let space = IoAddressSpace::builder().page_sizes(page_sizes).build();
            info.migration = space.info().migration;
        }
        info
    })
}

proptest! {
    #[test]
    fn what_is_said_is_understood(info in info()) {
        let bytes = answer(&info);
        prop_assert_eq!(&Info::decode(&bytes).unwrap(), &info);

        // What is needed is said where there is less, and is enough.
        let mut buf = [0; 24];
        put(&mut buf, 0, 24);
        info.encode(&mut buf).unwrap();
        let needed = u32::from_ne_bytes(buf[..4].try_into().unwrap()) as usize;
        let mut buf = vec![0; needed];
        put(&mut buf, 0, needed as u32);
        info.encode(&mut buf).unwrap();
        prop_assert_eq!(&buf[4..], &bytes[4..needed]);
        prop_assert_eq!(Info::decode(&buf).unwrap(), info);
    }

    #[test]
    fn bytes_of_anybody_are_understood_or_refused(
        info in info(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = answer(&info);
        bytes.truncate(256);
        for (index, value) in changes {
            let at = index.index(bytes.len());
            bytes[at] = value;
        }
        bytes.truncate(cut.index(257));
        if let Ok(info) = Info::decode(&bytes) {
            let bytes = answer(&info);
            prop_assert_eq!(Info::decode(&bytes).unwrap(), info);
        }
    }
}

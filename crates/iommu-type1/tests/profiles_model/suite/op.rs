// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is done, and how it is drawn.

use iommu_type1::{page_size, Profile, UnmapPolicy};
use proptest::prelude::*;
use vm_memory::Permissions;
use Permissions::{Read, ReadWrite, Write};

use super::model::{Mapped, Model};

pub(crate) const LIMIT: usize = 7;
/// Pages of the region that is used; the second half is the top of the 64-bit space.
pub(crate) const PAGES: u64 = 16;

pub(crate) fn address(page: u64) -> u64 {
    let p = page_size();
    if page < PAGES / 2 {
        0x7000_0000 + page * p
    } else {
        (page * p).wrapping_sub(PAGES * p)
    }
}

pub type Range = (u64, u64);

#[derive(Clone, Debug)]
pub enum Op {
    Map(Range, Permissions),
    Unmap(Range, UnmapPolicy),
    UnmapBatch(Range, Range, UnmapPolicy),
    UnmapAll,
    Replace(Range, Permissions, UnmapPolicy),
    Invalidate(Range),
    InvalidateAll,
    Resume(Range),
    Copy(Range, u64, Permissions),
    Read(u64, usize),
    Write(u64, usize, u8),
    Pin(u64, Permissions),
    Hold(u64, usize),
    Release(prop::sample::Index),
    SetTracking(bool),
    TakeDirty(Range),
    TakeBitmap(Range),
    MarkDirty(u64, usize),
    MapAnywhere(u64, Permissions),
    /// To an address, so many bytes from a page of the guest's memory.
    MapGuest(u64, u64, u64, Permissions),
    IsUnmapped(Range),
    Snapshot,
}

/// Regions of the guest's memory, in pages: two that meet, and one behind a hole.
pub(crate) const GUEST: [(u64, u64); 3] = [(0, 2), (2, 3), (7, 2)];

pub(crate) fn page() -> impl Strategy<Value = u64> {
    (0..PAGES).prop_map(address)
}

/// Mostly whole pages.
pub(crate) fn range() -> impl Strategy<Value = Range> {
    let odd = || prop_oneof![25 => Just(0), 1 => 1..page_size()];
    let near = (page(), odd(), 0..6_u64, odd())
        .prop_map(|(at, past, n, odd)| (at.wrapping_add(past), n * page_size() + odd));
    let rest = prop_oneof![
        Just((0, u64::MAX)),
        Just((u64::MAX, page_size())),
        Just((0, 0_u64.wrapping_sub(page_size()))),
        // Beyond the end.
        (PAGES - 2..PAGES).prop_map(|page| (address(page), 4 * page_size())),
        Just((address(0), (PAGES / 2) * page_size())),
    ];
    prop_oneof![12 => near, 1 => rest]
}

pub(crate) fn prot() -> impl Strategy<Value = Permissions> {
    prop_oneof![
        8 => Just(ReadWrite),
        2 => Just(Read),
        2 => Just(Write),
        1 => Just(Permissions::No),
    ]
}

pub(crate) fn policy() -> impl Strategy<Value = UnmapPolicy> {
    prop_oneof![Just(UnmapPolicy::Revoked), Just(UnmapPolicy::Restore)]
}

pub(crate) fn byte() -> impl Strategy<Value = u64> {
    (page(), 0..page_size()).prop_map(|(at, offset)| at + offset)
}

pub(crate) fn len() -> impl Strategy<Value = usize> {
    prop_oneof![0..64_usize, 0..3 * page_size() as usize]
}

pub(crate) fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        14 => (range(), prot()).prop_map(|(range, prot)| Op::Map(range, prot)),
        8 => (range(), policy()).prop_map(|(range, policy)| Op::Unmap(range, policy)),
        2 => (range(), range(), policy())
            .prop_map(|(one, other, policy)| Op::UnmapBatch(one, other, policy)),
        1 => Just(Op::UnmapAll),
        5 => (range(), prot(), policy())
            .prop_map(|(range, prot, policy)| Op::Replace(range, prot, policy)),
        4 => range().prop_map(Op::Invalidate),
        1 => Just(Op::InvalidateAll),
        5 => range().prop_map(Op::Resume),
        5 => (range(), page(), prot()).prop_map(|(range, to, prot)| Op::Copy(range, to, prot)),
        8 => (byte(), len()).prop_map(|(at, len)| Op::Read(at, len)),
        12 => (byte(), len(), any::<u8>()).prop_map(|(at, len, seed)| Op::Write(at, len, seed)),
        3 => (page(), prot()).prop_map(|(at, prot)| Op::Pin(at, prot)),
        4 => (byte(), len()).prop_map(|(at, len)| Op::Hold(at, len)),
        4 => any::<prop::sample::Index>().prop_map(Op::Release),
        2 => (0..4_u8).prop_map(|n| Op::SetTracking(n > 0)),
        6 => range().prop_map(Op::TakeDirty),
        2 => range().prop_map(Op::TakeBitmap),
        4 => (byte(), len()).prop_map(|(at, len)| Op::MarkDirty(at, len)),
        2 => (1..4_u64, prot()).prop_map(|(pages, prot)| Op::MapAnywhere(pages, prot)),
        4 => (range(), 0..10_u64, prot())
            .prop_map(|((at, size), page, prot)| Op::MapGuest(at, page, size, prot)),
        3 => range().prop_map(Op::IsUnmapped),
        1 => Just(Op::Snapshot),
    ]
}

/// Ranges that an op is about are drawn from what is mapped now and then: else replacements, resumptions
/// and exact unmaps would hardly ever succeed.
pub(crate) fn aim(op: Op, model: &Model, pick: prop::sample::Index) -> Op {
    let ranges: Vec<Range> = model.mappings.iter().map(Mapped::range).collect();
    if ranges.is_empty() || pick.index(4) == 0 {
        return op;
    }
    let range = ranges[pick.index(ranges.len())];
    match op {
        Op::Replace(_, prot, policy) => Op::Replace(range, prot, policy),
        Op::Invalidate(_) => Op::Invalidate(range),
        Op::Resume(_) => Op::Resume(range),
        // What lies anywhere is met by few ranges.
        Op::Unmap(_, policy) if pick.index(3) == 0 => Op::Unmap(range, policy),
        op => op,
    }
}

pub(crate) fn profile() -> impl Strategy<Value = Profile> {
    prop_oneof![
        1 => Just(Profile::Type1v1),
        1 => Just(Profile::Type1v2),
        1 => Just(Profile::Iommufd),
        2 => Just(Profile::Iotlb),
    ]
}

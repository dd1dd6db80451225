// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Random operations: on few pages, far from each other, and now and then beside them.

use iommu_type1::{page_size, UnmapPolicy};
use proptest::prelude::*;
use vm_memory::Permissions::{self, Read, ReadWrite};

/// Where mappings lie: some GiB apart, some with the same low bits, the last at the top of the 64-bit
/// space.
const CLUSTERS: [u64; 5] = [
    0x7000_0000,
    0x1_7000_0000,
    0x41_7000_0000,
    0x8000_0000_7000_0000,
    0,
];
/// Pages of each.
const PAGES: u64 = 4;

fn cluster_bytes() -> u64 {
    PAGES * page_size()
}

fn base(cluster: usize) -> u64 {
    match CLUSTERS[cluster] {
        0 => 0_u64.wrapping_sub(cluster_bytes()),
        low => low,
    }
}

/// What memory is written through.
#[derive(Clone, Copy, Debug)]
pub enum Through {
    Handle,
    Space,
    Guard,
    Stream,
}

/// An address and a size.
pub type Range = (u64, u64);
pub type NewMapping = (u64, u64, Permissions);

#[derive(Clone, Debug)]
pub enum Op {
    Map(NewMapping),
    MapBatch(Vec<NewMapping>),
    Unmap(Range, UnmapPolicy),
    UnmapBatch(Vec<Range>, UnmapPolicy),
    UnmapAll,
    Read(u64, usize, Through),
    Write(u64, usize, u8, Through),
    Store(u64, u32),
    /// Of so many bytes; with what is there if `hit`.
    CompareExchange {
        at: u64,
        width: u64,
        new: u64,
        hit: bool,
    },
    Hold(u64, usize, Permissions),
    WriteHeld(prop::sample::Index, u8),
    Release(prop::sample::Index),
    StartDirty,
    StopDirty,
    TakeDirty(Range),
    /// So many accesses that a handle goes without barriers, where it may.
    GoUnfenced,
}

fn prot() -> impl Strategy<Value = Permissions> {
    prop_oneof![
        8 => Just(Permissions::ReadWrite),
        2 => Just(Permissions::Read),
        1 => Just(Permissions::Write),
    ]
}

/// Now and then a mapping that is refused for itself.
fn any_prot() -> impl Strategy<Value = Permissions> {
    prop_oneof![20 => prot(), 1 => Just(Permissions::No)]
}

/// A page of a cluster.
fn page() -> impl Strategy<Value = u64> {
    (0..CLUSTERS.len(), 0..PAGES).prop_map(|(cluster, page)| base(cluster) + page * page_size())
}

/// Now and then something else than whole pages.
fn odd() -> impl Strategy<Value = u64> {
    prop_oneof![20 => Just(0), 1 => 1..page_size()]
}

fn new_mapping() -> impl Strategy<Value = NewMapping> {
    (page(), odd(), 0..8_u64, odd(), any_prot()).prop_map(|(at, past, size, odd, prot)| {
        // Few of nothing, most of one page or two.
        let pages = [0, 1, 1, 1, 2, 2, 2, 3][size as usize];
        (at + past, pages * page_size() + odd, prot)
    })
}

fn range() -> impl Strategy<Value = Range> {
    let near = (page(), odd(), 0..5_u64, odd())
        .prop_map(|(at, past, pages, odd)| (at + past, pages * page_size() + odd));
    let far = (0..CLUSTERS.len(), 0..CLUSTERS.len()).prop_map(|(one, other)| {
        let (first, last) = (base(one.min(other)), base(one.max(other)));
        (
            first,
            last.wrapping_sub(first).wrapping_add(cluster_bytes()),
        )
    });
    prop_oneof![3 => near, 2 => far]
}

fn policy() -> impl Strategy<Value = UnmapPolicy> {
    prop_oneof![Just(UnmapPolicy::Revoked), Just(UnmapPolicy::Restore)]
}

/// A byte of a cluster, now and then one whose address differs from such a one in one bit.
fn byte() -> impl Strategy<Value = u64> {
    let flip = prop_oneof![8 => Just(0), 1 => (12..64_u32).prop_map(|bit| 1 << bit)];
    (page(), 0..page_size(), flip).prop_map(|(at, offset, flip)| (at + offset) ^ flip)
}

/// Short ones, and some over several pages.
fn len() -> impl Strategy<Value = usize> {
    prop_oneof![2 => 0..64_usize, 2 => 0..3 * page_size() as usize]
}

fn through() -> impl Strategy<Value = Through> {
    use Through::*;
    prop_oneof![Just(Handle), Just(Space), Just(Guard), Just(Stream)]
}

pub fn op() -> impl Strategy<Value = Op> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        10 => new_mapping().prop_map(Op::Map),
        5 => prop::collection::vec(new_mapping(), 0..4).prop_map(Op::MapBatch),
        4 => (range(), policy()).prop_map(|(range, policy)| Op::Unmap(range, policy)),
        4 => (prop::collection::vec(range(), 0..4), policy())
            .prop_map(|(ranges, policy)| Op::UnmapBatch(ranges, policy)),
        1 => Just(Op::UnmapAll),
        8 => (byte(), len(), through()).prop_map(|(at, len, through)| Op::Read(at, len, through)),
        16 => (byte(), len(), any::<u8>(), through())
            .prop_map(|(at, len, seed, through)| Op::Write(at, len, seed, through)),
        3 => (byte(), any::<bool>(), any::<u32>())
            .prop_map(|(at, odd, value)| Op::Store(if odd { at } else { at & !3 }, value)),
        6 => (byte(), 0..4_u32, any::<u64>(), any::<bool>(), 0..8_u8).prop_map(|(at, shift, new, hit, odd)| {
            let width = 1 << shift;
            let at = if odd == 0 { at } else { at & !(width - 1) };
            Op::CompareExchange { at, width, new, hit }
        }),
        6 => (byte(), len(), prop_oneof![3 => Just(ReadWrite), 1 => Just(Read)])
            .prop_map(|(at, len, access)| Op::Hold(at, len, access)),
        6 => (index(), any::<u8>()).prop_map(|(index, seed)| Op::WriteHeld(index, seed)),
        4 => index().prop_map(Op::Release),
        3 => Just(Op::StartDirty),
        1 => Just(Op::StopDirty),
        8 => range().prop_map(Op::TakeDirty),
        1 => Just(Op::GoUnfenced),
    ]
}

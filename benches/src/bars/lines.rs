// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The table.

use iommu_type1::ReaderBarrier;

use super::measured::{
    against_memcpy, beside_writer, chain_against, dense_bytes, guard_cycles, held_elsewhere,
    minus_memcpy, more_when_tracked, pages_against_loops, pairs_against_tree, ratio, sparse_bytes,
    speed_up, tebibyte_bytes, tebibyte_micros, two_readers,
};
use super::Measuring::{ByDefault, Fenced, Unfenced};
use super::{Bar, Line};
use crate::candidates::Reader;
use crate::chain::Device;
use crate::dirty::Shape;
use crate::workload::Pattern;

const PAGE: usize = 4096;

const DEFAULT: ReaderBarrier = ReaderBarrier::Fence;

// What decides is the configuration that a line is meant for (docs/design.md, "Which configuration a bar is
// for"): without barriers what is short and has no room for one, by default everything else.

/// A table whose rows are `name: how, bar, measuring`.
macro_rules! lines {
    ($($name:literal: $how:literal, $bar:expr, $measuring:expr;)*) => {
        /// Every line.
        pub const LINES: &[Line] = &[
            $(Line { name: $name, how: $how, bar: $bar, measuring: $measuring },)*
        ];
    };
}

lines! {
    "hot-64/1": "64 B, hot, 1 mapping: handle minus memcpy",
        Bar::AtMost(20.0, "cycles"), Fenced(|rig, barrier| minus_memcpy(rig, barrier, 1));
    "hot-64/16": "64 B, hot, 16 mappings: handle minus memcpy",
        Bar::AtMost(20.0, "cycles"), Fenced(|rig, barrier| minus_memcpy(rig, barrier, 16));
    "hot-64/1024": "64 B, hot, 1 024 mappings: handle minus memcpy",
        Bar::AtMost(20.0, "cycles"), Fenced(|rig, barrier| minus_memcpy(rig, barrier, 1024));
    "hot-64/65535": "64 B, hot, 65 535 mappings: handle minus memcpy",
        Bar::AtMost(20.0, "cycles"), Fenced(|rig, barrier| minus_memcpy(rig, barrier, 65_535));
    "hot-64/page-loop": "64 B, hot, 16 mappings: handle / page loop over GuestMemoryMmap of 1 region",
        Bar::AtMost(0.50, "x"), Unfenced(|rig, barrier| ratio(rig, barrier, 16, 64, Reader::PageLoop));
    "hot-64/page-loop-16": "64 B, hot, 16 mappings: handle / page loop over GuestMemoryMmap of 16 regions",
        Bar::AtMost(0.30, "x"), Unfenced(|rig, barrier| ratio(rig, barrier, 16, 64, Reader::PageLoop16));
    "spread-64/iommu": "64 B spread over 1 024 mappings: IommuMemory / handle",
        Bar::AtLeast(12.0, "x"), Unfenced(|rig, barrier| speed_up(rig, barrier, 1024, Pattern::Spread, 64));
    "4k/memcpy": "4 KiB, hot, 16 mappings: handle / memcpy",
        Bar::AtMost(1.25, "x"), Unfenced(|rig, barrier| against_memcpy(rig, barrier, 16, PAGE));
    "20k/memcpy": "20 KiB, hot, 16 mappings: handle / memcpy",
        Bar::AtMost(1.25, "x"), ByDefault(|rig| against_memcpy(rig, DEFAULT, 16, 5 * PAGE));
    "80k/memcpy": "80 KiB, hot, 1 mapping: handle / memcpy",
        Bar::AtMost(1.05, "x"), ByDefault(|rig| against_memcpy(rig, DEFAULT, 1, 20 * PAGE));
    "1m/memcpy": "1 MiB, hot, 1 mapping: handle / memcpy",
        Bar::AtMost(1.05, "x"), ByDefault(|rig| against_memcpy(rig, DEFAULT, 1, 1 << 20));
    "20-pages/page-loop": "20 pages, hot, 1 mapping: handle / page loop over GuestMemoryMmap of 16 regions",
        Bar::AtMost(0.70, "x"), ByDefault(pages_against_loops);
    "uniform-64/iommu": "64 B at uniform addresses over 65 535 mappings of 4 KiB: IommuMemory / handle",
        Bar::AtLeast(4.0, "x"), Fenced(|rig, barrier| speed_up(rig, barrier, 65_535, Pattern::Uniform, 64));
    "80k-across/iommu": "80 KiB, hot, across mappings of 4 KiB, 65 535 of them: IommuMemory / handle",
        Bar::AtLeast(1.25, "x"), ByDefault(|rig| speed_up(rig, DEFAULT, 65_535, Pattern::Hot, 20 * PAGE));
    "guard": "memory() and the drop of the guard",
        Bar::AtMost(30.0, "cycles"), ByDefault(guard_cycles);
    "virtqueue/mmap": "a chain of 8 descriptors of 512 B, 1 024 mappings: guard / GuestMemoryMmap of 1 region",
        Bar::AtMost(1.2, "x"),
        Fenced(|rig, barrier| chain_against(rig, barrier, Device::OneRegion, |ours, peer| ours.over(peer)));
    "virtqueue/iommu": "a chain of 8 descriptors of 512 B, 1 024 mappings: IommuMemory / guard",
        Bar::AtLeast(4.0, "x"),
        Fenced(|rig, barrier| chain_against(rig, barrier, Device::Iommu, |ours, peer| peer.over(ours)));
    "two-readers": "64 B spread over 1 024 mappings, two handles: speed-up / that of memcpy",
        Bar::AtLeast(0.95, "x"), ByDefault(two_readers);
    "beside-writer-64": "64 B, hot, 16 mappings, beside a writer of at least 200 000 pairs/s: part of the speed kept",
        Bar::AtLeast(0.6, "x"), Fenced(|rig, barrier| beside_writer(rig, barrier, 64));
    "beside-writer-4k": "4 KiB, hot, 16 mappings, beside a writer of at least 200 000 pairs/s: part of the speed kept",
        Bar::AtLeast(0.8, "x"), Fenced(|rig, barrier| beside_writer(rig, barrier, PAGE));
    "map-unmap/tree": "unmap + map, random order, 65 000 mappings: ours / RwLock<BTreeMap>",
        Bar::AtMost(2.0, "x"), ByDefault(pairs_against_tree);
    "unmap-beside-lease": "p99 of unmaps elsewhere while a guard holds lent slices for 10 s",
        Bar::AtMost(1000.0, "us"), ByDefault(held_elsewhere);
    "dirty-64/large": "64 B written, hot, 64 mappings of 4 MiB: with dirty tracking minus without",
        Bar::AtMost(8.0, "cycles"), ByDefault(|rig| more_when_tracked(rig, Shape::Large));
    "dirty-64/pages": "64 B written, hot, 65 535 mappings of 4 KiB: with dirty tracking minus without",
        Bar::AtMost(8.0, "cycles"), ByDefault(|rig| more_when_tracked(rig, Shape::Pages));
    "bytes/dense": "bytes a mapping, 65 536 mappings of 4 KiB next to each other",
        Bar::AtMost(100.0, "bytes"), ByDefault(dense_bytes);
    "bytes/sparse": "bytes a mapping, 16 384 mappings of 4 KiB, one in every 2 MiB",
        Bar::AtMost(512.0, "bytes"), ByDefault(sparse_bytes);
    "tebibyte/bytes": "bytes of table for one mapping of 1 TiB",
        Bar::AtMost(65_536.0, "bytes"), ByDefault(tebibyte_bytes);
    "tebibyte/time": "map of 1 TiB",
        Bar::AtMost(20.0, "us"), ByDefault(tebibyte_micros);
}

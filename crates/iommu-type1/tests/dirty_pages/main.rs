// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which pages were written: by I/O virtual address, and in the bitmaps of memory regions.

mod bitmap;
#[path = "../common/mod.rs"]
mod common;
mod harvest;
mod regions;
mod rules;
mod unseen;

use std::collections::BTreeSet;

use iommu_type1::{page_size, IoAddressSpace};

/// The pages of a range that were written since they were last asked for, as page numbers.
fn taken(space: &IoAddressSpace, first: u64, pages: u64) -> BTreeSet<u64> {
    let p = page_size();
    let dirty = space.take_dirty(first * p, pages * p).unwrap();
    let found: BTreeSet<_> = dirty.iter().map(|iova| iova / p).collect();
    assert!(dirty.iter().all(|iova| iova % p == 0));
    assert_eq!(
        (dirty.len(), dirty.is_empty()),
        (found.len(), found.is_empty())
    );
    found
}

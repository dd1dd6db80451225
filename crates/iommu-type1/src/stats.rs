// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Counters of a space, for whoever watches it.

use checked_sync::{lock, AtomicU64, Ordering};

use crate::IoAddressSpace;

/// What a space has and what has happened to it; from [`IoAddressSpace::stats`].
///
/// ```
/// use iommu_type1::{Backing, IoAddressSpace};
/// use vm_memory::Permissions;
///
/// let space = IoAddressSpace::new();
/// space.map(0, Backing::anonymous(0x1000)?, Permissions::ReadWrite)?;
/// space.read(0x8000, &mut [0; 4]).unwrap_err();
/// let stats = space.stats();
/// assert_eq!((stats.mappings, stats.maps, stats.misses), (1, 1, 1));
/// # Ok::<(), iommu_type1::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Mappings now, those included whose unmap has not finished.
    pub mappings: u64,
    /// Of these, those whose unmap runs or has ended at its deadline.
    pub leaving: u64,
    /// Bytes of the table's nodes, without the mappings.
    pub table_bytes: u64,
    /// Bytes of the marks of dirty pages, while they are tracked.
    pub dirty_bytes: u64,
    /// Leases now, one a mapping and holder.
    pub leases: u64,
    /// Mappings made so far.
    pub maps: u64,
    /// Mappings removed so far.
    pub unmaps: u64,
    /// Unmaps that had to wait for an access or a holder, longer than some hundred turns of the
    /// processor.
    pub unmap_waits: u64,
    /// Mappings that were still held when the deadline of an unmap had passed.
    pub stragglers: u64,
    /// Accesses that found nothing they could use, or not all of it.
    pub misses: u64,
    /// Barriers that the kernel was asked for.
    pub membarriers: u64,
}

/// What is counted as it happens, beside what the [`Writer`](crate::writer::Writer) counts; none of it on the way of
/// an access that succeeds.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) unmap_waits: Counter,
    pub(crate) stragglers: Counter,
    pub(crate) misses: Counter,
}

/// One counter.
#[derive(Debug)]
pub(crate) struct Counter(AtomicU64);

impl Default for Counter {
    fn default() -> Self {
        Counter(AtomicU64::new(0))
    }
}

impl Counter {
    pub(crate) fn add(&self, n: usize) {
        if n > 0 {
            self.0.fetch_add(n as u64, Ordering::Relaxed);
        }
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl IoAddressSpace {
    /// The counters now. Those of what happens are each exact, but not of one moment.
    pub fn stats(&self) -> Stats {
        let space = &*self.view.space;
        let counters = &space.counters;
        let writer = lock(&space.writer);
        Stats {
            mappings: writer.len() as u64,
            leaving: writer.leaving() as u64,
            table_bytes: writer.table_bytes as u64,
            dirty_bytes: if writer.tracking {
                writer.log_bytes as u64
            } else {
                0
            },
            leases: space.leases.count() as u64,
            maps: writer.maps,
            unmaps: writer.unmaps,
            unmap_waits: counters.unmap_waits.get(),
            stragglers: counters.stragglers.get(),
            misses: counters.misses.get(),
            membarriers: space.grace.membarriers.get(),
        }
    }
}

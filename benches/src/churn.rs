// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Changing mappings: steady pairs of unmap and map, and how long single unmaps take.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use iommu_type1::{Backing, IoAddressSpace, ReaderBarrier};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemory, Permissions};

use crate::candidates::{ours, LockedIotlb, LockedTree};
use crate::compare::Candidate;

/// Bytes of each mapping.
pub const PAGE: u64 = 4096;

/// An address that no [`space`] maps.
const ELSEWHERE: u64 = 1 << 40;

/// A space of `mappings` one-page mappings, `stride` bytes from one to the next.
///
/// All show the same page: what is measured is the table.
///
/// # Panics
///
/// Panics where they cannot be mapped.
pub fn space(mappings: u64, stride: u64, page: &Backing) -> IoAddressSpace {
    space_with(ReaderBarrier::default(), mappings, stride, page)
}

/// As [`space`], with a barrier of choice.
///
/// # Panics
///
/// As [`space`].
pub fn space_with(
    barrier: ReaderBarrier,
    mappings: u64,
    stride: u64,
    page: &Backing,
) -> IoAddressSpace {
    // One more, for what is mapped elsewhere.
    let space = IoAddressSpace::builder()
        .entry_limit(mappings as usize + 1)
        .reader_barrier(barrier)
        .build();
    for i in 0..mappings {
        map(&space, i * stride, page);
    }
    space
}

/// A page to be mapped anywhere.
///
/// # Panics
///
/// Panics where there is no memory.
pub fn page() -> Backing {
    Backing::anonymous(PAGE as usize).expect("a page")
}

/// Mappings of the batches that are compared with single ones.
pub const BATCHES: [(&str, u64); 2] = [("ours, batches of 16", 16), ("ours, batches of 256", 256)];

/// Candidates that unmap a mapping and map it again, of as many as `order` has, in its order. Those
/// who do it in batches take neighbours together, and the batches in that order; what they show is
/// of one mapping too.
pub fn pairs(order: &[u64]) -> Vec<Candidate<'_>> {
    let page = page();
    let space = space(order.len() as u64, PAGE, &page);
    let tree = LockedTree::default();
    let iotlb = LockedIotlb::default();
    let host = page.host_address();
    for i in 0..order.len() as u64 {
        tree.map(i * PAGE, host, PAGE);
        iotlb.map(i * PAGE, GuestAddress(0), PAGE);
    }
    let mut candidates = vec![
        through("ours", order, {
            let (space, page) = (space.clone(), page.clone());
            move |iova| remap(&space, iova, &page)
        }),
        through("RwLock<BTreeMap>", order, move |iova| {
            tree.unmap(iova);
            tree.map(iova, host, PAGE);
        }),
        through("RwLock<Iotlb>", order, move |iova| {
            iotlb.unmap(iova, PAGE);
            iotlb.map(iova, GuestAddress(0), PAGE);
        }),
    ];
    for (name, mappings) in BATCHES {
        candidates.push(in_batches(name, order, mappings, &space, &page));
    }
    candidates
}

fn in_batches<'a>(
    name: &'static str,
    order: &[u64],
    mappings: u64,
    space: &IoAddressSpace,
    page: &Backing,
) -> Candidate<'a> {
    let (space, page) = (space.clone(), page.clone());
    let starts = order.iter().copied();
    let starts = starts.filter(|at| at % mappings == 0 && at + mappings <= order.len() as u64);
    let starts: Vec<u64> = starts.collect();
    let (mut next, mut owed) = (0, 0);
    Candidate::new(name, move |n| {
        owed += n;
        while owed >= mappings {
            owed -= mappings;
            let first = starts[next % starts.len()];
            next += 1;
            let ranges: Vec<_> = (first..first + mappings)
                .map(|at| (at * PAGE, PAGE))
                .collect();
            remap_batch(&space, &ranges, &page);
        }
    })
}

fn through<'a>(
    name: &'static str,
    order: &'a [u64],
    mut remap: impl FnMut(u64) + 'a,
) -> Candidate<'a> {
    let mut pages = order.iter().cycle();
    Candidate::of(name, move || {
        if let Some(page) = pages.next() {
            remap(page * PAGE);
        }
    })
}

#[inline(never)]
fn remap(space: &IoAddressSpace, iova: u64, page: &Backing) {
    space.unmap(iova, PAGE).expect("nobody holds it");
    map(space, iova, page);
}

#[inline(never)]
fn remap_batch(space: &IoAddressSpace, ranges: &[(u64, u64)], page: &Backing) {
    space.unmap_batch(ranges).expect("nobody holds them");
    let again = ranges
        .iter()
        .map(|(iova, _)| (*iova, page.clone(), Permissions::ReadWrite));
    space.map_batch(again).expect("free pages");
}

fn map(space: &IoAddressSpace, iova: u64, page: &Backing) {
    let mapped = space.map(iova, page.clone(), Permissions::ReadWrite);
    mapped.expect("a free page");
}

/// Maps a page that nobody uses, pauses and unmaps it, for as long as `time`; nanoseconds of each
/// unmap.
///
/// # Panics
///
/// Panics where the page cannot be mapped or unmapped.
pub fn unmap_latencies(space: &IoAddressSpace, time: Duration, pause: Duration) -> Vec<f64> {
    let page = page();
    let end = Instant::now() + time;
    let mut latencies = Vec::new();
    while Instant::now() < end {
        map(space, ELSEWHERE, &page);
        if !pause.is_zero() {
            std::thread::sleep(pause);
        }
        let start = Instant::now();
        space.unmap(ELSEWHERE, PAGE).expect("nobody holds it");
        latencies.push(start.elapsed().as_nanos() as f64);
    }
    latencies
}

/// Does `op` while another thread holds a guard that has lent slices of the page at address 0.
///
/// # Panics
///
/// Panics where nothing is mapped there.
pub fn beside_a_lease<T>(space: &IoAddressSpace, op: impl FnOnce() -> T) -> T {
    let (lent, is_lent) = mpsc::channel();
    let (done, is_done) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let guard = space.memory();
            let slices = guard.get_slices(GuestAddress(0), PAGE as usize, Permissions::Read);
            let slices: Vec<_> = slices.expect("a range").collect();
            assert!(slices.iter().all(Result::is_ok), "mapped");
            let _ = lent.send(());
            let _ = is_done.recv();
        });
        let _ = is_lent.recv();
        let result = op();
        drop(done);
        result
    })
}

/// Does `op` while another thread reads the page at address 0 by a handle, without pause.
///
/// # Panics
///
/// Panics where nothing is mapped there.
pub fn beside_a_reader<T>(space: &IoAddressSpace, op: impl FnOnce() -> T) -> T {
    struct End<'a>(&'a AtomicBool);
    impl Drop for End<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    let ended = AtomicBool::new(false);
    let (reads, is_reading) = mpsc::channel();
    std::thread::scope(|scope| {
        let _end = End(&ended);
        scope.spawn(|| {
            // Moved in, so that nobody waits for a reader that has failed.
            let reads = reads;
            let handle = space.handle();
            let mut buf = [0; 64];
            ours::handle(&handle, 0, &mut buf);
            let _ = reads.send(());
            while !ended.load(Ordering::Relaxed) {
                ours::handle(&handle, 0, &mut buf);
            }
        });
        is_reading.recv().expect("a page that can be read");
        op()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::Random;

    #[test]
    fn pairs_leave_what_they_found() {
        let order = Random::order(600);
        for mut candidate in pairs(&order) {
            candidate.run(1500);
        }
    }

    #[test]
    fn a_batch_is_counted_by_its_mappings() {
        let page = page();
        let space = space(32, PAGE, &page);
        let order: Vec<u64> = (0..32).collect();
        let mut batches = in_batches("batches", &order, 16, &space, &page);
        let before = space.stats().unmaps;
        for unmapped in [0, 16, 16, 32] {
            batches.run(9);
            assert_eq!(space.stats().unmaps - before, unmapped);
        }
        assert_eq!(space.mappings(), 32);
    }

    #[test]
    fn unmaps_beside_a_reader_are_measured_with_either_barrier() {
        for barrier in [ReaderBarrier::Fence, ReaderBarrier::Membarrier] {
            let space = space_with(barrier, 1, PAGE, &page());
            let time = Duration::from_millis(1);
            let unmaps = || unmap_latencies(&space, time, Duration::ZERO);
            assert!(!beside_a_reader(&space, unmaps).is_empty());
        }
    }

    #[test]
    fn a_lease_is_held_meanwhile_and_returned_after() {
        let space = space(1, PAGE, &page());
        let at_once = iommu_type1::UnmapOptions::new()
            .deadline(Duration::ZERO)
            .policy(iommu_type1::UnmapPolicy::Restore);
        let held = beside_a_lease(&space, || space.unmap_with(0, PAGE, at_once));
        assert!(held.is_err());
        let time = Duration::from_millis(1);
        assert!(!unmap_latencies(&space, time, Duration::ZERO).is_empty());
        assert_eq!(space.unmap(0, PAGE).expect("free again"), PAGE);
    }
}

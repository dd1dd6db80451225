// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Changing mappings: steady pairs of unmap and map, and how long single unmaps take.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use iommu_type1::{Backing, IoAddressSpace};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemory, Permissions};

use crate::candidates::{LockedIotlb, LockedTree};
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
    // One more, for what is mapped elsewhere.
    let space = IoAddressSpace::builder()
        .entry_limit(mappings as usize + 1)
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

/// Candidates that unmap a mapping and map it again, of as many as `order` has, in its order.
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
    vec![
        through("ours", order, move |iova| remap(&space, iova, &page)),
        through("RwLock<BTreeMap>", order, move |iova| {
            tree.unmap(iova);
            tree.map(iova, host, PAGE);
        }),
        through("RwLock<Iotlb>", order, move |iova| {
            iotlb.unmap(iova, PAGE);
            iotlb.map(iova, GuestAddress(0), PAGE);
        }),
    ]
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::Random;

    #[test]
    fn pairs_leave_what_they_found() {
        let order = Random::order(100);
        for mut candidate in pairs(&order) {
            candidate.run(250);
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

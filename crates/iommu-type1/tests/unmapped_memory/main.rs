// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory is made inaccessible (`mprotect`) as soon as its unmap has returned: an access that comes
//! too late kills the process with SIGSEGV.
//!
//! Inline users, holders of leases and a pinner use pages that two threads unmap, take away, fill
//! anew and map again. Whatever is read is checked: the right page, one generation of it, and none
//! that was gone before. It is counted which unmaps met somebody on their range. All of it happens
//! once with accesses that pass barriers of their own, and once with such that often do not.
//!
//! The long form:
//!
//! ```text
//! UNMAPS=1000000 READS=100000000 cargo test --release -p iommu-type1 --test unmapped_memory -- --nocapture
//! ```

#[path = "../common/deadline.rs"]
mod deadline;
mod memory;
mod overlap;
mod random;
mod slow_log;
mod unmappers;
mod users;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use deadline::Over;
use iommu_type1::{IoAddressSpace, ReaderBarrier};
use vm_memory::Permissions;

use memory::{iova_of, Memory, PAGES};
use overlap::{Board, HANDLES};

/// Each has blocks of its own.
const UNMAPPERS: usize = 2;

/// How long there may be no unmap at all.
const WATCHDOG: Duration = Duration::from_secs(120);

#[test]
fn no_access_reaches_memory_after_its_unmap() {
    let space = run(ReaderBarrier::Fence, 20_000, 1_000_000);
    assert_eq!(space.stats().membarriers, 0);
}

#[test]
fn nor_does_one_without_a_barrier_of_its_own() {
    let space = run(ReaderBarrier::Membarrier, 5_000, 250_000);
    if space.reader_barrier() == ReaderBarrier::Membarrier {
        let membarriers = space.stats().membarriers;
        println!("the kernel was asked for {membarriers} barriers");
        assert_ne!(membarriers, 0);
    }
}

/// At least so many unmaps beside so many inline reads, unless the environment says otherwise.
fn run(barrier: ReaderBarrier, unmaps: u64, reads: u64) -> IoAddressSpace {
    let stress = Stress::new(barrier, ordered("UNMAPS", unmaps), ordered("READS", reads));
    let begun = Instant::now();
    thread::scope(|scope| {
        for (at, seat) in stress.board.inline.iter().enumerate() {
            let stress = &stress;
            let user = move || match at {
                0..HANDLES => stress.inline(at, seat, &stress.space.handle()),
                _ => stress.inline(at, seat, &stress.space),
            };
            scope.spawn(move || stress.until_stop(user));
        }
        let [guards, lists] = &stress.board.leases;
        scope.spawn(|| stress.until_stop(|| stress.hold_guards(guards)));
        scope.spawn(|| stress.until_stop(|| stress.hold_lists(lists)));
        scope.spawn(|| stress.until_stop(|| stress.pin()));
        let unmappers: Vec<_> = (0..UNMAPPERS)
            .map(|number| {
                let stress = &stress;
                scope.spawn(move || stress.until_stop(|| stress.unmap(number)))
            })
            .collect();
        stress.watch(|| unmappers.iter().all(|unmapper| unmapper.is_finished()));
    });
    println!(
        "{:?}: {:.1?}",
        stress.space.reader_barrier(),
        begun.elapsed()
    );
    stress.board.report();
    stress.space
}

/// A number from the environment.
fn ordered(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().expect(name))
}

struct Stress {
    unmaps: u64,
    reads: u64,
    space: IoAddressSpace,
    memory: Memory,
    board: Arc<Board>,
    /// What the unmaps that run have met, by unmapper.
    met: Arc<[AtomicU64; UNMAPPERS]>,
    stop: AtomicBool,
}

impl Stress {
    fn new(barrier: ReaderBarrier, unmaps: u64, reads: u64) -> Self {
        let stress = Stress {
            unmaps,
            reads,
            space: IoAddressSpace::builder().reader_barrier(barrier).build(),
            memory: Memory::new(),
            board: Arc::default(),
            met: Arc::default(),
            stop: AtomicBool::new(false),
        };
        (0..PAGES).for_each(|page| stress.map(page));
        stress
    }

    /// Runs one of the threads; all end with the first.
    fn until_stop(&self, thread: impl FnOnce()) {
        let _over = Over(&self.stop);
        thread();
    }

    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    fn map(&self, page: usize) {
        let backing = self.memory.renew(page);
        self.space
            .map(iova_of(page), backing, Permissions::ReadWrite)
            .unwrap();
    }

    /// A thread that waits for ever cannot be ended otherwise than with its process.
    fn watch(&self, is_done: impl Fn() -> bool) {
        let (mut unmaps, mut since) = (0, Instant::now());
        while !is_done() {
            let now = self.board.unmaps.load(Ordering::Relaxed);
            if now != unmaps {
                (unmaps, since) = (now, Instant::now());
            }
            if since.elapsed() > WATCHDOG {
                eprintln!("no unmap for {WATCHDOG:?} after {unmaps} of them");
                std::process::abort();
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

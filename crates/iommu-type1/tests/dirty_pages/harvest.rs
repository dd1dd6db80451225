// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Dirty pages are taken while others write: a copy of what is taken becomes a copy of everything.
//!
//! In rounds, because a mark that is lost shows only if nobody writes the page again.
//!
//! The long form:
//!
//! ```text
//! ROUNDS=1000000 cargo test --release -p iommu-type1 --test dirty_pages harvest -- --nocapture
//! ```

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use iommu_type1::{page_size, Backing, DmaHandle, IoAddressSpace, ReaderBarrier};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, Permissions};

use crate::common::deadline::{within, Over, DEADLINE};

/// Two mappings of more pages than a word of marks has, some TiB apart.
const PLACES: [u64; 2] = [1 << 28, 1 << 42];
const PAGES: u64 = 80;
/// Each writes pages of its own: a mark of somebody else would make up for one that is lost.
const WRITERS: u64 = 4;
/// Writes of each in a round.
const WRITES: u64 = 200;
/// Rounds after which a handle gets to where it needs no barriers, if it may.
const UNFENCED_EVERY: u64 = 8;
/// Accesses that this takes.
const ENOUGH: usize = (1 << 16) + 1;

fn pages() -> impl Iterator<Item = u64> {
    let pages = |at| (0..PAGES).map(move |page| at + page * page_size());
    PLACES.into_iter().flat_map(pages)
}

/// A number without a pattern.
fn scramble(number: u64) -> u64 {
    let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    number ^ number >> 27
}

/// Where the `turn` of a writer goes.
fn target(writer: u64, turn: u64) -> u64 {
    let number = scramble(turn * WRITERS + writer);
    // Few of its pages: so they are marked already, as often as not.
    let page = (number >> 8) % 8 * (PAGES / 8) + writer;
    PLACES[number as usize % 2] + page * page_size()
}

fn write(space: &IoAddressSpace, handle: &DmaHandle, writer: u64, turn: u64) {
    let (at, value) = (target(writer, turn), turn.to_ne_bytes());
    match writer {
        0 => handle.write(at, &value).unwrap(),
        1 => space.write(at, &value).unwrap(),
        2 => space
            .memory()
            .write_slice(&value, GuestAddress(at))
            .unwrap(),
        _ => {
            let list = space.scatter(at, 8, Permissions::ReadWrite).unwrap();
            list.iter().for_each(|slice| slice.copy_from(&value));
        }
    }
}

struct Shadow {
    handle: DmaHandle,
    copies: Vec<u64>,
}

impl Shadow {
    fn read(&self, page: u64) -> u64 {
        self.handle
            .load(GuestAddress(page), Ordering::Relaxed)
            .unwrap()
    }

    /// Copies what was written; how many pages.
    fn harvest(&mut self, space: &IoAddressSpace) -> usize {
        let mut harvested = 0;
        for (place, at) in PLACES.into_iter().enumerate() {
            let dirty = space.take_dirty(at, PAGES * page_size()).unwrap();
            for page in dirty.iter() {
                let index = place as u64 * PAGES + (page - at) / page_size();
                self.copies[index as usize] = self.read(page);
            }
            harvested += dirty.len();
        }
        harvested
    }

    fn assert_complete(&self, round: u64) {
        for (copy, page) in self.copies.iter().zip(pages()) {
            assert_eq!(*copy, self.read(page), "round {round}, page {page:#x}");
        }
    }
}

/// Where all threads wait for each other, turn by turn. One that has failed does not come, so there is a deadline.
struct Turns(AtomicUsize);

impl Turns {
    fn wait(&self) {
        const THREADS: usize = WRITERS as usize + 1;
        let turn = self.0.fetch_add(1, Ordering::AcqRel) / THREADS;
        within("all threads come to the end of a turn", || {
            self.0.load(Ordering::Acquire) / THREADS > turn
        });
    }
}

fn nothing_written_is_missed(barrier: ReaderBarrier) {
    let rounds = std::env::var("ROUNDS").map_or(2000, |rounds| rounds.parse().unwrap());
    let space = IoAddressSpace::builder()
        .reader_barrier(barrier)
        .unmap_deadline(DEADLINE)
        .build();
    for at in PLACES {
        let backing = Backing::anonymous((PAGES * page_size()) as usize).unwrap();
        space.map(at, backing, Permissions::ReadWrite).unwrap();
    }
    space.start_dirty_tracking().unwrap();
    let turns = Turns(AtomicUsize::new(0));
    let done = AtomicUsize::new(0);
    let mut meanwhile = 0;
    thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (space, turns, done) = (&space, &turns, &done);
            scope.spawn(move || {
                let handle = space.handle();
                for round in 0..rounds {
                    if writer == 0 && round % UNFENCED_EVERY == 0 {
                        (0..ENOUGH).for_each(|_| handle.read(0, &mut []).unwrap());
                    }
                    turns.wait();
                    let first = 1 + round * WRITES;
                    (first..first + WRITES).for_each(|turn| write(space, &handle, writer, turn));
                    done.fetch_add(1, Ordering::Release);
                    turns.wait();
                }
            });
        }
        let mut shadow = Shadow {
            handle: space.handle(),
            copies: vec![0; pages().count()],
        };
        for round in 0..rounds {
            done.store(0, Ordering::Relaxed);
            turns.wait();
            within("all writers have written", || {
                meanwhile += shadow.harvest(&space);
                done.load(Ordering::Acquire) == WRITERS as usize
            });
            turns.wait();
            shadow.harvest(&space);
            shadow.assert_complete(round);
        }
    });
    println!("{barrier:?}: {meanwhile} pages were taken beside those who write");
    assert!(meanwhile > 0);
    let membarriers = space.stats().membarriers;
    assert_eq!(
        membarriers > 0,
        space.reader_barrier() == ReaderBarrier::Membarrier
    );
}

#[test]
fn nothing_written_is_missed_with_fences() {
    nothing_written_is_missed(ReaderBarrier::Fence);
}

#[test]
fn nothing_written_is_missed_with_membarriers() {
    nothing_written_is_missed(ReaderBarrier::Membarrier);
}

/// Whoever takes dirty pages refers to the mappings meanwhile, and may be the last who does.
#[test]
fn what_is_replaced_beside_a_harvest_is_forgotten() {
    let p = page_size();
    let space = IoAddressSpace::builder().unmap_deadline(DEADLINE).build();
    let page = || Backing::anonymous(p as usize).unwrap();
    space.map(0, page(), Permissions::ReadWrite).unwrap();
    space.start_dirty_tracking().unwrap();
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let _over = Over(&is_over);
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                space.write(0, &[1]).unwrap();
                space.take_dirty(0, p).unwrap();
            }
        });
        let kept = (0..3000).find(|_| {
            let replaced = space.replace(0, page(), Permissions::ReadWrite);
            replaced.is_err() || space.mappings() > 1
        });
        assert_eq!(kept, None);
    });
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Dirty pages: whoever copies what is taken has the memory in the end.

use std::sync::Arc;
use std::time::Duration;

use loom::sync::atomic::{AtomicU8, Ordering};
use loom::thread::spawn;
use vm_memory::bitmap::Bitmap;
use vm_memory::Permissions;

use super::{exhaustively, join, Plain};
use crate::backing::Region;
use crate::range::page_size;
use crate::{Backing, Error, IoAddressSpace};

/// The pages that a space has: one is found by its mapping, of two each by its page word.
const PAGES: [u64; 2] = [1, 2];

/// Passed where threads may take turns. Loom sees no reason to switch at a thread that reads a word and
/// then changes it, though another has read it before.
#[derive(Clone)]
struct Turn(Arc<AtomicU8>);

impl Turn {
    fn new() -> Self {
        Turn(Arc::new(AtomicU8::new(0)))
    }

    fn pass(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Memory where threads take turns in the middle of an access, which has written and marked.
struct Turning(Plain, Turn);

// SAFETY: everything is the wrapped region's, which upholds the same contract.
unsafe impl Region for Turning {
    fn host_address(&self) -> *mut u8 {
        self.0.host_address()
    }

    fn size(&self) -> usize {
        self.0.size()
    }

    fn access(&self) -> Permissions {
        self.0.access()
    }

    fn tracks(&self) -> bool {
        true
    }

    fn mark_dirty(&self, _offset: usize, _len: usize) {
        self.1.pass();
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }
}

/// A copy of the byte of the page at 0 that is brought up to date where the page is dirty.
struct Copy<M> {
    space: IoAddressSpace,
    memory: M,
    byte: u8,
}

impl<M: Fn() -> u8> Copy<M> {
    fn new(space: &IoAddressSpace, memory: M) -> Self {
        Copy {
            space: space.clone(),
            byte: memory(),
            memory,
        }
    }

    fn update(&mut self) {
        match self.space.take_dirty(0, page_size()) {
            Ok(dirty) if dirty.is_empty() => {}
            Ok(_) => self.byte = (self.memory)(),
            Err(error) => assert!(matches!(error, Error::AccessRuns { .. })),
        }
    }

    /// When nobody writes any more.
    fn finish(mut self) {
        self.update();
        assert_eq!(self.byte, (self.memory)(), "written and not marked");
    }
}

fn space(pages: u64, deadline: Duration) -> (IoAddressSpace, Plain) {
    checked_sync::clock::now();
    let space = IoAddressSpace::builder().unmap_deadline(deadline).build();
    let memory = Plain::new();
    memory.map(&space, 0);
    for page in 1..pages {
        Plain::new().map(&space, page);
    }
    (space, memory)
}

fn patiently(pages: u64) -> (IoAddressSpace, Plain) {
    space(pages, 2 * checked_sync::clock::NEVER)
}

/// A harvest against a thread that writes twice: the second write may find the page marked by the first.
fn harvest_against_inline_writes(deadline: Duration) {
    exhaustively(move || {
        checked_sync::clock::now();
        let space = IoAddressSpace::builder().unmap_deadline(deadline).build();
        let (memory, turn) = (Plain::new(), Turn::new());
        let backing = Backing::for_model(Turning(memory.clone(), turn.clone()));
        space.map(0, backing, Permissions::ReadWrite).unwrap();
        space.start_dirty_tracking().unwrap();
        let handle = space.handle();
        let mut copy = Copy::new(&space, move || memory.byte());
        let turns = turn.clone();
        let writer = spawn(move || {
            for value in [1, 2] {
                turns.pass();
                handle.write(8, &[value]).unwrap();
            }
        });
        turn.pass();
        copy.update();
        join([writer]);
        copy.finish();
    });
}

#[test]
fn inline_writes_against_a_harvest() {
    harvest_against_inline_writes(2 * checked_sync::clock::NEVER);
}

/// A harvest that gives up has taken nothing.
#[test]
fn inline_writes_against_a_harvest_without_time() {
    harvest_against_inline_writes(Duration::ZERO);
}

/// What is not marked is in memory when tracking has begun.
#[test]
fn an_inline_write_against_the_start() {
    for pages in PAGES {
        exhaustively(move || {
            let (space, memory) = patiently(pages);
            let handle = space.handle();
            let writer = spawn(move || handle.write(8, &[1]).unwrap());
            space.start_dirty_tracking().unwrap();
            let copy = Copy::new(&space, move || memory.byte());
            join([writer]);
            copy.finish();
        });
    }
}

/// Who has a slice is not waited for. Its bytes are loom's here, which may be seen late.
#[test]
fn lent_writes_against_a_harvest() {
    exhaustively(|| {
        let (space, _) = patiently(1);
        space.start_dirty_tracking().unwrap();
        let list = space.scatter(0, 8, Permissions::ReadWrite).unwrap();
        let byte = Arc::new(AtomicU8::new(0));
        let written = byte.clone();
        let mut copy = Copy::new(&space, move || byte.load(Ordering::Relaxed));
        let turn = Turn::new();
        let turns = turn.clone();
        let writer = spawn(move || {
            for value in [1, 2] {
                turns.pass();
                written.store(value, Ordering::Relaxed);
                for slice in list.iter() {
                    slice.bitmap().mark_dirty(0, 1);
                }
            }
            // Its drop passes a barrier: not before the harvest.
            list
        });
        turn.pass();
        copy.update();
        join([writer]);
        copy.finish();
    });
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Marks that nobody may lose: of what is unmapped, of what is pinned, and of who writes unseen.

use std::sync::Arc;

use loom::sync::atomic::{AtomicU8, Ordering};
use loom::thread::spawn;
use vm_memory::bitmap::Bitmap;
use vm_memory::Permissions::ReadWrite;

use super::{exhaustively, is_refusal, join, Plain};
use crate::range::page_size;
use crate::{Interest, IoAddressSpace, PinnedPages, Pinner};

/// The pages that a space has: one is found by its mapping, of two each by its page word.
const PAGES: [u64; 2] = [1, 2];

fn space(pages: u64) -> IoAddressSpace {
    checked_sync::clock::now();
    let space = IoAddressSpace::builder()
        .unmap_deadline(2 * checked_sync::clock::NEVER)
        .build();
    (0..pages).for_each(|page| Plain::new().map(&space, page));
    space
}

fn tracked(pages: u64) -> IoAddressSpace {
    let space = space(pages);
    space.start_dirty_tracking().unwrap();
    space
}

/// Whether the page at 0 is dirty.
fn is_dirty(space: &IoAddressSpace) -> bool {
    let dirty = space.take_dirty(0, page_size()).unwrap();
    !dirty.is_empty()
}

/// What is written before an unmap is handed over by it.
#[test]
fn an_inline_write_against_an_unmap_that_hands_over() {
    for pages in PAGES {
        exhaustively(move || {
            let space = tracked(pages);
            let handle = space.handle();
            let writer = spawn(move || match handle.write(8, &[1]) {
                Ok(()) => true,
                Err(error) => {
                    assert!(is_refusal(&error), "{error}");
                    false
                }
            });
            let (bytes, dirty) = space.unmap_dirty(0, page_size()).unwrap();
            assert_eq!(bytes, page_size());
            let is_written = writer.join().unwrap();
            assert_eq!(!dirty.is_empty(), is_written, "written and not handed over");
        });
    }
}

/// Also by who has had a slice since before, until the last moment.
#[test]
fn a_lent_write_against_an_unmap_that_hands_over() {
    exhaustively(|| {
        let space = tracked(1);
        let list = space.scatter(0, 8, ReadWrite).unwrap();
        let writer = spawn(move || {
            list.iter()
                .for_each(|slice| slice.bitmap().mark_dirty(0, 1));
        });
        let (_, dirty) = space.unmap_dirty(0, page_size()).unwrap();
        join([writer]);
        assert!(!dirty.is_empty(), "written and not handed over");
    });
}

/// Of two that take marks, one of them by an unmap, one gets each.
#[test]
fn a_harvest_against_an_unmap_that_hands_over() {
    exhaustively(|| {
        let space = tracked(1);
        space.write(8, &[1]).unwrap();
        let other = space.clone();
        let harvest = spawn(move || is_dirty(&other));
        let (_, dirty) = space.unmap_dirty(0, page_size()).unwrap();
        assert_ne!(harvest.join().unwrap(), !dirty.is_empty());
    });
}

fn pinner(space: &IoAddressSpace) -> Pinner {
    space.pinner("pinner", Interest::Holder, Arc::new(|_, _| ()))
}

fn pin(pinner: &Pinner) -> PinnedPages {
    pinner.pin_pages(0, 1, ReadWrite).unwrap()
}

/// What is pinned is dirty, whoever takes marks while it is being pinned.
#[test]
fn a_pin_against_a_harvest() {
    exhaustively(|| {
        let space = tracked(1);
        let pinner = pinner(&space);
        let pinning = spawn(move || pin(&pinner));
        is_dirty(&space);
        let pinned = pinning.join().unwrap();
        assert!(is_dirty(&space), "pinned and not dirty");
        // Its last owner may have written it since.
        drop(pinned);
        assert!(is_dirty(&space), "was pinned and is not dirty");
    });
}

/// What was pinned before it was asked for is dirty then or later, however short it was pinned.
#[test]
fn a_short_pin_against_a_harvest() {
    exhaustively(|| {
        let space = tracked(1);
        let pinner = pinner(&space);
        let pinning = spawn(move || drop(pin(&pinner)));
        let at_first = is_dirty(&space);
        join([pinning]);
        assert!(is_dirty(&space) || at_first, "pinned and never dirty");
    });
}

#[test]
fn a_pin_against_the_start() {
    exhaustively(|| {
        let space = space(1);
        let pinner = pinner(&space);
        let pinning = spawn(move || pin(&pinner));
        space.start_dirty_tracking().unwrap();
        let pinned = pinning.join().unwrap();
        assert!(is_dirty(&space), "pinned and not dirty");
        drop(pinned);
    });
}

/// Whoever writes unseen says so afterwards: who takes the mark finds the byte.
#[test]
fn a_write_unseen_against_a_harvest() {
    exhaustively(|| {
        let space = tracked(1);
        let byte = Arc::new(AtomicU8::new(0));
        let (writer_space, written) = (space.clone(), byte.clone());
        let writer = spawn(move || {
            for value in [1, 2] {
                written.store(value, Ordering::Relaxed);
                writer_space.mark_dirty(8, 1).unwrap();
            }
        });
        let mut copy = 0;
        if is_dirty(&space) {
            copy = byte.load(Ordering::Relaxed);
        }
        join([writer]);
        if is_dirty(&space) {
            copy = byte.load(Ordering::Relaxed);
        }
        assert_eq!(copy, 2, "written and not marked");
    });
}

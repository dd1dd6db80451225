// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bugs that GVT's scheduler had, or has, with the pages of a context. docs/kernel-bugs.md lists them;
//! `ci/kernel-bugs/run` puts each into the code and expects its test here to fail.

mod common;

use common::{entry, memory};
use gvt_scheduler::{ContextPages, CopyMode, Ggtt, PAGE_SIZE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const LRCA: u32 = 16;
const A: u64 = 3;
const B: u64 = 9;
const C: u64 = 20;
/// A page behind the guest's memory.
const NOWHERE: u64 = 1 << 20;

fn ggtt(frames: &[u64]) -> Ggtt {
    let mut ggtt = Ggtt::new(64);
    for (page, frame) in (LRCA + 2..).zip(frames) {
        ggtt.write_entry(page, entry(*frame)).unwrap();
    }
    ggtt
}

fn guest() -> GuestMemoryMmap {
    memory(32 * PAGE_SIZE)
}

fn first_byte(memory: &GuestMemoryMmap, frame: u64) -> u8 {
    let at = GuestAddress(frame * PAGE_SIZE as u64);
    memory.read_obj(at).unwrap()
}

/// A last page that did not follow the one before was in no run that was copied.
#[test]
fn b17_the_last_page_is_copied_wherever_it_lies() {
    for frames in [
        &[A][..],
        &[A, A + 1],
        &[A, B],
        &[A, A + 1, C],
        &[A, C, C + 1],
        &[C, B, A],
    ] {
        let (ggtt, memory) = (ggtt(frames), guest());
        let context = ContextPages::new(&ggtt, LRCA, 2 + frames.len());
        for (value, frame) in (1_u8..).zip(frames) {
            let at = GuestAddress(frame * PAGE_SIZE as u64);
            memory.write_obj(value, at).unwrap();
        }
        let mut pages = vec![0; frames.len() * PAGE_SIZE];
        let mode = CopyMode::default();
        let stats = context.populate(&memory, mode, &mut pages, &mut ());
        assert_eq!(stats.unwrap().pages, frames.len() as u64, "{frames:?}");
        for (value, page) in (1_u8..).zip(pages.chunks_mut(PAGE_SIZE)) {
            assert_eq!(page[0], value, "{frames:?}");
            page[0] = value + 100;
        }
        context.write_back(&memory, mode, &pages, &mut ()).unwrap();
        for (value, frame) in (101_u8..).zip(frames) {
            assert_eq!(first_byte(&memory, *frame), value, "{frames:?}");
        }
    }
}

/// What could not be read was taken for read.
#[test]
fn b17_an_access_that_fails_is_an_error() {
    for frames in [[NOWHERE, A, B], [A, NOWHERE, B], [A, B, NOWHERE]] {
        let (ggtt, memory) = (ggtt(&frames), guest());
        let context = ContextPages::new(&ggtt, LRCA, 2 + frames.len());
        let mut pages = vec![0; frames.len() * PAGE_SIZE];
        let mode = CopyMode::default();
        let read = context.populate(&memory, mode, &mut pages, &mut ());
        assert_eq!(read.unwrap_err().errno(), libc::EFAULT);
        let written = context.write_back(&memory, mode, &pages, &mut ());
        assert_eq!(written.unwrap_err().errno(), libc::EFAULT);
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A dirty log that takes its time, so that inline writes are still under way when others run.

use std::cell::Cell;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::thread;

use vm_memory::bitmap::{Bitmap, NewBitmap, WithBitmapSlice};

/// How many marks one of them takes long.
const SLOW: u32 = 16;

/// Keeps nothing. It is told in the middle of a write, waits now and then, and looks at what was
/// written: the write is not over, so the memory is there.
#[derive(Debug, Default)]
pub struct SlowLog {
    /// Of the region.
    memory: AtomicPtr<u8>,
    len: usize,
}

impl SlowLog {
    /// Says where the memory is that is marked.
    pub fn look_at(&self, memory: *mut u8) {
        self.memory.store(memory, Ordering::Relaxed);
    }
}

impl Bitmap for SlowLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        thread_local! {
            static MARKS: Cell<u32> = const { Cell::new(0) };
        }
        let marks = MARKS.get();
        MARKS.set((marks + 1) % SLOW);
        if marks == 0 {
            thread::yield_now();
        }
        let memory = self.memory.load(Ordering::Relaxed);
        assert!(!memory.is_null() && offset + len <= self.len);
        // SAFETY: inside the region, as was just checked, which owns this log.
        unsafe { ptr::read_volatile(memory.add(offset)) };
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, _offset: usize) {}
}

/// The region's own slices mark nothing.
impl WithBitmapSlice<'_> for SlowLog {
    type S = ();
}

impl NewBitmap for SlowLog {
    fn with_len(len: usize) -> Self {
        SlowLog {
            memory: AtomicPtr::default(),
            len,
        }
    }
}

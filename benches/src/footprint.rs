// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes that mappings cost, counted by the allocator.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io;

use iommu_type1::{Backing, IoAddressSpace};
use vm_memory::{FileOffset, Permissions};

use crate::churn::{page, space};
use crate::world::memfd;

/// The system's allocator, counting what the thread has. A binary that measures bytes makes it its
/// `#[global_allocator]`.
#[derive(Debug)]
pub struct CountingAllocator;

thread_local! {
    // A count per thread, without a destructor: no atomic slows what else the binary measures.
    static LIVE: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    let _ = LIVE.try_with(|live| live.set(live.get() + bytes));
}

// SAFETY: all is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as isize - layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(memory, layout, size) }
    }
}

/// Bytes allocated by `make` that its result still has; 0 where the allocator does not count.
pub fn bytes_of<T>(make: impl FnOnce() -> T) -> (T, f64) {
    let before = LIVE.get();
    let made = make();
    (made, (LIVE.get() - before) as f64)
}

/// Bytes a mapping, of `mappings` one-page mappings `stride` bytes from one to the next.
///
/// # Panics
///
/// Panics where they cannot be mapped.
pub fn bytes_per_mapping(mappings: u64, stride: u64) -> f64 {
    let page = page();
    let (_space, bytes) = bytes_of(|| space(mappings, stride, &page));
    bytes / mappings as f64
}

/// A tebibyte that takes no memory.
///
/// # Errors
///
/// What the system says.
pub fn tebibyte() -> io::Result<Backing> {
    const LEN: u64 = 1 << 40;
    let file = memfd(LEN)?;
    Backing::file(
        FileOffset::new(file, 0),
        LEN as usize,
        Permissions::ReadWrite,
    )
    .map_err(io::Error::other)
}

/// Bytes of table that one mapping of `backing` takes.
///
/// # Panics
///
/// Panics where it cannot be mapped.
pub fn bytes_of_one(backing: &Backing) -> f64 {
    let space = IoAddressSpace::new();
    let map = || space.map(0, backing.clone(), Permissions::ReadWrite);
    let (mapped, bytes) = bytes_of(map);
    mapped.expect("an empty space");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[global_allocator]
    static ALLOCATOR: CountingAllocator = CountingAllocator;

    #[test]
    fn what_is_kept_is_counted_and_what_is_freed_is_not() {
        let (kept, bytes) = bytes_of(|| {
            drop(vec![0_u8; 500]);
            let mut grown = Vec::with_capacity(10);
            grown.extend([1_u8; 1000]);
            grown.shrink_to_fit();
            grown
        });
        assert_eq!(bytes, kept.len() as f64);
    }

    #[test]
    fn a_tebibyte_can_be_mapped() {
        let backing = tebibyte().expect("address space");
        assert_eq!(backing.len(), 1 << 40);
        assert!(bytes_of_one(&backing) > 0.0);
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is done while something else does not end: an unmap that waits, or an access.

#![allow(dead_code)] // Each test uses a part of it.

pub mod deadline;
pub mod log;

use std::thread;
use std::time::Duration;

use deadline::{ended, within, DEADLINE};
use iommu_type1::{IoAddressSpace, UnmapOptions};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::Permissions::Read;
use vm_memory::{Bytes, GuestAddress, ReadVolatile, VolatileMemoryError, VolatileSlice};

/// For an unmap that waits for nobody.
pub fn at_once() -> UnmapOptions {
    UnmapOptions::new().deadline(Duration::ZERO)
}

/// For an unmap that has whoever uses its range end by itself.
pub fn patient() -> UnmapOptions {
    UnmapOptions::new().deadline(DEADLINE)
}

/// Does something while an unmap of mappings waits for who uses the first of them.
pub fn beside_an_unmap(space: &IoAddressSpace, iova: u64, size: u64, meanwhile: impl FnOnce()) {
    let list = space.scatter(iova, 8, Read).unwrap();
    let unmapping = space.clone();
    let unmap = thread::spawn(move || unmapping.unmap_with(iova, size, patient()));
    within("nobody finds what is being unmapped", || {
        space.read(iova, &mut [0]).is_err()
    });
    assert!(!unmap.is_finished());
    meanwhile();
    drop(list);
    let unmapped = ended("an unmap ends when nobody uses its range", unmap);
    assert_eq!(unmapped.unwrap(), size);
}

/// Does something in the middle of an access to a page.
pub fn inside_an_access(space: &IoAddressSpace, iova: u64, inside: impl FnMut()) {
    struct Inside<F>(F);
    impl<F: FnMut()> ReadVolatile for Inside<F> {
        fn read_volatile<B: BitmapSlice>(
            &mut self,
            buf: &mut VolatileSlice<B>,
        ) -> Result<usize, VolatileMemoryError> {
            (self.0)();
            Ok(buf.len())
        }
    }
    let handle = space.handle();
    let read = handle.read_volatile_from(GuestAddress(iova), &mut Inside(inside), 8);
    read.unwrap();
}

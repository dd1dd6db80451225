// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Our faces, each behind one call.

use iommu_type1::{DmaHandle, IoAddressSpace};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

/// A read by a handle.
#[inline(never)]
pub fn handle(handle: &DmaHandle, iova: u64, buf: &mut [u8]) {
    handle.read(iova, buf).expect("mapped");
}

/// A write by a handle.
#[inline(never)]
pub fn handle_write(handle: &DmaHandle, iova: u64, buf: &[u8]) {
    handle.write(iova, buf).expect("mapped");
}

/// A read on the shared path.
#[inline(never)]
pub fn shared(space: &IoAddressSpace, iova: u64, buf: &mut [u8]) {
    space.read(iova, buf).expect("mapped");
}

/// A guard, a read through it, and its drop.
#[inline(never)]
pub fn guard(space: &IoAddressSpace, iova: u64, buf: &mut [u8]) {
    let guard = space.memory();
    guard.read_slice(buf, GuestAddress(iova)).expect("mapped");
}

/// A guard and its drop.
#[inline(never)]
pub fn guard_alone(space: &IoAddressSpace) {
    drop(std::hint::black_box(space.memory()));
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The same guest memory for every candidate: as a VMM has it, and behind an IO address space.

use iommu_type1::{Backing, IoAddressSpace};
use vm_memory::{GuestAddress, GuestMemoryMmap, Permissions};

/// Guest memory of `regions` regions of `region_len` bytes, one after the other from address 0.
///
/// # Panics
///
/// Panics where the memory cannot be had: a bench has no use for less.
pub fn guest_memory(regions: u64, region_len: usize) -> GuestMemoryMmap {
    let ranges: Vec<_> = (0..regions)
        .map(|i| (GuestAddress(i * region_len as u64), region_len))
        .collect();
    GuestMemoryMmap::from_ranges(&ranges).expect("guest memory")
}

/// The first `mappings` pieces of `len` bytes of `memory`, each a mapping at its own address.
///
/// # Panics
///
/// Panics where `memory` is too small or the pieces are no pages.
pub fn identity_mapped(memory: &GuestMemoryMmap, mappings: u64, len: usize) -> IoAddressSpace {
    let space = IoAddressSpace::new();
    for i in 0..mappings {
        let gpa = i * len as u64;
        let backing = Backing::from_guest_memory(memory, GuestAddress(gpa), len);
        space
            .map(gpa, backing.expect("guest memory"), Permissions::ReadWrite)
            .expect("a free range");
    }
    space
}

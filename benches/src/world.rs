// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The same guest memory for every candidate, and the same mappings for all who translate.

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::sync::Arc;

use iommu_type1::{Backing, IoAddressSpace, ReaderBarrier};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
    IommuMemory, Permissions,
};

use crate::candidates::{LockedIotlb, LockedTree};
use crate::workload::Layout;

/// Bytes of guest memory.
pub const TOTAL: u64 = 256 << 20;

/// The same guest memory from address 0 in two shapes. Of [`new`](Memory::new) memory every page is
/// present: whose turn is after whose does not decide what is in the cache.
#[derive(Clone, Debug)]
pub struct Memory {
    /// In one region.
    pub one_region: GuestMemoryMmap,
    /// In 16 regions next to each other.
    pub regions_16: GuestMemoryMmap,
}

impl Memory {
    /// Fresh memory, shared as VMMs do with their back ends.
    ///
    /// # Panics
    ///
    /// Panics where it cannot be had: a bench has no use for less.
    pub fn new() -> Self {
        let memory = Memory::untouched();
        for shape in [&memory.one_region, &memory.regions_16] {
            for gpa in (0..TOTAL).step_by(4096) {
                shape.write_obj(gpa + 1, GuestAddress(gpa)).expect("in it");
            }
        }
        memory
    }

    /// As [`new`](Memory::new), but no page of it is present: for those who count instructions, which
    /// the kernel's are not among.
    ///
    /// # Panics
    ///
    /// As [`new`](Memory::new).
    pub fn untouched() -> Self {
        let file = Arc::new(memfd(TOTAL).expect("a memfd"));
        let shaped = |regions: u64| {
            let len = TOTAL / regions;
            let ranges = (0..regions).map(|i| {
                let part = FileOffset::from_arc(file.clone(), i * len);
                (GuestAddress(i * len), len as usize, Some(part))
            });
            GuestMemoryMmap::from_ranges_with_files(ranges).expect("guest memory")
        };
        Memory {
            one_region: shaped(1),
            regions_16: shaped(16),
        }
    }
}

impl Default for Memory {
    fn default() -> Self {
        Memory::new()
    }
}

/// A file that takes memory only where it is written.
///
/// # Errors
///
/// What the system says.
pub fn memfd(len: u64) -> io::Result<File> {
    // SAFETY: the name is a C string, and the descriptor is nobody else's.
    let file = unsafe {
        let fd = libc::memfd_create(c"benches".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        File::from_raw_fd(fd)
    };
    file.set_len(len)?;
    Ok(file)
}

/// Guest memory, and everybody's way to it.
#[derive(Debug)]
pub struct World {
    /// How it is mapped.
    pub layout: Layout,
    /// What is behind all the mappings below: the shape of one region.
    pub memory: Memory,
    /// That shape, replaceable.
    pub atomic: GuestMemoryAtomic<GuestMemoryMmap>,
    /// Our mappings, in a space as it is by default.
    pub space: IoAddressSpace,
    /// The same in a space whose accesses go without a barrier of their own, if the kernel lets them.
    pub membarrier: IoAddressSpace,
    /// The mappings in vm-memory's own IOMMU.
    pub iommu: IommuMemory<GuestMemoryMmap, LockedIotlb>,
    /// The mappings in a tree behind a lock.
    pub tree: LockedTree,
}

impl World {
    /// Memory in so many mappings.
    ///
    /// # Panics
    ///
    /// Panics where the memory cannot be had or mapped.
    pub fn new(mappings: u64, memory: &Memory) -> Self {
        let one_region = &memory.one_region;
        let layout = Layout::new(mappings);
        let iotlb = LockedIotlb::default();
        let tree = LockedTree::default();
        for i in 0..mappings {
            let (iova, gpa) = (layout.iova(i), GuestAddress(layout.gpa(i)));
            iotlb.map(iova, gpa, layout.len);
            let host = one_region.get_host_address(gpa).expect("inside");
            tree.map(iova, host, layout.len);
        }
        World {
            layout,
            memory: memory.clone(),
            atomic: GuestMemoryAtomic::new(one_region.clone()),
            space: mapped(layout, memory, ReaderBarrier::default()),
            membarrier: mapped(layout, memory, ReaderBarrier::Membarrier),
            iommu: IommuMemory::new(one_region.clone(), iotlb, true, ()),
            tree,
        }
    }
}

/// A space with the mappings of `layout`.
///
/// # Panics
///
/// Panics where the memory cannot be mapped.
pub fn mapped(layout: Layout, memory: &Memory, barrier: ReaderBarrier) -> IoAddressSpace {
    // One more, for what is mapped elsewhere meanwhile.
    let space = IoAddressSpace::builder()
        .entry_limit(layout.mappings as usize + 1)
        .reader_barrier(barrier)
        .build();
    for i in 0..layout.mappings {
        let gpa = GuestAddress(layout.gpa(i));
        let backing = Backing::from_guest_memory(&memory.one_region, gpa, layout.len as usize);
        space
            .map(
                layout.iova(i),
                backing.expect("inside"),
                Permissions::ReadWrite,
            )
            .expect("a free range");
    }
    space
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An IO address space with the rules of the VFIO type1 IOMMU, and DMA through it from the CPU side.
//!
//! # What for
//!
//! A device sees memory through I/O virtual addresses (IOVAs). A device model that runs in user
//! space (a vfio-user server, a vhost-user back end, an emulated or mediated device) must read and
//! write those addresses on the device's behalf, while somebody else maps and unmaps them. This
//! crate is that address space: what Linux' `vfio_iommu_type1` keeps for a container, and what its
//! `vfio_dma_rw` does with it.
//!
//! # How it works
//!
//! - [`IoAddressSpace`] holds mappings from IOVA ranges to a [`Backing`]: a part of a `GuestMemoryMmap`
//!   ([`from_guest_memory`](Backing::from_guest_memory)), of a file, or anonymous memory. [`map`](IoAddressSpace::map) and [`unmap`](IoAddressSpace::unmap) follow type1
//!   v2: overlaps, cuts, misalignment and too many entries are refused as the kernel refuses them,
//!   and [`Error::errno`] says how. Other [profiles](Profile) follow type1 v1, iommufd, or the IOTLB of
//!   vhost.
//! - [`replace`](IoAddressSpace::replace) changes memory and permissions of a mapping under the eyes of its
//!   users, [`copy_to`](IoAddressSpace::copy_to) shares memory with another space,
//!   [`invalidate_vaddr`](IoAddressSpace::invalidate_vaddr) takes it away until it is given other.
//! - An access crosses any number of mappings, in chunks as large as the mappings allow. An error
//!   says how many bytes were done ([`Error::completed`]).
//! - Maps and unmaps also come in batches, written pages are kept by I/O virtual address where
//!   somebody tracks them, and [`stats`](IoAddressSpace::stats) counts what happens.
//! - Two tiers of protection. *Inline* accesses (through a [`DmaHandle`], or directly on the space)
//!   are short and finish before an unmap proceeds. Memory that *leaves the call* (slices of a
//!   [`DmaGuard`], a [`ScatterList`]) holds a lease on the mappings it touches, and pinned pages
//!   ([`Pinner`]) a pin: an unmap of such a range tells the holders, waits for them up to a
//!   deadline, and names them when it passes. Unmaps elsewhere are not delayed.
//! - A [`Pinner`] pins ranges or lists of pages, may be moved to another space
//!   ([`replace`](Pinner::replace)), and what it pins may be limited ([`PinOptions`], [`MemlockLimit`]).
//!
//! # Example
//!
//! ```
//! use iommu_type1::{Backing, IoAddressSpace};
//! use vm_memory::Permissions;
//!
//! let space = IoAddressSpace::new();
//! space.map(0x1_0000, Backing::anonymous(0x1000)?, Permissions::ReadWrite)?;
//! space.map(0x1_1000, Backing::anonymous(0x1000)?, Permissions::ReadWrite)?;
//!
//! // One access over both mappings.
//! let handle = space.handle();
//! handle.write(0x1_0ffe, b"DMA!")?;
//! let mut bytes = [0; 4];
//! handle.read(0x1_0ffe, &mut bytes)?;
//! assert_eq!(&bytes, b"DMA!");
//!
//! // Errors carry the kernel's errno, the values, and how far the access came.
//! let error = space.read(0x1_1ffe, &mut bytes).unwrap_err();
//! assert_eq!((error.errno(), error.completed()), (libc::EINVAL, 2));
//!
//! assert_eq!(space.unmap(0x1_0000, 0x2000)?, 0x2000);
//! # Ok::<(), iommu_type1::Error>(())
//! ```
//!
//! # Gotchas
//!
//! - The smallest unit is the host page, see [`page_size`]; it is not 4096 everywhere.
//! - A write needs the mapping's read permission too, as in type1; not so with a
//!   [`PermissionPolicy`] that is strict.
//! - Dirty pages ([`take_dirty`](IoAddressSpace::take_dirty)) know what is written through the space and
//!   what is pinned, not what hardware or another holder of host addresses writes: that has to be said
//!   ([`mark_dirty`](IoAddressSpace::mark_dirty)).
//! - A [`DmaGuard`] keeps a lease on every mapping it has touched until it is dropped: take one per
//!   request, not one per device.
//! - Never unmap from inside a [`ReadVolatile`](vm_memory::ReadVolatile) or
//!   [`WriteVolatile`](vm_memory::WriteVolatile) that an access of the same space has called: it
//!   fails at once with [`Error::InsideAccess`].
//! - Whoever has the file behind a mapping can make it shorter, and then an access ends this process with SIGBUS;
//!   files that are sealed (`F_SEAL_SHRINK`) cannot. With the feature `sigbus`, `Backing::guarded` makes that an
//!   error of the access.
//! - Guest memory is shared with the guest: bytes may change between two reads of them.
//!
//! # Implementation notes
//!
//! A read or write by a handle that succeeds takes no lock and no reference count and makes no system
//! call: it announces itself in a
//! slot of its own (a handle has one, the shared path tries for one), looks the address up in a radix
//! table, and copies. An unmap takes the mapping out of the table, then waits for the slots whose accesses
//! were running. What it took out is freed after that. [`ReaderBarrier`] chooses who pays for the barrier
//! between the two.
//!
//! # Features
//!
//! All off by default.
//!
//! - `iommu`: `IommuAdapter`, vm-memory's `Iommu` on an address space.
//! - `serde`: snapshots that can be written and read.
//! - `sigbus`: `Backing::guarded`, accesses that survive files which get shorter.
//! - `uapi`: the ioctls of a type1 container on their argument structs.

// Says of what is behind a feature that it is.
#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(not(target_os = "linux"))]
compile_error!("iommu-type1 models the Linux VFIO type1 IOMMU and is built for Linux only");

mod access;
mod atomics;
mod attach;
mod backing;
mod change;
mod check;
mod copy;
mod deadline;
mod dirty;
mod error;
mod gaps;
mod grace;
mod guest_memory;
mod handle;
mod holder;
mod info;
#[cfg(feature = "iommu")]
mod iommu_adapter;
mod iova_ranges;
mod lease;
mod listen;
mod map;
mod map_guest;
mod mapping;
mod mapping_set;
mod membarrier;
mod memlock;
mod memory;
mod pin;
mod profile;
mod range;
mod replace;
mod sg;
mod share;
mod sigbus;
mod snapshot;
mod space;
mod stats;
mod stream;
mod table;
mod turn;
#[cfg(feature = "uapi")]
pub mod uapi;
mod unmap;
mod vaddr;
mod writer;

#[cfg(all(test, loom))]
mod model;

pub use access::Transfer;
pub use atomics::CompareExchange;
pub use backing::Backing;
pub use change::Change;
pub use dirty::{Dirty, DirtyBitmap, DirtyPages, DirtySlice};
pub use error::{errno_of, Error, Result};
pub use guest_memory::{DmaGuard, DmaMemory, DmaSlices};
pub use handle::DmaHandle;
pub use holder::{Holder, HolderKind};
pub use info::{Info, Migration};
#[cfg(feature = "iommu")]
pub use iommu_adapter::{IommuAdapter, LeasedIotlb};
pub use iova_ranges::IovaRanges;
pub use listen::{Listener, Listening, MappingInfo, LISTENER_LIMIT};
pub use mapping_set::MappingSet;
pub use membarrier::ReaderBarrier;
pub use memlock::MemlockLimit;
pub use page_pin::{Interest, PinOptions, PinPages, UnmapNotice};
pub use pin::{PinnedPages, Pinner};
pub use profile::{PermissionPolicy, Profile};
pub use range::page_size;
pub use sg::ScatterList;
pub use snapshot::{
    BackingRef, Place, SavedAccess, SavedLimits, SavedMapping, Snapshot, SnapshotError,
    SnapshotMemory, SNAPSHOT_VERSION,
};
pub use space::{
    IoAddressSpace, IoAddressSpaceBuilder, DIRTY_LIMIT, DMA_ENTRY_LIMIT, TABLE_LIMIT,
    UNMAP_DEADLINE, UNMAP_REMINDERS,
};
pub use stats::Stats;
pub use unmap::{UnmapOptions, UnmapPolicy, HOLDERS_LISTED};

/// Examples of the README are tested as those here are.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

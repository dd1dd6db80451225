// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is mapped, as data, and spaces made of it.

mod restore;
mod save;

use std::fs::File;
use std::sync::Arc;

#[cfg(feature = "serde")]
use serde::{Deserialize, Serialize};
use vm_memory::Permissions;

use crate::{Backing, PermissionPolicy, Profile};

/// The layout of [`Snapshot`] that this version writes and reads.
pub const SNAPSHOT_VERSION: u32 = 1;

/// What an address space was at one moment, from [`IoAddressSpace::snapshot`](crate::IoAddressSpace::snapshot).
///
/// Data and nothing else. With the feature `serde` it can be written and read in any format of serde; whoever
/// reads it need not be trusted ([`IoAddressSpaceBuilder::restore`](crate::IoAddressSpaceBuilder::restore)).
///
/// Not in it: the bytes of the memory; pins, leases, handles, listeners and the sets that mappings belong to;
/// mappings that are being unmapped or whose unmap has ended at its deadline; deadline and policy of unmaps, the
/// barrier, and which addresses and sizes of pages the hardware knows, which are the builder's.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(Serialize, Deserialize))]
pub struct Snapshot {
    /// [`SNAPSHOT_VERSION`].
    pub version: u32,
    /// Bytes of a host page: what a bit of [`SavedMapping::dirty`] stands for.
    pub page_size: u64,
    /// Whose rules the space follows.
    pub profile: Profile,
    /// What a write needs.
    pub permissions: PermissionPolicy,
    /// The limits of the space.
    pub limits: SavedLimits,
    /// Whether dirty pages are tracked.
    pub tracks_dirty: bool,
    /// How many files there are behind mappings.
    pub files: u32,
    /// The size of each region of memory that belongs to no file.
    pub anonymous: Vec<u64>,
    /// By address.
    pub mappings: Vec<SavedMapping>,
}

/// The limits of a space, as [`IoAddressSpaceBuilder`](crate::IoAddressSpaceBuilder) has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(Serialize, Deserialize))]
pub struct SavedLimits {
    /// Most mappings.
    pub entries: u64,
    /// Most bytes of the table's nodes.
    pub table: u64,
    /// Most bytes of the marks of dirty pages.
    pub dirty: u64,
}

/// A mapping of a [`Snapshot`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(Serialize, Deserialize))]
pub struct SavedMapping {
    /// First address.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
    /// What it is mapped for.
    pub access: SavedAccess,
    /// The memory; none of a mapping whose memory was taken away
    /// ([`IoAddressSpace::invalidate_vaddr`](crate::IoAddressSpace::invalidate_vaddr)).
    pub backing: Option<BackingRef>,
    /// While dirty pages are tracked, a bit for each page, the first in the lowest bit of the first word; else
    /// none.
    pub dirty: Vec<u64>,
}

/// Permissions in a [`Snapshot`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(Serialize, Deserialize))]
pub struct SavedAccess {
    /// Reads.
    pub read: bool,
    /// Writes.
    pub write: bool,
}

/// Which memory is behind a mapping of a [`Snapshot`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(Serialize, Deserialize))]
pub struct BackingRef {
    /// Where it is.
    pub place: Place,
    /// Bytes.
    pub size: u64,
    /// What the process may do with it.
    pub access: SavedAccess,
    /// Where the guest has it, if that is known ([`Backing::guest_address`]).
    #[cfg_attr(feature = "serde", serde(default))]
    pub guest_address: Option<u64>,
}

/// Where memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(Serialize, Deserialize))]
pub enum Place {
    /// In a file.
    File {
        /// Index in [`SnapshotMemory::files`].
        file: u32,
        /// Where it begins in the file.
        offset: u64,
    },
    /// In memory that belongs to no file, whose bytes somebody has to bring along.
    Anonymous {
        /// Index in [`Snapshot::anonymous`] and [`SnapshotMemory::anonymous`].
        region: u32,
        /// Where it begins in the region.
        offset: u64,
    },
}

/// What a [`Snapshot`] refers to by index, for whoever passes the files on and copies the bytes.
///
/// It keeps the memory, also of mappings that are unmapped meanwhile.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct SnapshotMemory {
    /// Files: mappings of the same open file (the same `Arc`) have one.
    pub files: Vec<Arc<File>>,
    /// Whole regions of memory that belong to no file.
    pub anonymous: Vec<Backing>,
}

/// What is wrong with a [`Snapshot`] in itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// It has a layout that is not known.
    #[error("version {0} of a snapshot is not known")]
    Version(u32),
    /// It was taken where pages have another size.
    #[error("a snapshot with pages of {0:#x} bytes")]
    PageSize(u64),
    /// It asks for more than the builder allows.
    #[error("a limit of {asked} in a snapshot, where {allowed} is allowed")]
    Limit {
        /// The limit that it has.
        asked: u64,
        /// That of the builder.
        allowed: u64,
    },
    /// A mapping refers to a file or region that is not there, or to what is behind its end.
    #[error("the mapping at {iova:#x} refers to memory that is not there")]
    Place {
        /// Start of the mapping.
        iova: u64,
    },
    /// The memory behind a mapping has another size.
    #[error("the mapping at {iova:#x} has {size:#x} bytes, the memory behind it {backing:#x}")]
    Size {
        /// Start of the mapping.
        iova: u64,
        /// Its size in bytes.
        size: u64,
        /// Bytes of the memory.
        backing: u64,
    },
    /// A mapping stands for guest memory that ends beyond the 64-bit address space.
    #[error("the mapping at {iova:#x} stands for guest memory at {address:#x} that ends beyond the 64-bit address space")]
    GuestAddress {
        /// Start of the mapping.
        iova: u64,
        /// Where the guest should have it.
        address: u64,
    },
    /// The dirty pages of a mapping are not those of so many pages.
    #[error("the mapping at {iova:#x} has {words} words of dirty pages that do not fit its size")]
    Dirty {
        /// Start of the mapping.
        iova: u64,
        /// Words of them.
        words: usize,
    },
}

impl From<Permissions> for SavedAccess {
    fn from(permissions: Permissions) -> Self {
        SavedAccess {
            read: permissions.allow(Permissions::Read),
            write: permissions.allow(Permissions::Write),
        }
    }
}

impl From<SavedAccess> for Permissions {
    fn from(access: SavedAccess) -> Self {
        match (access.read, access.write) {
            (false, false) => Permissions::No,
            (true, false) => Permissions::Read,
            (false, true) => Permissions::Write,
            (true, true) => Permissions::ReadWrite,
        }
    }
}

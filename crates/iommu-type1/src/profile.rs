// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whose rules a space follows, as data: what differs between the profiles stands here and nowhere else.

use crate::check::Check;

/// Whose rules an [`IoAddressSpace`](crate::IoAddressSpace) follows.
///
/// ```
/// use iommu_type1::{Backing, IoAddressSpace, Profile};
/// use vm_memory::Permissions::ReadWrite;
///
/// let space = IoAddressSpace::builder().profile(Profile::Iotlb).build();
/// space.map(0x1000, Backing::anonymous(0x3000)?, ReadWrite)?;
/// // An update replaces what is there, an invalidate cuts it.
/// space.map(0x2000, Backing::anonymous(0x1000)?, ReadWrite)?;
/// assert_eq!(space.unmap(0x1000, 0x1000)?, 0x1000);
/// assert_eq!(space.mappings(), 2);
/// # Ok::<(), iommu_type1::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum Profile {
    /// `VFIO_TYPE1_IOMMU`. An unmap takes away whole every mapping that begins in its range, and stops
    /// at once at one that begins before it. No dirty pages are kept and none can be pinned.
    Type1v1,
    /// `VFIO_TYPE1v2_IOMMU`: an unmap cuts no mapping.
    #[default]
    Type1v2,
    /// `IOMMU_IOAS_MAP` and its neighbours: as v2, but what is not there is ENOENT, and so is a cut. The
    /// smallest unit is the host page, as in the others; the kernel's may be smaller. Where the kernel
    /// has removed some areas before it meets the one that would be cut, here none is. Ranges that are allowed
    /// ([`IovaRanges`](crate::IovaRanges)) say where
    /// [`map_anywhere`](crate::IoAddressSpace::map_anywhere) may look, and bind no map at a given address.
    Iommufd,
    /// The device IOTLB of vhost: a map replaces what it overlaps, an unmap cuts.
    Iotlb,
}

/// What a mapping has to permit for a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum PermissionPolicy {
    /// Reads and writes, as type1's `vfio_dma_rw` wants it: nobody can use a mapping for writes only.
    WriteNeedsRead,
    /// Writes.
    Strict,
}

/// What an unmap does with a mapping of which its range has a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// It fails, and nothing is removed.
    Refuse,
    /// It takes it away whole if it begins in the range, and nothing at all if it begins before.
    Whole,
    /// It takes away the part.
    Split,
}

/// What a map does where something is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Overlapping {
    Refuse,
    Replace,
}

#[derive(Debug)]
pub(crate) struct Rules {
    /// What is looked at before a map, in order.
    pub(crate) map: &'static [Check],
    /// What is looked at once there is room for a map, before its memory.
    pub(crate) map_late: &'static [Check],
    /// Whether a range that may not be mapped is refused before one that is mapped.
    pub(crate) ranges_first: bool,
    /// Whether only the addresses that are found for a mapping have to be allowed ones; none may be reserved.
    pub(crate) allowed_when_found: bool,
    /// What is looked at before a copy, in order, of where it comes from and then of where it goes to.
    pub(crate) copy_both: &'static [Check],
    /// What is looked at then of where it comes from.
    pub(crate) copy_from: &'static [Check],
    /// What is looked at before an unmap, in order.
    pub(crate) unmap: &'static [Check],
    pub(crate) overlapping: Overlapping,
    pub(crate) cut: Cut,
    /// The errno of a cut that is refused.
    pub(crate) cut_errno: i32,
    /// Whether an unmap that finds nothing fails.
    pub(crate) needs_something: bool,
    /// The address and size that stand for everything in an unmap.
    pub(crate) everything: Option<(u64, u64)>,
    /// The errno of an access where nothing is mapped.
    pub(crate) hole_errno: i32,
    pub(crate) permissions: PermissionPolicy,
    /// Whether memory can be taken away from mappings and given back.
    pub(crate) vaddr: bool,
    /// Whether dirty pages are kept.
    pub(crate) dirty_pages: bool,
    /// Whether pages can be pinned.
    pub(crate) pins: bool,
    /// Whether what is pinned is dirty.
    pub(crate) pinned_is_dirty: bool,
    /// Whether a map for more than its file was opened for is refused for the file, and not for the memory.
    pub(crate) looks_at_files: bool,
}

const MAP: &[Check] = &[
    Check::NotEmpty,
    Check::Fits,
    Check::HostFits,
    Check::Permits,
    Check::AddressAligned,
    Check::SizeAligned,
    Check::HostAligned,
];

const UNMAP: &[Check] = &[
    Check::AddressAligned,
    Check::SizeAligned,
    Check::NotEmpty,
    Check::Fits,
];

static TYPE1_V2: Rules = Rules {
    map: MAP,
    map_late: &[],
    ranges_first: false,
    allowed_when_found: false,
    copy_both: &[],
    copy_from: MAP,
    unmap: UNMAP,
    overlapping: Overlapping::Refuse,
    cut: Cut::Refuse,
    cut_errno: libc::EINVAL,
    needs_something: false,
    everything: None,
    hole_errno: libc::EINVAL,
    permissions: PermissionPolicy::WriteNeedsRead,
    vaddr: true,
    dirty_pages: true,
    pins: true,
    pinned_is_dirty: true,
    looks_at_files: false,
};

static TYPE1_V1: Rules = Rules {
    cut: Cut::Whole,
    dirty_pages: false,
    pins: false,
    ..TYPE1_V2
};

static IOMMUFD: Rules = Rules {
    map: &[
        Check::BelowMax,
        Check::Permits,
        Check::HostEnds,
        Check::NotEmpty,
        Check::SizeAligned,
        Check::AddressAligned,
        Check::Fits,
    ],
    map_late: &[Check::HostAligned],
    ranges_first: true,
    allowed_when_found: true,
    copy_both: &[Check::BelowMax, Check::Permits],
    copy_from: &[Check::NotEmpty, Check::Fits],
    // Whatever is not the whole of areas is a cut.
    unmap: &[Check::BelowMax, Check::NotEmpty, Check::Fits],
    cut_errno: libc::ENOENT,
    needs_something: true,
    everything: Some((0, u64::MAX)),
    hole_errno: libc::ENOENT,
    permissions: PermissionPolicy::Strict,
    vaddr: false,
    pinned_is_dirty: false,
    looks_at_files: true,
    ..TYPE1_V2
};

static IOTLB: Rules = Rules {
    overlapping: Overlapping::Replace,
    cut: Cut::Split,
    // A miss: whoever can answer it is asked, and the access tried again.
    hole_errno: libc::EAGAIN,
    permissions: PermissionPolicy::Strict,
    vaddr: false,
    pinned_is_dirty: false,
    ..TYPE1_V2
};

impl Profile {
    /// Whether pages can be pinned: not by the rules of `VFIO_TYPE1_IOMMU` (EACCES).
    pub fn pins(self) -> bool {
        self.rules().pins
    }

    pub(crate) fn rules(self) -> &'static Rules {
        match self {
            Profile::Type1v1 => &TYPE1_V1,
            Profile::Type1v2 => &TYPE1_V2,
            Profile::Iommufd => &IOMMUFD,
            Profile::Iotlb => &IOTLB,
        }
    }
}

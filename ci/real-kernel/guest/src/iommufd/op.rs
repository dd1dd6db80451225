// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Operations on the IOASes of one iommufd, and what comes out of them.

use std::fmt;

use iommufd_bindings::{
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA as MAP_FIXED_IOVA,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE as MAP_READABLE,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE as MAP_WRITEABLE,
};

/// `IOMMU_IOAS_MAP_FIXED_IOVA`.
pub const FIXED: u32 = MAP_FIXED_IOVA;
/// `IOMMU_IOAS_MAP_READABLE`.
pub const READ: u32 = MAP_READABLE;
/// `IOMMU_IOAS_MAP_WRITEABLE`.
pub const WRITE: u32 = MAP_WRITEABLE;

/// IOASes there are at most. The device is attached to the first, which is never destroyed.
pub const SPACES: usize = 3;

/// The IOAS that the device is attached to.
pub const ATTACHED: usize = 0;

/// One call, as plain numbers: it can be made again on a fresh iommufd. Spaces go by their place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// `IOMMU_IOAS_ALLOC`, where the place is empty.
    Alloc(usize),
    /// `IOMMU_DESTROY`.
    Destroy(usize),
    /// `IOMMU_IOAS_MAP`, or `IOMMU_IOAS_MAP_FILE`.
    Map(Map),
    /// `IOMMU_IOAS_UNMAP`.
    Unmap(Unmap),
    /// `IOMMU_IOAS_COPY`.
    Copy(Copied),
    /// `IOMMU_IOAS_IOVA_RANGES` with room for so many.
    Ranges(usize, u32),
    /// `IOMMU_IOAS_ALLOW_IOVAS`.
    Allow(Allow),
}

/// What is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// Memory of the process, from an address.
    Own(u64),
    /// The file, from an offset.
    File(u64),
    /// A file that is not open.
    Closed,
}

/// Arguments of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Map {
    pub space: usize,
    pub flags: u32,
    pub memory: Memory,
    pub length: u64,
    pub iova: u64,
}

/// Arguments of an unmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Unmap {
    pub space: usize,
    pub iova: u64,
    pub length: u64,
}

/// Arguments of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Copied {
    pub flags: u32,
    pub to: usize,
    pub from: usize,
    pub length: u64,
    pub to_iova: u64,
    pub from_iova: u64,
}

/// Ranges that are allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allow {
    /// Whose.
    pub space: usize,
    /// First and last addresses.
    pub ranges: [(u64, u64); 2],
    /// How many of them are given.
    pub count: usize,
}

impl Allow {
    /// Those that are given.
    pub fn given(&self) -> &[(u64, u64)] {
        &self.ranges[..self.count]
    }
}

/// What a call has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Its errno, if it failed.
    pub result: Result<(), i32>,
    /// What the argument says afterwards: the address of what was mapped, the bytes that were unmapped, the
    /// number of ranges.
    pub value: u64,
    /// The ranges that were written.
    pub ranges: Vec<(u64, u64)>,
}

impl Outcome {
    /// A call that leaves its argument, or changes one number.
    pub fn plain(result: Result<(), i32>, value: u64) -> Self {
        let ranges = Vec::new();
        Outcome {
            result,
            value,
            ranges,
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Op::Alloc(space) => write!(f, "alloc {space}"),
            Op::Destroy(space) => write!(f, "destroy {space}"),
            Op::Map(Map {
                space,
                flags,
                memory,
                length,
                iova,
            }) => {
                write!(
                    f,
                    "map {space} flags={flags:#x} {memory:x?} length={length:#x} iova={iova:#x}"
                )
            }
            Op::Unmap(Unmap {
                space,
                iova,
                length,
            }) => {
                write!(f, "unmap {space} iova={iova:#x} length={length:#x}")
            }
            Op::Copy(Copied {
                flags,
                to,
                from,
                length,
                to_iova,
                from_iova,
            }) => write!(
                f,
                "copy flags={flags:#x} to {to} iova={to_iova:#x} from {from} iova={from_iova:#x} \
                 length={length:#x}"
            ),
            Op::Ranges(space, room) => write!(f, "ranges {space} room={room}"),
            Op::Allow(allow) => write!(f, "allow {} {:x?}", allow.space, allow.given()),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.result {
            Ok(()) => write!(f, "0")?,
            Err(errno) => write!(f, "errno {errno}")?,
        }
        write!(f, " value={:#x} ranges={:x?}", self.value, self.ranges)
    }
}

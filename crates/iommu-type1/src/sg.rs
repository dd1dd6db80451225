// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Owned scatter lists: memory of a range for as long as the list lives.

use std::fmt;

use vm_memory::{Permissions, VolatileSlice};

use crate::dirty::DirtySlice;
use crate::lease::{Leased, Leases};
use crate::mapping::Need;
use crate::memory;
use crate::{IoAddressSpace, Result};

/// The memory of a range of IOVAs, one slice a mapping, owned by whoever has the list.
///
/// It borrows nothing: it can be kept in a queue or sent to another thread. Until it is dropped, an
/// unmap of what it covers waits.
///
/// ```
/// use iommu_type1::{Backing, IoAddressSpace};
/// use vm_memory::{Bytes, Permissions};
///
/// let space = IoAddressSpace::new();
/// space.map(0x1000, Backing::anonymous(0x1000)?, Permissions::ReadWrite)?;
/// space.map(0x2000, Backing::anonymous(0x1000)?, Permissions::ReadWrite)?;
///
/// let list = space.scatter(0x1f00, 0x200, Permissions::Read)?;
/// let sent = std::thread::spawn(move || list.iter().map(|slice| slice.len()).collect::<Vec<_>>());
/// assert_eq!(sent.join().unwrap(), [0x100, 0x100]);
/// # Ok::<(), iommu_type1::Error>(())
/// ```
///
/// # Invariants
///
/// What the segments refer to is leased.
pub struct ScatterList {
    segments: Vec<Segment>,
    len: usize,
    leases: Leases,
}

struct Segment {
    mapping: Leased,
    iova: u64,
    len: usize,
}

impl IoAddressSpace {
    /// The memory of `len` bytes from `iova` for `access`, all of it or none.
    ///
    /// # Errors
    ///
    /// As [`read`](IoAddressSpace::read), and [`Error::NoMemory`](crate::Error::NoMemory) (ENOMEM); nothing is leased then. No bytes give an empty list.
    pub fn scatter(&self, iova: u64, len: usize, access: Permissions) -> Result<ScatterList> {
        let mut segments = Vec::new();
        let mut noted = Ok(());
        let leases = Leases::taken_by(self.view.clone(), |space, leasing| {
            let need = Need::of(access);
            space.for_each_chunk(
                leasing.inside(),
                iova,
                len,
                need,
                |mapping, iova, len, _| {
                    let mapping = leasing.lease(mapping);
                    if noted.is_ok() {
                        noted = memory::push(&mut segments, Segment { mapping, iova, len });
                    }
                },
            )
        })?;
        noted?;
        Ok(ScatterList {
            segments,
            len,
            leases,
        })
    }
}

impl ScatterList {
    /// The slices in order of their addresses.
    ///
    /// Slices of a list made for [`Permissions::Read`] must only be read.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = VolatileSlice<'_, DirtySlice<'_>>> {
        self.segments
            .iter()
            // SAFETY: leased as long as `self`, by the invariant.
            .map(|segment| unsafe { segment.mapping.get() }.slice(segment.iova, segment.len))
    }

    /// Bytes in all slices together.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl fmt::Debug for ScatterList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScatterList")
            .field("segments", &self.segments.len())
            .field("len", &self.len)
            .field("view", self.leases.view())
            .finish()
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Mappings that go together with whoever has made them.

use std::fmt;

use vm_memory::Permissions;

use crate::unmap::Revocation;
use crate::{Backing, IoAddressSpace, Result, UnmapOptions};

/// Which set a mapping was made through: a number that no other set of the space has had.
///
/// Of six bytes, which fit where a mapping has room, and are more than anybody can use up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SetId([u16; 3]);

impl SetId {
    /// Of mappings that were made through no set.
    pub(crate) const NONE: SetId = SetId([0; 3]);

    pub(crate) fn new(number: u64) -> Self {
        SetId([number as u16, (number >> 16) as u16, (number >> 32) as u16])
    }
}

/// The mappings of one client, device or connection: those made through it are unmapped when it is dropped.
///
/// A server has one for each client, and a client that goes away without a word leaves nothing behind. Other
/// mappings of the space are nothing of its business: they can be accessed like all others, but not unmapped
/// through the set. The space may unmap those of the set.
///
/// ```
/// use iommu_type1::{Backing, IoAddressSpace};
/// use vm_memory::Permissions::ReadWrite;
///
/// let space = IoAddressSpace::new();
/// space.map(0x1000, Backing::anonymous(0x1000)?, ReadWrite)?;
/// let client = space.mapping_set();
/// client.map(0x8000, Backing::anonymous(0x1000)?, ReadWrite)?;
/// assert_eq!(client.unmap(0x1000, 0x1000).unwrap_err().errno(), libc::EPERM);
/// assert_eq!(space.mappings(), 2);
/// drop(client);
/// assert_eq!(space.mappings(), 1);
/// # Ok::<(), iommu_type1::Error>(())
/// ```
#[must_use = "dropping it unmaps what was mapped through it"]
pub struct MappingSet {
    /// A reference to the space that signs what it maps.
    space: IoAddressSpace,
    is_closed: bool,
}

impl IoAddressSpace {
    /// A set of mappings, empty.
    pub fn mapping_set(&self) -> MappingSet {
        MappingSet {
            space: self.signing(),
            is_closed: false,
        }
    }
}

impl MappingSet {
    /// As [`IoAddressSpace::map`], and the mapping belongs to the set. So do parts of it
    /// ([`Profile::Iotlb`](crate::Profile::Iotlb)) and what it is when it got other memory
    /// ([`resume_vaddr`](IoAddressSpace::resume_vaddr)); what the space replaces it by does not.
    ///
    /// # Errors
    ///
    /// As [`IoAddressSpace::map`]; and [`Error::NotOwned`](crate::Error::NotOwned) (EPERM) where it would
    /// replace a mapping that does not belong to the set.
    pub fn map(&self, iova: u64, backing: Backing, prot: Permissions) -> Result<()> {
        self.space.map(iova, backing, prot)
    }

    /// As [`IoAddressSpace::map_batch`] and [`map`](MappingSet::map).
    ///
    /// # Errors
    ///
    /// As both.
    pub fn map_batch(
        &self,
        mappings: impl IntoIterator<Item = (u64, Backing, Permissions)>,
    ) -> Result<()> {
        self.space.map_batch(mappings)
    }

    /// As [`IoAddressSpace::map_anywhere`]; the mapping belongs to the set.
    ///
    /// # Errors
    ///
    /// As [`IoAddressSpace::map_anywhere`].
    pub fn map_anywhere(&self, backing: Backing, prot: Permissions) -> Result<u64> {
        self.space.map_anywhere(backing, prot)
    }

    /// As [`IoAddressSpace::unmap`], where every mapping of the range belongs to the set.
    ///
    /// # Errors
    ///
    /// As [`IoAddressSpace::unmap`]; and [`Error::NotOwned`](crate::Error::NotOwned) (EPERM): nothing is
    /// unmapped then.
    pub fn unmap(&self, iova: u64, size: u64) -> Result<u64> {
        self.space.unmap(iova, size)
    }

    /// As [`unmap`](MappingSet::unmap), with a deadline and policy of its own.
    ///
    /// # Errors
    ///
    /// As [`unmap`](MappingSet::unmap).
    pub fn unmap_with(&self, iova: u64, size: u64, options: UnmapOptions) -> Result<u64> {
        self.space.unmap_with(iova, size, options)
    }

    /// Unmaps all that belongs to the set, and returns the bytes; the set can be used further.
    ///
    /// # Errors
    ///
    /// As [`IoAddressSpace::unmap_all`].
    pub fn unmap_all(&self) -> Result<u64> {
        let view = &self.space.view;
        Revocation::of_set(&view.space, view.set, view.space.unmap)?.run(None)
    }

    /// Unmaps all that belongs to the set, as its drop does, which can only log what goes wrong.
    ///
    /// # Errors
    ///
    /// As [`IoAddressSpace::unmap_all`]: what is still held is left to the policy of unmaps then, and to the
    /// space.
    pub fn close(mut self) -> Result<u64> {
        self.is_closed = true;
        self.unmap_all()
    }
}

impl fmt::Debug for MappingSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MappingSet")
            .field("space", &self.space)
            .finish_non_exhaustive()
    }
}

impl Drop for MappingSet {
    fn drop(&mut self) {
        if self.is_closed {
            return;
        }
        if let Err(error) = self.unmap_all() {
            log::error!("the mappings of a set that is dropped: {error}");
        }
    }
}

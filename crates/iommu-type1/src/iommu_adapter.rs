// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! vm-memory's [`Iommu`]: translations to guest physical addresses.

use std::fmt;
use std::ops::Deref;

use vm_memory::iommu::{Error as IommuError, IotlbIterator, IovaRange};
use vm_memory::{GuestAddress, GuestAddressSpace, Iommu, Iotlb, Permissions};

use crate::{DmaGuard, IoAddressSpace};

/// An address space as vm-memory's [`Iommu`], for whoever takes an
/// [`IommuMemory`](vm_memory::IommuMemory) and nothing else.
///
/// Every mapping must carry the guest physical address it stands for
/// ([`Backing::guest_address`](crate::Backing::guest_address)), and the memory below the `IommuMemory` must be that of
/// the mappings. Where one carries none, a translation fails with
/// [`IommuMisconfigured`](IommuError::IommuMisconfigured); where nothing is mapped, or not for the access, with
/// [`CannotResolve`](IommuError::CannotResolve), which has the first part of the range that could not be translated.
///
/// [`IoAddressSpace::memory`](vm_memory::GuestAddressSpace::memory) is better wherever it can be had:
///
/// - The adapter leases what it has translated only while its iterator lives, and `IommuMemory` lets that go when it
///   has made slices of it. An unmap does not wait for those slices: the trait has no place for more.
/// - A translation makes an [`Iotlb`] of what it finds, which takes memory from the allocator; a guard takes none.
/// - What is written is marked in the bitmaps of vm-memory, and not among the space's dirty pages.
///
/// A range of no bytes is translated to nothing, wherever it is. One that ends beyond, or with, the last address there
/// is cannot be said with vm-memory's types, and fails.
///
/// ```
/// use iommu_type1::{Backing, IoAddressSpace, IommuAdapter};
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, IommuMemory, Permissions};
///
/// let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
/// let space = IoAddressSpace::new();
/// let backing = Backing::from_guest_memory(&memory, GuestAddress(0x3000), 0x1000)?;
/// space.map(0x8000, backing, Permissions::ReadWrite)?;
///
/// let translated = IommuMemory::new(memory.clone(), IommuAdapter::new(&space), true, ());
/// translated.write_slice(b"DMA!", GuestAddress(0x8010)).unwrap();
/// assert_eq!(memory.read_obj::<[u8; 4]>(GuestAddress(0x3010)).unwrap(), *b"DMA!");
/// # Ok::<(), iommu_type1::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct IommuAdapter {
    space: IoAddressSpace,
}

impl IommuAdapter {
    /// The adapter of a space.
    pub fn new(space: &IoAddressSpace) -> Self {
        IommuAdapter {
            space: space.clone(),
        }
    }

    /// The space it is of.
    pub fn space(&self) -> &IoAddressSpace {
        &self.space
    }
}

/// What an [`IommuAdapter`] has translated, and leases of the mappings: unmaps wait until it is dropped.
pub struct LeasedIotlb {
    iotlb: Iotlb,
    leases: DmaGuard,
}

impl Deref for LeasedIotlb {
    type Target = Iotlb;

    fn deref(&self) -> &Iotlb {
        &self.iotlb
    }
}

impl fmt::Debug for LeasedIotlb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeasedIotlb")
            .field("iotlb", &self.iotlb)
            .field("leases", &self.leases)
            .finish()
    }
}

impl Iommu for IommuAdapter {
    type IotlbGuard<'a> = LeasedIotlb;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<LeasedIotlb>, IommuError> {
        let mut found = LeasedIotlb {
            iotlb: Iotlb::new(),
            leases: self.space.memory(),
        };
        // vm-memory adds these without a look.
        if iova.0.checked_add(length as u64).is_none() {
            let reason = "it does not end before the last address of 64 bits";
            return Err(cannot_resolve(iova.0, length, reason));
        }
        let mut done = 0;
        while done < length {
            let (at, left) = (iova.0 + done as u64, length - done);
            let mapping = found.leases.mapping(at, access);
            let mapping = mapping.map_err(|error| cannot_resolve(at, left, error))?;
            let Some(guest) = mapping.guest_address(at) else {
                return Err(IommuError::IommuMisconfigured {
                    reason: format!(
                        "the mapping at {:#x} carries no guest physical address",
                        mapping.range.first
                    ),
                });
            };
            let behind = usize::try_from(mapping.range.last - at).unwrap_or(usize::MAX);
            let len = left.min(behind.saturating_add(1));
            found
                .iotlb
                .set_mapping(GuestAddress(at), guest, len, access)?;
            done += len;
        }
        Iotlb::lookup(found, iova, length, access)
            .map_err(|fails| cannot_resolve(iova.0, length, format!("{fails:?}")))
    }
}

fn cannot_resolve(iova: u64, length: usize, reason: impl ToString) -> IommuError {
    IommuError::CannotResolve {
        iova_range: IovaRange {
            base: GuestAddress(iova),
            length,
        },
        reason: reason.to_string(),
    }
}

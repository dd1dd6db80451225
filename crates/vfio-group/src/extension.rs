// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What `VFIO_CHECK_EXTENSION` is asked for, and the IOMMU types among it.

/// The type of a container's IOMMU, as `VFIO_SET_IOMMU` takes it; IOMMU types are extensions too.
///
/// ```
/// use vfio_group::IommuType;
///
/// assert_eq!(IommuType::from(3), IommuType::Type1v2);
/// assert_eq!(u32::from(IommuType::Other(7)), 7);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum IommuType {
    /// `VFIO_TYPE1_IOMMU`: an unmap takes away whole what begins in its range, and nothing can be
    /// pinned.
    Type1,
    /// `VFIO_TYPE1v2_IOMMU`: the rules of iommu-type1.
    Type1v2,
    /// `VFIO_NOIOMMU_IOMMU`: for no-IOMMU groups only; nothing is mapped.
    NoIommu,
    /// Any other number; no driver offers it.
    Other(u32),
}

const TYPE1_IOMMU: u32 = 1;
const TYPE1V2_IOMMU: u32 = 3;
const DMA_CC_IOMMU: u32 = 4;
const NOIOMMU_IOMMU: u32 = 8;
const UNMAP_ALL: u32 = 9;
const UPDATE_VADDR: u32 = 10;

impl From<u32> for IommuType {
    fn from(number: u32) -> Self {
        match number {
            TYPE1_IOMMU => IommuType::Type1,
            TYPE1V2_IOMMU => IommuType::Type1v2,
            NOIOMMU_IOMMU => IommuType::NoIommu,
            other => IommuType::Other(other),
        }
    }
}

impl From<IommuType> for u32 {
    fn from(iommu_type: IommuType) -> Self {
        match iommu_type {
            IommuType::Type1 => TYPE1_IOMMU,
            IommuType::Type1v2 => TYPE1V2_IOMMU,
            IommuType::NoIommu => NOIOMMU_IOMMU,
            IommuType::Other(other) => other,
        }
    }
}

/// Which groups a container has: whether type1 has hardware groups and emulated ones to serve.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Served {
    pub(crate) hardware: bool,
    pub(crate) emulated: bool,
}

/// The answer of type1; `served` once it is the container's driver.
pub(crate) fn type1_extension(extension: u32, served: Option<Served>) -> u32 {
    let supported = match extension {
        TYPE1_IOMMU | TYPE1V2_IOMMU | UNMAP_ALL => true,
        // Whether all domains are coherent: those of hardware are not, and emulated groups have none.
        DMA_CC_IOMMU => served.is_some_and(|served| !served.hardware),
        UPDATE_VADDR => served.is_some_and(|served| !served.emulated),
        _ => false,
    };
    u32::from(supported)
}

/// The answer of the driver of no-IOMMU groups.
pub(crate) fn noiommu_extension(extension: u32) -> u32 {
    u32::from(extension == NOIOMMU_IOMMU)
}

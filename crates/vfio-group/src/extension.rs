// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What `VFIO_CHECK_EXTENSION` is asked for, and the IOMMU types among it.

/// The type of a container's IOMMU, as `VFIO_SET_IOMMU` takes it; IOMMU types are extensions too.
///
/// ```
/// use vfio_group::IommuType;
///
/// assert_eq!(IommuType::from(3), IommuType::Type1v2);
/// assert_eq!(u32::from(IommuType::Other(1)), 1);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum IommuType {
    /// `VFIO_TYPE1v2_IOMMU`: the rules of iommu-type1.
    Type1v2,
    /// Any other number; no driver offers it.
    Other(u32),
}

const TYPE1V2_IOMMU: u32 = 3;
const UNMAP_ALL: u32 = 9;

impl From<u32> for IommuType {
    fn from(number: u32) -> Self {
        match number {
            TYPE1V2_IOMMU => IommuType::Type1v2,
            other => IommuType::Other(other),
        }
    }
}

impl From<IommuType> for u32 {
    fn from(iommu_type: IommuType) -> Self {
        match iommu_type {
            IommuType::Type1v2 => TYPE1V2_IOMMU,
            IommuType::Other(other) => other,
        }
    }
}

/// The answer to `VFIO_CHECK_EXTENSION`, the same before and after the IOMMU is set because there
/// is one driver. Only what can then be called is announced: the kernel's type1 also has the v1
/// rules (1) and, for hardware groups, `VFIO_UPDATE_VADDR` (10).
pub(crate) fn check_extension(extension: u32) -> u32 {
    match extension {
        TYPE1V2_IOMMU | UNMAP_ALL => 1,
        _ => 0,
    }
}

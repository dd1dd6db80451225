// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What an address space has, in the kernel's IOMMU as well.

mod hardware;
#[cfg(feature = "vfio-ioctls")]
mod ops;
#[cfg(feature = "vfio-ioctls")]
mod space_ops;

use std::fmt;
use std::sync::Arc;

use iommu_type1::{IoAddressSpace, Listening};

use crate::follower::{Follower, Target};
use crate::hardware::HardwareContainer;
use crate::Result;

#[cfg(feature = "vfio-ioctls")]
pub use space_ops::SpaceOps;

/// What an address space has mapped, mapped for devices too: whoever maps and unmaps in the space does so for
/// the hardware behind a container of the kernel's.
///
/// - A mapping the kernel refuses is not mapped in the space either: [`Refused`](iommu_type1::Error::Refused)
///   with the kernel's errno, and all of its batch is taken back.
/// - A mirror that comes late is given what there is, or nothing of it.
/// - An unmap takes the mapping from the hardware first, before anybody else is waited for.
/// - What devices write is not marked as dirty: that takes
///   [`mark_dirty`](iommu_type1::IoAddressSpace::mark_dirty).
///
/// Dropping it unmaps what it has mapped.
///
/// If the kernel refuses to unmap, the space has unmapped it all the same, and devices still reach the memory:
/// it is kept, is logged and listed ([`stuck`](Mirror::stuck)), and asked for again when something is to be
/// mapped there and when the mirror is dropped. If that is in vain too, it is leaked.
///
/// # Gotchas
///
/// - The kernel forgets all mappings when the last group leaves the container. A mirror does not notice; for a
///   group that comes afterwards it has to be made anew.
/// - What the IOMMU can map is better said to the space before, so that it is refused by name
///   ([`HardwareContainer::limits`]).
///
/// ```no_run
/// use std::sync::Arc;
/// use iommu_type1::{Backing, IoAddressSpace, IovaRanges};
/// use vfio_group::hardware::{HardwareContainer, HardwareGroup};
/// use vfio_group::{IommuType, Mirror};
/// use vm_memory::Permissions;
///
/// let container = Arc::new(HardwareContainer::open()?);
/// let group = HardwareGroup::open(26)?;
/// group.set_container(&container)?;
/// container.set_iommu(IommuType::Type1v2)?;
///
/// let limits = container.limits()?;
/// let space = IoAddressSpace::builder()
///     .page_sizes(limits.page_sizes)
///     .iova_ranges(IovaRanges::new(&limits.iova_ranges, &[])?)
///     .build();
/// let mirror = Mirror::new(&space, container)?;
/// // Devices may read this, and not write.
/// space.map(0x1000, Backing::anonymous(0x1000)?, Permissions::Read)?;
/// # Ok::<(), vfio_group::Error>(())
/// ```
#[must_use = "dropping it unmaps everything"]
pub struct Mirror {
    listening: Listening,
    stuck: Arc<dyn Stuck>,
}

/// A follower of any target.
trait Stuck: Send + Sync {
    fn stuck(&self) -> Vec<(u64, u64)>;
}

impl<T: Target> Stuck for Follower<T> {
    fn stuck(&self) -> Vec<(u64, u64)> {
        self.stuck()
    }
}

impl Mirror {
    /// Mirrors a space into a container with an IOMMU, each mapping with its permissions.
    ///
    /// # Errors
    ///
    /// [`Error::Iommu`](crate::Error::Iommu) with [`Refused`](iommu_type1::Error::Refused), as
    /// [`IoAddressSpace::listen`].
    pub fn new(space: &IoAddressSpace, container: Arc<HardwareContainer>) -> Result<Self> {
        Mirror::follow(space, container)
    }

    fn follow(space: &IoAddressSpace, target: impl Target + 'static) -> Result<Self> {
        let follower = Arc::new(Follower::new(target));
        Ok(Mirror {
            listening: space.listen(follower.clone())?,
            stuck: follower,
        })
    }

    /// What the kernel has refused to unmap, so that devices still reach its memory: addresses and sizes,
    /// ascending.
    pub fn stuck(&self) -> Vec<(u64, u64)> {
        self.stuck.stuck()
    }

    /// Whether the kernel has refused what it must not refuse (the parts of a mapping that was cut, what was
    /// there before another mirror refused): then everything was unmapped for the devices, and nothing is
    /// mapped for them any more.
    pub fn is_lost(&self) -> bool {
        self.listening.is_lost()
    }
}

impl fmt::Debug for Mirror {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mirror")
            .field("listening", &self.listening)
            .field("stuck", &self.stuck())
            .finish()
    }
}

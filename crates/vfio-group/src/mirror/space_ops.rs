// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An address space in the place of a container of the crate vfio-ioctls.

#![allow(unsafe_code)]

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use iommu_type1::uapi::{bindings, Type1, UserMemory};
use iommu_type1::IoAddressSpace;
use vfio_ioctls::{VfioError, VfioOps};
use vmm_sys_util::errno;

use super::Mirror;
use crate::Result;

/// An address space that code for `VfioOps` maps into, by host addresses: what emulated and mediated devices
/// of the VMM then see, and with [`mirrored`](SpaceOps::mirrored) real devices as well.
///
/// The memory has to be known, as it is kept for as long as it is mapped: `M` finds it by its host address. For
/// guest memory that is `GuestMemoryMmap`.
///
/// Errors are `VfioError::IommuDmaMap` and `IommuDmaUnmap` with the errno of the space; what they say in words is
/// logged. `vfio_dma_unmap` waits for those who use the memory, up to the deadline of the space.
///
/// ```
/// use iommu_type1::IoAddressSpace;
/// use vfio_group::SpaceOps;
/// use vfio_ioctls::VfioOps;
/// use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
///
/// let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
/// let host = memory.get_host_address(GuestAddress(0x8000)).unwrap();
/// let space = IoAddressSpace::new();
/// let ops = SpaceOps::new(space.clone(), memory);
/// // SAFETY: guest memory is accessed as memory that others change.
/// unsafe { ops.vfio_dma_map(0x4000_0000, 0x2000, host) }.unwrap();
/// space.write(0x4000_0ffe, b"DMA!")?;
/// ops.vfio_dma_unmap(0x4000_0000, 0x2000).unwrap();
/// assert_eq!(space.mappings(), 0);
/// # Ok::<(), iommu_type1::Error>(())
/// ```
pub struct SpaceOps<M> {
    type1: Type1<M>,
    real: Option<Real>,
}

struct Real {
    mirror: Mirror,
    ops: Arc<dyn VfioOps>,
}

impl<M: UserMemory> SpaceOps<M> {
    /// An address space alone, whose user has this memory.
    pub fn new(space: IoAddressSpace, memory: M) -> Self {
        SpaceOps {
            type1: Type1::new(space, memory),
            real: None,
        }
    }

    /// As [`new`](SpaceOps::new), and what is mapped is mapped by `ops` too. In this crate's eyes it is a
    /// [`Mirror`]; in those of vfio-ioctls it is `ops` itself, so a `VfioDevice` can be opened on it.
    ///
    /// # Errors
    ///
    /// As [`Mirror::with_ops`].
    pub fn mirrored(space: IoAddressSpace, memory: M, ops: Arc<dyn VfioOps>) -> Result<Self> {
        let mirror = Mirror::with_ops(&space, ops.clone())?;
        Ok(SpaceOps {
            type1: Type1::new(space, memory),
            real: Some(Real { mirror, ops }),
        })
    }

    /// The space.
    pub fn space(&self) -> &IoAddressSpace {
        self.type1.space()
    }

    /// The mirror, if there is one.
    pub fn mirror(&self) -> Option<&Mirror> {
        self.real.as_ref().map(|real| &real.mirror)
    }

    /// Whether real devices still reach a part of a range.
    fn is_stuck(&self, iova: u64, size: u64) -> bool {
        let last = iova.saturating_add(size.saturating_sub(1));
        let stuck = self.mirror().map(Mirror::stuck).unwrap_or_default();
        let reaches = |(first, size): (u64, u64)| first <= last && first + (size - 1) >= iova;
        stuck.into_iter().any(reaches)
    }
}

impl<M: UserMemory + Send + Sync + 'static> VfioOps for SpaceOps<M> {
    unsafe fn vfio_dma_map(
        &self,
        iova: u64,
        size: usize,
        user_addr: *mut u8,
    ) -> vfio_ioctls::Result<()> {
        let map = bindings::vfio_iommu_type1_dma_map {
            argsz: size_of::<bindings::vfio_iommu_type1_dma_map>() as u32,
            flags: bindings::VFIO_DMA_MAP_FLAG_READ | bindings::VFIO_DMA_MAP_FLAG_WRITE,
            vaddr: user_addr as u64,
            iova,
            size: size as u64,
        };
        self.type1.map_dma(&map).map_err(|error| {
            log::warn!("{error}");
            VfioError::IommuDmaMap(errno::Error::new(error.errno()))
        })
    }

    fn vfio_dma_unmap(&self, iova: u64, size: usize) -> vfio_ioctls::Result<()> {
        let size = size as u64;
        let unmapped = self.space().unmap(iova, size).map_err(|error| {
            log::warn!("{error}");
            VfioError::IommuDmaUnmap(errno::Error::new(error.errno()))
        })?;
        if self.is_stuck(iova, size) {
            return Err(VfioError::IommuDmaUnmap(errno::Error::new(libc::EBUSY)));
        }
        if unmapped != size {
            return Err(VfioError::InvalidDmaUnmapSize);
        }
        Ok(())
    }

    /// What maps for real devices, where there is that: `VfioDevice` wants to know whether it is a container or
    /// an iommufd.
    fn as_any(&self) -> &dyn Any {
        match &self.real {
            Some(real) => real.ops.as_any(),
            None => self,
        }
    }
}

impl<M> fmt::Debug for SpaceOps<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mirror = self.real.as_ref().map(|real| &real.mirror);
        f.debug_struct("SpaceOps")
            .field("mirror", &mirror)
            .finish_non_exhaustive()
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The container: groups that share one IO address space.

use std::sync::Arc;

use checked_sync::{lock, Mutex};
use iommu_type1::{Backing, IoAddressSpace, IoAddressSpaceBuilder, Profile};
use vm_memory::Permissions;

use crate::extension::{noiommu_extension, type1_extension, Served};
use crate::{Error, GroupType, IommuType, Result};

/// An open container: `/dev/vfio/vfio`.
///
/// Dropping it closes the file; the container lives on, with its mappings, while a group is
/// attached. When the last group leaves, the IOMMU is released: all mappings vanish, and before
/// anything is mapped again a group must be attached and the IOMMU set anew.
///
/// ```
/// use vfio_group::{Container, Group, IommuType};
/// use iommu_type1::Backing;
/// use vm_memory::Permissions;
///
/// let container = Container::open();
/// let file = Group::new(7).open()?;
/// file.set_container(&container)?;
/// container.set_iommu(IommuType::Type1v2)?;
/// container.map(0x1000, Backing::anonymous(0x1000)?, Permissions::ReadWrite)?;
///
/// file.unset_container()?;
/// let error = container.unmap(0x1000, 0x1000).unwrap_err();
/// assert_eq!(error.errno(), libc::EINVAL);
/// # Ok::<(), vfio_group::Error>(())
/// ```
#[derive(Debug)]
pub struct Container {
    shared: Arc<SharedContainer>,
}

impl Container {
    /// Opens a container whose address space has the default limits.
    pub fn open() -> Self {
        Container::open_with(IoAddressSpace::builder())
    }

    /// Opens a container; `options` are the limits of every address space it will have. The profile
    /// is that of the type given to [`set_iommu`](Container::set_iommu).
    pub fn open_with(options: IoAddressSpaceBuilder) -> Self {
        Container {
            shared: Arc::new(SharedContainer {
                options,
                state: Mutex::new(State::default()),
            }),
        }
    }

    /// Gives the container an IOMMU (`VFIO_SET_IOMMU`). No-IOMMU groups have
    /// [`IommuType::NoIommu`] and nothing else; the others have all but that.
    ///
    /// # Errors
    ///
    /// [`Error::NoGroup`] or [`Error::IommuSet`] (EINVAL), [`Error::NoDriver`] (ENODEV).
    pub fn set_iommu(&self, iommu_type: IommuType) -> Result<()> {
        let mut state = lock(&self.shared.state);
        if state.groups() == 0 {
            return Err(Error::NoGroup);
        }
        if state.driver.is_some() {
            return Err(Error::IommuSet);
        }
        let no_iommu = state.no_iommu > 0;
        let profile = match iommu_type {
            IommuType::NoIommu if no_iommu => {
                state.driver = Some(Driver::NoIommu);
                return Ok(());
            }
            IommuType::Type1 if !no_iommu => Profile::Type1v1,
            IommuType::Type1v2 if !no_iommu => Profile::Type1v2,
            _ => return Err(Error::NoDriver { iommu_type }),
        };
        state.driver = Some(Driver::Type1(Arc::new(Iommu {
            space: self.shared.options.clone().profile(profile).build(),
        })));
        Ok(())
    }

    /// Whether an extension is supported (`VFIO_CHECK_EXTENSION`): positive if so, 0 if not or if
    /// its number is unknown. Once the IOMMU is set its driver alone is asked; before, those that
    /// could be set are.
    ///
    /// ```
    /// let container = vfio_group::Container::open();
    /// // VFIO_TYPE1v2_IOMMU, VFIO_UNMAP_ALL, no such extension
    /// assert_eq!([3, 9, 99].map(|n| container.check_extension(n)), [1, 1, 0]);
    /// ```
    pub fn check_extension(&self, extension: u32) -> u32 {
        self.shared.check_extension(extension)
    }

    /// Maps `backing` at `iova` (`VFIO_IOMMU_MAP_DMA`).
    ///
    /// # Errors
    ///
    /// [`Error::NoIommu`] (EINVAL), [`Error::NothingToMap`] (ENOTTY), otherwise [`Error::Iommu`] with what [`IoAddressSpace::map`]
    /// says.
    pub fn map(&self, iova: u64, backing: Backing, prot: Permissions) -> Result<()> {
        Ok(self.shared.iommu()?.space.map(iova, backing, prot)?)
    }

    /// Unmaps `size` bytes from `iova` and returns the bytes removed (`VFIO_IOMMU_UNMAP_DMA`).
    ///
    /// # Errors
    ///
    /// [`Error::NoIommu`] (EINVAL), [`Error::NothingToMap`] (ENOTTY), otherwise [`Error::Iommu`] with what [`IoAddressSpace::unmap`]
    /// says.
    pub fn unmap(&self, iova: u64, size: u64) -> Result<u64> {
        Ok(self.shared.iommu()?.space.unmap(iova, size)?)
    }

    /// Unmaps everything and returns the bytes removed (`VFIO_DMA_UNMAP_FLAG_ALL`).
    ///
    /// # Errors
    ///
    /// As [`unmap`](Container::unmap).
    pub fn unmap_all(&self) -> Result<u64> {
        Ok(self.shared.iommu()?.space.unmap_all()?)
    }

    /// The address space, for whoever manages it: batches, dirty pages, counters.
    ///
    /// It keeps no group attached: when the IOMMU is released it is emptied, and what is mapped
    /// into it later is seen by no device. Whoever does DMA takes an
    /// [`ExternalUser`](crate::ExternalUser) instead.
    ///
    /// # Errors
    ///
    /// [`Error::NoIommu`] (EINVAL), [`Error::NothingToMap`] (ENOTTY).
    pub fn address_space(&self) -> Result<IoAddressSpace> {
        Ok(self.shared.iommu()?.space.clone())
    }

    pub(crate) fn shared(&self) -> &Arc<SharedContainer> {
        &self.shared
    }
}

/// The container behind its file: alive while that is open or a group is attached.
#[derive(Debug)]
pub(crate) struct SharedContainer {
    options: IoAddressSpaceBuilder,
    state: Mutex<State>,
}

/// # Invariants
///
/// - `driver` is `None` while there are no groups.
/// - There are no-IOMMU groups or others, never both.
#[derive(Debug, Default)]
struct State {
    hardware: usize,
    emulated: usize,
    no_iommu: usize,
    driver: Option<Driver>,
}

#[derive(Debug)]
enum Driver {
    Type1(Arc<Iommu>),
    NoIommu,
}

impl State {
    fn groups(&self) -> usize {
        self.hardware + self.emulated + self.no_iommu
    }

    fn of(&mut self, group_type: GroupType) -> &mut usize {
        match group_type {
            GroupType::Iommu => &mut self.hardware,
            GroupType::EmulatedIommu => &mut self.emulated,
            GroupType::NoIommu => &mut self.no_iommu,
        }
    }
}

impl SharedContainer {
    /// A group becomes attached, unless it is of the other sort than those there, or would find mappings
    /// without memory.
    pub(crate) fn enter(&self, group: u32, group_type: GroupType) -> Result<()> {
        let mut state = lock(&self.state);
        let mixed = match group_type {
            GroupType::NoIommu => state.hardware + state.emulated > 0,
            GroupType::Iommu | GroupType::EmulatedIommu => state.no_iommu > 0,
        };
        if mixed {
            return Err(Error::MixedGroups { group });
        }
        if let Some(Driver::Type1(iommu)) = &state.driver {
            let mappings = iommu.space.without_memory();
            if mappings > 0 {
                return Err(Error::VaddrInvalid { group, mappings });
            }
        }
        *state.of(group_type) += 1;
        Ok(())
    }

    /// A group is detached; the last one releases the IOMMU.
    pub(crate) fn leave(&self, group_type: GroupType) {
        let released = {
            let mut state = lock(&self.state);
            let groups = state.of(group_type);
            *groups = groups.saturating_sub(1);
            if state.groups() == 0 {
                state.driver.take()
            } else {
                None
            }
        };
        // Without the lock: releasing waits, and calls those who want to be told.
        drop(released);
    }

    /// EINVAL before the IOMMU is set.
    pub(crate) fn check_driver(&self) -> Result<()> {
        match lock(&self.state).driver {
            Some(_) => Ok(()),
            None => Err(Error::NoIommu),
        }
    }

    pub(crate) fn iommu(&self) -> Result<Arc<Iommu>> {
        match &lock(&self.state).driver {
            Some(Driver::Type1(iommu)) => Ok(iommu.clone()),
            Some(Driver::NoIommu) => Err(Error::NothingToMap),
            None => Err(Error::NoIommu),
        }
    }

    pub(crate) fn check_extension(&self, extension: u32) -> u32 {
        let state = lock(&self.state);
        match state.driver {
            Some(Driver::Type1(_)) => {
                let served = Served {
                    hardware: state.hardware > 0,
                    emulated: state.emulated > 0,
                };
                type1_extension(extension, Some(served))
            }
            Some(Driver::NoIommu) => noiommu_extension(extension),
            None if state.no_iommu > 0 => noiommu_extension(extension),
            None => type1_extension(extension, None),
        }
    }
}

/// What an IOMMU driver has set up for a container; dropping it removes all mappings.
///
/// A map or unmap that is under way has a reference, so it finishes before the release. That also
/// makes it safe to drop the last user from inside an unmap notice: the release then happens in
/// the unmapping call, after its own work.
#[derive(Debug)]
pub(crate) struct Iommu {
    pub(crate) space: IoAddressSpace,
}

impl Drop for Iommu {
    fn drop(&mut self) {
        // Nobody who came through a group can hold anything now: handles, guards, lists and pins
        // of an external user are users themselves, and the last user is gone. Only those who took
        // the space from the container can make this wait, and not beyond the space's deadline.
        if let Err(error) = self.space.unmap_all() {
            log::warn!("a container's IOMMU was released with mappings left: {error}");
        }
    }
}

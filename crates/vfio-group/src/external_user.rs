// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The external user: DMA for whoever holds the group, without a look-up per access.

use std::fmt;
use std::sync::{Arc, OnceLock};

use iommu_type1::{
    DmaHandle, Interest, IoAddressSpace, PinPages, PinnedPages, Pinner, Transfer, UnmapNotice,
};
use vm_memory::Permissions;

use crate::group::ContainerUser;
use crate::{Device, Error, Group, GroupFile, Result};

/// A reference on a group that keeps it attached to its container, taken once and held while DMA is
/// to be possible: what `vfio_group_get_external_user` and
/// `vfio_group_get_external_user_from_dev` return in the kernel.
///
/// While it lives the group cannot leave its container, and the mappings cannot vanish with it.
/// The same holds for every handle, guard, scatter list and pin made through it. A clone is one
/// more container user, without a notifier of its own; threads that should share one put it
/// into an [`Arc`], which pins as well (`PinPages`).
///
/// ```
/// use iommu_type1::Backing;
/// use vfio_group::{Container, ExternalUser, Group, IommuType};
/// use vm_memory::Permissions;
///
/// let group = Group::new(7);
/// let device = group.add_device("vgpu0")?;
/// let (container, file) = (Container::open(), group.open()?);
/// file.set_container(&container)?;
/// container.set_iommu(IommuType::Type1v2)?;
/// container.map(0x1000, Backing::anonymous(0x1000)?, Permissions::ReadWrite)?;
///
/// let user = ExternalUser::from_device(&device)?;
/// assert_eq!((user.iommu_id(), group.container_users()), (7, 2));
///
/// // The files may go: the user keeps the attachment and the mappings.
/// drop((file, container));
/// user.write(0x1ff0, b"still there")?;
/// assert_eq!(group.open().unwrap_err().errno(), libc::EBUSY);
///
/// drop(user);
/// group.open()?;
/// # Ok::<(), vfio_group::Error>(())
/// ```
pub struct ExternalUser {
    // In order of their drop: pins left to the pinner go before the last user can.
    pinner: OnceLock<Pinner>,
    /// The view that keeps `user`.
    space: IoAddressSpace,
    /// The space itself, for the view of a clone.
    bare: IoAddressSpace,
    user: Arc<ContainerUser>,
}

impl ExternalUser {
    /// The kernel's `vfio_group_get_external_user`.
    ///
    /// # Errors
    ///
    /// In this order: [`Error::NotAttached`] (EINVAL); [`Error::NoExternalUser`] (EPERM);
    /// [`Error::NoIommu`] or [`Error::NotViable`] (EINVAL).
    pub fn from_group(file: &GroupFile) -> Result<Self> {
        let group = file.group();
        ExternalUser::get(group, format!("group {}", group.id()))
    }

    /// The kernel's `vfio_group_get_external_user_from_dev`: for those who know the device only.
    ///
    /// # Errors
    ///
    /// [`Error::NoDevice`] (ENODEV) if the device was removed from its group, or is being unplugged;
    /// otherwise as [`from_group`](ExternalUser::from_group).
    pub fn from_device(device: &Device) -> Result<Self> {
        device.check_present()?;
        ExternalUser::get(device.group(), device.name().to_owned())
    }

    /// `name` is what an unmap that had to wait in vain calls those who hold memory through it.
    fn get(group: &Group, name: String) -> Result<Self> {
        let (user, iommu) = ContainerUser::external(group)?;
        Ok(ExternalUser::new(user, iommu.space.named(name)))
    }

    fn new(user: ContainerUser, bare: IoAddressSpace) -> Self {
        let user = Arc::new(user);
        ExternalUser {
            pinner: OnceLock::new(),
            space: bare.held_by(user.clone()),
            bare,
            user,
        }
    }

    /// The group it holds.
    pub fn group(&self) -> &Group {
        self.user.group()
    }

    /// Id of the IOMMU group (`vfio_external_user_iommu_id`).
    pub fn iommu_id(&self) -> u32 {
        self.group().id()
    }

    /// As [`Container::check_extension`](crate::Container::check_extension)
    /// (`vfio_external_check_extension`).
    pub fn check_extension(&self, extension: u32) -> u32 {
        match self.group().attachment().target() {
            Some(container) => container.check_extension(extension),
            None => 0,
        }
    }

    /// Reads or writes guest memory (`vfio_dma_rw`): an empty transfer is refused.
    ///
    /// # Errors
    ///
    /// [`Error::Iommu`] with what [`IoAddressSpace::dma_rw`] says.
    pub fn dma_rw(&self, iova: u64, transfer: Transfer<'_>) -> Result<()> {
        Ok(self.space.dma_rw(iova, transfer)?)
    }

    /// Fills `buf` from `iova` on; an empty buffer succeeds.
    ///
    /// # Errors
    ///
    /// [`Error::Iommu`] with what [`IoAddressSpace::read`] says.
    pub fn read(&self, iova: u64, buf: &mut [u8]) -> Result<()> {
        Ok(self.space.read(iova, buf)?)
    }

    /// Writes `buf` from `iova` on; an empty buffer succeeds.
    ///
    /// # Errors
    ///
    /// [`Error::Iommu`] with what [`IoAddressSpace::write`] says.
    pub fn write(&self, iova: u64, buf: &[u8]) -> Result<()> {
        Ok(self.space.write(iova, buf)?)
    }

    /// The address space, as a view that is this container user too: so is every handle, guard,
    /// scatter list and pin made from it, until the last of them is gone.
    pub fn address_space(&self) -> &IoAddressSpace {
        &self.space
    }

    /// A handle for one thread or queue: the fast path, with [`Bytes`](vm_memory::Bytes) for
    /// whoever takes guest memory.
    pub fn handle(&self) -> DmaHandle {
        self.space.handle()
    }

    /// Registers who is told before mappings go, which pinning requires
    /// (`vfio_register_notifier` with `VFIO_IOMMU_NOTIFY_DMA_UNMAP`). It lasts as long as this user
    /// and the pins made through it. `name` appears in errors of an unmap that had to wait in vain.
    ///
    /// A notice that keeps this user alive keeps itself alive: it should have a
    /// [`Weak`](std::sync::Weak) of it.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use iommu_type1::{Backing, Interest};
    /// # use vfio_group::{Container, ExternalUser, Group, IommuType};
    /// # use vm_memory::Permissions;
    /// # let group = Group::new(7);
    /// # let (container, file) = (Container::open(), group.open()?);
    /// # file.set_container(&container)?;
    /// # container.set_iommu(IommuType::Type1v2)?;
    /// # container.map(0, Backing::anonymous(0x1_0000)?, Permissions::ReadWrite)?;
    /// let user = ExternalUser::from_group(&file)?;
    /// let refused = user.pin_pages(0, 1, Permissions::ReadWrite).unwrap_err();
    /// assert_eq!(refused.errno(), libc::EINVAL);
    ///
    /// user.register_notifier("vgpu0", Interest::Holder, Arc::new(|iova, size| {
    ///     println!("{size:#x} bytes at {iova:#x} are about to go");
    /// }))?;
    /// let page = user.pin_pages(0, 1, Permissions::ReadWrite)?;
    /// # Ok::<(), vfio_group::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::NotifierRegistered`] (EBUSY): this user has one. (The kernel keeps a chain of them
    /// for the container, so a second is one of somebody else; here that is a user of its own.)
    pub fn register_notifier(
        &self,
        name: &str,
        interest: Interest,
        notice: Arc<dyn UnmapNotice>,
    ) -> Result<()> {
        let group = self.iommu_id();
        if self.pinner.get().is_some() {
            return Err(Error::NotifierRegistered { group });
        }
        self.pinner
            .set(self.space.pinner(name, interest, notice))
            .map_err(|_| Error::NotifierRegistered { group })
    }

    /// Pins `npages` host pages from `iova` (`vfio_group_pin_pages`): all of them, or none. They
    /// stay until the result is dropped, or with [`PinnedPages::keep`] until
    /// [`unpin_pages`](ExternalUser::unpin_pages).
    ///
    /// # Errors
    ///
    /// In this order: no pages (EINVAL), [`Error::NotSingleton`] (EINVAL), too many pages (E2BIG),
    /// [`Error::PinsNeedV2`] (EACCES), [`Error::NoNotifier`] (EINVAL); then what [`Pinner::pin_pages`] says.
    pub fn pin_pages(&self, iova: u64, npages: usize, prot: Permissions) -> Result<PinnedPages> {
        check_not_empty(iova, npages)?;
        let devices = self.group().devices().lock().len();
        if devices > 1 {
            let group = self.iommu_id();
            return Err(Error::NotSingleton { group, devices });
        }
        self.check_entries(npages)?;
        Ok(self.pinner()?.pin_pages(iova, npages, prot)?)
    }

    /// Releases one pin on each page, of those this user left with [`PinnedPages::keep`]
    /// (`vfio_group_unpin_pages`).
    ///
    /// # Errors
    ///
    /// No pages (EINVAL), too many (E2BIG), [`Error::PinsNeedV2`] (EACCES), [`Error::NoNotifier`]
    /// (EINVAL), a page this user left no pin on (EINVAL); nothing is released then.
    pub fn unpin_pages(&self, iova: u64, npages: usize) -> Result<()> {
        check_not_empty(iova, npages)?;
        self.check_entries(npages)?;
        Ok(self.pinner()?.unpin_pages(iova, npages)?)
    }

    /// `VFIO_PIN_PAGES_MAX_ENTRIES` is checked before the notifier is looked for, as in the kernel,
    /// where it is the core that checks it.
    fn check_entries(&self, npages: usize) -> Result<()> {
        let max = self.space.max_pin_pages();
        if npages > max {
            let error = page_pin::Error::TooMany { npages, max };
            return Err(Error::Iommu(error.into()));
        }
        Ok(())
    }

    fn pinner(&self) -> Result<&Pinner> {
        if !self.space.profile().pins() {
            return Err(Error::PinsNeedV2);
        }
        let group = self.iommu_id();
        self.pinner.get().ok_or(Error::NoNotifier { group })
    }
}

fn check_not_empty(iova: u64, npages: usize) -> Result<()> {
    if npages == 0 {
        let error = page_pin::Error::Empty { iova };
        return Err(Error::Iommu(error.into()));
    }
    Ok(())
}

impl fmt::Debug for ExternalUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExternalUser")
            .field("group", &self.iommu_id())
            .field("space", &self.space)
            .field("notifier", &self.pinner.get().is_some())
            .finish_non_exhaustive()
    }
}

impl Clone for ExternalUser {
    /// One more container user. It cannot fail, because this one keeps the attachment meanwhile.
    fn clone(&self) -> Self {
        ExternalUser::new(ContainerUser::clone(&self.user), self.bare.clone())
    }
}

impl PinPages for ExternalUser {
    type Pinned = PinnedPages;
    type Error = Error;

    fn pin_pages(&self, iova: u64, npages: usize, prot: Permissions) -> Result<PinnedPages> {
        self.pin_pages(iova, npages, prot)
    }
}

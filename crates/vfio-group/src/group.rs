// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The group: devices that can only be given away together, and its file.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use crate::broadcast::Broadcast;
use crate::container::{Iommu, SharedContainer};
use crate::device::DeviceTable;
use crate::users::Attachment;
use crate::{BoundElsewhere, Container, Device, DeviceFile, Error, Kvm, Result};

/// What isolates the devices of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GroupType {
    /// Software: device models that use an [`ExternalUser`](crate::ExternalUser).
    #[default]
    EmulatedIommu,
    /// An IOMMU.
    Iommu,
    /// Nothing. Opening the group, attaching it and opening its devices takes `CAP_SYS_RAWIO`; it
    /// shares no container with other groups, has no address space and no external users.
    NoIommu,
}

/// A group of devices: the kernel's `vfio_group`. A cheap reference; clones are the same group.
///
/// ```
/// use vfio_group::Group;
///
/// let group = Group::new(26);
/// group.add_device("0000:06:0d.0")?;
/// let file = group.open()?;
/// assert!(group.matches(&file));
/// assert_eq!(group.open().unwrap_err().errno(), libc::EBUSY);
/// # Ok::<(), vfio_group::Error>(())
/// ```
#[derive(Clone)]
pub struct Group {
    shared: Arc<SharedGroup>,
}

#[derive(Debug)]
struct SharedGroup {
    id: u32,
    group_type: GroupType,
    opened: AtomicBool,
    attachment: Attachment<SharedContainer>,
    devices: DeviceTable,
    kvm: Broadcast<Kvm>,
}

impl Group {
    /// A group without devices. `id` is that of the IOMMU group; it names the group and does not
    /// identify it, see [`matches`](Group::matches).
    pub fn new(id: u32) -> Self {
        Group::with_type(id, GroupType::default())
    }

    /// As [`new`](Group::new), of another type.
    ///
    /// ```
    /// use vfio_group::{Group, GroupType};
    ///
    /// let group = Group::with_type(5, GroupType::NoIommu);
    /// assert_eq!(group.open().unwrap_err().errno(), libc::EPERM);
    /// group.open_privileged()?;
    /// # Ok::<(), vfio_group::Error>(())
    /// ```
    pub fn with_type(id: u32, group_type: GroupType) -> Self {
        Group {
            shared: Arc::new(SharedGroup {
                id,
                group_type,
                opened: AtomicBool::new(false),
                attachment: Attachment::new(),
                devices: DeviceTable::new(),
                kvm: Broadcast::new(),
            }),
        }
    }

    /// Id of the IOMMU group.
    pub fn id(&self) -> u32 {
        self.shared.id
    }

    /// What isolates its devices.
    pub fn group_type(&self) -> GroupType {
        self.shared.group_type
    }

    /// Whether `file` is an open file of this very group (`vfio_external_group_match_file`); another
    /// group with the same id does not match.
    pub fn matches(&self, file: &GroupFile) -> bool {
        Arc::ptr_eq(&self.shared, &file.group.shared)
    }

    /// Adds a device to the group. It stays until [`Device::remove`], as a device in the kernel
    /// stays until its driver takes it back: who else knows it does not decide that.
    ///
    /// # Errors
    ///
    /// [`Error::DeviceExists`] (EEXIST).
    pub fn add_device(&self, name: &str) -> Result<Device> {
        Device::add(self, name)
    }

    /// Binds another driver to a device of the group: the group is not viable until the result is
    /// dropped. Device files and external users fail meanwhile (EINVAL); those there are go on.
    ///
    /// ```
    /// use vfio_group::{Group, GroupFile};
    ///
    /// let group = Group::new(1);
    /// let file = group.open()?;
    /// let bound = group.bind_elsewhere("0000:06:0d.1")?;
    /// assert_eq!(file.status() & GroupFile::VIABLE, 0);
    /// drop(bound);
    /// assert_eq!(file.status() & GroupFile::VIABLE, GroupFile::VIABLE);
    /// # Ok::<(), vfio_group::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::DeviceExists`] (EEXIST): the device is bound already.
    pub fn bind_elsewhere(&self, name: &str) -> Result<BoundElsewhere> {
        BoundElsewhere::bind(self, name)
    }

    /// Opens the group: `/dev/vfio/N`.
    ///
    /// # Errors
    ///
    /// [`Error::NotPermitted`] (EPERM) if it has no IOMMU; [`Error::GroupOpen`] (EBUSY);
    /// [`Error::StillAttached`] (EBUSY) while a device file or an external user from the last time
    /// keeps the group attached.
    pub fn open(&self) -> Result<GroupFile> {
        self.open_by(false)
    }

    /// As [`open`](Group::open), by somebody with `CAP_SYS_RAWIO`. Who may call this is the VMM's to
    /// say: the process's own capabilities are not looked at.
    ///
    /// # Errors
    ///
    /// [`Error::GroupOpen`] or [`Error::StillAttached`] (EBUSY).
    pub fn open_privileged(&self) -> Result<GroupFile> {
        self.open_by(true)
    }

    fn open_by(&self, privileged: bool) -> Result<GroupFile> {
        let group = self.id();
        self.check_permission(privileged)?;
        if self.shared.opened.swap(true, Ordering::AcqRel) {
            return Err(Error::GroupOpen { group });
        }
        // Only an open file attaches, so nobody does between this look and the return.
        if self.attachment().target().is_some() {
            self.shared.opened.store(false, Ordering::Release);
            let users = self.container_users();
            return Err(Error::StillAttached { group, users });
        }
        Ok(GroupFile {
            group: self.clone(),
            privileged: AtomicBool::new(privileged),
        })
    }

    fn check_permission(&self, privileged: bool) -> Result<()> {
        if self.group_type() == GroupType::NoIommu && !privileged {
            let group = self.id();
            return Err(Error::NotPermitted { group });
        }
        Ok(())
    }

    fn check_viable(&self) -> Result<()> {
        if self.devices().lock().viable() {
            return Ok(());
        }
        Err(Error::NotViable { group: self.id() })
    }

    /// Sets the virtual machine the group belongs to, or that it belongs to none, and tells every
    /// listener (`vfio_group_set_kvm`). Listeners that come later are told when they register.
    ///
    /// Listeners run in the caller's thread, one after the other, with no lock held: they may set,
    /// register, unregister, and drop whatever keeps the group. If one is still running for an earlier
    /// value in another thread, that thread tells it the newest one when it returns, and this does not
    /// wait for it: so each listener runs in one thread at a time, ends with the newest value, and may
    /// not see one that was replaced while it ran.
    ///
    /// ```
    /// use std::sync::atomic::{AtomicBool, Ordering};
    /// use std::sync::Arc;
    /// use vfio_group::{Container, Group, IommuType};
    ///
    /// let group = Group::new(1);
    /// let device = group.add_device("vgpu0")?;
    /// let (container, file) = (Container::open(), group.open()?);
    /// file.set_container(&container)?;
    /// container.set_iommu(IommuType::Type1v2)?;
    ///
    /// group.set_kvm(Some(Arc::new("the machine")));
    /// let running = Arc::new(AtomicBool::new(false));
    /// let seen = running.clone();
    /// let _listener = device.on_set_kvm(move |kvm| seen.store(kvm.is_some(), Ordering::Relaxed))?;
    /// assert!(running.load(Ordering::Relaxed), "told of the machine there was");
    /// group.set_kvm(None);
    /// assert!(!running.load(Ordering::Relaxed));
    /// # Ok::<(), vfio_group::Error>(())
    /// ```
    pub fn set_kvm(&self, kvm: Option<Kvm>) {
        self.broadcast().set(kvm);
    }

    /// What [`set_kvm`](Group::set_kvm) was last given.
    pub fn kvm(&self) -> Option<Kvm> {
        self.broadcast().current()
    }

    pub(crate) fn broadcast(&self) -> &Broadcast<Kvm> {
        &self.shared.kvm
    }

    /// How many use the container through this group: the group file while attached, every device
    /// file and every external user. The attachment lasts until it is 0.
    pub fn container_users(&self) -> u32 {
        as_count(self.attachment().users())
    }

    pub(crate) fn attachment(&self) -> &Attachment<SharedContainer> {
        &self.shared.attachment
    }

    pub(crate) fn devices(&self) -> &DeviceTable {
        &self.shared.devices
    }

    /// One container user less.
    fn put(&self) {
        let group_type = self.group_type();
        self.attachment()
            .put(|container| container.leave(group_type));
    }
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Group")
            .field("id", &self.id())
            .field("container_users", &self.container_users())
            .finish_non_exhaustive()
    }
}

impl PartialEq for Group {
    /// Identity: the same group, not one with the same id.
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }
}

impl Eq for Group {}

/// An open group file; dropping it closes it.
///
/// While the group is attached its file is one of the container users. Closing it gives that up
/// and, where it was the last, detaches the group.
///
/// ```
/// use vfio_group::{Container, Group, GroupFile, IommuType};
///
/// let group = Group::new(3);
/// group.add_device("disk")?;
/// let (container, file) = (Container::open(), group.open()?);
/// file.set_container(&container)?;
/// container.set_iommu(IommuType::Type1v2)?;
/// assert_eq!(file.status(), GroupFile::VIABLE | GroupFile::CONTAINER_SET);
///
/// let device = file.device("disk")?;
/// assert_eq!(file.unset_container().unwrap_err().errno(), libc::EBUSY);
/// drop(device);
/// file.unset_container()?;
/// assert_eq!(file.status(), GroupFile::VIABLE);
/// # Ok::<(), vfio_group::Error>(())
/// ```
#[derive(Debug)]
pub struct GroupFile {
    group: Group,
    privileged: AtomicBool,
}

impl GroupFile {
    /// [`status`](GroupFile::status): every device of the group can be used
    /// (`VFIO_GROUP_FLAGS_VIABLE`).
    pub const VIABLE: u32 = 1 << 0;

    /// [`status`](GroupFile::status): the group is attached (`VFIO_GROUP_FLAGS_CONTAINER_SET`).
    pub const CONTAINER_SET: u32 = 1 << 1;

    /// Whether who has the file now has `CAP_SYS_RAWIO`: at first, whether it was opened with
    /// [`Group::open_privileged`]. What a no-IOMMU group needs it for is checked at each call.
    pub fn set_privileged(&self, privileged: bool) {
        self.privileged.store(privileged, Ordering::Relaxed);
    }

    fn check_permission(&self) -> Result<()> {
        let privileged = self.privileged.load(Ordering::Relaxed);
        self.group.check_permission(privileged)
    }

    /// Attaches the group to a container (`VFIO_GROUP_SET_CONTAINER`).
    ///
    /// # Errors
    ///
    /// In this order: [`Error::AlreadyAttached`] (EINVAL); [`Error::NotPermitted`] (EPERM);
    /// [`Error::MixedGroups`] (EPERM); [`Error::VaddrInvalid`] (EBUSY) while mappings of the container have
    /// lost their memory ([`invalidate_vaddr`](iommu_type1::IoAddressSpace::invalidate_vaddr)).
    pub fn set_container(&self, container: &Container) -> Result<()> {
        let (group, group_type) = (self.group.id(), self.group.group_type());
        let attached = self
            .group
            .attachment()
            .attach(container.shared(), |shared| {
                self.check_permission()?;
                shared.enter(group, group_type)
            })?;
        if attached {
            Ok(())
        } else {
            Err(Error::AlreadyAttached { group })
        }
    }

    /// Detaches the group from its container (`VFIO_GROUP_UNSET_CONTAINER`).
    ///
    /// # Errors
    ///
    /// [`Error::NotAttached`] (EINVAL); [`Error::ContainerUsers`] (EBUSY) while there is a device
    /// file or an external user.
    pub fn unset_container(&self) -> Result<()> {
        let group = self.group.id();
        let group_type = self.group.group_type();
        let unset = |container: &SharedContainer| container.leave(group_type);
        match self.group.attachment().unset(unset) {
            Ok(()) => Ok(()),
            Err(0) => Err(Error::NotAttached { group }),
            Err(users) => Err(Error::ContainerUsers {
                group,
                users: as_count(users),
            }),
        }
    }

    /// [`VIABLE`](GroupFile::VIABLE) and [`CONTAINER_SET`](GroupFile::CONTAINER_SET), as far as
    /// they hold (`VFIO_GROUP_GET_STATUS`).
    pub fn status(&self) -> u32 {
        let viable = match self.group.devices().lock().viable() {
            true => GroupFile::VIABLE,
            false => 0,
        };
        match self.group.attachment().target() {
            Some(_) => viable | GroupFile::CONTAINER_SET,
            None => viable,
        }
    }

    /// Opens a device of the group (`VFIO_GROUP_GET_DEVICE_FD`); it may be open several times.
    ///
    /// # Errors
    ///
    /// In this order: [`Error::NoDevice`] (ENODEV); [`Error::NotAttached`], [`Error::NoIommu`] or
    /// [`Error::NotViable`] (EINVAL); [`Error::NotPermitted`] (EPERM).
    pub fn device(&self, name: &str) -> Result<DeviceFile> {
        self.device_for(name, "somebody")
    }

    /// As [`device`](GroupFile::device), and `user` is what errors call who has it open.
    ///
    /// # Errors
    ///
    /// As [`device`](GroupFile::device).
    pub fn device_for(&self, name: &str, user: &str) -> Result<DeviceFile> {
        DeviceFile::open(self, name, user)
    }

    /// The group it is a file of.
    pub fn group(&self) -> &Group {
        &self.group
    }
}

impl Drop for GroupFile {
    fn drop(&mut self) {
        self.group.put();
        self.group.shared.opened.store(false, Ordering::Release);
    }
}

/// One user of a group's container, that of a device file or an external user; dropping it gives it
/// up, and detaches the group where it was the last.
#[derive(Debug)]
pub(crate) struct ContainerUser {
    group: Group,
}

impl ContainerUser {
    /// One more user, and the container it uses. If something else is in the way then, it is given up
    /// like any other: the group file may have been closed meanwhile, and then this was the last.
    fn get(group: &Group) -> Result<(Self, Arc<SharedContainer>)> {
        let container = group
            .attachment()
            .get()
            .ok_or(Error::NotAttached { group: group.id() })?;
        let user = ContainerUser {
            group: group.clone(),
        };
        Ok((user, container))
    }

    /// The user that an external user is, together with the IOMMU it keeps.
    pub(crate) fn external(group: &Group) -> Result<(Self, Arc<Iommu>)> {
        let (user, container) = ContainerUser::get(group)?;
        if group.group_type() == GroupType::NoIommu {
            return Err(Error::NoExternalUser { group: group.id() });
        }
        let iommu = container.iommu()?;
        group.check_viable()?;
        Ok((user, iommu))
    }

    /// The user that a device file is.
    pub(crate) fn of_device(file: &GroupFile) -> Result<Self> {
        let (user, container) = ContainerUser::get(&file.group)?;
        container.check_driver()?;
        file.group.check_viable()?;
        file.check_permission()?;
        Ok(user)
    }

    pub(crate) fn group(&self) -> &Group {
        &self.group
    }
}

impl Clone for ContainerUser {
    fn clone(&self) -> Self {
        self.group.attachment().get_held();
        ContainerUser {
            group: self.group.clone(),
        }
    }
}

impl Drop for ContainerUser {
    fn drop(&mut self) {
        self.group.put();
    }
}

fn as_count(users: usize) -> u32 {
    u32::try_from(users).unwrap_or(u32::MAX)
}

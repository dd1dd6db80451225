// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The group: devices that can only be given away together, and its file.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use crate::container::{Iommu, SharedContainer};
use crate::device::Devices;
use crate::sync::Mutex;
use crate::users::Attachment;
use crate::{Container, Device, DeviceFile, Error, Result};

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
    opened: AtomicBool,
    attachment: Attachment<SharedContainer>,
    devices: Mutex<Devices>,
}

impl Group {
    /// A group without devices. `id` is that of the IOMMU group; it names the group and does not
    /// identify it, see [`matches`](Group::matches).
    pub fn new(id: u32) -> Self {
        Group {
            shared: Arc::new(SharedGroup {
                id,
                opened: AtomicBool::new(false),
                attachment: Attachment::new(),
                devices: Mutex::new(Devices::default()),
            }),
        }
    }

    /// Id of the IOMMU group.
    pub fn id(&self) -> u32 {
        self.shared.id
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

    /// Opens the group: `/dev/vfio/N`.
    ///
    /// # Errors
    ///
    /// [`Error::GroupOpen`] (EBUSY); [`Error::StillAttached`] (EBUSY) while a device file or an
    /// external user from the last time keeps the group attached.
    pub fn open(&self) -> Result<GroupFile> {
        let group = self.id();
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
        })
    }

    /// How many use the container through this group: the group file while attached, every device
    /// file and every external user. The attachment lasts until it is 0.
    pub fn container_users(&self) -> u32 {
        as_count(self.attachment().users())
    }

    pub(crate) fn attachment(&self) -> &Attachment<SharedContainer> {
        &self.shared.attachment
    }

    pub(crate) fn devices(&self) -> &Mutex<Devices> {
        &self.shared.devices
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
}

impl GroupFile {
    /// [`status`](GroupFile::status): every device of the group can be used
    /// (`VFIO_GROUP_FLAGS_VIABLE`).
    pub const VIABLE: u32 = 1 << 0;

    /// [`status`](GroupFile::status): the group is attached (`VFIO_GROUP_FLAGS_CONTAINER_SET`).
    pub const CONTAINER_SET: u32 = 1 << 1;

    /// Attaches the group to a container (`VFIO_GROUP_SET_CONTAINER`).
    ///
    /// # Errors
    ///
    /// [`Error::AlreadyAttached`] (EINVAL).
    pub fn set_container(&self, container: &Container) -> Result<()> {
        let attachment = self.group.attachment();
        if attachment.attach(container.shared(), SharedContainer::enter) {
            Ok(())
        } else {
            let group = self.group.id();
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
        match self.group.attachment().unset(SharedContainer::leave) {
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
        match self.group.attachment().target() {
            Some(_) => GroupFile::VIABLE | GroupFile::CONTAINER_SET,
            None => GroupFile::VIABLE,
        }
    }

    /// Opens a device of the group (`VFIO_GROUP_GET_DEVICE_FD`); it may be open several times.
    ///
    /// # Errors
    ///
    /// [`Error::NoDevice`] (ENODEV); [`Error::NotAttached`] or [`Error::NoIommu`] (EINVAL).
    pub fn device(&self, name: &str) -> Result<DeviceFile> {
        DeviceFile::open(&self.group, name)
    }

    /// The group it is a file of.
    pub fn group(&self) -> &Group {
        &self.group
    }
}

impl Drop for GroupFile {
    fn drop(&mut self) {
        self.group.attachment().put(SharedContainer::leave);
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
    /// One more user, together with the IOMMU it keeps.
    pub(crate) fn get(group: &Group) -> Result<(Self, Arc<Iommu>)> {
        let container = group
            .attachment()
            .get()
            .ok_or(Error::NotAttached { group: group.id() })?;
        let user = ContainerUser {
            group: group.clone(),
        };
        // On this error the user is given up like any other: the group file may have been closed
        // meanwhile, and then this was the last.
        let iommu = container.iommu()?;
        Ok((user, iommu))
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
        self.group.attachment().put(SharedContainer::leave);
    }
}

fn as_count(users: usize) -> u32 {
    u32::try_from(users).unwrap_or(u32::MAX)
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices of a group, and their files.

use std::collections::BTreeMap;

use crate::group::ContainerUser;
use crate::sync::lock;
use crate::{Error, Group, Result};

/// A device that belongs, or belonged, to a group: what its driver has in hand.
///
/// A cheap reference. The device stays in its group until [`remove`](Device::remove), no matter how
/// many references there are.
///
/// ```
/// use vfio_group::Group;
///
/// let group = Group::new(1);
/// let device = group.add_device("vgpu0")?;
/// assert_eq!(group.add_device("vgpu0").unwrap_err().errno(), libc::EEXIST);
/// device.remove()?;
/// group.add_device("vgpu0")?;
/// # Ok::<(), vfio_group::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Device {
    group: Group,
    name: String,
    /// Tells it from another device of the same name that came after its removal.
    id: u64,
}

impl Device {
    pub(crate) fn add(group: &Group, name: &str) -> Result<Self> {
        let id = lock(group.devices())
            .insert(name)
            .ok_or_else(|| Error::DeviceExists {
                group: group.id(),
                name: name.to_owned(),
            })?;
        Ok(Device {
            group: group.clone(),
            name: name.to_owned(),
            id,
        })
    }

    /// Its name, unique in the group.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The group it belongs to, or belonged to.
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// Takes the device out of its group. Every reference to it is then one to a device without a
    /// group.
    ///
    /// # Errors
    ///
    /// [`Error::NoDevice`] (ENODEV) if it was removed before; [`Error::DeviceOpen`] (EBUSY) while it
    /// has a file. (The kernel waits for the files instead.)
    pub fn remove(&self) -> Result<()> {
        let mut devices = lock(self.group.devices());
        let entry = devices.get(self).ok_or_else(|| self.gone())?;
        if entry.files > 0 {
            return Err(Error::DeviceOpen {
                group: self.group.id(),
                name: self.name.clone(),
                files: entry.files,
            });
        }
        devices.by_name.remove(&self.name);
        Ok(())
    }

    /// ENODEV unless the device is in its group.
    pub(crate) fn check_present(&self) -> Result<()> {
        match lock(self.group.devices()).get(self) {
            Some(_) => Ok(()),
            None => Err(self.gone()),
        }
    }

    fn gone(&self) -> Error {
        Error::NoDevice {
            group: self.group.id(),
            name: self.name.clone(),
        }
    }
}

/// An open device; dropping it closes it.
///
/// It is a container user of its group, so the group stays attached while it is open, also after
/// the group file was closed. [`GroupFile::device`](crate::GroupFile::device) has an example.
#[derive(Debug)]
pub struct DeviceFile {
    // Dropped first: nobody finds the device closed while it still uses the container.
    user: ContainerUser,
    opened: OpenedDevice,
}

impl DeviceFile {
    pub(crate) fn open(group: &Group, name: &str) -> Result<Self> {
        let opened = OpenedDevice::open(group, name)?;
        let (user, _) = ContainerUser::get(group)?;
        Ok(DeviceFile { user, opened })
    }

    /// The device it is a file of.
    pub fn device(&self) -> &Device {
        &self.opened.device
    }

    /// The group it keeps attached.
    pub fn group(&self) -> &Group {
        self.user.group()
    }
}

/// One more file in a device's count, for as long as it lives.
#[derive(Debug)]
struct OpenedDevice {
    device: Device,
}

impl OpenedDevice {
    fn open(group: &Group, name: &str) -> Result<Self> {
        let mut devices = lock(group.devices());
        let entry = devices
            .by_name
            .get_mut(name)
            .ok_or_else(|| Error::NoDevice {
                group: group.id(),
                name: name.to_owned(),
            })?;
        entry.files += 1;
        let device = Device {
            group: group.clone(),
            name: name.to_owned(),
            id: entry.id,
        };
        Ok(OpenedDevice { device })
    }
}

impl Drop for OpenedDevice {
    fn drop(&mut self) {
        if let Some(entry) = lock(self.device.group.devices())
            .by_name
            .get_mut(&self.device.name)
        {
            entry.files = entry.files.saturating_sub(1);
        }
    }
}

/// The devices of a group.
#[derive(Debug, Default)]
pub(crate) struct Devices {
    by_name: BTreeMap<String, Entry>,
    next_id: u64,
}

#[derive(Debug)]
struct Entry {
    id: u64,
    files: usize,
}

impl Devices {
    pub(crate) fn len(&self) -> usize {
        self.by_name.len()
    }

    /// Adds a device and returns its id, unless the name is taken.
    fn insert(&mut self, name: &str) -> Option<u64> {
        if self.by_name.contains_key(name) {
            return None;
        }
        let id = self.next_id;
        self.next_id += 1;
        self.by_name.insert(name.to_owned(), Entry { id, files: 0 });
        Some(id)
    }

    fn get(&self, device: &Device) -> Option<&Entry> {
        self.by_name
            .get(&device.name)
            .filter(|entry| entry.id == device.id)
    }
}

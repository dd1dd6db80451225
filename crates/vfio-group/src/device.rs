// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices of a group, and their files.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use checked_sync::{lock, now, wait_until, Condvar, Mutex, MutexGuard, LONGEST};
use vmm_sys_util::eventfd::EventFd;

use crate::group::ContainerUser;
use crate::kvm::KvmListener;
use crate::{Error, Group, GroupFile, Kvm, Result};

/// How long [`Device::unplug`] waits before it asks again, as the kernel does.
const REQUEST_INTERVAL: Duration = Duration::from_secs(10);

/// A device that belongs, or belonged, to a group: what its driver has in hand.
///
/// A cheap reference. The device stays in its group until [`remove`](Device::remove) or
/// [`unplug`](Device::unplug), no matter how many references there are.
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
        let id = group
            .devices()
            .lock()
            .insert(name)
            .ok_or_else(|| exists(group, name))?;
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
    /// group. [`unplug`](Device::unplug) waits for the files instead, as the kernel does.
    ///
    /// # Errors
    ///
    /// [`Error::NoDevice`] (ENODEV) if it was removed before; [`Error::DeviceOpen`] (EBUSY) while it
    /// has a file.
    pub fn remove(&self) -> Result<()> {
        let mut devices = self.group.devices().lock();
        let entry = devices.get(self).ok_or_else(|| self.gone())?;
        if !entry.files.is_empty() {
            return Err(self.open_by(entry));
        }
        let removed = devices.by_name.remove(&self.name);
        drop(devices);
        // Without the lock: a file descriptor is closed with it.
        drop(removed);
        self.group.devices().changed.notify_all();
        Ok(())
    }

    /// Who is signalled when the device should be given back: the counterpart of the request
    /// interrupt (`VFIO_PCI_REQ_IRQ_INDEX`). `None` takes it away; so does closing the last file.
    ///
    /// The eventfd should be non-blocking (`EFD_NONBLOCK`): who asks writes to it.
    ///
    /// # Errors
    ///
    /// [`Error::NoDevice`] (ENODEV).
    pub fn set_request_notifier(&self, notifier: Option<EventFd>) -> Result<()> {
        let mut devices = self.group.devices().lock();
        let entry = devices.get_mut(self).ok_or_else(|| self.gone())?;
        let before = std::mem::replace(&mut entry.request, notifier.map(Arc::new));
        drop(devices);
        // Without the lock: a file descriptor is closed with it.
        drop(before);
        Ok(())
    }

    /// Asks for the device: signals its notifier up to `times` times, and waits up to `interval` after
    /// each for its files to be closed. The device stays in the group, and can be opened meanwhile.
    ///
    /// ```
    /// use std::time::Duration;
    /// use vfio_group::{Container, Group, IommuType};
    /// use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};
    ///
    /// let group = Group::new(1);
    /// let device = group.add_device("vgpu0")?;
    /// let (container, file) = (Container::open(), group.open()?);
    /// file.set_container(&container)?;
    /// container.set_iommu(IommuType::Type1v2)?;
    ///
    /// let opened = file.device_for("vgpu0", "the guest")?;
    /// let asked = EventFd::new(EFD_NONBLOCK).unwrap();
    /// device.set_request_notifier(Some(asked.try_clone().unwrap()))?;
    /// let refused = device.request_release(2, Duration::from_millis(1)).unwrap_err();
    /// assert_eq!((refused.errno(), asked.read().unwrap()), (libc::EBUSY, 2));
    /// assert!(refused.to_string().contains("the guest"));
    ///
    /// drop(opened);
    /// device.request_release(1, Duration::ZERO)?;
    /// # Ok::<(), vfio_group::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::NoDevice`] (ENODEV); [`Error::DeviceOpen`] (EBUSY) if it is still open after that.
    pub fn request_release(&self, times: u32, interval: Duration) -> Result<()> {
        for _ in 0..times {
            if self.ask()? || self.wait_closed(interval)? {
                return Ok(());
            }
        }
        self.check_closed()
    }

    /// Takes the device away under those who use it: from now on nobody can open it (ENODEV); its
    /// notifier is signalled, at once and then every 10 seconds, until the last file is closed.
    ///
    /// External users of the group are not waited for: theirs is the group, and they go on with DMA,
    /// also when the last device is gone.
    ///
    /// # Errors
    ///
    /// [`Error::NoDevice`] (ENODEV) if it was removed; [`Error::DeviceOpen`] (EBUSY), with who has it
    /// open, if `timeout` has passed: the device can still not be opened, and this or
    /// [`remove`](Device::remove) may be called again.
    pub fn unplug(&self, timeout: Duration) -> Result<()> {
        self.group
            .devices()
            .lock()
            .get_mut(self)
            .ok_or_else(|| self.gone())?
            .leaving = true;
        let begun = now();
        while !self.ask()? {
            let left = timeout.saturating_sub(now().saturating_duration_since(begun));
            if self.wait_closed(left.min(REQUEST_INTERVAL))? || left <= REQUEST_INTERVAL {
                break;
            }
        }
        self.remove()
    }

    /// Registers who is told of the virtual machine the group belongs to, see
    /// [`Group::set_kvm`] (`vfio_register_notifier` with `VFIO_GROUP_NOTIFY_SET_KVM`). If there is one
    /// already, the listener is called with it at once. It lasts until the result is dropped; a call
    /// that runs then may still end later, none begins.
    ///
    /// A listener that owns what it is registered with is never dropped: it should have a
    /// [`Weak`](std::sync::Weak).
    ///
    /// # Errors
    ///
    /// [`Error::NoDevice`] (ENODEV); [`Error::CannotListen`] (EINVAL), whatever it is that keeps
    /// [`ExternalUser::from_device`](crate::ExternalUser::from_device) from succeeding.
    pub fn on_set_kvm(
        &self,
        listener: impl Fn(Option<&Kvm>) + Send + Sync + 'static,
    ) -> Result<KvmListener> {
        self.check_present()?;
        let _user = ContainerUser::external(&self.group).map_err(|reason| Error::CannotListen {
            group: self.group.id(),
            reason: Box::new(reason),
        })?;
        Ok(KvmListener::new(&self.group, listener))
    }

    /// ENODEV unless the device is in its group, and stays there.
    pub(crate) fn check_present(&self) -> Result<()> {
        match self.group.devices().lock().get(self) {
            Some(entry) if !entry.leaving => Ok(()),
            _ => Err(self.gone()),
        }
    }

    /// Signals the notifier, unless the device is not open; says whether it is not.
    fn ask(&self) -> Result<bool> {
        let notifier = {
            let devices = self.group.devices().lock();
            let entry = devices.get(self).ok_or_else(|| self.gone())?;
            if entry.files.is_empty() {
                return Ok(true);
            }
            entry.request.clone()
        };
        // Without the lock: the other end is somebody else's.
        match notifier.map(|notifier| notifier.write(1)) {
            Some(Ok(())) => {}
            Some(Err(error)) => log::warn!("{self:?} could not be asked for: {error}"),
            None => log::info!("nobody is told that {self:?} is asked for"),
        }
        Ok(false)
    }

    /// Waits until the device has no files, and says whether that is so.
    fn wait_closed(&self, timeout: Duration) -> Result<bool> {
        let deadline = now() + timeout.min(LONGEST);
        let table = self.group.devices();
        let mut devices = table.lock();
        loop {
            let entry = devices.get(self).ok_or_else(|| self.gone())?;
            if entry.files.is_empty() {
                return Ok(true);
            }
            match wait_until(&table.changed, &table.devices, devices, deadline) {
                Some(woken) => devices = woken,
                None => return Ok(false),
            }
        }
    }

    fn check_closed(&self) -> Result<()> {
        let devices = self.group.devices().lock();
        let entry = devices.get(self).ok_or_else(|| self.gone())?;
        if entry.files.is_empty() {
            return Ok(());
        }
        Err(self.open_by(entry))
    }

    fn open_by(&self, entry: &Entry) -> Error {
        Error::DeviceOpen {
            group: self.group.id(),
            name: self.name.clone(),
            users: entry.files.values().cloned().collect(),
        }
    }

    fn gone(&self) -> Error {
        no_device(&self.group, &self.name)
    }
}

fn no_device(group: &Group, name: &str) -> Error {
    Error::NoDevice {
        group: group.id(),
        name: name.to_owned(),
    }
}

fn exists(group: &Group, name: &str) -> Error {
    Error::DeviceExists {
        group: group.id(),
        name: name.to_owned(),
    }
}

/// A device of the group that another driver has, for as long as this lives: the group is not viable
/// meanwhile. Made by [`Group::bind_elsewhere`].
#[derive(Debug)]
pub struct BoundElsewhere {
    group: Group,
    name: String,
}

impl BoundElsewhere {
    pub(crate) fn bind(group: &Group, name: &str) -> Result<Self> {
        let mut devices = group.devices().lock();
        if devices.knows(name) {
            return Err(exists(group, name));
        }
        devices.elsewhere.insert(name.to_owned());
        drop(devices);
        Ok(BoundElsewhere {
            group: group.clone(),
            name: name.to_owned(),
        })
    }
}

impl Drop for BoundElsewhere {
    fn drop(&mut self) {
        self.group.devices().lock().elsewhere.remove(&self.name);
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
    pub(crate) fn open(file: &GroupFile, name: &str, user_name: &str) -> Result<Self> {
        // The name is looked for first, but the device is not open until nothing else is in the way:
        // an attempt that fails must not end as the closing of a file does.
        file.group()
            .devices()
            .lock()
            .open_entry(file.group(), name)?;
        let user = ContainerUser::of_device(file)?;
        let opened = OpenedDevice::open(file.group(), name, user_name)?;
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

/// One more file of a device, for as long as it lives.
#[derive(Debug)]
struct OpenedDevice {
    device: Device,
    file: u64,
}

impl OpenedDevice {
    fn open(group: &Group, name: &str, user: &str) -> Result<Self> {
        let mut devices = group.devices().lock();
        let file = devices.next_id();
        let entry = devices.open_entry(group, name)?;
        entry.files.insert(file, user.to_owned());
        let device = Device {
            group: group.clone(),
            name: name.to_owned(),
            id: entry.id,
        };
        Ok(OpenedDevice { device, file })
    }
}

impl Drop for OpenedDevice {
    fn drop(&mut self) {
        let table = self.device.group.devices();
        let notifier = match table.lock().get_mut(&self.device) {
            Some(entry) => {
                entry.files.remove(&self.file);
                match entry.files.is_empty() {
                    true => entry.request.take(),
                    false => None,
                }
            }
            None => None,
        };
        // Without the lock: a file descriptor is closed with it.
        drop(notifier);
        table.changed.notify_all();
    }
}

/// The devices of a group, and a signal when a file was closed or a device removed.
#[derive(Debug)]
pub(crate) struct DeviceTable {
    devices: Mutex<Devices>,
    changed: Condvar,
}

impl DeviceTable {
    pub(crate) fn new() -> Self {
        DeviceTable {
            devices: Mutex::new(Devices::default()),
            changed: Condvar::new(),
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Devices> {
        lock(&self.devices)
    }
}

#[derive(Debug, Default)]
pub(crate) struct Devices {
    by_name: BTreeMap<String, Entry>,
    /// Those that another driver has.
    elsewhere: BTreeSet<String>,
    next_id: u64,
}

#[derive(Debug)]
struct Entry {
    id: u64,
    /// Who has it open, file by file.
    files: BTreeMap<u64, String>,
    request: Option<Arc<EventFd>>,
    /// It is being unplugged: no more files.
    leaving: bool,
}

impl Devices {
    pub(crate) fn len(&self) -> usize {
        self.by_name.len()
    }

    pub(crate) fn viable(&self) -> bool {
        self.elsewhere.is_empty()
    }

    fn knows(&self, name: &str) -> bool {
        self.by_name.contains_key(name) || self.elsewhere.contains(name)
    }

    /// The device of that name, unless it is leaving.
    fn open_entry(&mut self, group: &Group, name: &str) -> Result<&mut Entry> {
        self.by_name
            .get_mut(name)
            .filter(|entry| !entry.leaving)
            .ok_or_else(|| no_device(group, name))
    }

    fn next_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    /// Adds a device and returns its id, unless the name is taken.
    fn insert(&mut self, name: &str) -> Option<u64> {
        if self.knows(name) {
            return None;
        }
        let id = self.next_id();
        let entry = Entry {
            id,
            files: BTreeMap::new(),
            request: None,
            leaving: false,
        };
        self.by_name.insert(name.to_owned(), entry);
        Some(id)
    }

    fn get(&self, device: &Device) -> Option<&Entry> {
        self.by_name
            .get(&device.name)
            .filter(|entry| entry.id == device.id)
    }

    fn get_mut(&mut self, device: &Device) -> Option<&mut Entry> {
        self.by_name
            .get_mut(&device.name)
            .filter(|entry| entry.id == device.id)
    }
}

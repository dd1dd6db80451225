// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! KVM's VFIO device: which groups belong to a virtual machine.

#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use kvm_bindings::{
    kvm_create_device, kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_VFIO, KVM_DEV_VFIO_FILE,
    KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL,
};
use kvm_ioctls::{DeviceFd, VmFd};

use super::Kvm;
#[cfg(feature = "hardware")]
use crate::hardware::{HardwareGroup, HardwareUser};
use crate::{Error, Group, Result};

/// The one ioctl that KVM's VFIO device needs, `KVM_SET_DEVICE_ATTR`: of KVM's `DeviceFd`, or of whatever a VMM has
/// around it.
pub trait SetDeviceAttr: Send + Sync {
    /// Adds or removes the file whose number `addr` points to.
    ///
    /// # Errors
    ///
    /// What KVM answers.
    fn set_device_attr(&self, attr: &kvm_device_attr) -> io::Result<()>;
}

impl SetDeviceAttr for DeviceFd {
    fn set_device_attr(&self, attr: &kvm_device_attr) -> io::Result<()> {
        let set = DeviceFd::set_device_attr(self, attr);
        set.map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }
}

/// KVM's VFIO device. A group of the kernel's, or a device's own file, is told which virtual machine it belongs to by
/// being added to it; a [`Group`] of this crate by [`Group::set_kvm`].
///
/// The order is that of the kernel, and the types keep it: a device learns of its virtual machine when it is
/// opened, so its group is added before; and the group is removed when the last device that was opened by it is
/// closed ([`KvmFile`]).
///
/// ```no_run
/// use std::sync::Arc;
/// use kvm_ioctls::Kvm;
/// use vfio_group::{Group, KvmVfio};
///
/// let vm = Arc::new(Kvm::new().unwrap().create_vm().unwrap());
/// let vfio = KvmVfio::new(&vm)?;
/// // A device model asks for the virtual machine when it is opened, or has itself told.
/// let group = Group::new(7);
/// let member = vfio.add_group(&group);
/// assert!(group.kvm().is_some());
/// drop(member);
/// assert!(group.kvm().is_none());
/// # Ok::<(), vfio_group::Error>(())
/// ```
#[derive(Clone)]
pub struct KvmVfio {
    device: Arc<dyn SetDeviceAttr>,
    vm: Kvm,
}

impl KvmVfio {
    /// The VFIO device of a virtual machine, which has one: whoever makes another gets an error. It is in the
    /// way of a VMM that has made it already; that one takes [`with_device`](KvmVfio::with_device).
    ///
    /// # Errors
    ///
    /// [`Error::Hardware`]: EBUSY if there is one, ENODEV where KVM has no VFIO.
    pub fn new(vm: &Arc<VmFd>) -> Result<Self> {
        let mut create = kvm_create_device {
            type_: kvm_device_type_KVM_DEV_TYPE_VFIO,
            ..Default::default()
        };
        let device = vm
            .create_device(&mut create)
            .map_err(|error| Error::Hardware {
                operation: "KVM_CREATE_DEVICE",
                source: io::Error::from_raw_os_error(error.errno()),
            })?;
        Ok(KvmVfio::with_device(Arc::new(device), vm.clone()))
    }

    /// A device that is there already, and what groups of this crate are told of the virtual machine.
    pub fn with_device(device: Arc<dyn SetDeviceAttr>, vm: Kvm) -> Self {
        KvmVfio { device, vm }
    }

    /// Adds a group of the kernel's, or the file of a device that will be bound to an iommufd
    /// (`KVM_DEV_VFIO_FILE_ADD`): before the devices of the group are opened, or that one is bound.
    ///
    /// # Errors
    ///
    /// [`Error::Hardware`]: EBADF or EINVAL for what is no file of VFIO, EEXIST if it was added before.
    pub fn add<F: AsFd>(&self, file: F) -> Result<Arc<KvmFile<F>>> {
        self.set(KVM_DEV_VFIO_FILE_ADD, file.as_fd())
            .map_err(|source| Error::Hardware {
                operation: "KVM_DEV_VFIO_FILE_ADD",
                source,
            })?;
        Ok(Arc::new(KvmFile {
            vfio: self.clone(),
            file,
        }))
    }

    /// Tells a group of this crate, and its device models with it, of the virtual machine. Device models that
    /// want to know when they are opened are told before.
    pub fn add_group(&self, group: &Group) -> KvmGroup {
        group.set_kvm(Some(self.vm.clone()));
        KvmGroup {
            group: group.clone(),
            vm: self.vm.clone(),
        }
    }

    fn set(&self, what: u32, file: BorrowedFd<'_>) -> io::Result<()> {
        let fd: RawFd = file.as_raw_fd();
        self.device.set_device_attr(&kvm_device_attr {
            flags: 0,
            group: KVM_DEV_VFIO_FILE,
            attr: u64::from(what),
            addr: std::ptr::from_ref(&fd) as u64,
        })
    }
}

impl fmt::Debug for KvmVfio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmVfio").finish_non_exhaustive()
    }
}

/// A file that KVM's VFIO device knows of; from [`KvmVfio::add`].
///
/// When the last reference goes it is removed from KVM (`KVM_DEV_VFIO_FILE_DEL`), then closed. Devices opened through
/// it are such references ([`KvmUser`]).
pub struct KvmFile<F: AsFd> {
    vfio: KvmVfio,
    file: F,
}

#[cfg(feature = "hardware")]
impl KvmFile<HardwareGroup> {
    /// Opens a device of the group, which learns of the virtual machine by that: as
    /// [`HardwareGroup::device`], and the group stays added to KVM until it is closed.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn device(self: &Arc<Self>, name: &str) -> Result<KvmUser> {
        Ok(KvmUser {
            user: self.file.device(name)?,
            _group: self.clone(),
        })
    }
}

impl<F: AsFd> Deref for KvmFile<F> {
    type Target = F;

    fn deref(&self) -> &F {
        &self.file
    }
}

impl<F: AsFd> fmt::Debug for KvmFile<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fd = self.file.as_fd();
        f.debug_struct("KvmFile").field("file", &fd).finish()
    }
}

impl<F: AsFd> Drop for KvmFile<F> {
    fn drop(&mut self) {
        let removed = self.vfio.set(KVM_DEV_VFIO_FILE_DEL, self.file.as_fd());
        if let Err(error) = removed {
            log::warn!("KVM_DEV_VFIO_FILE_DEL: {error}");
        }
    }
}

/// An open device of a group that KVM knows of; from [`KvmFile::device`].
#[cfg(feature = "hardware")]
#[derive(Debug)]
pub struct KvmUser {
    // Closed before its group is removed from KVM.
    user: HardwareUser,
    _group: Arc<KvmFile<HardwareGroup>>,
}

#[cfg(feature = "hardware")]
impl AsFd for KvmUser {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.user.as_fd()
    }
}

/// A group of this crate that was told of a virtual machine; from [`KvmVfio::add_group`]. When it is dropped the
/// group is told that there is none, if it was not told of another.
#[must_use = "dropping it tells the group that there is no virtual machine"]
pub struct KvmGroup {
    group: Group,
    vm: Kvm,
}

impl fmt::Debug for KvmGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("KvmGroup");
        shown.field("group", &self.group).finish_non_exhaustive()
    }
}

impl Drop for KvmGroup {
    fn drop(&mut self) {
        let told = self.group.kvm();
        if told.is_some_and(|told| Arc::ptr_eq(&told, &self.vm)) {
            self.group.set_kvm(None);
        }
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! KVM's VFIO device is told of groups before their devices are opened, and until they are closed.

#![cfg(all(feature = "kvm", not(loom)))]

#[cfg(feature = "hardware")]
#[path = "common/kernel.rs"]
mod kernel;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use kvm_bindings::kvm_device_attr;
use vfio_group::{Container, Group, IommuType, Kvm, KvmVfio, SetDeviceAttr};

/// KVM's device, as far as files are added and removed.
#[derive(Default)]
struct Device {
    files: Mutex<Vec<i32>>,
}

impl SetDeviceAttr for Device {
    fn set_device_attr(&self, attr: &kvm_device_attr) -> io::Result<()> {
        // KVM_DEV_VFIO_FILE
        assert_eq!((attr.group, attr.flags), (1, 0));
        let fd = std::ptr::with_exposed_provenance::<i32>(attr.addr as usize);
        // SAFETY: the argument is the address of a number.
        let fd = unsafe { fd.read() };
        let mut files = self.files.lock().unwrap();
        let at = files.iter().position(|file| *file == fd);
        let errno = match (attr.attr, at) {
            // KVM_DEV_VFIO_FILE_ADD
            (1, None) => {
                files.push(fd);
                return Ok(());
            }
            (1, Some(_)) => libc::EEXIST,
            // KVM_DEV_VFIO_FILE_DEL
            (2, Some(at)) => {
                files.remove(at);
                return Ok(());
            }
            _ => libc::ENOENT,
        };
        Err(io::Error::from_raw_os_error(errno))
    }
}

fn vfio() -> (Arc<Device>, Kvm, KvmVfio) {
    let device = Arc::new(Device::default());
    let vm: Kvm = Arc::new("the machine");
    let vfio = KvmVfio::with_device(device.clone(), vm.clone());
    (device, vm, vfio)
}

#[test]
fn a_file_is_known_while_somebody_has_it() {
    let (device, _, vfio) = vfio();
    let file = File::open("/dev/null").unwrap();
    let fd = file.as_raw_fd();
    let added = vfio.add(&file).unwrap();
    assert_eq!(*device.files.lock().unwrap(), [fd]);
    assert!(format!("{added:?}").contains(&fd.to_string()));
    assert_eq!(vfio.add(&file).unwrap_err().errno(), libc::EEXIST);
    let other = added.clone();
    drop((added, vfio));
    assert_eq!(*device.files.lock().unwrap(), [fd]);
    drop(other);
    assert!(device.files.lock().unwrap().is_empty());
}

#[test]
fn a_group_of_ours_is_told() {
    let (_, vm, vfio) = vfio();
    let group = Group::new(26);
    let device = group.add_device("vgpu0").unwrap();
    let (container, file) = (Container::open(), group.open().unwrap());
    file.set_container(&container).unwrap();
    container.set_iommu(IommuType::Type1v2).unwrap();
    let heard = Arc::new(Mutex::new(Vec::new()));
    let hears = heard.clone();
    let tell = move |kvm: Option<&Kvm>| hears.lock().unwrap().push(kvm.is_some());
    let listener = device.on_set_kvm(tell).unwrap();
    let member = vfio.add_group(&group);
    assert!(Arc::ptr_eq(&group.kvm().unwrap(), &vm));
    assert!(format!("{member:?} {vfio:?}").contains("26"));
    drop(member);
    assert!(group.kvm().is_none());
    assert_eq!(*heard.lock().unwrap(), [true, false]);
    drop(listener);
}

#[test]
fn a_group_that_was_told_of_another_stays_so() {
    let (_, _, vfio) = vfio();
    let group = Group::new(26);
    let member = vfio.add_group(&group);
    let other: Kvm = Arc::new("another machine");
    group.set_kvm(Some(other.clone()));
    drop(member);
    assert!(Arc::ptr_eq(&group.kvm().unwrap(), &other));
}

/// The kernel gives a device its virtual machine when it is opened.
#[cfg(feature = "hardware")]
mod with_devices {
    use std::io::Read;
    use std::os::fd::{AsFd, IntoRawFd};
    use std::os::unix::net::UnixStream;

    use vfio_group::hardware::HardwareGroup;

    use super::*;
    use crate::kernel::answer_with;

    const GROUP_GET_DEVICE_FD: u32 = 0x3b6a;

    /// Looks at a device's file when its group is removed.
    struct Watch {
        device: Device,
        peer: UnixStream,
        is_removed: Mutex<bool>,
    }

    impl SetDeviceAttr for Watch {
        fn set_device_attr(&self, attr: &kvm_device_attr) -> io::Result<()> {
            if attr.attr == 2 {
                let end = (&self.peer).read(&mut [0]);
                assert_eq!(end.unwrap(), 0, "the device is closed");
                *self.is_removed.lock().unwrap() = true;
            }
            self.device.set_device_attr(attr)
        }
    }

    #[test]
    fn a_group_is_removed_after_its_devices_are_closed() {
        let (peer, opened) = UnixStream::pair().unwrap();
        peer.set_nonblocking(true).unwrap();
        let watch = Arc::new(Watch {
            device: Device::default(),
            peer,
            is_removed: Mutex::new(false),
        });
        let vfio = KvmVfio::with_device(watch.clone(), Arc::new(()));
        let group = HardwareGroup::from_file(File::open("/dev/null").unwrap());
        let group = vfio.add(group).unwrap();
        let mut opened = Some(opened);
        let added = watch.clone();
        answer_with(move |call| {
            assert_eq!(call.number, GROUP_GET_DEVICE_FD);
            assert_eq!(
                *added.device.files.lock().unwrap(),
                [call.fd],
                "added before"
            );
            Ok(opened.take().unwrap().into_raw_fd())
        });
        let user = group.device("0000:06:0d.0").unwrap();
        assert!(user.as_fd().as_raw_fd() >= 0);
        drop((group, vfio));
        assert!(!*watch.is_removed.lock().unwrap());
        drop(user);
        assert!(*watch.is_removed.lock().unwrap());
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices that are asked for, and taken away under those who use them.

#![cfg(not(loom))]

#[path = "common/deadline.rs"]
mod deadline;

use std::thread;
use std::time::{Duration, Instant};

use deadline::{ended, within};
use iommu_type1::{page_size, Backing};
use vfio_group::{Container, Device, Error, ExternalUser, Group, GroupFile, IommuType};
use vm_memory::Permissions;
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

/// Longer than any test may take.
const NEVER: Duration = Duration::from_secs(3600);

struct Vm {
    group: Group,
    device: Device,
    file: GroupFile,
    container: Container,
}

impl Vm {
    fn new() -> Self {
        let group = Group::new(1);
        let device = group.add_device("vgpu0").unwrap();
        let (container, file) = (Container::open(), group.open().unwrap());
        file.set_container(&container).unwrap();
        container.set_iommu(IommuType::Type1v2).unwrap();
        Vm {
            group,
            device,
            file,
            container,
        }
    }

    fn notifier(&self) -> EventFd {
        let notifier = EventFd::new(EFD_NONBLOCK).unwrap();
        let other_end = notifier.try_clone().unwrap();
        self.device.set_request_notifier(Some(other_end)).unwrap();
        notifier
    }
}

fn users(error: Error) -> Vec<String> {
    match error {
        Error::DeviceOpen { users, .. } => users,
        other => panic!("{other}"),
    }
}

#[test]
fn an_unplug_that_runs_out_of_time_names_who_has_the_device() {
    let vm = Vm::new();
    let notifier = vm.notifier();
    let first = vm.file.device_for("vgpu0", "the guest").unwrap();
    let second = vm.file.device_for("vgpu0", "the migration").unwrap();
    let error = vm.device.unplug(Duration::ZERO).unwrap_err();
    assert_eq!(error.errno(), libc::EBUSY);
    assert_eq!(users(error), ["the guest", "the migration"]);
    assert_eq!(notifier.read().unwrap(), 1);

    // It goes no further, and not back either.
    let errors = [
        vm.file.device("vgpu0").unwrap_err(),
        ExternalUser::from_device(&vm.device).unwrap_err(),
        vm.device.on_set_kvm(|_| ()).unwrap_err(),
    ];
    assert!(errors.iter().all(|error| error.errno() == libc::ENODEV));
    let again = vm.group.add_device("vgpu0").unwrap_err();
    assert_eq!(again.errno(), libc::EEXIST);
    drop(first);
    let error = vm.device.unplug(Duration::ZERO).unwrap_err();
    assert_eq!(users(error), ["the migration"]);
    drop(second);
    vm.device.unplug(Duration::ZERO).unwrap();
    let gone = vm.device.unplug(Duration::ZERO).unwrap_err();
    assert_eq!(gone.errno(), libc::ENODEV);
    vm.group.add_device("vgpu0").unwrap();
}

/// It asks, gives the users that time, and says what it does at once without any.
#[test]
fn an_unplug_waits_as_long_as_it_was_told() {
    let vm = Vm::new();
    let notifier = vm.notifier();
    let _opened = vm.file.device_for("vgpu0", "the guest").unwrap();
    let timeout = Duration::from_millis(2);
    let begun = Instant::now();
    let error = vm.device.unplug(timeout).unwrap_err();
    assert!(begun.elapsed() >= timeout);
    assert_eq!(users(error), ["the guest"]);
    assert_eq!(notifier.read().unwrap(), 1);
}

/// Who is asked closes the device, and whoever waits is told of that. It may not wait yet then; what becomes of one who
/// does is in the model of `tests/loom_users.rs`.
#[test]
fn whoever_unplugs_waits_for_who_is_asked() {
    type Wait = fn(&Device) -> vfio_group::Result<()>;
    let waits: [Wait; 2] = [
        |device| device.unplug(NEVER),
        |device| device.request_release(1, NEVER),
    ];
    for wait in waits {
        let vm = Vm::new();
        let notifier = vm.notifier();
        let opened = vm.file.device("vgpu0").unwrap();
        let device = vm.device.clone();
        let waiter = thread::spawn(move || wait(&device).unwrap());
        let mut asked = 0;
        within("it is asked for the device", || {
            asked += notifier.read().unwrap_or(0);
            asked > 0
        });
        assert_eq!(asked, 1);
        drop(opened);
        ended("whoever waits is told that it was closed", waiter);
        assert_eq!(vm.group.container_users(), 1);
    }
}

/// Requests that are not heard are repeated, as often as was said.
#[test]
fn a_device_is_asked_for_as_often_as_was_said() {
    let vm = Vm::new();
    let notifier = vm.notifier();
    vm.device.request_release(7, NEVER).unwrap();
    assert!(notifier.read().is_err(), "it is not open");

    let opened = vm.file.device_for("vgpu0", "the guest").unwrap();
    for times in [0, 1, 7] {
        let asked = vm.device.request_release(times, Duration::ZERO);
        assert_eq!(users(asked.unwrap_err()), ["the guest"]);
        assert_eq!(notifier.read().unwrap_or(0), u64::from(times));
    }
    // It can be opened still, and nobody is told without a notifier.
    drop(vm.file.device("vgpu0").unwrap());
    vm.device.set_request_notifier(None).unwrap();
    vm.device.request_release(1, Duration::ZERO).unwrap_err();
    assert!(notifier.read().is_err());

    // The last file takes the notifier along.
    let notifier = vm.notifier();
    drop(opened);
    let _opened = vm.file.device("vgpu0").unwrap();
    vm.device.request_release(1, Duration::ZERO).unwrap_err();
    assert!(notifier.read().is_err());
}

/// Only a file that was open takes the notifier along when it is closed.
#[test]
fn an_open_that_fails_leaves_the_notifier() {
    let vm = Vm::new();
    let notifier = vm.notifier();
    let bound = vm.group.bind_elsewhere("other").unwrap();
    vm.file.device("vgpu0").unwrap_err();
    drop(bound);
    let _opened = vm.file.device("vgpu0").unwrap();
    vm.device.request_release(1, Duration::ZERO).unwrap_err();
    assert_eq!(notifier.read().unwrap(), 1);
}

/// A notifier that takes no more signals keeps nobody waiting.
#[test]
fn a_full_notifier_is_no_error_of_who_asks() {
    let vm = Vm::new();
    let notifier = vm.notifier();
    notifier.write(u64::MAX - 1).unwrap();
    let opened = vm.file.device("vgpu0").unwrap();
    let asked = vm.device.request_release(1, Duration::ZERO);
    assert_eq!(asked.unwrap_err().errno(), libc::EBUSY);
    drop(opened);
    vm.device.unplug(Duration::ZERO).unwrap();
    let gone = vm.device.set_request_notifier(Some(notifier));
    assert_eq!(gone.unwrap_err().errno(), libc::ENODEV);
}

#[test]
fn an_external_user_outlives_the_device() {
    let vm = Vm::new();
    let page = Backing::anonymous(page_size() as usize).unwrap();
    vm.container.map(0, page, Permissions::ReadWrite).unwrap();
    let user = ExternalUser::from_device(&vm.device).unwrap();
    vm.device.unplug(Duration::ZERO).unwrap();
    assert_eq!(vm.group.container_users(), 2);
    let Vm { group, file, .. } = vm;
    drop(file);
    user.write(8, b"DMA").unwrap();
    user.clone().write(8, b"DMA").unwrap();
    assert_eq!(group.open().unwrap_err().errno(), libc::EBUSY);
    drop(user);
    group.open().unwrap();
}

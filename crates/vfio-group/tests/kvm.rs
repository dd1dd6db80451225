// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who is told of the virtual machine, of what, and when.

#![cfg(not(loom))]

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, Mutex};

use vfio_group::{Container, Device, Group, GroupFile, IommuType, Kvm, KvmListener};

fn ready() -> (Group, Device, GroupFile) {
    let group = Group::new(1);
    let device = group.add_device("vgpu0").unwrap();
    let (container, file) = (Container::open(), group.open().unwrap());
    file.set_container(&container).unwrap();
    container.set_iommu(IommuType::Type1v2).unwrap();
    (group, device, file)
}

fn machine(number: u32) -> Option<Kvm> {
    Some(Arc::new(number))
}

type Heard = Arc<Mutex<Vec<Option<u32>>>>;

fn hear(heard: &Heard, kvm: Option<&Kvm>) {
    let number = kvm.map(|kvm| *kvm.clone().downcast().unwrap());
    heard.lock().unwrap().push(number);
}

fn listen(device: &Device) -> (KvmListener, Heard) {
    let heard = Heard::default();
    let hears = heard.clone();
    let listener = device.on_set_kvm(move |kvm| hear(&hears, kvm));
    (listener.unwrap(), heard)
}

#[test]
fn only_the_newcomer_is_told_what_there_was() {
    let (group, device, _file) = ready();
    let (_first, heard_first) = listen(&device);
    assert!(heard_first.lock().unwrap().is_empty(), "there was nothing");
    group.set_kvm(machine(1));
    let (_second, heard_second) = listen(&device);
    group.set_kvm(machine(2));
    group.set_kvm(None);
    let (_third, heard_third) = listen(&device);
    assert_eq!(*heard_first.lock().unwrap(), [Some(1), Some(2), None]);
    assert_eq!(*heard_second.lock().unwrap(), [Some(1), Some(2), None]);
    assert!(heard_third.lock().unwrap().is_empty());
    assert!(group.kvm().is_none());
}

#[test]
fn groups_are_told_apart() {
    let ((one, device, _file), (other, _, _other_file)) = (ready(), ready());
    let (_listener, heard) = listen(&device);
    other.set_kvm(machine(2));
    one.set_kvm(machine(1));
    assert_eq!(*heard.lock().unwrap(), [Some(1)]);
}

/// KVM's file goes in as it is.
#[test]
fn a_machine_may_be_a_file() {
    let (group, device, _file) = ready();
    let fd: Arc<OwnedFd> = Arc::new(File::open("/dev/null").unwrap().into());
    group.set_kvm(Some(fd.clone()));
    let seen = Arc::new(Mutex::new(None));
    let sees = seen.clone();
    let listener = device.on_set_kvm(move |kvm| {
        let fd = kvm.and_then(|kvm| kvm.clone().downcast::<OwnedFd>().ok());
        *sees.lock().unwrap() = fd.map(|fd| fd.as_raw_fd());
    });
    assert_eq!(*seen.lock().unwrap(), Some(fd.as_raw_fd()));
    group.set_kvm(None);
    assert_eq!(*seen.lock().unwrap(), None);
    assert_eq!(Arc::strong_count(&fd), 1, "nobody keeps it");
    drop(listener);
}

/// A listener that sets another value is told of that one too, when it has returned.
#[test]
fn a_listener_may_set_the_machine() {
    let (group, device, _file) = ready();
    let heard = Heard::default();
    let (hears, sets) = (heard.clone(), group.clone());
    let _listener = device.on_set_kvm(move |kvm| {
        hear(&hears, kvm);
        if kvm.is_some() {
            sets.set_kvm(None);
        }
    });
    group.set_kvm(machine(1));
    assert_eq!(*heard.lock().unwrap(), [Some(1), None]);
}

#[test]
fn a_listener_may_register_another_and_leave() {
    let (group, device, _file) = ready();
    let late = Arc::new(Mutex::new(None));
    let own: Arc<Mutex<Option<KvmListener>>> = Arc::default();
    let (registers, leaves, of) = (late.clone(), own.clone(), device.clone());
    let first = device.on_set_kvm(move |_| {
        let leaving = leaves.lock().unwrap().take();
        if leaving.is_some() {
            *registers.lock().unwrap() = Some(listen(&of));
        }
    });
    *own.lock().unwrap() = Some(first.unwrap());
    group.set_kvm(machine(1));
    group.set_kvm(machine(2));
    let (listener, heard) = late.lock().unwrap().take().unwrap();
    assert_eq!(*heard.lock().unwrap(), [Some(1), Some(2)]);
    drop(listener);
    assert_eq!(Arc::strong_count(&own), 1, "the first is gone");
}

#[test]
fn a_listener_that_panics_is_told_the_next_value() {
    let (group, device, _file) = ready();
    let heard = Heard::default();
    let hears = heard.clone();
    let _listener = device.on_set_kvm(move |kvm| {
        hear(&hears, kvm);
        assert!(kvm.is_none(), "on purpose");
    });
    let set = catch_unwind(AssertUnwindSafe(|| group.set_kvm(machine(1))));
    assert!(set.is_err());
    group.set_kvm(None);
    assert_eq!(*heard.lock().unwrap(), [Some(1), None]);
}

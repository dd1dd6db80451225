// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bugs that the kernel's VFIO core had, and that this one is not to have. `ci/kernel-bugs` puts each
//! back and expects its test to fail.

#![cfg(not(loom))]

#[path = "common/deadline.rs"]
mod deadline;

use std::hint::spin_loop;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;

use deadline::{ended, must_end, within};
use iommu_type1::{page_size, Backing, Interest};
use vfio_group::{Container, Device, ExternalUser, Group, GroupFile, IommuType, Kvm, Result};
use vm_memory::Permissions;

const IOVA: u64 = 0x10_0000;

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
        let page = Backing::anonymous(page_size() as usize).unwrap();
        container.map(IOVA, page, Permissions::ReadWrite).unwrap();
        Vm {
            group,
            device,
            file,
            container,
        }
    }

    fn user(&self) -> ExternalUser {
        ExternalUser::from_device(&self.device).unwrap()
    }
}

fn is_einval<T>(result: Result<T>) -> bool {
    result.is_err_and(|error| error.errno() == libc::EINVAL)
}

#[test]
fn b03_a_refused_pin_leaves_no_user_behind() {
    let vm = Vm::new();
    let user = vm.user();
    let pin = |npages| user.pin_pages(IOVA, npages, Permissions::ReadWrite);
    let refused = |result: Result<_>, errno| {
        assert_eq!(result.unwrap_err().errno(), errno);
        assert_eq!(vm.group.container_users(), 2);
    };
    let second = vm.group.add_device("second").unwrap();
    refused(pin(0), libc::EINVAL);
    refused(pin(1), libc::EINVAL);
    second.remove().unwrap();
    refused(pin(1 << 20), libc::E2BIG);
    refused(pin(1), libc::EINVAL);
    user.register_notifier("vgpu0", Interest::Holder, Arc::new(|_, _| ()))
        .unwrap();
    refused(pin(2), libc::EINVAL);
    drop(user);
    vm.file.unset_container().unwrap();
}

#[test]
fn b04_a_group_pins_only_while_it_is_a_singleton() {
    let vm = Vm::new();
    let user = ExternalUser::from_group(&vm.file).unwrap();
    user.register_notifier("vgpu0", Interest::Holder, Arc::new(|_, _| ()))
        .unwrap();
    let pin = || user.pin_pages(IOVA, 1, Permissions::ReadWrite);
    drop(pin().unwrap());
    let second = vm.group.add_device("second").unwrap();
    assert!(is_einval(pin()));
    second.remove().unwrap();
    drop(pin().unwrap());
}

/// The release of the IOMMU tells who listens; that may use the container.
#[test]
fn b14_a_notice_of_the_release_may_use_the_container() {
    must_end("the release", || {
        let Vm {
            container, file, ..
        } = Vm::new();
        let container = Arc::new(container);
        let space = container.address_space().unwrap();
        let calls = Arc::new(AtomicUsize::new(0));
        let notice = {
            let (container, calls) = (container.clone(), calls.clone());
            move |_, _| {
                assert_eq!(container.check_extension(3), 1);
                assert!(is_einval(container.address_space()));
                calls.fetch_add(1, Ordering::Relaxed);
            }
        };
        let _pinner = space.pinner("listener", Interest::All, Arc::new(notice));
        file.unset_container().unwrap();
        assert_eq!(calls.load(Ordering::Relaxed), 1);
    });
}

/// Whoever goes last may do so from inside a notice of an unmap.
#[test]
fn b14_the_last_user_may_go_in_a_notice() {
    must_end("the unmap", || {
        let vm = Vm::new();
        let user = Arc::new(Mutex::new(Some(vm.user())));
        let notice = {
            let user = Arc::downgrade(&user);
            move |_, _| drop(user.upgrade().and_then(|user| user.lock().unwrap().take()))
        };
        let registered = user.lock().unwrap();
        let by = registered.as_ref().unwrap();
        by.register_notifier("vgpu0", Interest::All, Arc::new(notice))
            .unwrap();
        drop(registered);
        drop(vm.file);
        assert_eq!(vm.container.unmap(IOVA, page_size()).unwrap(), page_size());
        assert_eq!(vm.group.container_users(), 0);
        vm.group.open().unwrap();
    });
}

/// Operations of the container against the last group's leaving: they work, or find no IOMMU.
#[test]
fn b14_the_container_is_used_while_its_last_group_leaves() {
    must_end("the race", || {
        for _ in 0..200 {
            let Vm {
                container,
                file,
                group,
                ..
            } = Vm::new();
            let (container, start) = (Arc::new(container), Arc::new(Barrier::new(2)));
            let mapper = {
                let (container, start) = (container.clone(), start.clone());
                thread::spawn(move || {
                    let page = Backing::anonymous(page_size() as usize).unwrap();
                    start.wait();
                    let mapped = container.map(0, page, Permissions::Read);
                    assert!(mapped.is_ok() || is_einval(mapped));
                })
            };
            start.wait();
            file.unset_container().unwrap();
            mapper.join().unwrap();
            assert_eq!(group.container_users(), 0);
            assert!(is_einval(container.address_space()));
        }
    });
}

/// Of opening and removing a device one wins: the first, or at the same time any. Who that is in these rounds is left
/// to chance; the model in `tests/loom_users.rs` has all there is.
#[test]
fn b14_a_device_is_opened_while_it_is_removed() {
    let vm = Vm::new();
    let opened = vm.file.device("vgpu0").unwrap();
    assert_eq!(vm.device.remove().unwrap_err().errno(), libc::EBUSY);
    drop(opened);
    vm.device.remove().unwrap();
    assert_eq!(vm.file.device("vgpu0").unwrap_err().errno(), libc::ENODEV);

    for round in 0..200 {
        let vm = Vm::new();
        let (device, start) = (vm.device.clone(), Arc::new(AtomicBool::new(false)));
        let remover = {
            let start = start.clone();
            thread::spawn(move || {
                within("a start", || start.load(Ordering::Acquire));
                device.remove()
            })
        };
        start.store(true, Ordering::Release);
        // So that each comes first in some rounds.
        (0..round * 4).for_each(|_| spin_loop());
        let opened = vm.file.device("vgpu0");
        let removed = ended("a removal", remover);
        match (&opened, &removed) {
            (Ok(_), Err(error)) => {
                assert_eq!(error.errno(), libc::EBUSY);
                assert!(vm.device.remove().is_err(), "still open");
            }
            (Err(error), Ok(())) => assert_eq!(error.errno(), libc::ENODEV),
            other => panic!("both won, or none: {other:?}"),
        }
    }
}

/// The virtual machine goes while a device is released, each waiting for what the other does.
#[test]
fn b15_set_kvm_and_release_do_not_wait_for_each_other() {
    must_end("set_kvm", || {
        let vm = Vm::new();
        let (entered, has_entered) = channel();
        let (released, has_released): (Sender<()>, Receiver<()>) = channel();
        let has_released = Mutex::new(has_released);
        let listener = vm.device.on_set_kvm(move |kvm| {
            if kvm.is_none() {
                entered.send(()).unwrap();
                has_released.lock().unwrap().recv().unwrap();
            }
        });
        let (listener, user) = (listener.unwrap(), vm.user());
        let group = vm.group.clone();
        group.set_kvm(Some(Arc::new(())));
        let releaser = {
            let (file, group) = (vm.file, vm.group);
            thread::spawn(move || {
                has_entered.recv().unwrap();
                drop(listener);
                group.set_kvm(None);
                drop((user, file));
                assert_eq!(group.container_users(), 0);
                released.send(()).unwrap();
            })
        };
        group.set_kvm(None);
        releaser.join().unwrap();
    });
}

/// A listener that releases everything itself.
#[test]
fn b15_a_listener_may_release_the_device() {
    must_end("set_kvm", || {
        let vm = Vm::new();
        let held = Arc::new(Mutex::new(None));
        let releases = held.clone();
        let listener = vm.device.on_set_kvm(move |kvm: Option<&Kvm>| {
            if kvm.is_none() {
                let held = releases.lock().unwrap().take();
                drop(held);
            }
        });
        let Vm { group, file, .. } = vm;
        let user = ExternalUser::from_group(&file).unwrap();
        *held.lock().unwrap() = Some((listener.unwrap(), user, file));
        group.set_kvm(Some(Arc::new(())));
        assert_eq!(group.container_users(), 2);
        group.set_kvm(None);
        assert_eq!(group.container_users(), 0);
        assert_eq!(Arc::strong_count(&held), 1, "the listener is gone too");
    });
}

#[test]
fn b16_who_goes_is_not_told_any_more() {
    let vm = Vm::new();
    let calls = Arc::new(AtomicUsize::new(0));
    let counts = calls.clone();
    let listener = vm
        .device
        .on_set_kvm(move |_| {
            counts.fetch_add(1, Ordering::Relaxed);
        })
        .unwrap();
    vm.group.set_kvm(Some(Arc::new(())));
    assert_eq!(calls.load(Ordering::Relaxed), 1);
    drop(listener);
    vm.group.set_kvm(None);
    assert_eq!(calls.load(Ordering::Relaxed), 1);
    assert_eq!(Arc::strong_count(&calls), 1, "nothing is left of it");

    let notices = calls.clone();
    let user = vm.user();
    let notice = move |_, _| {
        notices.fetch_add(1, Ordering::Relaxed);
    };
    user.register_notifier("vgpu0", Interest::All, Arc::new(notice))
        .unwrap();
    drop(user);
    vm.container.unmap(IOVA, page_size()).unwrap();
    assert_eq!(calls.load(Ordering::Relaxed), 1);
    assert_eq!(Arc::strong_count(&calls), 1, "nothing is left of it");
}

#[test]
fn b16_a_registration_outlives_everything_else() {
    let vm = Vm::new();
    let kvm: Kvm = Arc::new(());
    let listener = vm.device.on_set_kvm(|_| ()).unwrap();
    vm.group.set_kvm(Some(kvm.clone()));
    drop(vm);
    drop(listener);
    assert_eq!(Arc::strong_count(&kvm), 1);
}

/// Whoever comes while the group is being set up finds it ready, or an error.
#[test]
fn b25_a_half_attached_group_cannot_be_used() {
    let group = Group::new(1);
    let device = group.add_device("vgpu0").unwrap();
    let file = group.open().unwrap();
    let refuses = || {
        assert!(is_einval(file.device("vgpu0")));
        assert!(is_einval(ExternalUser::from_group(&file)));
        assert!(is_einval(ExternalUser::from_device(&device)));
        assert!(is_einval(device.on_set_kvm(|_| ())));
    };
    refuses();
    let container = Container::open();
    file.set_container(&container).unwrap();
    refuses();
    assert_eq!(group.container_users(), 1);
    container.set_iommu(IommuType::Type1v2).unwrap();
    let user = ExternalUser::from_device(&device).unwrap();
    drop((user, file.device("vgpu0").unwrap()));
    file.unset_container().unwrap();
    refuses();
}

#[test]
fn b25_users_come_while_the_group_is_set_up() {
    for _ in 0..200 {
        let group = Group::new(1);
        let device = group.add_device("vgpu0").unwrap();
        let start = Arc::new(Barrier::new(2));
        let comer = {
            let start = start.clone();
            thread::spawn(move || {
                start.wait();
                match ExternalUser::from_device(&device) {
                    Ok(user) => assert!(user.read(0, &mut [0]).is_err(), "nothing is mapped"),
                    Err(error) => assert_eq!(error.errno(), libc::EINVAL),
                }
            })
        };
        let (container, file) = (Container::open(), group.open().unwrap());
        start.wait();
        file.set_container(&container).unwrap();
        container.set_iommu(IommuType::Type1v2).unwrap();
        ended("who comes", comer);
        assert_eq!(group.container_users(), 1);
        file.unset_container().unwrap();
    }
}

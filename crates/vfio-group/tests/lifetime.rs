// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who keeps what: whoever goes last detaches the group, and with it the mappings go.

#![cfg(not(loom))]

#[path = "common/deadline.rs"]
mod deadline;

use std::any::Any;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::Duration;

use deadline::{ended, must_end};
use iommu_type1::{page_size, Backing, Interest, IoAddressSpace};
use page_pin::PinPages;
use vfio_group::{Container, Error, ExternalUser, Group, GroupFile, IommuType};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemory, Permissions};

const IOVA: u64 = 0x10_0000;
/// Far longer than anything here takes: whatever waits for itself leaves a mapping when this is over.
const DEADLINE: Duration = Duration::from_secs(10);

struct Vm {
    group: Group,
    file: GroupFile,
    container: Container,
}

impl Vm {
    fn new() -> Self {
        let group = Group::new(1);
        group.add_device("vgpu0").unwrap();
        let file = group.open().unwrap();
        let container = Container::open_with(IoAddressSpace::builder().unmap_deadline(DEADLINE));
        file.set_container(&container).unwrap();
        let vm = Vm {
            group,
            file,
            container,
        };
        vm.start();
        vm
    }

    fn start(&self) {
        self.container.set_iommu(IommuType::Type1v2).unwrap();
        let page = Backing::anonymous(page_size() as usize).unwrap();
        self.container
            .map(IOVA, page, Permissions::ReadWrite)
            .unwrap();
    }

    fn user(&self) -> ExternalUser {
        ExternalUser::from_group(&self.file).unwrap()
    }

    /// The space as the container gives it: it keeps nothing, but shows whether mappings are left.
    fn space(&self) -> IoAddressSpace {
        self.container.address_space().unwrap()
    }
}

fn assert_ended(group: &Group, space: &IoAddressSpace) {
    assert_eq!(group.container_users(), 0);
    assert_eq!(space.mappings(), 0);
    group.open().unwrap();
}

#[test]
fn the_last_of_file_device_and_user_dissolves() {
    for order in [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ] {
        let vm = Vm::new();
        let space = vm.space();
        let user = vm.user();
        let device = vm.file.device("vgpu0").unwrap();
        let Vm {
            group,
            file,
            container,
        } = vm;
        drop(container);
        let mut holders: Vec<Option<Box<dyn Any>>> = vec![
            Some(Box::new(file)),
            Some(Box::new(device)),
            Some(Box::new(user)),
        ];
        for (gone, which) in order.into_iter().enumerate() {
            assert_eq!(group.container_users() as usize, 3 - gone);
            assert_eq!(space.mappings(), 1);
            assert_eq!(group.open().unwrap_err().errno(), libc::EBUSY);
            holders[which] = None;
        }
        assert_ended(&group, &space);
    }
}

#[test]
fn a_clone_is_one_more_user() {
    let vm = Vm::new();
    let user = vm.user();
    let clone = user.clone();
    assert_eq!(vm.group.container_users(), 3);
    drop(user);
    assert_eq!(vm.group.container_users(), 2);
    clone.write(IOVA, &[1]).unwrap();
    assert_eq!(vm.file.unset_container().unwrap_err().errno(), libc::EBUSY);
    drop(clone);
    vm.file.unset_container().unwrap();
}

#[test]
fn failed_attempts_leave_no_user_behind() {
    let vm = Vm::new();
    for _ in 0..3 {
        vm.file.device("no such device").unwrap_err();
    }
    assert_eq!(vm.group.container_users(), 1);
    vm.file.unset_container().unwrap();
}

/// Each is the last thing to go, and the release does not wait for itself.
#[test]
fn whatever_is_made_through_a_user_keeps_the_attachment() {
    type Make = fn(&ExternalUser) -> Box<dyn Any>;
    let make: [(&str, Make); 6] = [
        ("view", |user| Box::new(user.address_space().clone())),
        ("handle", |user| Box::new(user.handle())),
        ("guard", |user| {
            let guard = user.address_space().memory();
            let lent = guard
                .get_slices(GuestAddress(IOVA), 16, Permissions::Read)
                .unwrap()
                .count();
            assert_eq!(lent, 1);
            Box::new(guard)
        }),
        ("scatter list", |user| {
            let list = user
                .address_space()
                .scatter(IOVA, 16, Permissions::ReadWrite);
            Box::new(list.unwrap())
        }),
        ("pinned pages", |user| {
            Box::new(user.pin_pages(IOVA, 1, Permissions::ReadWrite).unwrap())
        }),
        ("pinner", |user| {
            let space = user.address_space();
            Box::new(space.pinner("own", Interest::All, Arc::new(|_, _| ())))
        }),
    ];
    for (what, make) in make {
        let vm = Vm::new();
        let space = vm.space();
        let user = vm.user();
        user.register_notifier("vgpu0", Interest::Holder, Arc::new(|_, _| ()))
            .unwrap();
        let made = make(&user);
        let Vm {
            group,
            file,
            container,
        } = vm;
        drop((user, file, container));
        assert_eq!(group.container_users(), 1, "{what}");
        assert_eq!(space.mappings(), 1, "{what}");
        assert_eq!(group.open().unwrap_err().errno(), libc::EBUSY, "{what}");
        drop(made);
        assert_ended(&group, &space);
    }
}

/// As code does that takes any source of pins.
#[test]
fn pages_pinned_by_whoever_pins_for_anybody_keep_the_attachment() {
    fn pin<P: PinPages>(pins: &P, npages: usize) -> Result<P::Pinned, P::Error> {
        pins.pin_pages(IOVA, npages, Permissions::ReadWrite)
    }
    let vm = Vm::new();
    let space = vm.space();
    let user = vm.user();
    assert_eq!(pin(&user, 1).unwrap_err().errno(), libc::EINVAL);
    user.register_notifier("vgpu0", Interest::Holder, Arc::new(|_, _| ()))
        .unwrap();
    assert_eq!(pin(&user, 2).unwrap_err().errno(), libc::EINVAL);
    let pinned = pin(&user, 1).unwrap();
    let Vm {
        group,
        file,
        container,
    } = vm;
    drop((user, file, container));
    assert_eq!((group.container_users(), space.mappings()), (1, 1));
    drop(pinned);
    assert_ended(&group, &space);
}

#[test]
fn a_device_file_names_what_it_keeps() {
    let (vm, other) = (Vm::new(), Vm::new());
    let file = vm.file.device("vgpu0").unwrap();
    assert_eq!(file.device().name(), "vgpu0");
    assert_eq!(file.group(), &vm.group);
    assert_ne!(file.group(), &other.group);
}

#[test]
fn pins_left_to_a_user_end_with_it() {
    let vm = Vm::new();
    let space = vm.space();
    let user = vm.user();
    user.register_notifier("vgpu0", Interest::Holder, Arc::new(|_, _| ()))
        .unwrap();
    user.pin_pages(IOVA, 1, Permissions::ReadWrite)
        .unwrap()
        .keep();
    let Vm {
        group,
        file,
        container,
    } = vm;
    drop((file, container));
    drop(user);
    assert_ended(&group, &space);
}

#[test]
fn a_handle_works_after_everything_else_was_closed() {
    let vm = Vm::new();
    let handle = vm.user().handle();
    drop(vm);
    handle.write_obj(7_u64, GuestAddress(IOVA)).unwrap();
    let sent = thread::spawn(move || handle.read_obj::<u64>(GuestAddress(IOVA)).unwrap());
    assert_eq!(ended("a read by another thread", sent), 7);
}

#[test]
fn the_iommu_lives_until_the_last_group_leaves() {
    let vm = Vm::new();
    let second = Group::new(2);
    let second_file = second.open().unwrap();
    second_file.set_container(&vm.container).unwrap();
    let user = ExternalUser::from_group(&second_file).unwrap();
    user.write(IOVA, b"from 2").unwrap();

    vm.file.unset_container().unwrap();
    let mut bytes = [0; 6];
    user.read(IOVA, &mut bytes).unwrap();
    assert_eq!(&bytes, b"from 2");

    let space = vm.space();
    drop(user);
    second_file.unset_container().unwrap();
    assert_eq!(space.mappings(), 0);

    // Attached again it begins anew.
    second_file.set_container(&vm.container).unwrap();
    vm.start();
    let user = ExternalUser::from_group(&second_file).unwrap();
    user.read(IOVA, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 6]);
}

/// The user goes in the notice of an unmap that the container carries out: the release is left to
/// that unmap, and nobody waits for himself.
#[test]
fn the_last_user_may_go_inside_a_notice() {
    let vm = Vm::new();
    let space = vm.space();
    let user = Arc::new(Mutex::new(None));
    let in_notice = user.clone();
    let watcher = space.pinner(
        "watcher",
        Interest::All,
        Arc::new(move |_, _| {
            let user = in_notice.lock().unwrap().take();
            drop(user);
        }),
    );
    *user.lock().unwrap() = Some(vm.user());
    let other = Backing::anonymous(page_size() as usize).unwrap();
    vm.container.map(0, other, Permissions::Read).unwrap();
    let Vm {
        group,
        file,
        container,
    } = vm;
    drop(file);
    assert_eq!(group.container_users(), 1);

    assert_eq!(container.unmap(IOVA, page_size()).unwrap(), page_size());
    assert_ended(&group, &space);
    drop(watcher);
}

/// As above, but the unmap is one of the space itself, which the container knows nothing of: what
/// is being unmapped is left to it.
#[test]
fn the_last_user_may_go_inside_a_notice_of_the_space() {
    let vm = Vm::new();
    let space = vm.space();
    let user = Arc::new(Mutex::new(None));
    let in_notice = user.clone();
    let _watcher = space.pinner(
        "watcher",
        Interest::All,
        Arc::new(move |_, _| {
            let user = in_notice.lock().unwrap().take();
            drop(user);
        }),
    );
    *user.lock().unwrap() = Some(vm.user());
    let Vm {
        group,
        file,
        container,
    } = vm;
    drop(file);
    assert_eq!(space.unmap(IOVA, page_size()).unwrap(), page_size());
    assert_ended(&group, &space);
    assert_eq!(container.unmap_all().unwrap_err().errno(), libc::EINVAL);
}

#[test]
fn the_group_is_attached_until_its_mappings_are_gone() {
    let vm = Vm::new();
    let user = vm.user();
    let group = vm.group.clone();
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = calls.clone();
    let _watcher = vm.space().pinner(
        "watcher",
        Interest::All,
        Arc::new(move |iova, size| {
            assert_eq!((iova, size), (IOVA, page_size()));
            let opened = group.open();
            assert!(matches!(opened, Err(Error::StillAttached { users: 0, .. })));
            counted.fetch_add(1, Ordering::Relaxed);
        }),
    );
    drop(vm.file);
    drop(user);
    assert_eq!(calls.load(Ordering::Relaxed), 1);
    vm.group.open().unwrap();
}

/// Whoever took the space from the container is no user. The release does not wait for him longer
/// than the deadline of the space, and the group is free then.
#[test]
fn a_lease_on_the_bare_space_does_not_keep_the_group() {
    let group = Group::new(1);
    let file = group.open().unwrap();
    let container = Container::open_with(IoAddressSpace::builder().unmap_deadline(Duration::ZERO));
    file.set_container(&container).unwrap();
    container.set_iommu(IommuType::Type1v2).unwrap();
    let page = Backing::anonymous(page_size() as usize).unwrap();
    container.map(IOVA, page, Permissions::ReadWrite).unwrap();
    let list = container
        .address_space()
        .unwrap()
        .scatter(IOVA, 4, Permissions::Read)
        .unwrap();
    file.unset_container().unwrap();
    file.set_container(&container).unwrap();
    assert_eq!(list.len(), 4);
}

#[test]
fn an_unmap_in_vain_names_the_device() {
    let group = Group::new(1);
    let device = group.add_device("vgpu0").unwrap();
    let file = group.open().unwrap();
    let container = Container::open_with(IoAddressSpace::builder().unmap_deadline(Duration::ZERO));
    file.set_container(&container).unwrap();
    container.set_iommu(IommuType::Type1v2).unwrap();
    let page = Backing::anonymous(page_size() as usize).unwrap();
    container.map(IOVA, page, Permissions::ReadWrite).unwrap();
    for (user, name) in [
        (ExternalUser::from_device(&device), "vgpu0 leases"),
        (ExternalUser::from_group(&file), "group 1 leases"),
    ] {
        let user = user.unwrap();
        let list = user.address_space().scatter(IOVA, 4, Permissions::Read);
        let message = container.unmap_all().unwrap_err().to_string();
        assert!(message.contains(name), "{message}");
        drop(list);
        container.unmap_all().unwrap();
        let page = Backing::anonymous(page_size() as usize).unwrap();
        container.map(IOVA, page, Permissions::ReadWrite).unwrap();
    }
}

#[test]
fn users_come_and_go_while_the_group_closes() {
    const THREADS: usize = 4;
    must_end("users of a group that closes", || {
        for _ in 0..200 {
            let vm = Vm::new();
            let space = vm.space();
            let barrier = Barrier::new(THREADS + 1);
            let Vm {
                group,
                file,
                container,
            } = vm;
            let device = group.clone().add_device("second").unwrap();
            thread::scope(|scope| {
                for _ in 0..THREADS {
                    scope.spawn(|| {
                        barrier.wait();
                        for _ in 0..20 {
                            let Ok(user) = ExternalUser::from_device(&device) else {
                                break;
                            };
                            user.write(IOVA, &[1, 2, 3]).unwrap();
                            let clone = user.clone();
                            drop(user);
                            clone.read(IOVA, &mut [0; 3]).unwrap();
                        }
                    });
                }
                barrier.wait();
                drop((file, container));
            });
            assert_ended(&group, &space);
        }
    });
}

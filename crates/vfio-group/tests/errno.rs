// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What Linux 7.3 answers to a type1 v2 user, case by case.

#![cfg(not(loom))]

use std::sync::Arc;

use iommu_type1::{page_size, Backing, Interest, Transfer};
use vfio_group::{Container, Error, ExternalUser, Group, GroupFile, GroupType, IommuType, Result};
use vm_memory::Permissions;

const IOVA: u64 = 0x10_0000;
const NO_SUCH_TYPE: IommuType = IommuType::Other(99);

#[track_caller]
fn assert_errno<T: std::fmt::Debug>(result: Result<T>, errno: i32) {
    let error = result.expect_err("an error was due");
    assert_eq!(error.errno(), errno, "{error}");
}

fn map_page(container: &Container) -> Result<()> {
    let page = Backing::anonymous(page_size() as usize)?;
    container.map(IOVA, page, Permissions::ReadWrite)
}

/// A group with a device, attached to a container with an IOMMU.
fn ready() -> (Group, GroupFile, Container) {
    ready_with(GroupType::EmulatedIommu, IommuType::Type1v2)
}

fn ready_with(group_type: GroupType, iommu_type: IommuType) -> (Group, GroupFile, Container) {
    let group = Group::with_type(1, group_type);
    group.add_device("edu").unwrap();
    let file = group.open_privileged().unwrap();
    let container = Container::open();
    file.set_container(&container).unwrap();
    container.set_iommu(iommu_type).unwrap();
    (group, file, container)
}

/// The table in its order: each step finds the state that those before it left.
#[test]
fn container_and_group_ioctls() {
    let container = Container::open();
    assert_errno(container.set_iommu(IommuType::Type1v2), libc::EINVAL);
    assert_errno(map_page(&container), libc::EINVAL);
    assert_errno(container.unmap(IOVA, page_size()), libc::EINVAL);
    assert_errno(container.unmap_all(), libc::EINVAL);
    assert_errno(container.address_space(), libc::EINVAL);
    assert_eq!(container.check_extension(3), 1);

    let group = Group::new(1);
    group.add_device("edu").unwrap();
    let file = group.open().unwrap();
    assert_errno(group.open(), libc::EBUSY);
    assert_eq!(file.status(), 0x1);
    assert_errno(file.device("edu"), libc::EINVAL);
    assert_errno(file.unset_container(), libc::EINVAL);

    file.set_container(&container).unwrap();
    assert_eq!(file.status(), 0x3);
    assert_errno(file.set_container(&container), libc::EINVAL);
    assert_errno(file.set_container(&Container::open()), libc::EINVAL);
    assert_errno(file.device("edu"), libc::EINVAL);
    assert_errno(ExternalUser::from_group(&file), libc::EINVAL);
    assert_eq!(group.container_users(), 1, "failed users are given up");
    assert_errno(map_page(&container), libc::EINVAL);

    assert_errno(container.set_iommu(NO_SUCH_TYPE), libc::ENODEV);
    container.set_iommu(IommuType::Type1v2).unwrap();
    assert_errno(container.set_iommu(IommuType::Type1v2), libc::EINVAL);
    assert_errno(container.set_iommu(NO_SUCH_TYPE), libc::EINVAL);

    assert_errno(file.device("no such device"), libc::ENODEV);
    let device = file.device("edu").unwrap();
    assert_errno(file.unset_container(), libc::EBUSY);
    map_page(&container).unwrap();
    drop(device);
    file.unset_container().unwrap();
    assert_errno(map_page(&container), libc::EINVAL);
    assert_errno(container.set_iommu(IommuType::Type1v2), libc::EINVAL);
}

fn announced(container: &Container) -> Vec<u32> {
    (0..12)
        .filter(|n| container.check_extension(*n) > 0)
        .collect()
}

/// 10 (`VFIO_UPDATE_VADDR`) is for hardware groups only, once the IOMMU is set. 4
/// (`VFIO_DMA_CC_IOMMU`) is whether no domain is incoherent, and emulated groups have none.
#[test]
fn extensions() {
    for iommu_type in [IommuType::Type1, IommuType::Type1v2] {
        let (group, file, container) = ready_with(GroupType::Iommu, iommu_type);
        assert_eq!(announced(&container), [1, 3, 9, 10]);
        let user = ExternalUser::from_group(&file).unwrap();
        assert_eq!(user.check_extension(10), 1);
        assert_eq!(user.check_extension(u32::MAX), 0);

        let emulated = Group::new(2).open().unwrap();
        emulated.set_container(&container).unwrap();
        assert_eq!(announced(&container), [1, 3, 9]);
        assert_eq!(user.check_extension(10), 0);
        drop((user, file));
        assert_eq!(group.container_users(), 0);
        assert_eq!(announced(&container), [1, 3, 4, 9]);
        emulated.unset_container().unwrap();
        assert_eq!(announced(&container), [1, 3, 9]);
    }
}

#[test]
fn before_the_iommu_is_set_the_drivers_that_could_be_are_asked() {
    let container = Container::open();
    assert_eq!(announced(&container), [1, 3, 9]);
    let group = Group::with_type(1, GroupType::Iommu);
    let file = group.open().unwrap();
    file.set_container(&container).unwrap();
    assert_eq!(announced(&container), [1, 3, 9]);
    drop(file);

    let group = Group::with_type(1, GroupType::NoIommu);
    let file = group.open_privileged().unwrap();
    file.set_container(&container).unwrap();
    assert_eq!(announced(&container), [8]);
    container.set_iommu(IommuType::NoIommu).unwrap();
    assert_eq!(announced(&container), [8]);
}

#[test]
fn a_type_that_is_not_announced_is_refused() {
    for number in 0..12 {
        let container = Container::open();
        let file = Group::new(1).open().unwrap();
        file.set_container(&container).unwrap();
        let set = container.set_iommu(IommuType::from(number));
        match number {
            1 | 3 => set.unwrap(),
            _ => assert_errno(set, libc::ENODEV),
        }
    }
}

#[test]
fn v1_removes_whole_mappings_and_pins_nothing() {
    let (_group, file, container) = ready_with(GroupType::EmulatedIommu, IommuType::Type1);
    let size = 4 * page_size();
    let backing = Backing::anonymous(size as usize).unwrap();
    container
        .map(IOVA, backing, Permissions::ReadWrite)
        .unwrap();
    let user = ExternalUser::from_group(&file).unwrap();
    user.write(IOVA, b"DMA").unwrap();
    let pin = |npages| user.pin_pages(IOVA, npages, Permissions::ReadWrite);
    assert_errno(pin(0), libc::EINVAL);
    assert_errno(pin(1 << 20), libc::E2BIG);
    assert_errno(pin(1), libc::EACCES);
    assert_errno(user.unpin_pages(IOVA, 1), libc::EACCES);
    user.register_notifier("edu", Interest::Holder, Arc::new(|_, _| ()))
        .unwrap();
    assert_errno(pin(1), libc::EACCES);
    assert_eq!(container.unmap(IOVA, page_size()).unwrap(), size);
}

/// What an access had done before it failed is known; what is no access has done nothing.
#[test]
fn errors_say_how_far_an_access_came() {
    let (_group, file, container) = ready();
    map_page(&container).unwrap();
    let user = ExternalUser::from_group(&file).unwrap();
    let last_three = IOVA + page_size() - 3;
    let error = user.write(last_three, &[0; 8]).unwrap_err();
    assert_eq!((error.errno(), error.completed()), (libc::EINVAL, 3));
    let error = map_page(&container).unwrap_err();
    assert_eq!((error.errno(), error.completed()), (libc::EEXIST, 0));
    let error = file.unset_container().unwrap_err();
    assert_eq!((error.errno(), error.completed()), (libc::EBUSY, 0));
}

#[test]
fn a_group_is_not_viable_while_another_driver_has_a_device() {
    let group = Group::new(1);
    let device = group.add_device("edu").unwrap();
    let (container, file) = (Container::open(), group.open().unwrap());
    assert_errno(group.bind_elsewhere("edu"), libc::EEXIST);
    let bound = group.bind_elsewhere("other").unwrap();
    assert_errno(group.bind_elsewhere("other"), libc::EEXIST);
    assert_errno(group.add_device("other"), libc::EEXIST);
    assert_eq!(file.status(), 0);

    // It attaches, and only who would do DMA is refused.
    file.set_container(&container).unwrap();
    assert_eq!(file.status(), GroupFile::CONTAINER_SET);
    let none = ExternalUser::from_group(&file);
    assert!(matches!(none, Err(Error::NoIommu)), "the IOMMU first");
    container.set_iommu(IommuType::Type1v2).unwrap();
    let errors = [
        ExternalUser::from_group(&file).map(drop),
        ExternalUser::from_device(&device).map(drop),
        file.device("edu").map(drop),
    ];
    for error in errors {
        assert!(matches!(error, Err(Error::NotViable { group: 1 })));
        assert_errno(error, libc::EINVAL);
    }
    assert_errno(device.on_set_kvm(|_| ()), libc::EINVAL);
    assert_errno(file.device("no such device"), libc::ENODEV);
    assert_eq!(group.container_users(), 1, "failed users are given up");

    drop(bound);
    assert_eq!(file.status(), 0x3);
    map_page(&container).unwrap();
    let user = ExternalUser::from_device(&device).unwrap();
    let _opened = file.device("edu").unwrap();

    // Who is there goes on.
    let _bound = group.bind_elsewhere("other").unwrap();
    user.write(IOVA, b"DMA").unwrap();
    user.clone().write(IOVA, b"DMA").unwrap();
    assert_errno(ExternalUser::from_device(&device), libc::EINVAL);
    // The name of an unbound device is free.
    assert_eq!(group.container_users(), 3);
}

#[test]
fn a_group_without_an_iommu_takes_a_privilege() {
    let group = Group::with_type(1, GroupType::NoIommu);
    let device = group.add_device("edu").unwrap();
    assert_errno(group.open(), libc::EPERM);
    let file = group.open_privileged().unwrap();
    assert_errno(group.open(), libc::EPERM);
    assert_errno(group.open_privileged(), libc::EBUSY);
    assert_errno(ExternalUser::from_group(&file), libc::EINVAL);

    let container = Container::open();
    file.set_privileged(false);
    assert_errno(file.set_container(&container), libc::EPERM);
    assert_eq!((file.status(), group.container_users()), (0x1, 0));
    file.set_privileged(true);
    file.set_container(&container).unwrap();
    file.set_privileged(false);
    assert_errno(file.set_container(&container), libc::EINVAL);

    // EPERM for external users comes before EINVAL for want of an IOMMU, for devices behind it.
    assert_errno(ExternalUser::from_group(&file), libc::EPERM);
    assert_errno(file.device("edu"), libc::EINVAL);
    assert_errno(map_page(&container), libc::EINVAL);
    for number in (0..12).filter(|n| *n != 8) {
        assert_errno(container.set_iommu(IommuType::from(number)), libc::ENODEV);
    }
    container.set_iommu(IommuType::NoIommu).unwrap();
    assert_errno(container.set_iommu(IommuType::NoIommu), libc::EINVAL);
    let bound = group.bind_elsewhere("other").unwrap();
    assert_errno(file.device("edu"), libc::EINVAL);
    assert_errno(ExternalUser::from_device(&device), libc::EPERM);
    drop(bound);
    assert_errno(file.device("edu"), libc::EPERM);
    assert_errno(file.device("no such device"), libc::ENODEV);
    assert_errno(ExternalUser::from_group(&file), libc::EPERM);
    assert_errno(device.on_set_kvm(|_| ()), libc::EINVAL);
    assert_eq!(group.container_users(), 1, "failed users are given up");

    file.set_privileged(true);
    let opened = file.device("edu").unwrap();
    assert_eq!(group.container_users(), 2);
    assert_errno(map_page(&container), libc::ENOTTY);
    assert_errno(container.unmap(IOVA, page_size()), libc::ENOTTY);
    assert_errno(container.unmap_all(), libc::ENOTTY);
    assert_errno(container.address_space(), libc::ENOTTY);
    drop(opened);
    file.unset_container().unwrap();
}

#[test]
fn groups_with_and_without_an_iommu_share_no_container() {
    for real in [GroupType::Iommu, GroupType::EmulatedIommu] {
        for (first, second) in [(real, GroupType::NoIommu), (GroupType::NoIommu, real)] {
            let container = Container::open();
            let (a, b) = (Group::with_type(1, first), Group::with_type(2, second));
            let a = a.open_privileged().unwrap();
            let b = b.open_privileged().unwrap();
            a.set_container(&container).unwrap();
            assert_errno(b.set_container(&container), libc::EPERM);
            assert_eq!(b.status(), 0x1);
            a.unset_container().unwrap();
            b.set_container(&container).unwrap();
        }
    }
    let container = Container::open();
    let (a, b) = (Group::with_type(1, GroupType::Iommu), Group::new(2));
    let (a, b) = (a.open().unwrap(), b.open().unwrap());
    a.set_container(&container).unwrap();
    b.set_container(&container).unwrap();
}

#[test]
fn the_name_is_looked_up_before_the_container() {
    let group = Group::new(1);
    let file = group.open().unwrap();
    assert_errno(file.device("edu"), libc::ENODEV);
}

#[test]
fn devices() {
    let (group, file, _container) = ready();
    let device = group.add_device("other").unwrap();
    assert_errno(group.add_device("other"), libc::EEXIST);
    let opened = file.device("other").unwrap();
    assert_eq!(opened.device().name(), "other");
    assert_errno(device.remove(), libc::EBUSY);
    drop(opened);
    device.remove().unwrap();
    assert_errno(device.remove(), libc::ENODEV);
    assert_errno(file.device("other"), libc::ENODEV);
    assert_errno(ExternalUser::from_device(&device), libc::ENODEV);
    // A later device of the same name is another device.
    group.add_device("other").unwrap();
    assert_errno(ExternalUser::from_device(&device), libc::ENODEV);
    assert_errno(device.remove(), libc::ENODEV);
    assert_eq!(group.container_users(), 1);
}

#[test]
fn external_users() {
    let group = Group::new(1);
    let device = group.add_device("edu").unwrap();
    assert_errno(ExternalUser::from_device(&device), libc::EINVAL);
    let file = group.open().unwrap();
    assert_errno(ExternalUser::from_group(&file), libc::EINVAL);
    let container = Container::open();
    file.set_container(&container).unwrap();
    assert_errno(ExternalUser::from_device(&device), libc::EINVAL);
    assert_eq!(group.container_users(), 1);
    container.set_iommu(IommuType::Type1v2).unwrap();
    let user = ExternalUser::from_device(&device).unwrap();
    assert_eq!(user.group(), &group);
    assert_eq!(user.iommu_id(), 1);
    assert_eq!(group.container_users(), 2);
}

#[test]
fn match_is_by_identity() {
    let (a, b) = (Group::new(1), Group::new(1));
    let file = a.open().unwrap();
    assert!(a.matches(&file) && a.clone().matches(&file));
    assert!(!b.matches(&file));
    assert_ne!(a, b);
}

#[test]
fn no_group_comes_to_mappings_without_memory() {
    let (_group, file, container) = ready();
    map_page(&container).unwrap();
    let space = container.address_space().unwrap();
    space.invalidate_vaddr(IOVA, page_size()).unwrap();
    for group_type in [GroupType::EmulatedIommu, GroupType::Iommu] {
        let second = Group::with_type(2, group_type).open().unwrap();
        let refused = second.set_container(&container);
        assert!(matches!(
            refused,
            Err(Error::VaddrInvalid {
                group: 2,
                mappings: 1
            })
        ));
        assert_errno(refused, libc::EBUSY);
        assert_eq!(second.status() & GroupFile::CONTAINER_SET, 0);
    }
    let page = Backing::anonymous(page_size() as usize).unwrap();
    space.resume_vaddr(IOVA, page_size(), page).unwrap();
    let second = Group::new(2).open().unwrap();
    second.set_container(&container).unwrap();
    second.unset_container().unwrap();
    // Who has come before stays, and leaves when it likes.
    space.invalidate_vaddr(IOVA, page_size()).unwrap();
    file.unset_container().unwrap();
    second.set_container(&container).unwrap();
}

#[test]
fn dma_rw() {
    let (_group, file, container) = ready();
    map_page(&container).unwrap();
    let user = ExternalUser::from_group(&file).unwrap();
    let last = IOVA + page_size() - 2;
    user.dma_rw(last, Transfer::Write(b"ok")).unwrap();
    let mut bytes = [0; 2];
    user.dma_rw(last, Transfer::Read(&mut bytes)).unwrap();
    assert_eq!(&bytes, b"ok");
    assert_errno(user.dma_rw(IOVA, Transfer::Read(&mut [])), libc::EINVAL);
    user.read(IOVA, &mut []).unwrap();
    let error = user.write(last, b"too long").unwrap_err();
    assert_eq!((error.errno(), error.completed()), (libc::EINVAL, 2));
    assert_errno(user.read(u64::MAX, &mut bytes), libc::EOVERFLOW);
}

#[test]
fn pin_pages_checks_in_the_kernels_order() {
    let (group, file, container) = ready();
    map_page(&container).unwrap();
    let user = ExternalUser::from_group(&file).unwrap();
    let max = (page_size() / 8) as usize;
    let pin = |iova, npages| user.pin_pages(iova, npages, Permissions::ReadWrite);

    // 1 no pages, 2 not a singleton, 3 too many, 4 no notifier, 5 the pages.
    let second = group.add_device("second").unwrap();
    assert!(matches!(pin(IOVA, 0), Err(Error::Iommu(_))));
    assert_errno(pin(IOVA, 0), libc::EINVAL);
    let too_many = pin(IOVA, max + 1);
    assert!(matches!(
        too_many,
        Err(Error::NotSingleton { devices: 2, .. })
    ));
    assert_errno(too_many, libc::EINVAL);
    second.remove().unwrap();
    assert_errno(pin(IOVA, max + 1), libc::E2BIG);
    assert!(matches!(pin(IOVA, 1), Err(Error::NoNotifier { group: 1 })));
    assert_errno(pin(IOVA, 1), libc::EINVAL);
    assert_errno(user.unpin_pages(IOVA, 1), libc::EINVAL);

    user.register_notifier("edu", Interest::Holder, Arc::new(|_, _| ()))
        .unwrap();
    let second = user.register_notifier("edu", Interest::All, Arc::new(|_, _| ()));
    assert_errno(second, libc::EBUSY);
    assert_errno(pin(IOVA, max + 1), libc::E2BIG);
    assert_errno(pin(IOVA, max), libc::EINVAL);
    assert_errno(pin(u64::MAX - page_size() + 1, 2), libc::EOVERFLOW);
    pin(IOVA, 1).unwrap().keep();
    assert_errno(user.unpin_pages(IOVA, 0), libc::EINVAL);
    assert_errno(user.unpin_pages(IOVA, max + 1), libc::E2BIG);
    user.unpin_pages(IOVA, 1).unwrap();
    assert_errno(user.unpin_pages(IOVA, 1), libc::EINVAL);
    // A clone is another user: it has to say who is told of its pins.
    assert_errno(
        user.clone().pin_pages(IOVA, 1, Permissions::Read),
        libc::EINVAL,
    );
}

#[test]
fn the_options_are_those_of_every_address_space() {
    let container = Container::open_with(iommu_type1::IoAddressSpace::builder().entry_limit(1));
    let group = Group::new(1);
    for _ in 0..2 {
        let file = group.open().unwrap();
        file.set_container(&container).unwrap();
        container.set_iommu(IommuType::Type1v2).unwrap();
        map_page(&container).unwrap();
        assert_errno(map_page(&container), libc::EEXIST);
        let page = Backing::anonymous(page_size() as usize).unwrap();
        assert_errno(container.map(0, page, Permissions::Read), libc::ENOSPC);
    }
}

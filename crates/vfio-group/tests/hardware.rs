// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the wrapper of the kernel's ioctls makes of files that are no VFIO files.

#![cfg(all(feature = "hardware", not(loom)))]

use std::fmt::Debug;
use std::fs::File;

use vfio_group::hardware::{HardwareContainer, HardwareGroup, READ};
use vfio_group::{Error, IommuType, Result};

#[track_caller]
fn assert_refused<T: Debug>(result: Result<T>, name: &str, errno: i32) {
    let error = result.expect_err("an error was due");
    assert_eq!(error.errno(), errno, "{error}");
    assert!(matches!(error, Error::Hardware { operation, .. } if operation == name));
}

fn null() -> File {
    File::open("/dev/null").unwrap()
}

#[test]
fn errors_carry_what_the_kernel_answers() {
    let container = HardwareContainer::from_file(null());
    let group = HardwareGroup::from_file(null());
    let enotty = libc::ENOTTY;
    assert_refused(container.api_version(), "VFIO_GET_API_VERSION", enotty);
    assert_refused(container.check_extension(3), "VFIO_CHECK_EXTENSION", enotty);
    let set = container.set_iommu(IommuType::Type1v2);
    assert_refused(set, "VFIO_SET_IOMMU", enotty);
    // SAFETY: nothing is mapped by a file that knows no such ioctl.
    let mapped = unsafe { container.map(0, std::ptr::null_mut(), 0x1000, READ) };
    assert_refused(mapped, "VFIO_IOMMU_MAP_DMA", enotty);
    assert_refused(container.unmap(0, 0x1000), "VFIO_IOMMU_UNMAP_DMA", enotty);
    assert_refused(container.unmap_all(), "VFIO_IOMMU_UNMAP_DMA", enotty);
    assert_refused(container.info(), "VFIO_IOMMU_GET_INFO", enotty);
    assert_refused(group.status(), "VFIO_GROUP_GET_STATUS", enotty);
    let set = group.set_container(&container);
    assert_refused(set, "VFIO_GROUP_SET_CONTAINER", enotty);
    let unset = group.unset_container();
    assert_refused(unset, "VFIO_GROUP_UNSET_CONTAINER", enotty);
    assert_refused(group.device("edu"), "VFIO_GROUP_GET_DEVICE_FD", enotty);
    let impossible = group.device("e\0du");
    assert_refused(impossible, "VFIO_GROUP_GET_DEVICE_FD", libc::ENODEV);
}

/// No group has the id that the kernel keeps for none.
#[test]
fn a_group_that_is_not_there_cannot_be_opened() {
    assert_refused(HardwareGroup::open(u32::MAX), "open", libc::ENOENT);
}

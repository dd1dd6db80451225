// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the wrapper asks of the kernel, byte by byte, and what it makes of the answers. No machine need have
//! VFIO for that: a test stands in for the kernel. Numbers and layouts are those of `linux/vfio.h`, written down once more.

#![cfg(all(feature = "hardware", not(loom)))]

#[path = "common/kernel.rs"]
mod kernel;

use std::cell::RefCell;
use std::ffi::{c_char, c_int, CStr};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

use kernel::answer_with;
use vfio_group::hardware::{HardwareContainer, HardwareGroup, READ, WRITE};
use vfio_group::{Error, IommuType};

const GET_API_VERSION: u32 = 0x3b64;
const CHECK_EXTENSION: u32 = 0x3b65;
const SET_IOMMU: u32 = 0x3b66;
const GROUP_GET_STATUS: u32 = 0x3b67;
const GROUP_SET_CONTAINER: u32 = 0x3b68;
const GROUP_UNSET_CONTAINER: u32 = 0x3b69;
const GROUP_GET_DEVICE_FD: u32 = 0x3b6a;
const IOMMU_GET_INFO: u32 = 0x3b70;
const IOMMU_MAP_DMA: u32 = 0x3b71;
const IOMMU_UNMAP_DMA: u32 = 0x3b72;

fn null() -> File {
    File::open("/dev/null").unwrap()
}

fn container() -> HardwareContainer {
    HardwareContainer::from_file(null())
}

/// Calls as (file, number, value) that are all answered with their order, from 40.
fn record() -> Rc<RefCell<Vec<(c_int, u32, usize)>>> {
    let calls: Rc<RefCell<Vec<_>>> = Rc::default();
    let seen = calls.clone();
    answer_with(move |call| {
        seen.borrow_mut().push((call.fd, call.number, call.value()));
        Ok(39 + seen.borrow().len() as c_int)
    });
    calls
}

#[test]
fn numbers_go_in_and_come_out() {
    let calls = record();
    let (container, group) = (container(), HardwareGroup::from_file(null()));
    let fd = container.as_fd().as_raw_fd();
    assert_eq!(container.api_version().unwrap(), 40);
    assert_eq!(container.check_extension(10).unwrap(), 41);
    let types = [
        (IommuType::Type1, 1),
        (IommuType::Type1v2, 3),
        (IommuType::NoIommu, 8),
        (IommuType::Other(77), 77),
    ];
    for (iommu_type, _) in types {
        container.set_iommu(iommu_type).unwrap();
    }
    group.unset_container().unwrap();

    let mut due = vec![(fd, GET_API_VERSION, 0), (fd, CHECK_EXTENSION, 10)];
    due.extend(types.map(|(_, number)| (fd, SET_IOMMU, number)));
    due.push((group.as_fd().as_raw_fd(), GROUP_UNSET_CONTAINER, 0));
    assert_eq!(*calls.borrow(), due);
}

#[test]
fn the_container_of_a_group_is_named_by_its_file() {
    let (container, group) = (container(), HardwareGroup::from_file(null()));
    let (container_fd, group_fd) = (container.as_fd().as_raw_fd(), group.as_fd().as_raw_fd());
    assert_ne!(container_fd, group_fd);
    answer_with(move |call| {
        assert_eq!((call.fd, call.number), (group_fd, GROUP_SET_CONTAINER));
        assert_eq!(call.get::<c_int>(0), container_fd);
        Err(libc::EINVAL)
    });
    let error = group.set_container(&container).unwrap_err();
    assert_eq!(error.errno(), libc::EINVAL);
    assert_eq!(error.completed(), 0);
}

#[test]
fn a_mapping_is_asked_for_as_it_is() {
    let mut memory = [0_u64; 512];
    let vaddr = memory.as_mut_ptr().cast::<u8>();
    let at = vaddr as u64;
    let flags = [READ, WRITE, READ | WRITE];
    let mut due = [1_u32, 2, 3].into_iter();
    answer_with(move |call| {
        assert_eq!(call.number, IOMMU_MAP_DMA);
        assert_eq!(call.get::<u32>(0), 32, "argsz");
        assert_eq!(call.get::<u32>(4), due.next().unwrap(), "flags");
        let places = [8, 16, 24].map(|offset| call.get::<u64>(offset));
        assert_eq!(places, [at, 0x1_0000_2000, 0x1000], "vaddr, iova, size");
        Ok(0)
    });
    for flags in flags {
        // SAFETY: nothing is mapped: the kernel is the one above.
        unsafe { container().map(0x1_0000_2000, vaddr, 0x1000, flags) }.unwrap();
    }
}

/// The kernel says how much it was, which is not what was asked for: less or, of v1, more.
#[test]
fn an_unmap_says_what_the_kernel_says() {
    answer_with(|call| {
        assert_eq!(call.number, IOMMU_UNMAP_DMA);
        assert_eq!(call.get::<u32>(0), 24, "argsz");
        let (flags, iova, size): (u32, u64, u64) = (call.get(4), call.get(8), call.get(16));
        match (flags, iova, size) {
            (0, 0x5000, 0x4000) => call.put(16, 0x3000_u64),
            (2, 0, 0) => call.put(16, 0x70_0000_0000_u64),
            _ => return Err(libc::EINVAL),
        }
        Ok(0)
    });
    assert_eq!(container().unmap(0x5000, 0x4000).unwrap(), 0x3000);
    assert_eq!(container().unmap_all().unwrap(), 0x70_0000_0000);
}

/// Answers GET_INFO twice, as the kernel does, with `wanted` bytes in all, and keeps how many it was asked for.
fn inform(wanted: u32) -> Rc<RefCell<Vec<u32>>> {
    let asked: Rc<RefCell<Vec<_>>> = Rc::default();
    let seen = asked.clone();
    answer_with(move |call| {
        assert_eq!(call.number, IOMMU_GET_INFO);
        let len = call.get::<u32>(0);
        seen.borrow_mut().push(len);
        assert!(seen.borrow().len() <= 2, "it has been told how long it is");
        call.put(0, wanted);
        call.put(4, 3_u32);
        call.put(8, 0x4020_1000_u64);
        // Capabilities only where they have space, as in the kernel.
        let fits = len >= wanted;
        call.put(16, if fits { 24_u32 } else { 0 });
        for offset in 24..if fits { wanted } else { 0 } {
            call.put(offset as usize, offset as u8);
        }
        Ok(0)
    });
    asked
}

#[test]
fn info_is_asked_for_again_with_space_for_all_of_it() {
    // Not a multiple of a word.
    let asked = inform(61);
    let info = container().info().unwrap();
    assert_eq!(*asked.borrow(), [24, 61]);
    assert_eq!((info.flags, info.iova_pgsizes), (3, 0x4020_1000));
    assert_eq!(info.cap_offset, 24);
    assert_eq!(info.bytes.len(), 61);
    assert_eq!(info.bytes[24..], *(24..61).collect::<Vec<u8>>());
    assert_eq!(info.bytes[..4], 61_u32.to_ne_bytes());
}

#[test]
fn info_without_capabilities_is_asked_for_once() {
    let asked = inform(24);
    assert_eq!(container().info().unwrap().bytes.len(), 24);
    assert_eq!(*asked.borrow(), [24]);
}

/// No kernel wants that; the structure is all there is then.
#[test]
fn info_beyond_all_measure_is_not_asked_for() {
    let asked = inform((1 << 20) + 1);
    let info = container().info().unwrap();
    assert_eq!(*asked.borrow(), [24]);
    assert_eq!((info.cap_offset, info.bytes.len()), (0, 24));

    let asked = inform(1 << 20);
    assert_eq!(container().info().unwrap().bytes.len(), 1 << 20);
    assert_eq!(*asked.borrow(), [24, 1 << 20]);
}

#[test]
fn the_status_of_a_group_is_what_the_kernel_writes() {
    answer_with(|call| {
        assert_eq!(call.number, GROUP_GET_STATUS);
        assert_eq!((call.get::<u32>(0), call.get::<u32>(4)), (8, 0));
        call.put(4, 3_u32);
        Ok(0)
    });
    assert_eq!(HardwareGroup::from_file(null()).status().unwrap(), 3);
}

/// The file is open for as long as the user, or what it becomes, and no longer: the kernel counts by it.
#[test]
fn a_user_is_the_file_that_the_kernel_opened() {
    let (mut reader, writer) = UnixStream::pair().unwrap();
    // What stays open would never end.
    let stuck = Some(Duration::from_secs(20));
    reader.set_read_timeout(stuck).unwrap();
    let opened = writer.as_raw_fd();
    let mut writer = Some(writer);
    answer_with(move |call| {
        assert_eq!(call.number, GROUP_GET_DEVICE_FD);
        // SAFETY: the wrapper passes a name that ends with a zero.
        let name = unsafe { CStr::from_ptr(call.argument.cast::<c_char>()) };
        assert_eq!(name, c"0000:06:0d.0");
        Ok(writer.take().unwrap().into_raw_fd())
    });
    let group = HardwareGroup::from_file(null());
    let user = group.device("0000:06:0d.0").unwrap();
    assert_eq!(user.as_fd().as_raw_fd(), opened);
    let mut file = File::from(OwnedFd::from(user));
    file.write_all(b"open").unwrap();
    drop(file);
    let mut left = Vec::new();
    reader.read_to_end(&mut left).unwrap();
    assert_eq!(left, b"open", "nobody else has it open");
}

/// With or without VFIO on this machine.
#[test]
fn a_container_is_opened_like_any_file() {
    let options = OpenOptions::new().read(true).write(true).to_owned();
    let due = options.open("/dev/vfio/vfio").map(drop);
    match (HardwareContainer::open(), due) {
        (Ok(_), Ok(())) => {}
        (Err(error), Err(due)) => {
            assert_eq!(Some(error.errno()), due.raw_os_error());
            assert!(matches!(
                error,
                Error::Hardware {
                    operation: "open",
                    ..
                }
            ));
        }
        (opened, due) => panic!("{opened:?}, but {due:?}"),
    }
}

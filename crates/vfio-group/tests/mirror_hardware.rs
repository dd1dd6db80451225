// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a mirror asks of a container of the kernel's, which a test stands in for.

#![cfg(all(feature = "hardware", not(loom)))]

#[path = "common/kernel.rs"]
mod kernel;

use std::cell::{Cell, RefCell};
use std::ffi::c_int;
use std::fs::File;
use std::rc::Rc;
use std::sync::Arc;

use iommu_type1::{page_size, Backing, Info, IoAddressSpace, IovaRanges};
use kernel::{answer_with, Call};
use vfio_group::hardware::HardwareContainer;
use vfio_group::Mirror;
use vm_memory::Permissions::{Read, ReadWrite, Write};

const IOMMU_GET_INFO: u32 = 0x3b70;
const IOMMU_MAP_DMA: u32 = 0x3b71;
const IOMMU_UNMAP_DMA: u32 = 0x3b72;

fn container() -> Arc<HardwareContainer> {
    let file = File::open("/dev/null").unwrap();
    Arc::new(HardwareContainer::from_file(file))
}

fn page() -> Backing {
    Backing::anonymous(page_size() as usize).unwrap()
}

/// Flags, host address, IOVA and size of a map.
type Map = (u32, u64, u64, u64);

/// Notes maps down, and answers all else as is said.
fn answer_but_maps(
    mut other: impl FnMut(&Call) -> Result<c_int, c_int> + 'static,
) -> Rc<RefCell<Vec<Map>>> {
    let maps: Rc<RefCell<Vec<Map>>> = Rc::default();
    let seen = maps.clone();
    answer_with(move |call| {
        if call.number != IOMMU_MAP_DMA {
            return other(call);
        }
        let map = (call.get(4), call.get(8), call.get(16), call.get(24));
        seen.borrow_mut().push(map);
        Ok(0)
    });
    maps
}

#[test]
fn permissions_stay_what_they_are() {
    let maps = answer_but_maps(|call| {
        assert_eq!(call.number, IOMMU_UNMAP_DMA);
        Ok(0)
    });
    let space = IoAddressSpace::new();
    let mirror = Mirror::new(&space, container()).unwrap();
    let mut due = Vec::new();
    for (n, (permissions, flags)) in (1..).zip([(Read, 1), (Write, 2), (ReadWrite, 3)]) {
        let (iova, backing) = (n * page_size(), page());
        due.push((flags, backing.host_address() as u64, iova, page_size()));
        space.map(iova, backing, permissions).unwrap();
    }
    assert_eq!(*maps.borrow(), due);
    space.unmap_all().unwrap();
    assert_eq!(mirror.stuck(), []);
    assert!(!mirror.is_lost());
}

/// Unmaps fail, and so does all else if the container has no IOMMU any more.
fn refuse_unmaps(has_iommu: bool) {
    answer_but_maps(move |call| match call.number {
        IOMMU_UNMAP_DMA => Err(libc::EINVAL),
        IOMMU_GET_INFO if has_iommu => Ok(0),
        IOMMU_GET_INFO => Err(libc::EINVAL),
        other => panic!("{other:#x}"),
    });
}

#[test]
fn what_the_kernel_does_not_unmap_is_stuck_unless_all_is_gone() {
    for has_iommu in [true, false] {
        refuse_unmaps(has_iommu);
        let space = IoAddressSpace::new();
        let mirror = Mirror::new(&space, container()).unwrap();
        space.map(page_size(), page(), ReadWrite).unwrap();
        space.unmap_all().unwrap();
        assert_eq!(mirror.stuck().len(), usize::from(has_iommu));
    }
}

/// The last group has left and another has come.
#[test]
fn what_the_kernel_had_no_longer_is_not_stuck() {
    answer_but_maps(|call| {
        call.put(16, 0_u64);
        Ok(0)
    });
    let space = IoAddressSpace::new();
    let mirror = Mirror::new(&space, container()).unwrap();
    space.map(page_size(), page(), ReadWrite).unwrap();
    space.unmap_all().unwrap();
    assert_eq!(mirror.stuck(), []);
}

#[test]
fn the_limits_of_the_hardware_become_those_of_the_space() {
    let mut info = Info::default();
    info.page_sizes = page_size() | 1 << 30;
    info.iova_ranges = vec![0..=0xfedf_ffff, 0xfef0_0000..=0x7f_ffff_ffff];
    let asked = Rc::new(Cell::new(0));
    let (asks, due) = (asked.clone(), info.clone());
    answer_with(move |call| {
        assert_eq!(call.number, IOMMU_GET_INFO);
        asks.set(asks.get() + 1);
        let mut answer = vec![0; call.get::<u32>(0) as usize];
        answer[..4].copy_from_slice(&call.get::<u32>(0).to_ne_bytes());
        due.encode(&mut answer).unwrap();
        for (offset, byte) in answer.into_iter().enumerate() {
            call.put(offset, byte);
        }
        Ok(0)
    });
    let limits = container().limits().unwrap();
    assert_eq!(limits, info);
    assert_eq!(asked.get(), 2, "with space for the capabilities");

    let space = IoAddressSpace::builder()
        .page_sizes(limits.page_sizes)
        .build();
    let ranges = IovaRanges::new(&limits.iova_ranges, &[]).unwrap();
    space.set_iova_ranges(ranges).unwrap();
    let refused = space.map(0xfee0_0000, page(), ReadWrite).unwrap_err();
    assert_eq!(refused.errno(), libc::EINVAL);
}

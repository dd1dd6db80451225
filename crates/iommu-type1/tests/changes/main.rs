// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Lists of changes of an IOTLB: all at once or none, and the last has the say.

#[path = "../common/mod.rs"]
mod common;
mod lists;
mod one_by_one;
mod revoked;
mod users;

use common::at_once;
use common::deadline::DEADLINE;
use iommu_type1::{page_size, Backing, Change, IoAddressSpace, Profile, ScatterList};
use vm_memory::Permissions::ReadWrite;

fn iotlb() -> IoAddressSpace {
    IoAddressSpace::builder()
        .profile(Profile::Iotlb)
        .unmap_deadline(DEADLINE)
        .build()
}

fn p(pages: u64) -> u64 {
    pages * page_size()
}

/// Memory with another byte in each page, the first of which is `byte`.
fn memory(pages: u64, byte: u8) -> Backing {
    let backing = Backing::anonymous(p(pages) as usize).unwrap();
    let space = IoAddressSpace::new();
    space.map(0, backing.clone(), ReadWrite).unwrap();
    for page in 0..pages {
        space
            .write(p(page), &[byte.wrapping_add(page as u8)])
            .unwrap();
    }
    backing
}

fn map(page: u64, pages: u64, byte: u8) -> Change {
    Change::Map {
        iova: p(page),
        backing: memory(pages, byte),
        prot: ReadWrite,
    }
}

fn unmap(page: u64, pages: u64) -> Change {
    Change::Unmap {
        iova: p(page),
        size: p(pages),
    }
}

fn byte(space: &IoAddressSpace, page: u64) -> Result<u8, i32> {
    let mut found = [0];
    let read = space.read(p(page), &mut found);
    read.map(|()| found[0]).map_err(|error| error.errno())
}

/// Has some pages mapped and revoked in vain: `None` as soon as nobody uses them.
fn revoke(space: &IoAddressSpace, page: u64, pages: u64) -> Option<ScatterList> {
    space.change([map(page, pages, 1)]).unwrap();
    let list = space.scatter(p(page), 4, ReadWrite).unwrap();
    let refused = space.unmap_with(p(page), p(pages), at_once());
    assert_eq!(refused.unwrap_err().errno(), libc::EDEADLK);
    Some(list)
}

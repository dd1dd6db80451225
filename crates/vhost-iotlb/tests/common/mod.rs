// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A front end's memory, and messages.
#![allow(dead_code)]

pub mod deadline;

use std::io;

use iommu_type1::{page_size, Backing, IoAddressSpace};
use vhost::{VhostAccess, VhostIotlbMsg, VhostIotlbType};
use vhost_iotlb::{MemRegion, MemTable, MissSink, VhostIotlb};
use vm_memory::Permissions::ReadWrite;

/// Pages of a region.
pub const PAGES: u64 = 8;
/// Where the front end has the first region; the second is behind it.
pub const LOW: u64 = 0x7f00_0000_0000;

pub fn p(pages: u64) -> u64 {
    pages * page_size()
}

/// A front end that never answers.
pub struct Nobody;

impl MissSink for Nobody {
    fn miss(&self, _miss: &VhostIotlbMsg) -> io::Result<()> {
        Ok(())
    }
}

/// Pages of bytes that count up.
pub fn region(userspace_addr: u64, first: u8) -> MemRegion {
    let backing = Backing::anonymous(p(PAGES) as usize).unwrap();
    let space = IoAddressSpace::new();
    space.map(0, backing.clone(), ReadWrite).unwrap();
    for page in 0..PAGES {
        let bytes = vec![first + page as u8; p(1) as usize];
        space.write(p(page), &bytes).unwrap();
    }
    MemRegion::new(userspace_addr, backing)
}

/// Two regions next to each other, of bytes from 1 and from 101.
pub fn table() -> MemTable {
    MemTable::new([region(LOW + p(PAGES), 101), region(LOW, 1)]).unwrap()
}

pub fn msg(msg_type: VhostIotlbType, iova: u64, size: u64) -> VhostIotlbMsg {
    VhostIotlbMsg {
        iova,
        size,
        msg_type,
        ..Default::default()
    }
}

pub fn update(page: u64, pages: u64, userspace_addr: u64) -> VhostIotlbMsg {
    VhostIotlbMsg {
        iova: p(page),
        size: p(pages),
        userspace_addr,
        perm: VhostAccess::ReadWrite,
        msg_type: VhostIotlbType::Update,
    }
}

/// The byte that a page is full of, if it is there.
pub fn byte(iotlb: &VhostIotlb, page: u64) -> Option<u8> {
    let mut bytes = [[0], [0]];
    let ends = [p(page), p(page) + (p(1) - 1)];
    for (iova, byte) in ends.into_iter().zip(&mut bytes) {
        iotlb.space().read(iova, byte).ok()?;
    }
    assert_eq!(bytes[0], bytes[1]);
    Some(bytes[0][0])
}

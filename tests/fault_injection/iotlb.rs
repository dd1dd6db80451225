// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device IOTLB of a vhost back end: what its messages come to, and misses.

use std::io;
use std::sync::{Arc, Mutex};

use vfio_dma::iommu::{IoAddressSpace, Profile};
use vhost::{VhostAccess, VhostIotlbMsg, VhostIotlbType};
use vhost_iotlb::{Error, MemRegion, MemTable, MissSink, Result, VhostIotlb};

use crate::inject::aside;
use crate::scenarios::{memory, p, step, MANY};

/// Where the front end has its memory.
const USERSPACE: u64 = 0x7f00_0000_0000;

/// Regions of a table, and misses that wait at a time: lists of them take more than a page.
const DEEP: u64 = 200;

fn message(msg_type: VhostIotlbType, page: u64, pages: u64) -> VhostIotlbMsg {
    VhostIotlbMsg {
        iova: p(page),
        size: p(pages),
        userspace_addr: USERSPACE,
        perm: VhostAccess::ReadWrite,
        msg_type,
    }
}

/// Memory of so many regions of a page.
fn table(regions: u64) -> MemTable {
    let region = |n| MemRegion::new(USERSPACE + p(n), memory(1));
    aside(|| MemTable::new((0..regions).map(region)).unwrap())
}

fn space() -> IoAddressSpace {
    IoAddressSpace::builder().profile(Profile::Iotlb).build()
}

struct Nobody;

impl MissSink for Nobody {
    fn miss(&self, _: &VhostIotlbMsg) -> io::Result<()> {
        Err(io::ErrorKind::BrokenPipe.into())
    }
}

pub fn messages() {
    let owner = Arc::new(());
    let space = space().held_by(owner.clone());
    let iotlb = VhostIotlb::with_space(space.clone(), Arc::new(Nobody)).unwrap();
    iotlb.set_mem_table(table(DEEP)).unwrap();
    step(&space, "an update of many regions", || {
        iotlb.apply(&message(VhostIotlbType::Update, 0, DEEP))
    });
    assert_eq!(space.mappings() as u64, DEEP);
    step(&space, "a batch", || {
        iotlb.apply(&message(VhostIotlbType::BatchBegin, 0, 0))?;
        let mut outcome = Ok(());
        for n in 0..MANY {
            let of = match n % 2 {
                0 => VhostIotlbType::Update,
                _ => VhostIotlbType::Invalidate,
            };
            outcome = outcome.and(iotlb.apply(&message(of, 3 * n, 1)));
        }
        let end = iotlb.apply(&message(VhostIotlbType::BatchEnd, 0, 0));
        outcome.and(end)
    });
    step(&space, "an invalidation", || {
        iotlb.apply(&message(VhostIotlbType::Invalidate, 1, 2 * DEEP))
    });
    space.write(0, &[1]).unwrap();
    space.write(p(1), &[1]).unwrap_err();
    step(&space, "another table", || {
        iotlb.set_mem_table(MemTable::default())
    });
    assert_eq!((space.mappings(), space.stats().table_bytes), (0, 0));
    drop((space, iotlb));
    assert_eq!(Arc::strong_count(&owner), 1);
}

/// Has another page missed before each answer, until there are enough of them.
#[derive(Default)]
struct Deeper(Mutex<Option<VhostIotlb>>);

impl MissSink for Deeper {
    fn miss(&self, miss: &VhostIotlbMsg) -> io::Result<()> {
        let iotlb = self.0.lock().unwrap().clone();
        let iotlb = iotlb.ok_or(io::ErrorKind::NotConnected)?;
        let page = miss.iova / p(1);
        let below = match page {
            0..DEEP => iotlb.read(p(page + 1), &mut [0]),
            _ => Ok(()),
        };
        let update = message(VhostIotlbType::Update, page, 1);
        let answered = below.and_then(|()| iotlb.apply(&update));
        answered.map_err(io::Error::from)
    }
}

pub fn misses() {
    let space = space();
    let sink = Arc::new(Deeper::default());
    let iotlb = VhostIotlb::with_space(space.clone(), sink.clone()).unwrap();
    *sink.0.lock().unwrap() = Some(iotlb.clone());
    iotlb.set_mem_table(table(1)).unwrap();
    let read = || -> Result<()> {
        let read = iotlb.read(0, &mut [0]);
        assert_eq!(iotlb.open_misses(), 0);
        read
    };
    // Those that were answered before one that was not stay.
    match read() {
        Ok(()) => {}
        Err(Error::Report { .. } | Error::Space(_)) => read().unwrap(),
        Err(error) => panic!("{error}"),
    }
    assert_eq!(space.mappings() as u64, DEEP + 1);
    *sink.0.lock().unwrap() = None;
    step(&space, "the end", || iotlb.disconnect());
    assert_eq!(space.stats().table_bytes, 0);
}

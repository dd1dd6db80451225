// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A front end that sends what it likes, beside a device that accesses what is there.

#![no_main]

use std::io;
use std::sync::Arc;
use std::time::Duration;

use arbitrary::Arbitrary;
use iommu_type1::{page_size, Backing, IoAddressSpace, Profile};
use libfuzzer_sys::fuzz_target;
use vhost::{VhostIotlbMsg, VhostIotlbType};
use vhost_iotlb::{message, MemRegion, MemTable, MissSink, VhostIotlb};
use vm_memory::{GuestAddress, Permissions};

const USERSPACE: u64 = 0x7f00_0000_0000;
const PAGES: u64 = 8;

#[derive(Arbitrary, Debug)]
enum Op {
    /// Any bytes, as a message.
    Bytes(Vec<u8>),
    /// A message of few pages, from either end of the addresses.
    Message { kind: u8, perm: u8, page: i8, pages: u8, at: u8, off: u8 },
    /// A memory table of any regions.
    Table(Vec<(u8, u8, Option<u64>)>),
    Disconnect,
    Access { page: i8, off: u16, len: u16, write: bool },
    Resolve { iova: u64, len: u16, write: bool },
}

/// Whoever looks sees that reports are well-formed.
struct Frontend;

impl MissSink for Frontend {
    fn miss(&self, miss: &VhostIotlbMsg) -> io::Result<()> {
        assert!(miss.size > 0 && miss.iova.checked_add(miss.size - 1).is_some());
        assert_eq!(message::decode(&message::encode(miss)).unwrap().iova, miss.iova);
        Ok(())
    }
}

fn table(regions: &[(u8, u8, Option<u64>)]) -> Option<MemTable> {
    let p = page_size();
    let regions = regions.iter().take(8).map(|(page, pages, guest)| {
        let backing = Backing::anonymous((u64::from(*pages % 8) * p) as usize).ok()?;
        let backing = match guest {
            Some(guest) => backing.with_guest_address(GuestAddress(*guest)).ok()?,
            None => backing,
        };
        Some(MemRegion::new(USERSPACE + u64::from(*page) * p, backing))
    });
    MemTable::new(regions.collect::<Option<Vec<_>>>()?).ok()
}

/// Takes a message, and looks whether what it says is so then; `is_open` says whether it may be one of a batch.
fn apply(iotlb: &VhostIotlb, bytes: &[u8], is_open: &mut bool) {
    let applied = iotlb.apply_bytes(bytes);
    // Nobody holds anything: no invalidation can be late.
    let errno = applied.err().map(|error| error.errno());
    assert_ne!(errno, Some(libc::EDEADLK));
    let Ok(message) = message::decode(bytes) else {
        assert_eq!(errno, Some(libc::EINVAL));
        return;
    };
    match message.msg_type {
        VhostIotlbType::BatchBegin => *is_open = true,
        VhostIotlbType::BatchEnd => *is_open = false,
        VhostIotlbType::Update if errno.is_none() && !*is_open => {
            let (write, read) = (message.perm as u8 & 2 != 0, message.perm as u8 & 1 != 0);
            for (access, is_allowed) in [(Permissions::Read, read), (Permissions::Write, write)] {
                let len = message.size.try_into().unwrap();
                let found = iotlb.space().scatter(message.iova, len, access);
                assert_eq!(found.is_ok(), is_allowed, "{found:?}");
            }
        }
        VhostIotlbType::Invalidate if errno.is_none() && !*is_open => {
            let ends = [message.iova, message.iova.wrapping_add(message.size.wrapping_sub(1))];
            for iova in ends {
                let error = iotlb.space().scatter(iova, 1, Permissions::Read).unwrap_err();
                assert_eq!(error.errno(), libc::EAGAIN);
            }
        }
        _ => {}
    }
}

fuzz_target!(|ops: Vec<Op>| {
    let p = page_size();
    let space = IoAddressSpace::builder()
        .profile(Profile::Iotlb)
        .entry_limit(16)
        .build();
    let iotlb = VhostIotlb::with_space(space, Arc::new(Frontend))
        .unwrap()
        .miss_deadline(Duration::ZERO);
    iotlb.set_mem_table(table(&[(0, 7, None), (7, 1, Some(0))]).unwrap()).unwrap();
    let mut is_open = false;
    for op in ops.into_iter().take(64) {
        match op {
            Op::Bytes(bytes) => apply(&iotlb, &bytes, &mut is_open),
            Op::Message { kind, perm, page, pages, at, off } => {
                let mut bytes = [0; message::SIZE];
                let iova = (i64::from(page) as u64).wrapping_mul(p);
                bytes[..8].copy_from_slice(&iova.to_ne_bytes());
                let size = u64::from(pages % 5) * p + u64::from(off / 128);
                bytes[8..16].copy_from_slice(&size.to_ne_bytes());
                let userspace = USERSPACE + u64::from(at) % (PAGES + 2) * p;
                bytes[16..24].copy_from_slice(&userspace.to_ne_bytes());
                (bytes[24], bytes[25]) = (perm % 5, kind % 8);
                assert_eq!(message::decode(&bytes).is_err(), bytes[24] > 3 || bytes[25] > 6);
                apply(&iotlb, &bytes, &mut is_open);
            }
            Op::Table(regions) => {
                if let Some(table) = table(&regions) {
                    let _ = iotlb.set_mem_table(table);
                }
            }
            Op::Disconnect => {
                iotlb.disconnect().unwrap();
                is_open = false;
                assert_eq!(iotlb.space().mappings(), 0);
            }
            Op::Access { page, off, len, write } => {
                let iova = (i64::from(page) as u64).wrapping_mul(p).wrapping_add(off.into());
                let mut bytes = vec![0; len.into()];
                let _ = match write {
                    true => iotlb.write(iova, &bytes),
                    false => iotlb.read(iova, &mut bytes),
                };
            }
            Op::Resolve { iova, len, write } => {
                let access = if write { Permissions::Write } else { Permissions::Read };
                if iotlb.resolve(iova, len.into(), access).is_ok() {
                    assert!(iotlb.space().scatter(iova, len.into(), access).is_ok());
                }
            }
        }
        assert_eq!(iotlb.open_misses(), 0);
        assert!(iotlb.space().mappings() <= 16);
    }
});

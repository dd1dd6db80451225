// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Compare-exchange through a handle.

#[path = "common/deadline.rs"]
mod deadline;

use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};
use std::thread;
use std::time::Duration;

use deadline::within;
use iommu_type1::{page_size, Backing, DmaHandle, Error, IoAddressSpace, UnmapOptions};
use vm_memory::{Bytes, GuestAddress, Permissions};

use Permissions::{Read, ReadWrite, Write};

/// Page 1 for reads and writes, 2 for reads, 3 for writes, nothing behind.
fn space() -> IoAddressSpace {
    let space = IoAddressSpace::new();
    for (page, prot) in [(1, ReadWrite), (2, Read), (3, Write)] {
        let backing = Backing::anonymous(page_size() as usize).unwrap();
        space.map(page * page_size(), backing, prot).unwrap();
    }
    space
}

fn refused(handle: &DmaHandle, iova: u64) -> Error {
    handle
        .compare_exchange(iova, 0_u32, 1, AcqRel, Acquire)
        .unwrap_err()
}

#[test]
fn every_width_exchanges_its_own_bytes_and_says_what_was_there() {
    macro_rules! check {
        ($($int:ty)*) => {$({
            let handle = space().handle();
            let size = size_of::<$int>() as u64;
            // The last of its page, between bytes of others.
            let at = 2 * page_size() - 2 * size;
            handle.write(at - size, &vec![0xaa; 3 * size as usize]).unwrap();
            let before = <$int>::from_ne_bytes([0xaa; size_of::<$int>()]);
            assert_eq!(handle.compare_exchange(at, 1 as $int, 2, AcqRel, Relaxed).unwrap(), Err(before));
            assert_eq!(handle.read_obj::<$int>(GuestAddress(at)).unwrap(), before);
            assert_eq!(handle.compare_exchange(at, before, 2, AcqRel, Relaxed).unwrap(), Ok(before));
            assert_eq!(handle.read_obj::<$int>(GuestAddress(at)).unwrap(), 2);
            for beside in [at - size, at + size] {
                assert_eq!(handle.read_obj::<$int>(GuestAddress(beside)).unwrap(), before);
            }
        })*};
    }
    check!(u8 i8 u16 i16 u32 i32 u64 i64);
}

#[test]
fn errors_say_where_and_why_and_change_nothing() {
    let p = page_size();
    let space = space();
    let handle = space.handle();
    for (iova, errno, message) in [
        (
            p + 2,
            libc::EINVAL,
            format!(
                "address of an atomic access {:#x} is not a multiple of 0x4",
                p + 2
            ),
        ),
        (
            2 * p,
            libc::EPERM,
            format!(
                "{:#x} is mapped for Read, the access needs ReadWrite (0 bytes were done)",
                2 * p
            ),
        ),
        (
            3 * p,
            libc::EPERM,
            format!(
                "{:#x} is mapped for Write, the access needs ReadWrite (0 bytes were done)",
                3 * p
            ),
        ),
        (
            4 * p,
            libc::EINVAL,
            format!("{:#x} is not mapped (0 bytes were done)", 4 * p),
        ),
        (
            u64::MAX - 3,
            libc::EINVAL,
            format!("{:#x} is not mapped (0 bytes were done)", u64::MAX - 3),
        ),
    ] {
        let error = refused(&handle, iova);
        assert_eq!((error.errno(), error.to_string()), (errno, message));
        assert_eq!(error.completed(), 0);
    }

    let list = space.scatter(p, 4, Read).unwrap();
    let at_once = UnmapOptions::new().deadline(Duration::ZERO);
    space.unmap_with(p, p, at_once).unwrap_err();
    let error = refused(&handle, p);
    assert!(matches!(error, Error::Revoked { iova, completed: 0 } if iova == p));
    assert_eq!(error.errno(), libc::EBUSY);
    let mut found = [0xff_u8; 4];
    list.iter()
        .for_each(|slice| assert_eq!(slice.copy_to(&mut found), 4));
    assert_eq!(found, [0; 4]);
}

#[test]
fn of_those_who_exchange_the_same_value_one_succeeds() {
    const EACH: u64 = 20_000;
    const THREADS: u64 = 3;
    let space = space();
    let at = page_size() + 8;
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                let handle = space.handle();
                let mut current = 0_u64;
                for _ in 0..EACH {
                    within("an exchange succeeds", || {
                        let exchanged =
                            handle.compare_exchange(at, current, current + 1, AcqRel, Acquire);
                        exchanged.unwrap().map_err(|now| current = now).is_ok()
                    });
                }
            });
        }
    });
    let total: u64 = space.handle().read_obj(GuestAddress(at)).unwrap();
    assert_eq!(total, THREADS * EACH);
}

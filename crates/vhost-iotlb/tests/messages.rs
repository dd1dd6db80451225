// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Messages one by one: what each does, and what is wrong with it.

mod common;

use std::fs::File;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use common::{byte, msg, p, table, update, Nobody, LOW, PAGES};
use iommu_type1::{IoAddressSpace, Profile, UnmapPolicy};
use vhost::VhostIotlbType::{AccessFail, BatchBegin, BatchEnd, Empty, Invalidate, Miss};
use vhost::{VhostAccess, VhostIotlbMsg};
use vhost_iotlb::{message, Error, MemRegion, MemTable, VhostIotlb, BATCH_LIMIT};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{
    Bytes, GuestAddress, Permissions, ReadVolatile, VolatileMemoryError, VolatileSlice,
};

static_assertions::assert_impl_all!(VhostIotlb: Send, Sync, Clone);
static_assertions::assert_impl_all!(MemTable: Send, Sync, Clone);
static_assertions::assert_impl_all!(Error: Send, Sync);

fn iotlb() -> VhostIotlb {
    let iotlb = VhostIotlb::new(Nobody).miss_deadline(Duration::ZERO);
    iotlb.set_mem_table(table()).unwrap();
    iotlb
}

fn bytes(iotlb: &VhostIotlb, pages: u64) -> Vec<Option<u8>> {
    (0..pages).map(|page| byte(iotlb, page)).collect()
}

#[test]
fn an_update_replaces_and_an_invalidation_splits() {
    let iotlb = iotlb();
    iotlb.apply(&update(0, 4, LOW)).unwrap();
    iotlb.apply(&update(1, 1, LOW + p(3))).unwrap();
    iotlb.apply(&msg(Invalidate, p(2), p(1))).unwrap();
    assert_eq!(bytes(&iotlb, 5), [Some(1), Some(4), None, Some(4), None]);
    assert_eq!(iotlb.space().mappings(), 3);
    // What is not there can be forgotten too.
    iotlb.apply(&msg(Invalidate, p(100), p(1))).unwrap();
    iotlb.apply(&msg(Invalidate, 0, 0)).unwrap();
    assert_eq!(iotlb.space().mappings(), 0);
}

#[test]
fn memory_that_goes_on_in_the_next_region_is_mapped_as_a_whole() {
    let iotlb = iotlb();
    iotlb.apply(&update(0, 4, LOW + p(PAGES - 2))).unwrap();
    let last = PAGES as u8;
    assert_eq!(bytes(&iotlb, 4), [last - 1, last, 101, 102].map(Some));
    let mut across = [0; 2];
    iotlb.space().read(p(2) - 1, &mut across).unwrap();
    assert_eq!(across, [last, 101]);
    // Where the table has a hole, nothing is.
    let error = iotlb.apply(&update(8, 2 * PAGES + 1, LOW)).unwrap_err();
    assert!(matches!(error, Error::NotInTable { .. }), "{error}");
    assert_eq!(byte(&iotlb, 8), None);
}

#[test]
fn accesses_are_those_that_the_message_says() {
    let iotlb = iotlb();
    for (perm, read, write) in [
        (VhostAccess::ReadOnly, true, false),
        (VhostAccess::WriteOnly, false, true),
        (VhostAccess::ReadWrite, true, true),
    ] {
        let message = VhostIotlbMsg {
            perm,
            ..update(0, 1, LOW)
        };
        iotlb.apply(&message).unwrap();
        let space = iotlb.space();
        assert_eq!(space.read(0, &mut [0]).is_ok(), read);
        assert_eq!(space.write(0, &[1]).is_ok(), write);
    }
}

#[test]
fn hostile_messages_are_errors_that_change_nothing() {
    let iotlb = iotlb();
    iotlb.apply(&update(0, 2, LOW)).unwrap();
    let top = 0_u64.wrapping_sub(p(1));
    let with = |iova, size, userspace_addr| VhostIotlbMsg {
        iova,
        size,
        userspace_addr,
        ..update(0, 1, LOW)
    };
    let no_access = VhostIotlbMsg {
        perm: VhostAccess::No,
        ..update(0, 1, LOW)
    };
    let wrong = [
        (with(0, 0, LOW), libc::EINVAL),
        (with(1, p(1), LOW), libc::EINVAL),
        (with(0, p(1) + 1, LOW), libc::EINVAL),
        (with(0, p(1), LOW + 1), libc::EINVAL),
        (with(top, p(2), LOW), libc::EOVERFLOW),
        (with(0, u64::MAX, LOW), libc::EFAULT),
        (with(u64::MAX, u64::MAX, u64::MAX), libc::EOVERFLOW),
        (with(0, p(1), u64::MAX), libc::EFAULT),
        (with(0, p(1), LOW - 1), libc::EFAULT),
        (with(0, p(1), 0), libc::EFAULT),
        (no_access, libc::EINVAL),
        (msg(Invalidate, 8, 0), libc::EINVAL),
        (msg(Invalidate, top, p(1) + 1), libc::EOVERFLOW),
        (msg(Invalidate, u64::MAX, 2), libc::EOVERFLOW),
        (msg(AccessFail, 0, 0), libc::EINVAL),
        (msg(AccessFail, u64::MAX, 2), libc::EOVERFLOW),
        (msg(Empty, 0, 0), libc::EINVAL),
        (msg(Miss, 0, p(1)), libc::EINVAL),
    ];
    for (message, errno) in wrong {
        let error = iotlb.apply(&message).unwrap_err();
        assert_eq!(error.errno(), errno, "{error}");
        assert_eq!(bytes(&iotlb, 3), [Some(1), Some(2), None]);
        // And nothing of a batch that it is in.
        iotlb.apply(&msg(BatchBegin, 0, 0)).unwrap();
        iotlb.apply(&update(1, 1, LOW + p(3))).unwrap();
        assert_eq!(iotlb.apply(&message).unwrap_err().errno(), errno);
        iotlb.apply(&update(2, 1, LOW)).unwrap();
        let error = iotlb.apply(&msg(BatchEnd, 0, 0)).unwrap_err();
        assert!(
            matches!(error, Error::BatchSpoiled { refused: 1 }),
            "{error}"
        );
        assert_eq!(bytes(&iotlb, 3), [Some(1), Some(2), None]);
    }
    let error = iotlb.apply(&msg(BatchEnd, 0, 0)).unwrap_err();
    assert!(matches!(error, Error::NoBatch), "{error}");
}

#[test]
fn the_ends_of_the_address_space_can_be_used() {
    let iotlb = iotlb();
    let top = 0_u64.wrapping_sub(p(1));
    let last = VhostIotlbMsg {
        iova: top,
        ..update(0, 1, LOW)
    };
    for size in [p(1), 1, p(1) - 1] {
        iotlb.apply(&last).unwrap();
        let mut byte = [0];
        iotlb.space().read(top, &mut byte).unwrap();
        assert_eq!(byte, [1]);
        // A part of a page is the page.
        iotlb.apply(&msg(Invalidate, top, size)).unwrap();
        assert_eq!(iotlb.space().mappings(), 0);
    }
    iotlb.apply(&last).unwrap();
    iotlb.apply(&update(0, 1, LOW)).unwrap();
    iotlb.apply(&msg(Invalidate, 0, u64::MAX)).unwrap();
    assert_eq!(iotlb.space().mappings(), 0);
    iotlb.apply(&update(4, 3, LOW)).unwrap();
    iotlb.apply(&msg(Invalidate, p(6) - 1, 2)).unwrap();
    assert_eq!(iotlb.space().mappings(), 1);
    assert_eq!(byte(&iotlb, 4), Some(1));
}

/// A stream that wants another memory table in the middle of the access that called it.
struct Reconfigures(VhostIotlb);

impl ReadVolatile for Reconfigures {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let error = self.0.set_mem_table(MemTable::default()).unwrap_err();
        assert_eq!(error.errno(), libc::EDEADLK);
        Ok(buf.len())
    }
}

#[test]
fn a_table_that_cannot_come_leaves_the_one_before() {
    let iotlb = iotlb();
    iotlb.apply(&update(0, 1, LOW)).unwrap();
    let handle = iotlb.space().handle();
    let mut stream = Reconfigures(iotlb.clone());
    let read = handle.read_volatile_from(GuestAddress(0), &mut stream, 8);
    assert_eq!(read.unwrap(), 8);
    // What is there is of the same table as what comes.
    iotlb.apply(&update(1, 1, LOW + p(1))).unwrap();
    assert_eq!(bytes(&iotlb, 3), [Some(1), Some(2), None]);
}

#[test]
fn a_batch_takes_effect_at_its_end() {
    let iotlb = iotlb();
    iotlb.apply(&update(0, 4, LOW)).unwrap();
    let maps = iotlb.space().stats().maps;
    iotlb.apply(&msg(BatchBegin, 0, 0)).unwrap();
    iotlb.apply(&msg(Invalidate, p(1), p(2))).unwrap();
    iotlb.apply(&update(2, 1, LOW + p(7))).unwrap();
    iotlb.apply(&update(9, 1, LOW)).unwrap();
    assert_eq!(bytes(&iotlb, 4), [1, 2, 3, 4].map(Some));
    assert!(matches!(
        iotlb.set_mem_table(table()),
        Err(Error::BatchOpen)
    ));
    iotlb.apply(&msg(BatchEnd, 0, 0)).unwrap();
    assert_eq!(bytes(&iotlb, 4), [Some(1), None, Some(8), Some(4)]);
    assert_eq!(byte(&iotlb, 9), Some(1));
    assert_eq!(iotlb.space().stats().maps, maps + 2);
    // A batch in a batch spoils it.
    iotlb.apply(&msg(BatchBegin, 0, 0)).unwrap();
    iotlb.apply(&msg(Invalidate, 0, 0)).unwrap();
    let error = iotlb.apply(&msg(BatchBegin, 0, 0)).unwrap_err();
    assert_eq!(error.errno(), libc::EBUSY);
    assert!(iotlb.apply(&msg(BatchEnd, 0, 0)).is_err());
    assert_eq!(iotlb.space().mappings(), 4);
    iotlb.apply(&msg(BatchBegin, 0, 0)).unwrap();
    iotlb.apply(&msg(BatchEnd, 0, 0)).unwrap();
}

#[test]
fn bytes_that_are_no_message_spoil_a_batch() {
    let iotlb = iotlb();
    let map = message::encode(&update(0, 1, LOW));
    let mut unknown = map;
    unknown[25] = 77;
    for wrong in [&unknown[..], &map[..20], &[]] {
        iotlb.apply_bytes(wrong).unwrap_err();
        let begin = message::encode(&msg(BatchBegin, 0, 0));
        iotlb.apply_bytes(&begin).unwrap();
        iotlb.apply_bytes(&map).unwrap();
        let error = iotlb.apply_bytes(wrong).unwrap_err();
        assert_eq!(error.errno(), libc::EINVAL);
        let end = message::encode(&msg(BatchEnd, 0, 0));
        let error = iotlb.apply_bytes(&end).unwrap_err();
        assert!(
            matches!(error, Error::BatchSpoiled { refused: 1 }),
            "{error}"
        );
        assert_eq!(byte(&iotlb, 0), None);
    }
    iotlb.apply_bytes(&map).unwrap();
    assert_eq!(byte(&iotlb, 0), Some(1));
}

#[test]
fn a_batch_has_a_limit() {
    let iotlb = iotlb();
    iotlb.apply(&msg(BatchBegin, 0, 0)).unwrap();
    for _ in 0..BATCH_LIMIT {
        iotlb.apply(&msg(Invalidate, p(1), p(1))).unwrap();
    }
    let error = iotlb.apply(&msg(Invalidate, p(1), p(1))).unwrap_err();
    assert!(matches!(error, Error::BatchLimit { .. }), "{error}");
    assert!(iotlb.apply(&msg(BatchEnd, 0, 0)).is_err());
    iotlb.apply(&update(0, 1, LOW)).unwrap();
}

#[test]
fn a_request_in_flight_is_waited_for_and_named() {
    let space = IoAddressSpace::builder()
        .profile(Profile::Iotlb)
        .unmap_deadline(Duration::ZERO)
        .build();
    let iotlb = VhostIotlb::with_space(space.named("blk"), Arc::new(Nobody)).unwrap();
    iotlb.set_mem_table(table()).unwrap();
    iotlb.apply(&update(0, 2, LOW)).unwrap();
    let list = iotlb.space().scatter(0, 8, Permissions::ReadWrite).unwrap();
    for _ in 0..2 {
        let error = iotlb.apply(&msg(Invalidate, 0, p(1))).unwrap_err();
        assert_eq!(error.errno(), libc::EDEADLK);
        assert!(error.to_string().contains("blk leases"), "{error}");
        assert_eq!(bytes(&iotlb, 2), [None, Some(2)]);
    }
    // The front end may go on with it meanwhile.
    iotlb.apply(&update(0, 1, LOW + p(5))).unwrap();
    assert_eq!(byte(&iotlb, 0), Some(6));
    drop(list);
    iotlb.apply(&msg(Invalidate, 0, p(2))).unwrap();
    assert_eq!(iotlb.space().mappings(), 0);
}

#[test]
fn other_profiles_are_refused() {
    let made = VhostIotlb::with_space(IoAddressSpace::new(), Arc::new(Nobody));
    assert!(matches!(made, Err(Error::Profile(Profile::Type1v2))));
}

#[test]
fn a_space_that_maps_again_what_was_invalidated_is_refused() {
    let space = IoAddressSpace::builder()
        .profile(Profile::Iotlb)
        .unmap_policy(UnmapPolicy::Restore)
        .build();
    let error = VhostIotlb::with_space(space, Arc::new(Nobody)).unwrap_err();
    assert!(
        matches!(error, Error::Policy(UnmapPolicy::Restore)),
        "{error}"
    );
    assert_eq!(error.errno(), libc::EINVAL);
}

#[test]
fn files_are_mapped_and_their_places_known() {
    // SAFETY: the name ends with a NUL.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: it was just opened, and is nobody else's.
    let file = Arc::new(unsafe { File::from_raw_fd(fd) });
    file.set_len(p(8)).unwrap();
    let region = |size, offset| MemRegion::file(0x8000_0000, size, LOW, file.clone(), offset);
    let wrong = [
        (p(8), p(1)),
        (0, 0),
        (u64::MAX, 0),
        (p(1), u64::MAX),
        (p(1), 1),
    ];
    for (size, offset) in wrong {
        assert!(region(size, offset).is_err(), "{size:#x} at {offset:#x}");
    }
    let iotlb = VhostIotlb::new(Nobody);
    let table = MemTable::new([region(p(6), p(2)).unwrap()]).unwrap();
    iotlb.set_mem_table(table).unwrap();
    iotlb.apply(&update(0, 2, LOW + p(3))).unwrap();
    iotlb.write(p(1), b"DMA!").unwrap();
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, p(2 + 4)).unwrap();
    assert_eq!(&bytes, b"DMA!");
    let (snapshot, _) = iotlb.space().snapshot().unwrap();
    let backing = snapshot.mappings[0].backing.unwrap();
    assert_eq!(backing.guest_address, Some(0x8000_0000 + p(3)));
}

#[test]
fn an_iotlb_that_is_full_is_emptied() {
    let space = IoAddressSpace::builder()
        .profile(Profile::Iotlb)
        .entry_limit(4)
        .build();
    let iotlb = VhostIotlb::with_space(space, Arc::new(Nobody)).unwrap();
    iotlb.set_mem_table(table()).unwrap();
    for page in 0..4 {
        iotlb.apply(&update(2 * page, 1, LOW)).unwrap();
    }
    iotlb.apply(&update(8, 1, LOW + p(1))).unwrap();
    assert_eq!((iotlb.space().mappings(), byte(&iotlb, 8)), (1, Some(2)));
    // An invalidation that splits needs room, and is never refused for want of it.
    for page in 0..4 {
        iotlb.apply(&update(page * 4, 3, LOW)).unwrap();
    }
    assert_eq!(iotlb.space().mappings(), 4);
    iotlb.apply(&msg(Invalidate, p(1), p(1))).unwrap();
    assert_eq!(byte(&iotlb, 1), None);
    // More in one batch than there may ever be.
    iotlb.apply(&msg(BatchBegin, 0, 0)).unwrap();
    for page in 0..5 {
        iotlb.apply(&update(2 * page, 1, LOW)).unwrap();
    }
    let error = iotlb.apply(&msg(BatchEnd, 0, 0)).unwrap_err();
    assert_eq!(error.errno(), libc::ENOSPC);
}

#[test]
fn an_iotlb_whose_table_is_full_is_emptied() {
    let space = IoAddressSpace::builder()
        .profile(Profile::Iotlb)
        .table_limit(256 << 10)
        .build();
    let iotlb = VhostIotlb::with_space(space, Arc::new(Nobody)).unwrap();
    iotlb.set_mem_table(table()).unwrap();
    // Two pages that only a node of their own tells apart, and many such.
    for pair in 0..64 {
        for page in [512 * pair, 512 * pair + 1] {
            iotlb.apply(&update(page, 1, LOW)).unwrap();
            assert_eq!(byte(&iotlb, page), Some(1));
        }
    }
    assert!(iotlb.space().mappings() < 128);
}

/// An invalidation is never refused for want of room.
#[test]
fn an_iotlb_without_room_for_what_a_cut_leaves_is_emptied() {
    let builder = || IoAddressSpace::builder().profile(Profile::Iotlb);
    // Two words of marks instead of one; two entries instead of one.
    for (builder, tracks) in [
        (builder().dirty_limit(8), true),
        (builder().entry_limit(1), false),
    ] {
        let iotlb = VhostIotlb::with_space(builder.build(), Arc::new(Nobody)).unwrap();
        iotlb.set_mem_table(table()).unwrap();
        iotlb.apply(&update(0, 3, LOW)).unwrap();
        if tracks {
            iotlb.space().start_dirty_tracking().unwrap();
        }
        iotlb.apply(&msg(Invalidate, p(1), p(1))).unwrap();
        assert_eq!(bytes(&iotlb, 3), [None; 3]);
    }
}

/// Also where what was replaced takes the last entry, because somebody uses it.
#[test]
fn what_is_replaced_and_used_keeps_no_invalidation_from_being_done() {
    let space = IoAddressSpace::builder()
        .profile(Profile::Iotlb)
        .entry_limit(1)
        .unmap_deadline(Duration::ZERO)
        .build();
    let iotlb = VhostIotlb::with_space(space, Arc::new(Nobody)).unwrap();
    iotlb.set_mem_table(table()).unwrap();
    iotlb.apply(&update(0, 1, LOW)).unwrap();
    let list = iotlb.space().scatter(0, 8, Permissions::Read).unwrap();
    let used = [update(0, 1, LOW + p(1)), msg(Invalidate, 0, p(1))];
    for message in used {
        let error = iotlb.apply(&message).unwrap_err();
        assert_eq!(error.errno(), libc::EDEADLK, "{error}");
    }
    assert_eq!(byte(&iotlb, 0), None);
    drop(list);
    iotlb.disconnect().unwrap();
    assert_eq!(iotlb.space().mappings(), 0);
}

#[test]
fn pages_of_which_few_are_all_addresses_can_be_missed() {
    for bit in [55, 63] {
        let space = IoAddressSpace::builder()
            .profile(Profile::Iotlb)
            .page_sizes(1 << bit)
            .build();
        let iotlb = VhostIotlb::with_space(space, Arc::new(Nobody)).unwrap();
        let iotlb = iotlb.miss_deadline(Duration::ZERO);
        let error = iotlb
            .resolve(u64::MAX - 8, 8, Permissions::Read)
            .unwrap_err();
        let Error::MissDeadline { iova, size, .. } = error else {
            panic!("{error}");
        };
        assert_eq!((iova, size), (0_u64.wrapping_sub(1 << bit), 1 << bit));
    }
}

#[test]
fn single_pages_by_the_ten_thousands() {
    let count = 65_536;
    let iotlb = iotlb();
    let table_bytes = iotlb.space().stats().table_bytes;
    // One more than the limit: the last finds an IOTLB that was emptied for it.
    for page in 0..count {
        let message = update(page, 1, LOW + p(page % PAGES));
        iotlb.apply(&message).unwrap();
    }
    assert_eq!(iotlb.space().mappings(), 1);
    assert_eq!(byte(&iotlb, count - 1), Some(PAGES as u8));
    // As a batch, as one that replaces as many, and as one that forgets them.
    let limit = count - 1;
    for _ in 0..2 {
        iotlb.apply(&msg(BatchBegin, 0, 0)).unwrap();
        for page in 0..limit {
            let message = update(page, 1, LOW + p(page % PAGES));
            iotlb.apply(&message).unwrap();
        }
        iotlb.apply(&msg(BatchEnd, 0, 0)).unwrap();
        assert_eq!(iotlb.space().mappings() as u64, limit);
    }
    iotlb.apply(&msg(BatchBegin, 0, 0)).unwrap();
    for page in 0..limit {
        iotlb.apply(&msg(Invalidate, p(page), p(1))).unwrap();
    }
    iotlb.apply(&msg(BatchEnd, 0, 0)).unwrap();
    assert_eq!(iotlb.space().mappings(), 0);
    assert_eq!(iotlb.space().stats().table_bytes, table_bytes);
}

#[test]
fn ranges_that_are_none_are_errors_of_those_who_wait() {
    let iotlb = iotlb();
    let error = iotlb.read(0, &mut [0]).unwrap_err();
    assert!(matches!(error, Error::MissDeadline { .. }), "{error}");
    assert_eq!((error.errno(), iotlb.open_misses()), (libc::ETIMEDOUT, 0));
    iotlb.resolve(u64::MAX, 0, Permissions::Read).unwrap();
    let error = iotlb.resolve(u64::MAX, 2, Permissions::Read).unwrap_err();
    assert_eq!(error.errno(), libc::EOVERFLOW);
    let error = iotlb.write(u64::MAX, &[0; 2]).unwrap_err();
    assert_eq!(error.errno(), libc::EOVERFLOW);
}

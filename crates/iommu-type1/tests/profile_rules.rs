// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the profiles do case by case, as kernels answered; and what holders see of replacements, cuts and
//! memory that is taken away.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use common::beside_an_unmap;
use common::deadline::{ended, within, Over, DEADLINE};
use iommu_type1::{
    page_size, Backing, Error, HolderKind, Interest, IoAddressSpace, PermissionPolicy, Profile,
    UnmapOptions, UnmapPolicy,
};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, Permissions};

use Permissions::{Read, ReadWrite, Write};
use Profile::{Iommufd, Iotlb, Type1v1, Type1v2};

fn pages(n: u64) -> Backing {
    Backing::anonymous((n * page_size()) as usize).unwrap()
}

fn space(profile: Profile) -> IoAddressSpace {
    IoAddressSpace::builder()
        .profile(profile)
        .unmap_deadline(DEADLINE)
        .build()
}

fn errno<T>(result: Result<T, Error>) -> Result<T, i32> {
    result.map_err(|error| error.errno())
}

/// No time, and the policy.
fn at_once(policy: UnmapPolicy) -> UnmapOptions {
    UnmapOptions::new().deadline(Duration::ZERO).policy(policy)
}

const EINVAL: Result<u64, i32> = Err(libc::EINVAL);
const ENOENT: Result<u64, i32> = Err(libc::ENOENT);

/// Pages 16 to 19 are one mapping, 20 is another; what an unmap returns, in pages, in each profile: v1,
/// v2, iommufd, iotlb.
#[test]
fn an_unmap_of_a_part_is_what_the_profile_says() {
    let p = page_size();
    for (first, n, expected) in [
        (16, 4, [Ok(4), Ok(4), Ok(4), Ok(4)]),
        (16, 1, [Ok(4), EINVAL, ENOENT, Ok(1)]),
        (17, 1, [Ok(0), EINVAL, ENOENT, Ok(1)]),
        (18, 2, [Ok(0), EINVAL, ENOENT, Ok(2)]),
        (18, 3, [Ok(0), EINVAL, ENOENT, Ok(3)]),
        (14, 4, [Ok(4), EINVAL, ENOENT, Ok(2)]),
        (14, 7, [Ok(5), Ok(5), Ok(5), Ok(5)]),
        (20, 5, [Ok(1), Ok(1), Ok(1), Ok(1)]),
        (30, 5, [Ok(0), Ok(0), ENOENT, Ok(0)]),
        (16, 0, [EINVAL, EINVAL, EINVAL, EINVAL]),
    ] {
        for (profile, expected) in [Type1v1, Type1v2, Iommufd, Iotlb].into_iter().zip(expected) {
            let space = space(profile);
            space.map(16 * p, pages(4), ReadWrite).unwrap();
            space.map(20 * p, pages(1), ReadWrite).unwrap();
            let result = errno(space.unmap(first * p, n * p));
            assert_eq!(
                result.map(|bytes| bytes / p),
                expected,
                "{profile:?}: {first} {n}"
            );
            let left = (16..21).filter(|page| space.read(page * p, &mut [0]).is_ok());
            assert_eq!(left.count() as u64, 5 - expected.unwrap_or(0));
        }
    }
}

/// As measured: type1 wants whole pages first, iommufd whole areas.
#[test]
fn odd_unmaps_are_what_the_profile_says() {
    let p = page_size();
    let overflow = Err(libc::EOVERFLOW);
    for (iova, size, type1, iommufd) in [
        (16 * p + 1, p, EINVAL, ENOENT),
        (16 * p, p + 1, EINVAL, Ok(p)),
        (u64::MAX - p + 1, 2 * p, overflow, overflow),
        (0, u64::MAX, EINVAL, Ok(p)),
        (0, u64::MAX - p + 1, Ok(p), Ok(p)),
    ] {
        for (profile, expected) in [(Type1v1, type1), (Type1v2, type1), (Iommufd, iommufd)] {
            let space = space(profile);
            space.map(16 * p, pages(1), ReadWrite).unwrap();
            assert_eq!(
                errno(space.unmap(iova, size)),
                expected,
                "{profile:?}: {iova:#x}"
            );
        }
    }
    assert_eq!(space(Iommufd).unmap(0, u64::MAX).unwrap(), 0);
    assert_eq!(space(Iommufd).unmap_all().unwrap(), 0);
}

/// The first wrong thing that the profile looks at.
#[test]
fn a_wrong_map_is_what_the_profile_says() {
    let p = page_size();
    let (top, no) = (0_u64.wrapping_sub(p), Permissions::No);
    for (iova, prot, type1, iommufd) in [
        (top + 1, ReadWrite, libc::EOVERFLOW, libc::EINVAL),
        (top, no, libc::EOVERFLOW, libc::EINVAL),
        (u64::MAX, ReadWrite, libc::EOVERFLOW, libc::EOVERFLOW),
        (top, ReadWrite, libc::EOVERFLOW, libc::EOVERFLOW),
        (1, ReadWrite, libc::EINVAL, libc::EINVAL),
    ] {
        for (profile, expected) in [(Type1v1, type1), (Type1v2, type1), (Iommufd, iommufd)] {
            let result = errno(space(profile).map(iova, pages(2), prot));
            assert_eq!(result, Err(expected), "{profile:?}: {iova:#x}");
        }
    }
}

#[test]
fn what_is_not_mapped_is_what_the_profile_says() {
    for (profile, expected) in [
        (Type1v1, libc::EINVAL),
        (Type1v2, libc::EINVAL),
        (Iommufd, libc::ENOENT),
        (Iotlb, libc::EAGAIN),
    ] {
        let space = space(profile);
        assert_eq!(space.profile(), profile);
        assert_eq!(errno(space.handle().read(0, &mut [0])), Err(expected));
    }
}

#[test]
fn a_write_needs_what_the_policy_says_on_every_way() {
    use PermissionPolicy::{Strict, WriteNeedsRead};
    for (policy, is_writable) in [(WriteNeedsRead, false), (Strict, true)] {
        let space = IoAddressSpace::builder().permission_policy(policy).build();
        // Two, so that one of them is found by its page word.
        for page in [0, 1] {
            space.map(page * page_size(), pages(1), Write).unwrap();
            let at = page * page_size();
            let handle = space.handle();
            assert_eq!(handle.write(at, &[1]).is_ok(), is_writable);
            let store = handle.store(1_u32, GuestAddress(at), Ordering::Release);
            assert_eq!(store.is_ok(), is_writable);
            let guard = space.memory();
            let written = guard.write_slice(&[1], GuestAddress(at));
            assert_eq!(written.is_ok(), is_writable);
            assert_eq!(space.scatter(at, 1, Write).is_ok(), is_writable);
            for error in [
                space.read(at, &mut [0]).unwrap_err(),
                handle
                    .compare_exchange(at, 1_u32, 2, Ordering::AcqRel, Ordering::Acquire)
                    .unwrap_err(),
                space.scatter(at, 1, ReadWrite).map(drop).unwrap_err(),
            ] {
                assert_eq!(error.errno(), libc::EPERM);
            }
            // A pin needs what it asks for, whatever the policy.
            let pinner = space.pinner("pinner", Interest::Holder, Arc::new(|_, _| ()));
            drop(pinner.pin_pages(at, 1, Write).unwrap());
            assert_eq!(
                errno(pinner.pin_pages(at, 1, Read)).err(),
                Some(libc::EPERM)
            );
        }
        let denied = space.scatter(0, 1, ReadWrite).map(drop).unwrap_err();
        assert!(matches!(
            denied,
            Error::Permission {
                needed: ReadWrite,
                allowed: Write,
                ..
            }
        ));
    }
}

/// Readers of what is replaced, cut and updated all the time never miss.
#[test]
fn there_is_never_a_hole() {
    let p = page_size();
    let space = space(Iotlb);
    let [at, beside, behind] = [64, 65, 66].map(|page| page * p);
    space.map(at, pages(3), ReadWrite).unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let _over = Over(&stop);
        for _ in 0..2 {
            let (handle, stop) = (space.handle(), &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    for iova in [at, beside, behind, at + p - 1] {
                        handle.write(iova, &[1, 2]).unwrap();
                        handle.read(iova, &mut [0; 2]).unwrap();
                    }
                }
            });
        }
        for i in 0..300 {
            // The one in the middle of three, then all three by one.
            space.map(beside, pages(1), ReadWrite).unwrap();
            space.replace(beside, pages(1), ReadWrite).unwrap();
            if i % 2 == 0 {
                space.map(at, pages(3), ReadWrite).unwrap();
            }
        }
    });
    assert_eq!(space.stats().misses, 0);
}

#[test]
fn a_replacement_waits_for_leases_and_pins_and_names_them() {
    let p = page_size();
    for policy in [UnmapPolicy::Revoked, UnmapPolicy::Restore] {
        for kind in [HolderKind::Lease, HolderKind::Pin] {
            let space = space(Type1v2);
            space.map(p, pages(2), ReadWrite).unwrap();
            space.write(p, &[1]).unwrap();
            let told = Arc::new(Mutex::new(Vec::new()));
            let notice = told.clone();
            let tell = move |iova, size| notice.lock().unwrap().push((iova, size));
            let pinner = space.pinner("pinner", Interest::Holder, Arc::new(tell));
            let (mut list, mut pin) = (None, None);
            match kind {
                HolderKind::Lease => list = Some(space.scatter(p, 8, ReadWrite).unwrap()),
                _ => pin = Some(pinner.pin_pages(p, 1, ReadWrite).unwrap()),
            }
            let result = space.replace_with(p, pages(2), ReadWrite, at_once(policy));
            let Err(Error::Deadline {
                unmapped,
                left,
                holders,
            }) = result
            else {
                panic!("{result:?}");
            };
            assert_eq!((unmapped, left), (0, 2 * p));
            assert!(holders.iter().all(|holder| holder.kind == kind) && !holders.is_empty());
            let expected = if pin.is_some() {
                vec![(p, 2 * p)]
            } else {
                vec![]
            };
            assert_eq!(*told.lock().unwrap(), expected);
            // Replaced nevertheless, or there again.
            let mut byte = [7];
            space.read(p, &mut byte).unwrap();
            assert_eq!(byte, [u8::from(policy == UnmapPolicy::Restore)]);

            // The next unmap waits for the same.
            assert_eq!(
                errno(space.unmap_with(p, 2 * p, at_once(UnmapPolicy::Revoked))),
                Err(libc::EDEADLK)
            );
            drop((list.take(), pin.take()));
            assert_eq!(space.unmap(p, 2 * p).unwrap(), 2 * p);
            assert_eq!(space.mappings(), 0);
        }
    }
}

#[test]
fn what_was_replaced_again_is_not_put_back() {
    let p = page_size();
    let space = space(Type1v2);
    space.map(p, pages(1), ReadWrite).unwrap();
    let (again, is_first) = (space.clone(), AtomicBool::new(true));
    let tell = move |iova, _| {
        if is_first.swap(false, Ordering::Relaxed) {
            let other =
                again.replace_with(iova, pages(1), ReadWrite, at_once(UnmapPolicy::Revoked));
            assert_eq!(errno(other), Err(libc::EDEADLK));
            again.write(iova, b"newest").unwrap();
        }
    };
    let pinner = space.pinner("pinner", Interest::Holder, Arc::new(tell));
    let pinned = pinner.pin_pages(p, 1, ReadWrite).unwrap();
    let first = space.replace_with(p, pages(1), ReadWrite, at_once(UnmapPolicy::Restore));
    assert_eq!(errno(first), Err(libc::EDEADLK));
    let mut found = [0; 6];
    space.read(p, &mut found).unwrap();
    assert_eq!(&found, b"newest");
    drop(pinned);
    assert_eq!(space.unmap_all().unwrap(), p);
    assert_eq!(space.mappings(), 0);
}

/// Pages beside the part that goes stay pinned, and what is written to them is known.
#[test]
fn a_cut_leaves_pins_beside_it_alone() {
    let p = page_size();
    let space = space(Iotlb);
    space.map(p, pages(3), ReadWrite).unwrap();
    space.start_dirty_tracking().unwrap();
    let told = Arc::new(Mutex::new(Vec::new()));
    let notice = told.clone();
    let tell = move |iova, size| notice.lock().unwrap().push((iova, size));
    let pinner = space.pinner("pinner", Interest::Holder, Arc::new(tell));
    let pinned = pinner.pin_pages(3 * p, 1, ReadWrite).unwrap();
    assert_eq!(space.unmap(p, p).unwrap(), p);
    assert!(told.lock().unwrap().is_empty());
    let page = pinned.page(0).unwrap();
    page.write_slice(b"still", 0).unwrap();
    let dirty = space.take_dirty(2 * p, 2 * p).unwrap();
    assert!(dirty.iter().eq([3 * p]));
    let mut found = [0; 5];
    space.read(3 * p, &mut found).unwrap();
    assert_eq!(&found, b"still");
    drop(pinned);
    assert_eq!(space.unmap(2 * p, 2 * p).unwrap(), 2 * p);
    assert_eq!(space.mappings(), 0);
}

#[test]
fn a_cut_needs_room_for_the_parts_it_adds() {
    let p = page_size();
    let limited = |limit| {
        let builder = IoAddressSpace::builder().profile(Iotlb).entry_limit(limit);
        let space = builder.build();
        space.map(0, pages(4), ReadWrite).unwrap();
        space
    };
    assert_eq!(errno(limited(2).unmap(p, p)), Err(libc::ENOSPC));
    let space = limited(3);
    assert_eq!(space.unmap(p, p).unwrap(), p);
    assert_eq!(space.mappings(), 2);
}

#[test]
fn nothing_is_cut_where_something_else_of_the_range_leaves() {
    let p = page_size();
    let space = space(Iotlb);
    space.map(0, pages(2), ReadWrite).unwrap();
    space.map(2 * p, pages(2), ReadWrite).unwrap();
    beside_an_unmap(&space, 0, 2 * p, || {
        let refused = space.unmap(0, 3 * p).unwrap_err();
        assert!(matches!(refused, Error::Unmapping { .. }), "{refused}");
        assert_eq!(space.mappings(), 2);
        // Everything is whatever nobody else unmaps.
        assert_eq!(space.unmap_all().unwrap(), 2 * p);
    });
    assert_eq!(space.mappings(), 0);
}

/// By the rules of v1 nothing happens where the first mapping begins before the range, unless somebody is working on it.
#[test]
fn no_memory_is_taken_away_behind_the_beginning_of_what_leaves() {
    let p = page_size();
    let space = space(Type1v1);
    space.map(0, pages(2), ReadWrite).unwrap();
    beside_an_unmap(&space, 0, 2 * p, || {
        let refused = space.invalidate_vaddr(p, p).unwrap_err();
        assert!(matches!(refused, Error::Unmapping { .. }), "{refused}");
    });
    space.map(0, pages(2), ReadWrite).unwrap();
    let _held = space.scatter(0, 8, Read).unwrap();
    let held = space.unmap_with(0, 2 * p, at_once(UnmapPolicy::Revoked));
    assert_eq!(errno(held), Err(libc::EDEADLK));
    assert_eq!(space.invalidate_vaddr(p, p).unwrap(), 0);
}

#[test]
fn a_part_of_what_was_revoked_in_vain_is_not_unmapped_alone() {
    let p = page_size();
    let space = space(Iotlb);
    space.map(0, pages(2), ReadWrite).unwrap();
    let list = space.scatter(0, 8, Read).unwrap();
    let held = space.unmap_with(0, 2 * p, at_once(UnmapPolicy::Revoked));
    assert_eq!(errno(held), Err(libc::EDEADLK));
    let refused = space.unmap(0, p).unwrap_err();
    assert!(matches!(refused, Error::Unmapping { .. }), "{refused}");
    drop(list);
    assert_eq!(space.unmap(0, 2 * p).unwrap(), 2 * p);
}

#[test]
fn dirty_pages_stay_dirty_whatever_stands_in_their_place() {
    let p = page_size();
    let space = space(Iotlb);
    space.map(p, pages(3), ReadWrite).unwrap();
    space.start_dirty_tracking().unwrap();
    (1..4).for_each(|page| space.write(page * p, &[1]).unwrap());
    space.map(2 * p, pages(1), ReadWrite).unwrap();
    space.replace(p, pages(1), ReadWrite).unwrap();
    let dirty = space.take_dirty(p, 3 * p).unwrap();
    assert!(dirty.iter().eq([p, 2 * p, 3 * p]));
    assert!(space.take_dirty(p, 3 * p).unwrap().is_empty());
}

#[test]
fn memory_is_not_taken_away_from_pinned_pages() {
    let p = page_size();
    let space = space(Type1v2);
    space.map(p, pages(1), ReadWrite).unwrap();
    space.map(2 * p, pages(1), ReadWrite).unwrap();
    let pinner = space.pinner("pinner", Interest::Holder, Arc::new(|_, _| ()));
    let pinned = pinner.pin_pages(2 * p, 1, Read).unwrap();
    let refused = space.invalidate_all_vaddr().unwrap_err();
    assert!(matches!(refused, Error::Pinned { .. }), "{refused}");
    assert_eq!(refused.errno(), libc::EBUSY);
    space.read(p, &mut [0]).unwrap();
    drop(pinned);
    assert_eq!(space.invalidate_all_vaddr().unwrap(), 2 * p);
    for result in [
        space.read(p, &mut [0]),
        pinner.pin_pages(2 * p, 1, Read).map(drop),
        space.scatter(p, 1, Read).map(drop),
    ] {
        assert!(matches!(
            result,
            Err(Error::VaddrInvalid {
                errno: libc::EBUSY,
                ..
            })
        ));
    }
}

#[test]
fn by_the_rules_of_v1_nothing_is_pinned() {
    let p = page_size();
    for (profile, refused) in [
        (Type1v1, Some(libc::EACCES)),
        (Type1v2, None),
        (Iommufd, None),
        (Iotlb, None),
    ] {
        assert_eq!(profile.pins(), refused.is_none());
        let space = space(profile);
        space.map(p, pages(2), ReadWrite).unwrap();
        let pinner = space.pinner("pinner", Interest::Holder, Arc::new(|_, _| ()));
        let pin = |iova, npages| pinner.pin_pages(iova, npages, Read).map(drop);
        // How many they are comes first, where they are afterwards.
        assert_eq!(errno(pin(p, 0)), Err(libc::EINVAL));
        assert_eq!(errno(pin(p, space.max_pin_pages() + 1)), Err(libc::E2BIG));
        let overflow = errno(pin(0_u64.wrapping_sub(p), 2));
        assert_eq!(overflow, Err(refused.unwrap_or(libc::EOVERFLOW)));
        for result in [pin(p, 2), pinner.pin_list(&[2 * p, p], Read).map(drop)] {
            assert_eq!(errno(result).err(), refused, "{profile:?}");
        }
        space.read(p, &mut [0]).unwrap();
    }
}

#[test]
fn mappings_without_memory_are_counted() {
    let p = page_size();
    let space = space(Type1v2);
    for page in 1..4 {
        space.map(page * p, pages(1), ReadWrite).unwrap();
    }
    assert_eq!(space.without_memory(), 0);
    space.invalidate_vaddr(p, 2 * p).unwrap();
    assert_eq!(space.without_memory(), 2);
    space.resume_vaddr(p, p, pages(1)).unwrap();
    assert_eq!(space.without_memory(), 1);
    space.unmap(2 * p, p).unwrap();
    assert_eq!(space.without_memory(), 0);
}

/// As an unmap, it stops at what begins before its range, whatever lies behind.
#[test]
fn memory_is_taken_away_from_nothing_where_v1_stops() {
    let p = page_size();
    let space = space(Type1v1);
    space.map(p, pages(2), ReadWrite).unwrap();
    space.map(3 * p, pages(1), ReadWrite).unwrap();
    assert_eq!(space.invalidate_vaddr(3 * p, p).unwrap(), p);
    assert_eq!(space.invalidate_vaddr(2 * p, 2 * p).unwrap(), 0);
    assert_eq!(errno(space.invalidate_vaddr(p, 3 * p)), EINVAL);
    space.read(p, &mut [0]).unwrap();
}

/// Whoever has taken it away may unmap it, and the memory is released at once.
#[test]
fn memory_that_is_taken_away_is_released() {
    use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};
    let p = page_size();
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), p as usize)]).unwrap();
    let region = memory.find_region(GuestAddress(0)).unwrap().get_mmap();
    let backing = Backing::from_guest_memory(&memory, GuestAddress(0), p as usize).unwrap();
    let space = space(Type1v2);
    space.map(p, backing, Read).unwrap();
    let shared = Arc::strong_count(&region);
    space.invalidate_vaddr(p, p).unwrap();
    assert_eq!(Arc::strong_count(&region), shared - 1);
    // It permits what it did before.
    space.resume_vaddr(p, p, pages(1)).unwrap();
    assert_eq!(errno(space.write(p, &[1])), Err(libc::EPERM));
}

/// What refused it can be put right: the mapping stays as it was.
#[test]
fn memory_of_another_size_is_not_given_back() {
    let p = page_size();
    let space = space(Type1v2);
    space.map(p, pages(1), ReadWrite).unwrap();
    space.map(2 * p, pages(2), ReadWrite).unwrap();
    assert_eq!(space.invalidate_vaddr(2 * p, 2 * p).unwrap(), 2 * p);
    for wrong in [1, 3] {
        let error = space.resume_vaddr(2 * p, 2 * p, pages(wrong)).unwrap_err();
        assert_eq!(error.errno(), libc::EFAULT);
        let (due, had) = (2 * p, wrong * p);
        assert!(
            matches!(error, Error::BackingRange { offset: 0, len, size } if (len, size) == (due, had)),
            "{error}"
        );
        // What lies before it was read.
        let error = space.read(2 * p - 3, &mut [0; 8]).unwrap_err();
        assert_eq!((error.errno(), error.completed()), (libc::EBUSY, 3));
    }
    space.resume_vaddr(2 * p, 2 * p, pages(2)).unwrap();
    space.read(2 * p - 3, &mut [0; 8]).unwrap();
}

#[test]
fn a_copy_shares_memory_and_shrinks_permissions_only() {
    let p = page_size();
    let [one, other] = [space(Type1v2), space(Iommufd)];
    one.map(p, pages(2), ReadWrite).unwrap();
    one.map(3 * p, pages(1), Read).unwrap();
    let copy = |iova, n: u64, to, prot| errno(one.copy_to(iova, n * p, &other, to, prot));
    assert_eq!(copy(2 * p, 2, 0, ReadWrite), Err(libc::EPERM));
    assert_eq!(copy(2 * p, 3, 0, Read), Err(libc::ENOENT));
    assert_eq!(copy(0, 2, 0, Read), Err(libc::ENOENT));
    assert_eq!(copy(p, 0, 0, Read), Err(libc::EINVAL));
    assert_eq!(
        copy(p, 1, 0_u64.wrapping_sub(p) + 1, Read),
        Err(libc::EINVAL)
    );
    assert_eq!(other.mappings(), 0);
    copy(2 * p, 2, 8 * p, Read).unwrap();
    assert_eq!(other.mappings(), 2);
    assert_eq!(copy(p, 1, 9 * p, Read), Err(libc::EEXIST));

    one.write(2 * p, b"both").unwrap();
    assert_eq!(one.unmap_all().unwrap(), 3 * p);
    let mut found = [0; 4];
    other.read(8 * p, &mut found).unwrap();
    assert_eq!(&found, b"both");
    assert_eq!(errno(other.write(8 * p, &[1])), Err(libc::EPERM));
}

/// Both wait for whoever uses the memory that was replaced; either may be the last who does.
#[test]
fn what_was_replaced_is_forgotten_by_whoever_waits_last() {
    for _ in 0..200 {
        let space = space(Type1v2);
        space.map(0, pages(1), ReadWrite).unwrap();
        let guard = space.memory();
        guard.read_slice(&mut [0], GuestAddress(0)).unwrap();
        let one = space.clone();
        let replacing = thread::spawn(move || one.replace(0, pages(1), ReadWrite));
        within("what was replaced is there still", || space.mappings() > 1);
        let other = space.clone();
        let invalidating = thread::spawn(move || other.invalidate_vaddr(0, page_size()));
        within("memory is taken away", || space.read(0, &mut [0]).is_err());
        drop(guard);
        ended("who replaces waits for nobody", replacing).unwrap();
        ended("who takes away waits for nobody", invalidating).unwrap();
        assert_eq!(space.mappings(), 1);
    }
}

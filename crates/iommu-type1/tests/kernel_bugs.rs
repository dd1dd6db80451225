// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bugs that Linux had, or has, in what this crate does. docs/kernel-bugs.md lists them; `ci/kernel-bugs/run`
//! puts each into the code and expects its test here to fail.

mod common;

use std::sync::{Arc, Mutex};

use common::at_once;
use common::deadline::must_end;
use iommu_type1::uapi::bindings::vfio_iommu_type1_dma_map;
use iommu_type1::uapi::{Bitmap, Type1, UserMemory};
use iommu_type1::{
    page_size, Backing, DirtyBitmap, Error, Interest, IoAddressSpace, IovaRanges, PermissionPolicy,
    Profile, Result,
};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryMmap, GuestRegionMmap, Permissions,
};

use Permissions::{Read, ReadWrite, Write};

fn pages(n: u64) -> Backing {
    Backing::anonymous((n * page_size()) as usize).unwrap()
}

/// A user whose memory is wherever it says.
struct Anywhere;

impl UserMemory for Anywhere {
    fn backing(&self, _vaddr: u64, size: u64, _prot: Permissions) -> Result<Backing> {
        Backing::anonymous(size as usize)
    }
}

/// What ends exactly at 2^64 was found by no look-up, no unmap and no harvest.
#[test]
fn b01_the_end_of_the_address_space() {
    let p = page_size();
    let first = u64::MAX - 2 * p + 1;
    let space = IoAddressSpace::new();
    space.start_dirty_tracking().unwrap();
    space.map(first, pages(1), ReadWrite).unwrap();
    space.map(first + p, pages(1), ReadWrite).unwrap();
    assert_eq!(
        space
            .map(u64::MAX - p + 1, pages(1), Read)
            .unwrap_err()
            .errno(),
        libc::EEXIST
    );

    assert_eq!(space.unmap_with(0, p, at_once()).unwrap(), 0);
    space.write(u64::MAX - p - 1, &[1, 2, 3, 4]).unwrap();
    space.write(u64::MAX, &[5]).unwrap();
    let mut byte = [0];
    space.read(u64::MAX, &mut byte).unwrap();
    assert_eq!(byte, [5]);
    let dirty = space.take_dirty(first, 2 * p).unwrap();
    assert!(dirty.iter().eq([first, first + p]));

    assert_eq!(space.unmap(first + p, p).unwrap(), p);
    assert_eq!(space.unmap(first, 2 * p).unwrap(), p);
    space.map(first, pages(2), ReadWrite).unwrap();
    assert_eq!(space.unmap_all().unwrap(), 2 * p);
    assert_eq!(space.mappings(), 0);
}

/// The first page's offset was left out when the written pages were counted: a write of two bytes over
/// the end of a page dirtied one.
#[test]
fn b02_dirty_pages_of_a_write_across_pages() {
    let p = page_size();
    let space = IoAddressSpace::new();
    space.map(0, pages(4), ReadWrite).unwrap();
    space.start_dirty_tracking().unwrap();
    let offsets = [0, 1, p / 2, p - 2, p - 1, p, p + 1, 2 * p - 1];
    for offset in offsets {
        for len in [1, 2, p - 1, p, p + 1, 2 * p - 1, 2 * p] {
            space.write(offset, &vec![1; len as usize]).unwrap();
            let dirty = space.take_dirty(0, 4 * p).unwrap();
            let expected = (offset / p..=(offset + len - 1) / p).map(|page| page * p);
            assert!(dirty.iter().eq(expected), "{len} bytes at {offset}");
        }
    }
}

/// When there was no memory for the bits of one mapping, those of others were left behind.
#[test]
fn b06_a_start_of_tracking_that_fails_leaves_nothing() {
    let p = page_size();
    let space = IoAddressSpace::builder().dirty_limit(2 * 8).build();
    for at in 0..3 {
        space.map(at * p, pages(1), ReadWrite).unwrap();
    }
    assert!(matches!(
        space.start_dirty_tracking(),
        Err(Error::DirtyLimit { .. })
    ));
    assert_eq!(space.stats().dirty_bytes, 0);
    assert!(matches!(
        space.take_dirty(0, 3 * p),
        Err(Error::NotTracking { .. })
    ));
    space.unmap(2 * p, p).unwrap();
    space.start_dirty_tracking().unwrap();
    space.write(p, &[1]).unwrap();
    assert!(space.take_dirty(0, 2 * p).unwrap().iter().eq([p]));
}

/// A look-up of no bytes at the first address of a mapping missed it, so an unmap could cut it there.
#[test]
fn b07_an_unmap_that_begins_or_ends_with_a_mapping() {
    let p = page_size();
    let space = IoAddressSpace::new();
    space.map(4 * p, pages(2), ReadWrite).unwrap();
    for (iova, size) in [(4, 1), (5, 1), (3, 2), (5, 3)] {
        let error = space.unmap(iova * p, size * p).unwrap_err();
        assert!(matches!(error, Error::Bisect { .. }), "{error}");
    }
    assert_eq!(space.unmap(2 * p, 2 * p).unwrap(), 0);
    assert_eq!(space.unmap(6 * p, 2 * p).unwrap(), 0);
    assert_eq!(space.unmap(4 * p, 2 * p).unwrap(), 2 * p);
}

/// Who used a mapping without memory waited until it had some again, if ever: a user could block a
/// kernel thread for ever.
#[test]
fn b10_without_memory_the_answer_comes_at_once() {
    let p = page_size();
    let space = IoAddressSpace::new();
    space.map(0, pages(2), ReadWrite).unwrap();
    space.start_dirty_tracking().unwrap();
    let pinner = space.pinner("model", Interest::Holder, Arc::new(|_, _| ()));
    let handle = space.handle();
    assert_eq!(space.invalidate_vaddr(0, 2 * p).unwrap(), 2 * p);

    let (inner, pins) = (space.clone(), pinner.clone());
    let errnos = must_end("a refusal", move || {
        let answers = [
            inner.read(0, &mut [0]),
            inner.write(p - 1, &[1, 2]),
            handle.write(p, &[1]),
            inner.mark_dirty(0, 1),
            inner.scatter(0, 1, Read).map(drop),
            pins.pin_pages(0, 1, Read).map(drop),
            pins.pin_list(&[p], Read).map(drop),
        ];
        answers.map(|answer| answer.unwrap_err().errno())
    });
    assert_eq!(errnos, [libc::EBUSY; 7]);

    space.resume_vaddr(0, 2 * p, pages(2)).unwrap();
    space.write(p - 1, &[1, 2]).unwrap();
    drop(pinner.pin_pages(0, 2, Read).unwrap());
    space.invalidate_all_vaddr().unwrap();
    assert_eq!(
        must_end("an unmap", move || space.unmap(0, 2 * p).unwrap()),
        2 * p
    );
}

/// Memory that this process cannot write could be mapped for the device to write (B19), and any number
/// of mappings could be made (CVE-2019-3882).
#[test]
fn b19_memory_that_cannot_be_written_and_mappings_without_end() {
    let p = page_size();
    let region = MmapRegionBuilder::new(p as usize)
        .with_mmap_prot(libc::PROT_READ)
        .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE)
        .build()
        .unwrap();
    let region = GuestRegionMmap::<()>::new(region, GuestAddress(0)).unwrap();
    let read_only = Backing::from_region(&region, 0, p as usize).unwrap();
    let space = IoAddressSpace::builder().entry_limit(2).build();
    let error = space.map(0, read_only.clone(), ReadWrite).unwrap_err();
    assert_eq!(error.errno(), libc::EFAULT);
    space.map(0, read_only, Read).unwrap();
    space.map(p, pages(1), ReadWrite).unwrap();
    assert_eq!(
        space.map(2 * p, pages(1), ReadWrite).unwrap_err().errno(),
        libc::ENOSPC
    );
}

/// Memory was taken away below somebody who still held it.
#[test]
fn b20_an_unmap_of_what_is_held() {
    let p = page_size();
    let space = IoAddressSpace::new();
    space.map(0, pages(1), ReadWrite).unwrap();
    let guard = space.memory();
    let slices = guard.get_slices(GuestAddress(0), 1, Read).unwrap();
    assert_eq!(slices.count(), 1);
    let error = space.unmap_with(0, p, at_once()).unwrap_err();
    assert!(matches!(error, Error::Deadline { unmapped: 0, .. }));
    drop(guard);
    let pinner = space.pinner("model", Interest::Holder, Arc::new(|_, _| ()));
    assert_eq!(space.unmap(0, p).unwrap(), p);

    space.map(0, pages(1), ReadWrite).unwrap();
    let pinned = pinner.pin_pages(0, 1, Read).unwrap();
    let error = space.unmap_with(0, p, at_once()).unwrap_err();
    assert!(matches!(error, Error::Deadline { unmapped: 0, .. }));
    drop(pinned);
    assert_eq!(space.unmap(0, p).unwrap(), p);
}

/// The end of the user's memory was calculated without a look at whether it fits.
#[test]
fn b20_memory_of_the_user_that_ends_behind_the_last_address() {
    let p = page_size();
    let type1 = Type1::new(IoAddressSpace::new(), Anywhere);
    let map = |vaddr, size| {
        type1.map_dma(&vfio_iommu_type1_dma_map {
            argsz: 32,
            flags: 3,
            vaddr,
            iova: 0,
            size,
        })
    };
    for (vaddr, size) in [(p.wrapping_neg(), 2 * p), (2 * p, p.wrapping_neg())] {
        let error = map(vaddr, size).unwrap_err();
        assert_eq!(error.errno(), libc::EOVERFLOW, "{error}");
        assert_eq!(type1.space().mappings(), 0);
    }
    map(p.wrapping_neg(), p).unwrap();
}

/// The size of pages that the user said was divided by, and shifted by, before it was looked at.
#[test]
fn b21_a_bitmap_of_pages_of_no_size_or_a_huge_one() {
    let p = page_size();
    let space = IoAddressSpace::new();
    space.map(0, pages(2), ReadWrite).unwrap();
    space.start_dirty_tracking().unwrap();
    space.write(p, &[1]).unwrap();
    let type1 = Type1::new(space.clone(), Anywhere);
    for page_size in [0, 1, p - 1, p / 2, p + 1, 3 * p, 1 << 63, u64::MAX] {
        let mut words = [0; 2];
        let bitmap = DirtyBitmap::new(0, 2 * p, page_size, &mut words);
        let taken = bitmap.and_then(|mut bitmap| space.take_dirty_bitmap(&mut bitmap));
        assert_eq!(taken.unwrap_err().errno(), libc::EINVAL, "{page_size:#x}");

        let bitmap = Bitmap {
            pgsize: page_size,
            size: 8,
            data: &mut words,
        };
        // Sizes of `struct vfio_iommu_type1_dirty_bitmap` and what is behind it.
        let got = type1.dirty_pages(8 + 40, 4, Some((0, 2 * p, bitmap)));
        assert_eq!(got.unwrap_err().errno(), libc::EINVAL, "{page_size:#x}");
        assert_eq!(words, [0; 2]);
    }
    let mut words = [0; 2];
    let mut bitmap = DirtyBitmap::new(0, 2 * p, p, &mut words).unwrap();
    space.take_dirty_bitmap(&mut bitmap).unwrap();
    assert_eq!(words, [0b10, 0]);
}

/// Rounding up the beginning of the last gap went over the end, and came out at address 0.
#[test]
fn b22_no_address_is_found_behind_the_last() {
    let p = page_size();
    // Its memory begins at a multiple of four pages, and so would its addresses.
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 8 * p as usize)]).unwrap();
    let three_at =
        |offset| Backing::from_guest_memory(&memory, GuestAddress(offset), 3 * p as usize).unwrap();
    let start = three_at(0).host_address().addr() as u64;
    let three = || three_at(start.next_multiple_of(4 * p) - start);
    let last = |n: u64| (n * p).wrapping_neg();
    let within = |n| {
        let ranges = IovaRanges::new(&[last(n)..=u64::MAX], &[]).unwrap();
        IoAddressSpace::builder().iova_ranges(ranges).build()
    };
    let space = within(3);
    let error = space.map_anywhere(three(), ReadWrite).unwrap_err();
    assert!(matches!(error, Error::NoRoom { .. }), "{error}");
    assert_eq!((error.errno(), space.mappings()), (libc::ENOSPC, 0));
    assert_eq!(within(4).map_anywhere(three(), ReadWrite).unwrap(), last(4));
}

/// For a while an unmap of nothing was an error where type1 has none.
#[test]
fn b23_an_unmap_of_nothing() {
    let p = page_size();
    for (profile, expected) in [
        (Profile::Type1v1, Ok(0)),
        (Profile::Type1v2, Ok(0)),
        (Profile::Iotlb, Ok(0)),
        (Profile::Iommufd, Err(libc::ENOENT)),
    ] {
        let space = IoAddressSpace::builder().profile(profile).build();
        let unmap = |iova, size| space.unmap(iova, size).map_err(|error| error.errno());
        assert_eq!(unmap(0, p), expected, "{profile:?}");
        space.map(4 * p, pages(1), ReadWrite).unwrap();
        assert_eq!(unmap(0, 4 * p), expected, "{profile:?}");
        assert_eq!(unmap(4 * p, p), Ok(p), "{profile:?}");
        assert_eq!(unmap(4 * p, p), expected, "{profile:?}");
        assert_eq!(space.unmap_all().unwrap(), 0, "{profile:?}");
    }
    // That stands for everything.
    let iommufd = IoAddressSpace::builder().profile(Profile::Iommufd).build();
    assert_eq!(iommufd.unmap(0, u64::MAX).unwrap(), 0);
}

/// An access beyond 2^64 went on at address 0.
#[test]
fn b24_an_access_does_not_wrap() {
    let p = page_size();
    let space = IoAddressSpace::new();
    space.map(0, pages(1), ReadWrite).unwrap();
    space.map(u64::MAX - p + 1, pages(1), ReadWrite).unwrap();
    let error = space.write(u64::MAX, &[1, 2]).unwrap_err();
    assert_eq!((error.errno(), error.completed()), (libc::EOVERFLOW, 0));
    let mut bytes = [0];
    space.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [0]);
    space.read(u64::MAX, &mut bytes).unwrap();
    assert_eq!(bytes, [0]);
}

/// What a write had written before it failed was not marked.
#[test]
fn b24_a_partial_write_is_marked() {
    let p = page_size();
    let space = IoAddressSpace::new();
    space.map(0, pages(1), ReadWrite).unwrap();
    space.map(p, pages(1), Read).unwrap();
    space.start_dirty_tracking().unwrap();
    let error = space.write(p - 3, &[1; 8]).unwrap_err();
    assert_eq!((error.errno(), error.completed()), (libc::EPERM, 3));
    assert!(space.take_dirty(0, p).unwrap().iter().eq([0]));
    assert!(space.take_dirty(p, p).unwrap().is_empty());
}

/// What is mapped for writes only could be used by nobody. Here that is a matter of policy.
#[test]
fn b24_a_mapping_for_writes_only() {
    let p = page_size();
    for (policy, write) in [
        (PermissionPolicy::Strict, Ok(())),
        (PermissionPolicy::WriteNeedsRead, Err(libc::EPERM)),
    ] {
        let space = IoAddressSpace::builder().permission_policy(policy).build();
        space.map(0, pages(1), Write).unwrap();
        let errno = |result: Result<()>| result.map_err(|error| error.errno());
        assert_eq!(errno(space.write(p - 1, &[1])), write, "{policy:?}");
        assert_eq!(errno(space.handle().write(0, &[1])), write, "{policy:?}");
        let read = errno(space.read(0, &mut [0]));
        assert_eq!(read, Err(libc::EPERM), "{policy:?}");
    }
}

/// A map that raced with the notice of an unmap made the rest of it fail, and that was reported as
/// success.
#[test]
fn b24_a_map_during_an_unmap() {
    let p = page_size();
    let space = IoAddressSpace::new();
    space.map(0, pages(1), ReadWrite).unwrap();
    space.map(p, pages(1), ReadWrite).unwrap();
    let racing = Arc::new(Mutex::new(Vec::new()));
    let (inner, seen) = (space.clone(), racing.clone());
    let _pinner = space.pinner(
        "racing",
        Interest::All,
        Arc::new(move |iova, _| {
            let map = inner.map(iova, pages(2), ReadWrite);
            seen.lock().unwrap().push(map.unwrap_err().errno());
        }),
    );
    assert_eq!(space.unmap(0, 2 * p).unwrap(), 2 * p);
    assert_eq!(*racing.lock().unwrap(), [libc::EBUSY; 2]);
    assert_eq!(space.mappings(), 0);
}

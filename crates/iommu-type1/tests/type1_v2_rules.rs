// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The rules of type1 v2, case by case, as the kernel answered them.

use std::fs::File;

use iommu_type1::{page_size, Backing, Error, IoAddressSpace, Profile, Transfer, DMA_ENTRY_LIMIT};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, Permissions};

use Permissions::{Read, ReadWrite, Write};

fn pages(n: u64) -> Backing {
    Backing::anonymous((n * page_size()) as usize).unwrap()
}

fn errno<T: std::fmt::Debug>(result: Result<T, Error>) -> i32 {
    result.unwrap_err().errno()
}

/// A space with one mapping of 4 pages at page 16.
fn four_pages() -> IoAddressSpace {
    let space = IoAddressSpace::new();
    space.map(16 * page_size(), pages(4), ReadWrite).unwrap();
    space
}

#[test]
fn overlapping_maps_are_refused() {
    let p = page_size();
    let space = four_pages();
    for (iova, n) in [(16, 4), (16, 1), (19, 1), (15, 2), (19, 4), (10, 20)] {
        assert_eq!(
            errno(space.map(iova * p, pages(n), ReadWrite)),
            libc::EEXIST
        );
    }
    space.map(15 * p, pages(1), ReadWrite).unwrap();
    space.map(20 * p, pages(1), ReadWrite).unwrap();
    let message = space
        .map(17 * p, pages(1), ReadWrite)
        .unwrap_err()
        .to_string();
    assert_eq!(
        message,
        format!(
            "{p:#x} bytes at {:#x} overlap the mapping of {:#x} bytes at {:#x}",
            17 * p,
            4 * p,
            16 * p
        )
    );
}

#[test]
fn an_unmap_cuts_no_mapping() {
    let p = page_size();
    let space = four_pages();
    for (iova, n) in [(16, 1), (17, 1), (18, 2), (18, 4), (14, 4), (17, 2)] {
        assert_eq!(
            errno(space.unmap(iova * p, n * p)),
            libc::EINVAL,
            "{iova} {n}"
        );
        assert_eq!(space.mappings(), 1);
    }
    assert_eq!(space.unmap(0, 16 * p).unwrap(), 0);
    assert_eq!(space.unmap(20 * p, 4 * p).unwrap(), 0);
    assert_eq!(space.unmap(10 * p, 20 * p).unwrap(), 4 * p);
    assert_eq!(space.unmap(16 * p, 4 * p).unwrap(), 0);
}

#[test]
fn unmap_1st_whole_and_half_of_2nd_removes_nothing() {
    let p = page_size();
    let space = four_pages();
    space.map(20 * p, pages(4), ReadWrite).unwrap();
    assert_eq!(errno(space.unmap(16 * p, 6 * p)), libc::EINVAL);
    assert_eq!(space.mappings(), 2);
    assert_eq!(space.unmap(16 * p, 8 * p).unwrap(), 8 * p);
}

#[test]
fn ranges_are_checked_before_anything_else() {
    let p = page_size();
    let space = four_pages();
    assert_eq!(errno(space.map(1, pages(1), ReadWrite)), libc::EINVAL);
    assert_eq!(errno(space.map(p / 2, pages(1), ReadWrite)), libc::EINVAL);
    assert_eq!(
        errno(space.map(0, Backing::anonymous(p as usize + 1).unwrap(), ReadWrite)),
        libc::EINVAL
    );
    assert_eq!(errno(space.map(0, pages(1), Permissions::No)), libc::EINVAL);
    assert_eq!(
        errno(space.map(u64::MAX - p + 1, pages(2), ReadWrite)),
        libc::EOVERFLOW
    );
    assert_eq!(errno(space.unmap(0, 0)), libc::EINVAL);
    assert_eq!(errno(space.unmap(1, p)), libc::EINVAL);
    assert_eq!(errno(space.unmap(0, p + 1)), libc::EINVAL);
    assert_eq!(errno(space.unmap(0, u64::MAX)), libc::EINVAL);
    assert_eq!(errno(space.unmap(u64::MAX - p + 1, 2 * p)), libc::EOVERFLOW);
    assert_eq!(space.unmap(0, u64::MAX - p + 1).unwrap(), 4 * p);
}

#[test]
fn a_host_address_is_aligned() {
    let p = page_size() as usize;
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 4 * p)]).unwrap();
    let backing = Backing::from_guest_memory(&memory, GuestAddress(8), p).unwrap();
    let error = IoAddressSpace::new()
        .map(0, backing, ReadWrite)
        .unwrap_err();
    assert_eq!(error.errno(), libc::EINVAL);
    assert!(error.to_string().starts_with("host address"), "{error}");
}

#[test]
fn a_write_needs_the_read_permission_too() {
    let p = page_size();
    let space = IoAddressSpace::new();
    space.map(0, pages(1), Read).unwrap();
    space.map(p, pages(1), Write).unwrap();
    let mut byte = [0];
    assert_eq!(errno(space.write(0, &[1])), libc::EPERM);
    assert_eq!(errno(space.read(p, &mut byte)), libc::EPERM);
    assert_eq!(errno(space.write(p, &[1])), libc::EPERM);
    space.read(0, &mut byte).unwrap();
}

#[test]
fn an_access_that_fails_says_how_far_it_came() {
    let p = page_size();
    let space = IoAddressSpace::new();
    space.map(0, pages(2), ReadWrite).unwrap();
    space.map(2 * p, pages(1), Read).unwrap();
    let data = vec![7; 4 * p as usize];

    let error = space.write(p / 2, &data).unwrap_err();
    assert_eq!(
        (error.errno(), error.completed()),
        (libc::EPERM, (2 * p - p / 2) as usize)
    );
    let mut back = vec![0; (2 * p - p / 2) as usize];
    space.read(p / 2, &mut back).unwrap();
    assert!(
        back.iter().all(|byte| *byte == 7),
        "what came before the error stays written"
    );

    let mut whole = vec![0; 4 * p as usize];
    let error = space.read(0, &mut whole).unwrap_err();
    assert_eq!(
        (error.errno(), error.completed()),
        (libc::EINVAL, 3 * p as usize)
    );
    assert_eq!(
        error.to_string(),
        format!("{:#x} is not mapped ({} bytes were done)", 3 * p, 3 * p)
    );
}

#[test]
fn an_empty_access_succeeds_and_an_empty_dma_rw_does_not() {
    let space = IoAddressSpace::new();
    space.read(0xdead_beef, &mut []).unwrap();
    space.write(u64::MAX, &[]).unwrap();
    assert_eq!(
        errno(space.dma_rw(0, Transfer::Read(&mut []))),
        libc::EINVAL
    );
    assert_eq!(errno(space.dma_rw(0, Transfer::Write(&[]))), libc::EINVAL);
}

#[test]
fn the_entry_limit_counts_mappings_and_comes_after_the_overlap() {
    let p = page_size();
    let space = IoAddressSpace::builder().entry_limit(4).build();
    for i in 0..4 {
        space.map(i * p, pages(1), ReadWrite).unwrap();
    }
    assert_eq!(errno(space.map(4 * p, pages(1), ReadWrite)), libc::ENOSPC);
    assert_eq!(errno(space.map(0, pages(1), ReadWrite)), libc::EEXIST);
    space.unmap(0, p).unwrap();
    space.map(4 * p, pages(1), ReadWrite).unwrap();
    assert_eq!(IoAddressSpace::new().entry_limit(), DMA_ENTRY_LIMIT);
}

#[test]
fn the_table_is_bounded_against_mappings_far_apart() {
    let p = page_size();
    let space = IoAddressSpace::builder().table_limit(64 * 1024).build();
    // Two neighbours in a place of their own take a node.
    let far_apart = (0..1000).find_map(|i| {
        let at = (i + 1) << 40;
        let two = space
            .map(at, pages(1), Read)
            .and(space.map(at + p, pages(1), Read));
        two.err()
    });
    assert_eq!(far_apart.unwrap().errno(), libc::ENOSPC);
    space.unmap_all().unwrap();
    space.map(0, pages(1), Read).unwrap();
    space.map(p, pages(1), Read).unwrap();
}

#[test]
fn a_mapping_allows_no_more_than_its_memory() {
    let p = page_size() as usize;
    let region = |prot| {
        let mmap = MmapRegionBuilder::new_with_bitmap(p, ())
            .with_mmap_prot(prot)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
            .build()
            .unwrap();
        let region = GuestRegionMmap::new(mmap, GuestAddress(0)).unwrap();
        Backing::from_region(&region, 0, p).unwrap()
    };
    let space = IoAddressSpace::new();
    assert_eq!(
        errno(space.map(0, region(libc::PROT_READ), ReadWrite)),
        libc::EFAULT
    );
    assert_eq!(
        errno(space.map(0, region(libc::PROT_NONE), Read)),
        libc::EFAULT
    );
    space.map(0, region(libc::PROT_READ), Read).unwrap();
    assert_eq!(errno(space.write(0, &[1])), libc::EPERM);

    // What is in the way comes first, as the kernel looks at the memory last.
    let again = || (0, region(libc::PROT_READ), ReadWrite);
    let (iova, backing, prot) = again();
    assert_eq!(errno(space.map(iova, backing, prot)), libc::EEXIST);
    assert_eq!(errno(space.map_batch([again()])), libc::EEXIST);
}

fn memfd(len: u64) -> File {
    use std::os::fd::FromRawFd;
    // SAFETY: the name is a C string, and the flags are none.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), 0) };
    assert!(fd >= 0);
    // SAFETY: the call above has just made this descriptor, nobody else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len).unwrap();
    file
}

#[test]
fn file_memory_is_shared_and_ends_where_the_file_ends() {
    use std::os::unix::fs::FileExt;
    let p = page_size();
    let file = memfd(4 * p);
    let part = |start, n, access| {
        let file = FileOffset::new(file.try_clone().unwrap(), start);
        Backing::file(file, (n * p) as usize, access)
    };
    let space = IoAddressSpace::new();
    space
        .map(0, part(2 * p, 2, ReadWrite).unwrap(), ReadWrite)
        .unwrap();
    space.write(p + 5, b"shared").unwrap();
    let mut found = [0; 6];
    file.read_exact_at(&mut found, 3 * p + 5).unwrap();
    assert_eq!(&found, b"shared");

    assert_eq!(errno(part(3 * p, 2, ReadWrite)), libc::EFAULT);
    assert_eq!(errno(part(5, 1, ReadWrite)), libc::EINVAL);
    let read_only = part(0, 1, Read).unwrap();
    assert_eq!(
        errno(space.map(64 * p, read_only.clone(), ReadWrite)),
        libc::EFAULT
    );
    let iommufd = IoAddressSpace::builder().profile(Profile::Iommufd).build();
    let refused = iommufd.map(64 * p, read_only.clone(), ReadWrite);
    assert!(matches!(refused, Err(Error::FileProtection { .. })));
    assert_eq!(errno(refused), libc::EPERM);
    iommufd.map(64 * p, read_only.clone(), Read).unwrap();
    // That something is there comes first.
    assert_eq!(
        errno(iommufd.map(64 * p, read_only, ReadWrite)),
        libc::EEXIST
    );
}

#[test]
fn guest_memory_is_found_by_its_address() {
    let p = page_size();
    let memory = GuestMemoryMmap::<()>::from_ranges(&[
        (GuestAddress(0), 4 * p as usize),
        (GuestAddress(1 << 32), 4 * p as usize),
    ])
    .unwrap();
    let at = |gpa, n: u64| Backing::from_guest_memory(&memory, GuestAddress(gpa), (n * p) as usize);
    assert_eq!(errno(at(8 * p, 1)), libc::EFAULT);
    assert_eq!(errno(at(2 * p, 3)), libc::EFAULT);
    assert_eq!(
        errno(Backing::from_guest_memory(
            &memory,
            GuestAddress(p),
            usize::MAX
        )),
        libc::EFAULT
    );

    let space = IoAddressSpace::new();
    space
        .map(0, at((1 << 32) + p, 2).unwrap(), ReadWrite)
        .unwrap();
    space.write(0, b"high").unwrap();
    let mut found = [0; 4];
    vm_memory::Bytes::read_slice(&memory, &mut found, GuestAddress((1 << 32) + p)).unwrap();
    assert_eq!(&found, b"high");
}

#[test]
fn memory_outlives_the_vmm_that_brought_it() {
    let p = page_size() as usize;
    let space = IoAddressSpace::new();
    {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), p)]).unwrap();
        let backing = Backing::from_guest_memory(&memory, GuestAddress(0), p).unwrap();
        space.map(0, backing, ReadWrite).unwrap();
    }
    space.write(0, &[1]).unwrap();
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Parts of memory: which there are, and that they are the same memory.

use iommu_type1::{page_size, Backing, Error, IoAddressSpace};
use proptest::prelude::*;
use vm_memory::Permissions::ReadWrite;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

#[test]
fn a_part_lies_inside_of_what_it_is_a_part_of() {
    let p = page_size() as usize;
    let whole = Backing::anonymous(4 * p).unwrap();
    let middle = whole.slice(p, 2 * p).unwrap();
    for (of, offset, len) in [
        (&whole, 0, 4 * p + 1),
        (&whole, 4 * p, 1),
        (&whole, 5 * p, 0),
        // Not the end of the region, but of the part.
        (&middle, p, p + 1),
        (&middle, 1, usize::MAX),
    ] {
        let error = of.slice(offset, len).unwrap_err();
        assert_eq!(error.errno(), libc::EFAULT);
        let Error::BackingRange {
            offset: at,
            len: long,
            size,
        } = error
        else {
            panic!("{error}");
        };
        let due = [offset, len, of.len()].map(|number| number as u64);
        assert_eq!([at, long, size], due);
    }
    assert_eq!(whole.slice(4 * p, 0).unwrap().len(), 0);
}

#[test]
fn a_part_of_a_part_is_the_memory_of_the_whole() {
    let p = page_size();
    let whole = Backing::anonymous(4 * p as usize).unwrap();
    let middle = whole.slice(p as usize, 2 * p as usize).unwrap();
    let last = middle.slice(p as usize, p as usize).unwrap();
    let space = IoAddressSpace::new();
    space.map(0, whole, ReadWrite).unwrap();
    space.map(16 * p, last, ReadWrite).unwrap();
    space.write(16 * p, b"third page").unwrap();
    let mut seen = [0; 10];
    space.read(2 * p, &mut seen).unwrap();
    assert_eq!(&seen, b"third page");
}

proptest! {
    /// Pages in regions of two, two and one, with a hole of two in front of the last.
    #[test]
    fn guest_memory_is_mapped_whole_whatever_regions_it_lies_in(first in 0..8_u64, pages in 0..9_u64) {
        const IOVA: u64 = 0x4000_0000;
        let p = page_size();
        let regions = [(0, 2), (2, 2), (6, 1)]
            .map(|(page, pages)| (GuestAddress(page * p), (pages * p) as usize));
        let memory = GuestMemoryMmap::<()>::from_ranges(&regions).unwrap();
        for page in [0, 1, 2, 3, 6] {
            memory.write_obj(page as u8, GuestAddress(page * p)).unwrap();
        }
        let space = IoAddressSpace::new();
        let gpa = GuestAddress(first * p);
        let mapped = space.map_guest_memory(IOVA, &memory, gpa, pages * p, ReadWrite);
        let missing = (first..first + pages).find(|page| ![0, 1, 2, 3, 6].contains(page));
        match (pages, missing) {
            (0, _) => prop_assert!(matches!(mapped, Err(Error::Empty { .. })), "{:?}", mapped),
            (_, Some(page)) => {
                prop_assert!(matches!(mapped, Err(Error::NoRegion(at)) if at == page * p), "{:?}", mapped);
                prop_assert_eq!(space.mappings(), 0);
            }
            (_, None) => {
                mapped.unwrap();
                let (snapshot, _) = space.snapshot().unwrap();
                let bytes = snapshot.mappings.iter().map(|mapping| mapping.size).sum::<u64>();
                prop_assert_eq!(bytes, pages * p);
                prop_assert_eq!(snapshot.mappings.len() as u64, (first + pages - 1) / 2 - first / 2 + 1);
                for page in 0..pages {
                    let mut byte = [0xff];
                    space.read(IOVA + page * p, &mut byte).unwrap();
                    prop_assert_eq!(u64::from(byte[0]), first + page);
                }
            }
        }
    }
}

#[test]
fn guest_memory_is_mapped_to_the_end_of_the_space_and_not_beyond() {
    let p = page_size();
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), p as usize)]).unwrap();
    let space = IoAddressSpace::new();
    let map =
        |iova, gpa, size| space.map_guest_memory(iova, &memory, GuestAddress(gpa), size, ReadWrite);
    let last = u64::MAX - (p - 1);
    for (iova, gpa, size) in [(last, 0, 2 * p), (0, last, 2 * p), (p, p, u64::MAX)] {
        let error = map(iova, gpa, size).unwrap_err();
        assert!(matches!(error, Error::Overflow { .. }), "{error}");
    }
    map(last, 0, p).unwrap();
}

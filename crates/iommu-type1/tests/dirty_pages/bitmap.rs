// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bitmaps in the shape of the kernel's, bit by bit.

use std::collections::BTreeSet;

use iommu_type1::{page_size, Backing, DirtyBitmap, IoAddressSpace, Transfer};
use proptest::prelude::*;
use vm_memory::Permissions::ReadWrite;

use super::taken;

const FIRST: u64 = 1000;

/// A space with mappings at pages behind `FIRST`, tracked.
fn space(mappings: &[(u64, u64)]) -> IoAddressSpace {
    let space = IoAddressSpace::new();
    for (page, count) in mappings {
        let backing = Backing::anonymous((count * page_size()) as usize).unwrap();
        let iova = (FIRST + page) * page_size();
        space.map(iova, backing, ReadWrite).unwrap();
    }
    space.start_dirty_tracking().unwrap();
    space
}

fn write(space: &IoAddressSpace, page: u64) {
    space.write((FIRST + page) * page_size(), &[1]).unwrap();
}

/// The bitmap of `pages` pages from `first`, in words that were all of `before`.
fn bitmap(space: &IoAddressSpace, first: u64, pages: u64, before: u64) -> Vec<u64> {
    let p = page_size();
    let mut words = vec![before; pages.div_ceil(64) as usize];
    let (iova, size) = ((FIRST + first) * p, pages * p);
    let mut bitmap = DirtyBitmap::new(iova, size, p, &mut words).unwrap();
    assert_eq!(
        (bitmap.iova(), bitmap.size(), bitmap.page_size()),
        (iova, size, p)
    );
    space.take_dirty_bitmap(&mut bitmap).unwrap();
    words
}

/// Any first byte and length that reaches over pages.
#[test]
fn b02_bits_are_those_of_the_bytes_whatever_the_offset() {
    let p = page_size();
    let space = space(&[(0, 2), (2, 3)]);
    let handle = space.handle();
    let bytes = vec![1; 2 * p as usize + 2];
    for offset in [0, 1, 2, p / 2, p - 2, p - 1, p, p + 1, 2 * p - 1] {
        for len in [1, 2, 3, p - 1, p, p + 1, 2 * p - 1, 2 * p, 2 * p + 2] {
            let iova = FIRST * p + offset;
            let (first, last) = (offset / p, (offset + len - 1) / p);
            let expected: u64 = (first..=last).map(|page| 1 << page).sum();
            let bytes = &bytes[..len as usize];
            handle.dma_rw(iova, Transfer::Write(bytes)).unwrap();
            assert_eq!(bitmap(&space, 0, 5, 0), [expected], "{offset} {len}");
            space.write(iova, bytes).unwrap();
            assert_eq!(bitmap(&space, 0, 5, 0), [expected], "{offset} {len}");
            space.mark_dirty(iova, len as usize).unwrap();
            assert_eq!(bitmap(&space, 0, 5, 0), [expected], "{offset} {len}");
        }
    }
}

#[test]
fn b24_what_was_written_before_an_error_is_dirty() {
    let p = page_size();
    let space = space(&[(0, 2), (4, 1)]);
    let bytes = vec![1; 3 * p as usize];
    let error = space.write(FIRST * p + 8, &bytes).unwrap_err();
    assert_eq!(error.completed() as u64, 2 * p - 8);
    assert_eq!(bitmap(&space, 0, 5, 0), [0b11]);
    let error = space.mark_dirty(FIRST * p + 8, bytes.len()).unwrap_err();
    assert_eq!(error.completed() as u64, 2 * p - 8);
    assert_eq!(bitmap(&space, 0, 5, 0), [0b11]);
}

#[test]
fn words_are_shared_as_in_the_kernel() {
    let space = space(&[(3, 2), (70, 10), (80, 100), (300, 1)]);
    for page in [4, 75, 79, 80, 179, 300] {
        write(&space, page);
    }
    // A mapping clears its words, but for what is below it in the first; words of nobody stay.
    let expected = [
        0b111 | 1 << 4,
        0b11_1111 | 1 << 11 | 1 << 15 | 1 << 16,
        1 << (179 - 128),
        u64::MAX,
        (1 << 45) - 1,
    ];
    assert_eq!(bitmap(&space, 0, 301, u64::MAX), expected);
    assert_eq!(bitmap(&space, 0, 301, 0), [0; 5]);
    // Bit 0 is the address asked for.
    write(&space, 80);
    assert_eq!(bitmap(&space, 80, 100, u64::MAX), [1, 0]);
}

#[test]
fn a_bitmap_has_to_fit() {
    let p = page_size();
    let space = space(&[(0, 65)]);
    let at = FIRST * p;
    let mut words = [0; 2];
    let refused = |iova, size, page_size, words: &mut [u64]| {
        let bitmap = DirtyBitmap::new(iova, size, page_size, words);
        bitmap.map(|_| ()).unwrap_err().errno()
    };
    assert_eq!(refused(at, 0, p, &mut words), libc::EINVAL);
    assert_eq!(refused(at, p, 0, &mut words), libc::EINVAL);
    assert_eq!(refused(at, p, p + 1, &mut words), libc::EINVAL);
    assert_eq!(refused(at, p, p / 2, &mut words), libc::EINVAL);
    assert_eq!(refused(at, p, p, &mut []), libc::EINVAL);
    assert_eq!(refused(at, 65 * p, p, &mut [0]), libc::EINVAL);
    assert_eq!(refused(u64::MAX, 2, p, &mut words), libc::EOVERFLOW);

    write(&space, 64);
    let mut larger = DirtyBitmap::new(at, 65 * p, 2 * p, &mut words).unwrap();
    let error = space.take_dirty_bitmap(&mut larger).unwrap_err();
    let expected = format!("a bitmap of pages of {:#x} bytes, not {p:#x}", 2 * p);
    assert_eq!((error.errno(), error.to_string()), (libc::EINVAL, expected));
    // Nothing was taken.
    assert_eq!(bitmap(&space, 0, 65, 0), [0, 1]);
}

/// A bit stands for the smallest size of pages, which need not be the host's.
#[test]
fn large_pages_have_a_bit_each() {
    let p = page_size();
    let large = 4 * p;
    let space = IoAddressSpace::builder().page_sizes(large).build();
    assert_eq!(space.info().page_sizes, large);
    let memory = Backing::anonymous(large as usize).unwrap();
    let error = space.map(p, memory, ReadWrite).unwrap_err();
    assert_eq!(error.errno(), libc::EINVAL);
    let mut kept = Vec::new();
    let backing = loop {
        let memory = Backing::anonymous(3 * large as usize).unwrap();
        if memory.host_address().addr() as u64 % large == 0 {
            break memory;
        }
        // The next one lies elsewhere.
        kept.push((memory, Backing::anonymous(p as usize).unwrap()));
    };
    space.map(large, backing, ReadWrite).unwrap();
    assert_eq!(space.unmap(large + p, p).unwrap_err().errno(), libc::EINVAL);
    space.start_dirty_tracking().unwrap();
    space
        .write(large + 3 * p, &vec![1; 2 * p as usize])
        .unwrap();
    let mut words = [0];
    let mut bitmap = DirtyBitmap::new(0, 4 * large, large, &mut words).unwrap();
    space.take_dirty_bitmap(&mut bitmap).unwrap();
    assert_eq!(words, [0b110]);
}

#[test]
fn a_mapping_can_have_too_many_pages_for_a_bitmap() {
    let p = page_size();
    let space = IoAddressSpace::new();
    // Memory that nobody touches; where not even that is to be had there is nothing to test.
    let Ok(backing) = Backing::anonymous((1_usize << 31) * p as usize) else {
        return;
    };
    space.map(0, backing.clone(), ReadWrite).unwrap();
    let error = space.start_dirty_tracking().unwrap_err();
    assert_eq!(error.errno(), libc::EINVAL);
    assert!(error.to_string().contains("0x80000000 pages"), "{error}");
    space.unmap_all().unwrap();
    space.start_dirty_tracking().unwrap();
    let error = space.map(0, backing, ReadWrite).unwrap_err();
    assert_eq!(error.errno(), libc::EINVAL);
    assert_eq!(space.mappings(), 0);
}

proptest! {
    /// Against sets of pages: what is taken as a bitmap is what would have been taken as pages.
    #[test]
    fn bits_are_pages(
        sizes in prop::collection::vec((0..70_u64, 1..70_u64), 1..6),
        writes in prop::collection::vec((any::<prop::sample::Index>(), any::<u64>(), 1..300_u64), 0..8),
        before in any::<u64>(),
    ) {
        let p = page_size();
        let mut mappings = Vec::new();
        let mut end = 0;
        for (gap, count) in &sizes {
            mappings.push((end + gap, *count));
            end += gap + count;
        }
        let space = space(&mappings);
        let mut dirty = BTreeSet::new();
        for (mapping, offset, bytes) in &writes {
            let (page, count) = mappings[mapping.index(mappings.len())];
            let offset = offset % (count * p);
            let len = (*bytes).min(count * p - offset);
            space.write((FIRST + page) * p + offset, &vec![1; len as usize]).unwrap();
            dirty.extend(page + offset / p..=page + (offset + len - 1) / p);
        }
        let words = bitmap(&space, 0, end, before);
        for page in 0..end {
            let bit = words[(page / 64) as usize] >> (page % 64) & 1 == 1;
            if mappings.iter().any(|(first, count)| (*first..first + count).contains(&page)) {
                prop_assert_eq!(bit, dirty.contains(&page), "page {}", page);
            }
        }
        for (index, word) in words.iter().enumerate() {
            let pages = index as u64 * 64..index as u64 * 64 + 64;
            let touched = mappings.iter().any(|(first, count)| *first < pages.end && first + count > pages.start);
            prop_assert!(touched || *word == before);
        }
        prop_assert!(taken(&space, FIRST, end).is_empty());
    }
}

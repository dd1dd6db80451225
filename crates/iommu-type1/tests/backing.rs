// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Parts of memory: which there are, and that they are the same memory.

use iommu_type1::{page_size, Backing, Error, IoAddressSpace};
use vm_memory::Permissions::ReadWrite;

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

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! map, unmap, read and write against a naive model that knows every byte by itself.

use std::collections::BTreeMap;

use iommu_type1::{page_size, Backing, IoAddressSpace};
use proptest::prelude::*;
use vm_memory::Permissions;

/// Pages of the window; half of them lie at the very top of the 64-bit space.
const PAGES: u64 = 12;
const LIMIT: usize = 5;

/// Address of an offset in the window: its second half ends at 2^64.
fn iova(offset: u64) -> u64 {
    let half = PAGES / 2 * page_size();
    if offset < half {
        0x7000_0000 + offset
    } else {
        // Wraps on purpose for offsets behind the window: such ranges must be refused.
        (offset - half).wrapping_sub(half)
    }
}

#[derive(Clone, Debug)]
enum Op {
    Map {
        offset: u64,
        size: u64,
        prot: Permissions,
    },
    Unmap {
        offset: u64,
        size: u64,
    },
    UnmapAll,
    Read {
        offset: u64,
        len: usize,
    },
    Write {
        offset: u64,
        len: usize,
        seed: u8,
    },
}

fn prot() -> impl Strategy<Value = Permissions> {
    prop_oneof![
        6 => Just(Permissions::ReadWrite),
        2 => Just(Permissions::Read),
        1 => Just(Permissions::Write),
        1 => Just(Permissions::No),
    ]
}

/// Multiples of the page size, now and then not.
fn bytes(pages: std::ops::Range<u64>) -> impl Strategy<Value = u64> {
    (pages, prop_oneof![12 => Just(0), 1 => 1..page_size()])
        .prop_map(|(pages, odd)| pages * page_size() + odd)
}

fn op() -> impl Strategy<Value = Op> {
    let span = (PAGES * page_size()) as usize;
    prop_oneof![
        6 => (bytes(0..PAGES), bytes(0..4), prot()).prop_map(|(offset, size, prot)| Op::Map { offset, size, prot }),
        3 => (bytes(0..PAGES), bytes(0..6)).prop_map(|(offset, size)| Op::Unmap { offset, size }),
        1 => Just(Op::UnmapAll),
        5 => (0..span as u64, 0..span / 2).prop_map(|(offset, len)| Op::Read { offset, len }),
        5 => (0..span as u64, 0..span / 2, any::<u8>()).prop_map(|(offset, len, seed)| Op::Write { offset, len, seed }),
    ]
}

#[derive(Clone)]
struct Byte {
    value: u8,
    prot: Permissions,
    mapping: u64,
}

/// Every mapped byte, and nothing else.
#[derive(Default)]
struct Model {
    bytes: BTreeMap<u64, Byte>,
    mappings: BTreeMap<u64, u64>,
}

impl Model {
    fn map(&mut self, iova: u64, size: u64, prot: Permissions) -> Result<(), i32> {
        if size == 0 {
            return Err(libc::EINVAL);
        }
        let end = iova as u128 + size as u128;
        if end > 1 << 64 {
            return Err(libc::EOVERFLOW);
        }
        if prot == Permissions::No || iova % page_size() != 0 || size % page_size() != 0 {
            return Err(libc::EINVAL);
        }
        let addresses = || (0..size).map(|i| iova + i);
        if addresses().any(|a| self.bytes.contains_key(&a)) {
            return Err(libc::EEXIST);
        }
        if self.mappings.len() == LIMIT {
            return Err(libc::ENOSPC);
        }
        for a in addresses() {
            let byte = Byte {
                value: 0,
                prot,
                mapping: iova,
            };
            self.bytes.insert(a, byte);
        }
        self.mappings.insert(iova, size);
        Ok(())
    }

    fn unmap(&mut self, iova: u64, size: u64) -> Result<u64, i32> {
        if iova % page_size() != 0 || size % page_size() != 0 || size == 0 {
            return Err(libc::EINVAL);
        }
        if iova as u128 + size as u128 > 1 << 64 {
            return Err(libc::EOVERFLOW);
        }
        let last = iova + (size - 1);
        let inside = |at: u64| at >= iova && at <= last;
        let mut gone = Vec::new();
        for (&start, &len) in &self.mappings {
            match (inside(start), inside(start + (len - 1))) {
                (true, true) => gone.push((start, len)),
                (false, false) if start < iova && start + (len - 1) > last => {
                    return Err(libc::EINVAL)
                }
                (false, false) => {}
                _ => return Err(libc::EINVAL),
            }
        }
        for (start, len) in &gone {
            self.mappings.remove(start);
            self.bytes.retain(|_, byte| byte.mapping != *start);
            let _ = len;
        }
        Ok(gone.iter().map(|(_, len)| len).sum())
    }

    /// Byte by byte until one refuses: its errno and how many came before.
    fn access(
        &mut self,
        iova: u64,
        len: usize,
        write: bool,
        mut each: impl FnMut(usize, &mut u8),
    ) -> Result<(), (i32, usize)> {
        if iova as u128 + len as u128 > 1 << 64 {
            return Err((libc::EOVERFLOW, 0));
        }
        for i in 0..len {
            let Some(byte) = self.bytes.get_mut(&(iova + i as u64)) else {
                return Err((libc::EINVAL, i));
            };
            let needed = if write {
                Permissions::ReadWrite
            } else {
                Permissions::Read
            };
            if !byte.prot.allow(needed) {
                return Err((libc::EPERM, i));
            }
            each(i, &mut byte.value);
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn every_byte_and_errno_equals_the_naive_model(ops in prop::collection::vec(op(), 1..50)) {
        let space = IoAddressSpace::builder().entry_limit(LIMIT).build();
        let handle = space.handle();
        let mut model = Model::default();

        for op in ops {
            match op {
                Op::Map { offset, size, prot } => {
                    let at = iova(offset);
                    let expected = model.map(at, size, prot);
                    // No memory can be made of nothing: cut a page to nothing through a region.
                    let backing = match size {
                        0 => nothing(),
                        _ => Backing::anonymous(size as usize).unwrap(),
                    };
                    let result = space.map(at, backing, prot).map_err(|e| e.errno());
                    prop_assert_eq!(result, expected);
                }
                Op::Unmap { offset, size } => {
                    let at = iova(offset);
                    let result = space.unmap(at, size).map_err(|e| e.errno());
                    prop_assert_eq!(result, model.unmap(at, size));
                }
                Op::UnmapAll => {
                    let expected: u64 = model.mappings.values().sum();
                    model = Model::default();
                    prop_assert_eq!(space.unmap_all().unwrap(), expected);
                }
                Op::Read { offset, len } => {
                    let at = iova(offset);
                    let (mut found, mut expected) = (vec![0xee; len], vec![0xee; len]);
                    let result = handle.read(at, &mut found).map_err(|e| (e.errno(), e.completed()));
                    let wanted = model.access(at, len, false, |i, byte| expected[i] = *byte);
                    prop_assert_eq!(result, wanted);
                    prop_assert_eq!(found, expected);
                }
                Op::Write { offset, len, seed } => {
                    let at = iova(offset);
                    let data: Vec<u8> = (0..len).map(|i| seed.wrapping_add(i as u8)).collect();
                    let result = space.write(at, &data).map_err(|e| (e.errno(), e.completed()));
                    let wanted = model.access(at, len, true, |i, byte| *byte = data[i]);
                    prop_assert_eq!(result, wanted);
                }
            }
            prop_assert_eq!(space.mappings(), model.mappings.len());
        }

        // Whatever was not read on the way: every mapped byte at the end.
        for (&start, &len) in &model.mappings {
            let mut found = vec![0; len as usize];
            if space.read(start, &mut found).is_ok() {
                let expected: Vec<u8> = (0..len).map(|i| model.bytes[&(start + i)].value).collect();
                prop_assert_eq!(found, expected);
            }
        }
    }
}

/// A backing of no bytes.
fn nothing() -> Backing {
    use vm_memory::{GuestAddress, GuestMemoryMmap};
    let memory =
        GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), page_size() as usize)]).unwrap();
    Backing::from_guest_memory(&memory, GuestAddress(0), 0).unwrap()
}

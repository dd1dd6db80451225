// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! vm-memory's `Iommu` over an address space whose mappings say which guest memory they stand for.

use std::time::Duration;

use iommu_type1::{page_size, Backing, Error, IoAddressSpace, IommuAdapter, Profile, UnmapOptions};
use proptest::prelude::*;
use vm_memory::iommu::{Error as IommuError, MappedRange};
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Iommu, IommuMemory, Permissions,
};

use Permissions::{Read, ReadWrite, Write};

static_assertions::assert_impl_all!(IommuAdapter: Send, Sync, Clone);

const GUEST_PAGES: u64 = 16;
const IOVA_PAGES: u64 = 12;

fn p(pages: u64) -> u64 {
    pages * page_size()
}

fn guest() -> GuestMemoryMmap<()> {
    let half = p(GUEST_PAGES / 2) as usize;
    // Two regions, next to each other.
    let ranges = [(GuestAddress(0), half), (GuestAddress(half as u64), half)];
    let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
    for page in 0..GUEST_PAGES {
        let bytes = vec![page as u8 + 1; p(1) as usize];
        memory.write_slice(&bytes, GuestAddress(p(page))).unwrap();
    }
    memory
}

fn backing(memory: &GuestMemoryMmap<()>, page: u64, pages: u64) -> Result<Backing, Error> {
    Backing::from_guest_memory(memory, GuestAddress(p(page)), p(pages) as usize)
}

/// What is translated, with neighbours joined.
fn translate(
    adapter: &IommuAdapter,
    iova: u64,
    length: usize,
    access: Permissions,
) -> Result<Vec<(u64, usize)>, IommuError> {
    let found = adapter.translate(GuestAddress(iova), length, access)?;
    Ok(found
        .map(|MappedRange { base, length }| (base.0, length))
        .collect())
}

#[test]
fn a_range_is_translated_across_mappings() {
    let memory = guest();
    let space = IoAddressSpace::builder().profile(Profile::Iommufd).build();
    space
        .map(p(4), backing(&memory, 10, 2).unwrap(), ReadWrite)
        .unwrap();
    space
        .map(p(6), backing(&memory, 3, 1).unwrap(), Read)
        .unwrap();
    let adapter = IommuAdapter::new(&space);
    let found = translate(&adapter, p(6) - 8, 16, Read).unwrap();
    assert_eq!(found, [(p(12) - 8, 8), (p(3), 8)]);

    let translated = IommuMemory::new(memory.clone(), adapter, true, ());
    let mut bytes = [0; 4];
    translated
        .read_slice(&mut bytes, GuestAddress(p(6) - 2))
        .unwrap();
    assert_eq!(bytes, [12, 12, 4, 4]);
    translated.write_slice(b"ab", GuestAddress(p(5))).unwrap();
    assert_eq!(
        memory.read_obj::<[u8; 2]>(GuestAddress(p(11))).unwrap(),
        *b"ab"
    );
    assert!(translated.write_slice(b"ab", GuestAddress(p(6))).is_err());
    assert!(translated.check_range(GuestAddress(p(4)), p(3) as usize, Read));
    assert!(!translated.check_range(GuestAddress(p(4)), p(3) as usize, Write));
    assert!(!translated.check_range(GuestAddress(p(4)), p(3) as usize + 1, Read));
}

#[test]
fn a_mapping_without_a_guest_address_is_an_error_that_names_it() {
    let space = IoAddressSpace::new();
    space
        .map(p(4), Backing::anonymous(p(1) as usize).unwrap(), ReadWrite)
        .unwrap();
    let error = translate(&IommuAdapter::new(&space), p(4) + 8, 8, Read).unwrap_err();
    let named = format!("{:#x}", p(4));
    assert!(
        matches!(&error, IommuError::IommuMisconfigured { reason } if reason.contains(&named)),
        "{error}"
    );
}

#[test]
fn nothing_panics_whatever_is_asked_for() {
    let memory = guest();
    let space = IoAddressSpace::new();
    let top = 0_u64.wrapping_sub(p(1));
    space
        .map(0, backing(&memory, 0, 1).unwrap(), ReadWrite)
        .unwrap();
    space
        .map(top, backing(&memory, 1, 1).unwrap(), ReadWrite)
        .unwrap();
    let adapter = IommuAdapter::new(&space);
    for iova in [0, 1, p(5), top, u64::MAX] {
        for access in [Permissions::No, Read, Write, ReadWrite] {
            assert_eq!(translate(&adapter, iova, 0, access).unwrap(), []);
        }
    }
    for (iova, length) in [
        (top, p(1) as usize),
        (u64::MAX, 1),
        (u64::MAX, usize::MAX),
        (top, p(2) as usize),
    ] {
        let error = translate(&adapter, iova, length, Read).unwrap_err();
        assert!(matches!(error, IommuError::CannotResolve { .. }), "{error}");
    }
    // All but the last byte.
    let found = translate(&adapter, top, p(1) as usize - 1, Read).unwrap();
    assert_eq!(found, [(p(1), p(1) as usize - 1)]);
    let translated = IommuMemory::new(memory, adapter, true, ());
    assert!(!translated.check_range(GuestAddress(u64::MAX), 8, Read));
    assert!(translated
        .read_slice(&mut [0; 8], GuestAddress(u64::MAX - 3))
        .is_err());
    translated.read_slice(&mut [], GuestAddress(p(7))).unwrap();
}

#[test]
fn an_unmap_waits_while_a_translation_is_looked_at() {
    let memory = guest();
    let space = IoAddressSpace::new();
    space
        .map(0, backing(&memory, 0, 1).unwrap(), ReadWrite)
        .unwrap();
    let adapter = IommuAdapter::new(&space);
    let found = adapter.translate(GuestAddress(0), 8, Read).unwrap();
    let at_once = UnmapOptions::new().deadline(Duration::ZERO);
    assert!(space.unmap_with(0, p(1), at_once).is_err());
    drop(found);
    assert_eq!(space.unmap_with(0, p(1), at_once).unwrap(), p(1));
    let error = translate(&adapter, 0, 8, Read).unwrap_err();
    assert!(error.to_string().contains("not mapped"), "{error}");
}

#[test]
fn guest_addresses_go_with_the_memory() {
    let memory = guest();
    let backing = backing(&memory, 2, 4).unwrap();
    assert_eq!(backing.guest_address(), Some(GuestAddress(p(2))));
    // Through cuts, copies and snapshots.
    let space = IoAddressSpace::builder().profile(Profile::Iotlb).build();
    space.map(p(8), backing, ReadWrite).unwrap();
    space.unmap(p(9), p(1)).unwrap();
    let copy = IoAddressSpace::new();
    space.copy_to(p(10), p(2), &copy, 0, Read).unwrap();
    let (snapshot, kept) = space.snapshot().unwrap();
    let restored = IoAddressSpace::builder().restore(&snapshot, |backing| {
        let iommu_type1::Place::Anonymous { region, offset } = backing.place else {
            unreachable!();
        };
        kept.anonymous[region as usize].slice(offset as usize, backing.size as usize)
    });
    let restored = restored.unwrap();
    assert_eq!(restored.snapshot().unwrap().0, snapshot);
    for (space, iova) in [(&space, p(10)), (&copy, 0), (&restored, p(10))] {
        let found = translate(&IommuAdapter::new(space), iova + 8, 8, Read).unwrap();
        assert_eq!(found, [(p(4) + 8, 8)]);
    }
    let nowhere = Backing::anonymous(16).unwrap();
    assert!(nowhere.guest_address().is_none());
    let error = nowhere
        .with_guest_address(GuestAddress(u64::MAX - 8))
        .unwrap_err();
    assert_eq!(error.errno(), libc::EOVERFLOW);
}

proptest! {
    #[test]
    fn bytes_are_those_that_the_space_has(
        maps in prop::collection::vec((0..IOVA_PAGES, 0..GUEST_PAGES, 1..4_u64, prop::sample::select(vec![Read, Write, ReadWrite])), 0..6),
        asked in prop::collection::vec((0..p(IOVA_PAGES + 1), 0..p(4) as usize), 1..20),
    ) {
        let memory = guest();
        let space = IoAddressSpace::builder().profile(Profile::Iommufd).build();
        for (iova, page, pages, prot) in maps {
            if let Ok(backing) = backing(&memory, page, pages) {
                // One that overlaps another is refused.
                let _ = space.map(p(iova), backing, prot);
            }
        }
        let translated = IommuMemory::new(memory, IommuAdapter::new(&space), true, ());
        for (iova, len) in asked {
            let (mut one, mut other) = (vec![0; len], vec![0; len]);
            let direct = space.read(iova, &mut one);
            let through = translated.read_slice(&mut other, GuestAddress(iova));
            prop_assert_eq!(direct.is_ok(), through.is_ok(), "{:?} {:?}", direct, through);
            if direct.is_ok() {
                prop_assert_eq!(one, other);
            }
        }
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Snapshots of anybody: they are restored, and then saved as they were, or refused; never a panic, and never
//! more memory than they have themselves.
#![no_main]

use arbitrary::Arbitrary;
use iommu_type1::{
    Backing, BackingRef, Error, IoAddressSpace, PermissionPolicy, Place, Profile, SavedAccess,
    SavedLimits, SavedMapping, Snapshot,
};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Mapping {
    iova: u64,
    size: u64,
    /// Added to both shifted by it, so that pages are met.
    shift: u8,
    access: (bool, bool),
    backing: Option<(bool, u32, u64, Option<u64>)>,
    guest_address: Option<u64>,
    dirty: Vec<u64>,
}

#[derive(Arbitrary, Debug)]
struct Input {
    /// Mostly as it should be.
    version: Option<u32>,
    page_size: Option<u64>,
    profile: u8,
    strict: bool,
    limits: Option<(u64, u64, u64)>,
    tracks_dirty: bool,
    files: u32,
    anonymous: Vec<u64>,
    mappings: Vec<Mapping>,
}

impl Mapping {
    fn saved(self) -> SavedMapping {
        let shift = u32::from(self.shift % 64);
        let (iova, size) = (self.iova.wrapping_shl(shift), self.size.wrapping_shl(shift));
        let access = SavedAccess {
            read: self.access.0,
            write: self.access.1,
        };
        let guest_address = self.guest_address;
        let refer = |(of_file, index, offset, other): (bool, u32, u64, Option<u64>)| BackingRef {
            place: match of_file {
                true => Place::File {
                    file: index,
                    offset,
                },
                false => Place::Anonymous {
                    region: index % 8,
                    offset,
                },
            },
            size: other.unwrap_or(size),
            access,
            guest_address,
        };
        SavedMapping {
            iova,
            size,
            access,
            backing: self.backing.map(refer),
            dirty: self.dirty,
        }
    }
}

fuzz_target!(|input: Input| {
    let (entries, table, dirty) = input.limits.unwrap_or((64, 1 << 20, 1 << 20));
    let profiles = [
        Profile::Type1v1,
        Profile::Type1v2,
        Profile::Iommufd,
        Profile::Iotlb,
    ];
    let snapshot = Snapshot {
        version: input.version.unwrap_or(iommu_type1::SNAPSHOT_VERSION),
        page_size: input.page_size.unwrap_or(iommu_type1::page_size()),
        profile: profiles[usize::from(input.profile) % 4],
        permissions: match input.strict {
            true => PermissionPolicy::Strict,
            false => PermissionPolicy::WriteNeedsRead,
        },
        limits: SavedLimits {
            entries,
            table,
            dirty,
        },
        tracks_dirty: input.tracks_dirty,
        files: input.files,
        anonymous: input.anonymous,
        mappings: input.mappings.into_iter().map(Mapping::saved).collect(),
    };
    let restored = IoAddressSpace::builder().restore(&snapshot, |backing| {
        if backing.size > 1 << 24 {
            return Err(Error::NoRegion(0));
        }
        Backing::anonymous(backing.size as usize)
    });
    if let Ok(restored) = restored {
        let saved = restored.snapshot().unwrap().0;
        assert_eq!(saved.mappings.len(), snapshot.mappings.len());
        for mapping in &saved.mappings {
            let same = |other: &&SavedMapping| other.iova == mapping.iova;
            let other = snapshot.mappings.iter().find(same);
            assert_eq!(other.map(|other| other.size), Some(mapping.size));
            assert_eq!(other.map(|other| &other.dirty), Some(&mapping.dirty));
        }
        restored.unmap_all().unwrap();
    }
});

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Snapshots: what is restored is what was saved, and what cannot be is an error.

#[path = "common/deadline.rs"]
mod deadline;

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread;

use deadline::{within, Over, DEADLINE};
use iommu_type1::{
    page_size, Backing, BackingRef, Error, IoAddressSpace, Place, Profile, Result, Snapshot,
    SnapshotError, SnapshotMemory,
};
use proptest::prelude::*;
use vm_memory::Permissions::{self, Read, ReadWrite, Write};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

fn p(pages: u64) -> u64 {
    pages * page_size()
}

fn memory(pages: u64) -> Backing {
    Backing::anonymous(p(pages) as usize).unwrap()
}

fn memfd(pages: u64) -> Arc<File> {
    use std::os::fd::FromRawFd;
    // SAFETY: the name is a string.
    let fd = unsafe { libc::memfd_create(c"snapshot".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: it was just opened, and is nobody else's.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(p(pages)).unwrap();
    Arc::new(file)
}

/// The memory that was saved, or a part of a file that was.
fn of_same(memory: &SnapshotMemory, backing: &BackingRef) -> Result<Backing> {
    match backing.place {
        Place::File { file, offset } => {
            let file = memory.files[file as usize].clone();
            let access = backing.access.into();
            Backing::file(
                FileOffset::from_arc(file, offset),
                backing.size as usize,
                access,
            )
        }
        Place::Anonymous { region, offset } => {
            memory.anonymous[region as usize].slice(offset as usize, backing.size as usize)
        }
    }
}

/// With the same files, and new memory where there is no file.
fn restore(snapshot: &Snapshot, memory: &SnapshotMemory) -> Result<IoAddressSpace> {
    let mut fresh = SnapshotMemory::default();
    fresh.files = memory.files.clone();
    for size in &snapshot.anonymous {
        fresh.anonymous.push(Backing::anonymous(*size as usize)?);
    }
    IoAddressSpace::builder().restore(snapshot, |backing| of_same(&fresh, backing))
}

#[derive(Clone, Debug)]
enum Op {
    Map(u64, u64, Permissions, bool),
    Unmap(u64, u64),
    Write(u64),
    Invalidate(u64, u64),
    Track(bool),
}

fn op() -> impl Strategy<Value = Op> {
    let range = || (0..200_u64, 1..80_u64);
    let prot = prop::sample::select(vec![Read, Write, ReadWrite]);
    prop_oneof![
        4 => (range(), prot, any::<bool>()).prop_map(|((page, n), prot, file)| Op::Map(page, n, prot, file)),
        1 => range().prop_map(|(page, n)| Op::Unmap(page, n)),
        4 => (0..280_u64).prop_map(Op::Write),
        1 => range().prop_map(|(page, n)| Op::Invalidate(page, n)),
        1 => any::<bool>().prop_map(Op::Track),
    ]
}

proptest! {
    #[test]
    fn what_is_restored_is_what_was_saved(
        profile in prop::sample::select(vec![Profile::Type1v1, Profile::Type1v2, Profile::Iommufd, Profile::Iotlb]),
        ops in prop::collection::vec(op(), 1..30),
    ) {
        let space = IoAddressSpace::builder().profile(profile).entry_limit(100).build();
        let file = memfd(100);
        for op in &ops {
            // Whether it succeeds is not what this is about.
            match *op {
                Op::Map(page, n, prot, of_file) => {
                    let backing = match of_file {
                        true => {
                            let part = FileOffset::from_arc(file.clone(), p(page % 20));
                            Backing::file(part, p(n) as usize, ReadWrite).unwrap()
                        }
                        false => memory(n),
                    };
                    drop(space.map(p(page), backing, prot));
                }
                Op::Unmap(page, n) => drop(space.unmap(p(page), p(n))),
                Op::Write(page) => drop(space.write(p(page), &[page as u8])),
                Op::Invalidate(page, n) => drop(space.invalidate_vaddr(p(page), p(n))),
                Op::Track(true) => drop(space.start_dirty_tracking()),
                Op::Track(false) => space.stop_dirty_tracking(),
            }
        }
        let (snapshot, memory) = space.snapshot().unwrap();
        let text = serde_json::to_string(&snapshot).unwrap();
        let read: Snapshot = serde_json::from_str(&text).unwrap();
        prop_assert_eq!(&read, &snapshot);
        let restored = restore(&read, &memory).unwrap();
        prop_assert_eq!(&restored.snapshot().unwrap().0, &snapshot);
        prop_assert_eq!(restored.profile(), profile);
        prop_assert_eq!(restored.entry_limit(), 100);
        prop_assert_eq!(restored.mappings(), space.mappings());
        for page in 0..280 {
            let (mut before, mut after) = ([0], [0]);
            let read = [space.read(p(page), &mut before), restored.read(p(page), &mut after)];
            let [before_errno, after_errno] = read.map(|read| read.err().map(|error| error.errno()));
            prop_assert_eq!(before_errno, after_errno);
            let is_of_file = snapshot.mappings.iter().any(|mapping| {
                let backing = mapping.backing.map(|backing| backing.place);
                (mapping.iova..mapping.iova + mapping.size).contains(&p(page))
                    && matches!(backing, Some(Place::File { .. }))
            });
            prop_assert!(!is_of_file || before == after);
        }
        if snapshot.tracks_dirty {
            for mapping in &snapshot.mappings {
                let dirty = [&space, &restored].map(|space| space.take_dirty(mapping.iova, mapping.size));
                let [before, after] = dirty.map(|dirty| dirty.unwrap().iter().collect::<Vec<_>>());
                prop_assert_eq!(before, after);
            }
        } else {
            prop_assert!(restored.take_dirty(0, p(300)).is_err());
        }
        restored.unmap_all().unwrap();
        prop_assert_eq!(restored.mappings(), 0);
    }
}

#[test]
fn files_and_regions_stand_once_with_their_offsets() {
    let space = IoAddressSpace::new();
    let file = memfd(8);
    let part = Backing::file(
        FileOffset::from_arc(file.clone(), p(2)),
        p(6) as usize,
        Read,
    )
    .unwrap();
    assert_eq!(part.file_offset().unwrap().start(), p(2));
    let whole = Backing::file(FileOffset::from_arc(file, 0), p(8) as usize, ReadWrite).unwrap();
    let guest =
        GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(p(100)), p(8) as usize)]).unwrap();
    space.map(p(0), part, Read).unwrap();
    space.map(p(10), whole, Write).unwrap();
    for (iova, gpa) in [(20, 101), (30, 104)] {
        let backing =
            Backing::from_guest_memory(&guest, GuestAddress(p(gpa)), p(2) as usize).unwrap();
        space.map(p(iova), backing, ReadWrite).unwrap();
    }
    let (snapshot, memory) = space.snapshot().unwrap();
    assert_eq!((snapshot.files, memory.files.len()), (1, 1));
    assert_eq!(snapshot.anonymous, [p(8)]);
    assert_eq!(memory.anonymous[0].len() as u64, p(8));
    let places: Vec<_> = snapshot
        .mappings
        .iter()
        .map(|mapping| mapping.backing.unwrap().place)
        .collect();
    let file = |offset| Place::File { file: 0, offset };
    let region = |offset| Place::Anonymous { region: 0, offset };
    assert_eq!(places, [file(p(2)), file(0), region(p(1)), region(p(4))]);
}

/// A snapshot of three mappings, with a page written.
fn saved() -> (Snapshot, SnapshotMemory) {
    let space = IoAddressSpace::new();
    for page in [0, 10, 100] {
        space.map(p(page), memory(4), ReadWrite).unwrap();
    }
    space.start_dirty_tracking().unwrap();
    space.write(p(11), &[1]).unwrap();
    space.snapshot().unwrap()
}

#[test]
fn what_cannot_be_is_an_error_before_anything_is_asked_for() {
    type Break = fn(&mut Snapshot);
    type Expected<'a> = Box<dyn Fn(&Error) -> bool + 'a>;
    let is = |error: &Error, expected: SnapshotError| matches!(error, Error::Snapshot(error) if *error == expected);
    let place = |iova| SnapshotError::Place { iova };
    let dirty = |iova, words| SnapshotError::Dirty { iova, words };
    let expected: Vec<(Break, Expected<'_>)> = vec![
        (
            |s| s.version += 1,
            Box::new(|e| is(e, SnapshotError::Version(2))),
        ),
        (
            |s| s.page_size *= 2,
            Box::new(|e| is(e, SnapshotError::PageSize(p(2)))),
        ),
        (
            |s| s.limits.entries = u64::MAX,
            Box::new(|e| {
                matches!(
                    e,
                    Error::Snapshot(SnapshotError::Limit {
                        asked: u64::MAX,
                        ..
                    })
                )
            }),
        ),
        (
            |s| s.limits.dirty = u64::MAX,
            Box::new(|e| matches!(e, Error::Snapshot(SnapshotError::Limit { .. }))),
        ),
        (
            |s| s.limits.table = u64::MAX,
            Box::new(|e| matches!(e, Error::Snapshot(SnapshotError::Limit { .. }))),
        ),
        (
            |s| s.limits.entries = 2,
            Box::new(|e| matches!(e, Error::EntryLimit { limit: 2 })),
        ),
        (
            |s| s.limits.dirty = 16,
            Box::new(|e| {
                matches!(
                    e,
                    Error::DirtyLimit {
                        bytes: 24,
                        limit: 16
                    }
                )
            }),
        ),
        (
            |s| s.mappings[1].iova = p(2),
            Box::new(|e| matches!(e, Error::Overlap { .. })),
        ),
        (
            |s| s.mappings[1].iova = p(98),
            Box::new(|e| matches!(e, Error::Overlap { .. })),
        ),
        (
            |s| s.mappings[1].iova += 1,
            Box::new(|e| matches!(e, Error::Misaligned { .. })),
        ),
        (
            |s| s.mappings[1].size -= 1,
            Box::new(|e| matches!(e, Error::Misaligned { .. })),
        ),
        (
            |s| s.mappings[1].size = 0,
            Box::new(|e| matches!(e, Error::Empty { .. })),
        ),
        (
            |s| s.mappings[1].iova = p(2).wrapping_neg(),
            Box::new(|e| matches!(e, Error::Overflow { .. })),
        ),
        (
            |s| s.mappings[1].size = p(2).wrapping_neg(),
            Box::new(|e| matches!(e, Error::Overflow { .. })),
        ),
        (|s| s.mappings[1].access.write = false, Box::new(|_| false)),
        (
            |s| (s.mappings[1].access.read, s.mappings[1].access.write) = (false, false),
            Box::new(|e| matches!(e, Error::NoPermissions { .. })),
        ),
        (
            |s| s.mappings[1].size = p(3),
            Box::new(|e| matches!(e, Error::Snapshot(SnapshotError::Size { .. }))),
        ),
        (
            |s| {
                s.mappings[1].backing.as_mut().unwrap().place = Place::Anonymous {
                    region: 3,
                    offset: 0,
                }
            },
            Box::new(|e| is(e, place(p(10)))),
        ),
        (
            |s| {
                s.mappings[1].backing.as_mut().unwrap().place = Place::Anonymous {
                    region: 0,
                    offset: p(1),
                }
            },
            Box::new(|e| is(e, place(p(10)))),
        ),
        (
            |s| {
                s.mappings[1].backing.as_mut().unwrap().place = Place::Anonymous {
                    region: 0,
                    offset: u64::MAX,
                }
            },
            Box::new(|e| is(e, place(p(10)))),
        ),
        (
            |s| s.mappings[1].backing.as_mut().unwrap().place = Place::File { file: 0, offset: 0 },
            Box::new(|e| is(e, place(p(10)))),
        ),
        (
            |s| s.mappings[1].dirty.clear(),
            Box::new(|e| is(e, dirty(p(10), 0))),
        ),
        (
            |s| s.mappings[1].dirty.push(0),
            Box::new(|e| is(e, dirty(p(10), 2))),
        ),
        (
            |s| s.mappings[1].dirty[0] = 1 << 4,
            Box::new(|e| is(e, dirty(p(10), 1))),
        ),
        (|s| s.tracks_dirty = false, Box::new(|e| is(e, dirty(0, 1)))),
        (
            |s| (s.profile, s.mappings[1].backing) = (Profile::Iotlb, None),
            Box::new(|e| matches!(e, Error::NotInProfile(_))),
        ),
        (
            |s| s.mappings[1].backing.as_mut().unwrap().guest_address = Some(u64::MAX - 1),
            Box::new(|e| matches!(e, Error::Snapshot(SnapshotError::GuestAddress { .. }))),
        ),
    ];
    let (snapshot, memory) = saved();
    restore(&snapshot, &memory).unwrap();
    for (at, (spoil, is_expected)) in expected.into_iter().enumerate() {
        let mut spoilt = snapshot.clone();
        spoil(&mut spoilt);
        let mut asked = 0;
        let restored = IoAddressSpace::builder().restore(&spoilt, |backing| {
            asked += 1;
            of_same(&memory, backing)
        });
        match restored {
            // The one that is right.
            Ok(_) => assert_eq!((at, asked), (14, 3)),
            Err(error) => {
                assert!(is_expected(&error), "{at}: {error}");
                assert_eq!(asked, 0, "{at}: {error}");
            }
        }
    }
}

#[test]
fn memory_that_does_not_fit_is_an_error() {
    let (snapshot, _memory) = saved();
    let builder = IoAddressSpace::builder();
    let restored = builder
        .clone()
        .restore(&snapshot, |_| Err(Error::NoRegion(7)));
    assert!(matches!(restored, Err(Error::NoRegion(7))));
    let restored = builder.clone().restore(&snapshot, |_| Ok(memory(3)));
    let size = SnapshotError::Size {
        iova: 0,
        size: p(4),
        backing: p(3),
    };
    assert!(matches!(restored, Err(Error::Snapshot(error)) if error == size));
    let file = memfd(4);
    let read_only =
        |_: &BackingRef| Backing::file(FileOffset::from_arc(file.clone(), 0), p(4) as usize, Read);
    let restored = builder.clone().restore(&snapshot, read_only);
    assert!(matches!(
        restored,
        Err(Error::BackingProtection { iova: 0, .. })
    ));
    let restored = builder.table_limit(0).restore(&snapshot, |_| Ok(memory(4)));
    assert!(matches!(
        restored,
        Err(Error::Snapshot(SnapshotError::Limit { .. }))
    ));
}

#[test]
fn what_is_being_unmapped_is_left_out() {
    let space = IoAddressSpace::builder()
        .unmap_deadline(std::time::Duration::ZERO)
        .build();
    space.map(p(1), memory(1), ReadWrite).unwrap();
    space.map(p(2), memory(1), ReadWrite).unwrap();
    let held = space.scatter(p(1), 8, Read).unwrap();
    space.unmap(p(1), p(1)).unwrap_err();
    let mappings = space.snapshot().unwrap().0.mappings;
    assert_eq!(
        mappings
            .iter()
            .map(|mapping| mapping.iova)
            .collect::<Vec<_>>(),
        [p(2)]
    );
    drop(held);
}

/// Batches come and go as one, and a snapshot sees them so.
#[test]
fn a_snapshot_is_of_one_moment() {
    let space = IoAddressSpace::builder().unmap_deadline(DEADLINE).build();
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let _over = Over(&is_over);
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                let mappings = [1, 5, 1000].map(|page| (p(page), memory(1), ReadWrite));
                space.map_batch(mappings).unwrap();
                space.write(p(5), &[1]).unwrap();
                space
                    .unmap_batch(&[(p(1), p(1)), (p(5), p(1)), (p(1000), p(1))])
                    .unwrap();
            }
        });
        let mut seen = [0, 0];
        within("there is a snapshot of all, and one of nothing", || {
            let (snapshot, memory) = space.snapshot().unwrap();
            let mapped = snapshot.mappings.len();
            assert!(mapped == 0 || mapped == 3, "{mapped}");
            seen[mapped / 3] += 1;
            restore(&snapshot, &memory).unwrap();
            !seen.contains(&0)
        });
    });
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The ioctls of a container, row by row as Linux 7.3 has answered them to root with a device behind an
//! emulated IOMMU of 48 bits, by the rules of type1 v1 and v2.

use iommu_type1::uapi::bindings::{vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap};
use iommu_type1::uapi::{Bitmap, Type1, UserMemory};
use iommu_type1::{page_size, Backing, Error, Info, IoAddressSpace, IovaRanges, Profile, Result};
use vm_memory::Permissions;
use Permissions::{Read, ReadWrite};

/// The memory of a user: 1 GiB from here, of which the last pages differ.
const MEMORY: u64 = 1 << 32;
const MEMORY_END: u64 = MEMORY + (1 << 30);
const READ_ONLY: u64 = MEMORY_END;
const NO_ACCESS: u64 = MEMORY_END + 0x10_0000;
/// Nothing is here.
const HOLE: u64 = MEMORY_END + 0x20_0000;

struct User;

impl UserMemory for User {
    fn backing(&self, vaddr: u64, size: u64, prot: Permissions) -> Result<Backing> {
        let end = vaddr + size;
        let within = |first, last| vaddr >= first && end <= last;
        let allowed = if within(MEMORY, MEMORY_END) {
            ReadWrite
        } else if within(READ_ONLY, NO_ACCESS) {
            Read
        } else if within(NO_ACCESS, HOLE) {
            Permissions::No
        } else {
            return Err(Error::BackingRange {
                offset: vaddr,
                len: size,
                size: MEMORY_END,
            });
        };
        if !allowed.allow(prot) {
            return Err(Error::BackingProtection {
                iova: 0,
                asked: prot,
                allowed,
            });
        }
        // Whether it is the same memory does not matter to these tests.
        Backing::anonymous(size as usize)
    }
}

const READ: u32 = 1;
const WRITE: u32 = 2;
const RW: u32 = READ | WRITE;
const MAP_VADDR: u32 = 4;
const GET_DIRTY: u32 = 1;
const ALL: u32 = 2;
const UNMAP_VADDR: u32 = 4;
const START: u32 = 1;
const STOP: u32 = 2;
const GET: u32 = 4;

const IOVA: u64 = 0x10_0000;
const OK: i32 = 0;

fn errno(result: Result<()>) -> i32 {
    result.map_or_else(|error| error.errno(), |()| OK)
}

struct Container(Type1<User>);

impl Container {
    fn new(profile: Profile) -> Self {
        let ranges = IovaRanges::new(&[0..=0xfedf_ffff, 0xfef0_0000..=0xffff_ffff_ffff], &[]);
        let space = IoAddressSpace::builder()
            .profile(profile)
            .page_sizes(1 << 12 | 1 << 21 | 1 << 30)
            .iova_ranges(ranges.unwrap())
            .build();
        Container(Type1::new(space, User))
    }

    fn map_with(&self, argsz: u32, flags: u32, iova: u64, vaddr: u64, size: u64) -> i32 {
        errno(self.0.map_dma(&vfio_iommu_type1_dma_map {
            argsz,
            flags,
            vaddr,
            iova,
            size,
        }))
    }

    fn map(&self, flags: u32, iova: u64, vaddr: u64, size: u64) -> i32 {
        self.map_with(32, flags, iova, vaddr, size)
    }

    /// The errno and the size that is in the struct then.
    fn unmap_with(
        &self,
        argsz: u32,
        flags: u32,
        iova: u64,
        size: u64,
        bitmap: Option<Bitmap<'_>>,
    ) -> (i32, u64) {
        let mut argument = vfio_iommu_type1_dma_unmap {
            argsz,
            flags,
            iova,
            size,
            ..Default::default()
        };
        let result = errno(self.0.unmap_dma(&mut argument, bitmap));
        (result, argument.size)
    }

    fn unmap(&self, flags: u32, iova: u64, size: u64) -> (i32, u64) {
        self.unmap_with(24, flags, iova, size, None)
    }

    fn info(&self, argsz: u32, bytes: usize) -> (i32, Vec<u8>) {
        let mut buf = vec![0xaa; bytes];
        let given = bytes.min(4);
        buf[..given].copy_from_slice(&argsz.to_ne_bytes()[..given]);
        (errno(self.0.get_info(&mut buf)), buf)
    }

    /// With a mapping of these pages at `IOVA`.
    fn with(profile: Profile, pages: &[(u64, u64)]) -> Self {
        let container = Container::new(profile);
        for (page, count) in pages {
            let (iova, size) = (IOVA + page * 0x1000, count * 0x1000);
            assert_eq!(container.map(RW, iova, MEMORY, size), OK);
        }
        container
    }
}

const BOTH: [Profile; 2] = [Profile::Type1v1, Profile::Type1v2];
const TOP: u64 = 0_u64.wrapping_sub(0x1000);

#[test]
fn maps() {
    use libc::{EEXIST, EFAULT, EINVAL, EOVERFLOW};
    for profile in BOTH {
        let c = Container::new(profile);
        let p = 0x1000;
        let mut vaddr = MEMORY;
        let mut row = |name: &str, expected: i32, flags: u32, iova: u64, size: u64| {
            vaddr += 0x10_0000;
            assert_eq!(
                c.map(flags, iova, vaddr, size),
                expected,
                "{profile:?}: {name}"
            );
        };
        row("1 page", OK, RW, IOVA, p);
        row("same again", EEXIST, RW, IOVA, p);
        row("overlapping, longer", EEXIST, RW, IOVA, 2 * p);
        row("overlapping, from below", EEXIST, RW, IOVA - p, 2 * p);
        row("adjacent", OK, RW, IOVA + p, p);
        row("size 0", EINVAL, RW, IOVA + 16 * p, 0);
        row("iova + 1", EINVAL, RW, IOVA + 16 * p + 1, p);
        row("iova + 2048", EINVAL, RW, IOVA + 16 * p + 2048, p);
        row("size 4097", EINVAL, RW, IOVA + 16 * p, 4097);
        row("size 2048", EINVAL, RW, IOVA + 16 * p, 2048);
        row("flags 0", EINVAL, 0, IOVA + 16 * p, p);
        row("flags bit 5", EINVAL, RW | 32, IOVA + 16 * p, p);
        row("READ only", OK, READ, IOVA + 20 * p, p);
        row("WRITE only", OK, WRITE, IOVA + 21 * p, p);
        row("iova 0", OK, RW, 0, p);
        row("iova wraps", EOVERFLOW, RW, TOP, 2 * p);
        row("last page of u64", EINVAL, RW, TOP, p);
        row("iova 1 << 48", EINVAL, RW, 1 << 48, p);
        row("iova 1 << 47", OK, RW, 1 << 47, p);
        row("across 1 << 39", OK, RW, (1 << 39) - p, 2 * p);
        row("MSI window", EINVAL, RW, 0xfee0_0000, p);
        row("straddling the MSI window", EINVAL, RW, 0xfedf_f000, 2 * p);
        row(
            "size u64::MAX - 4095",
            EOVERFLOW,
            RW,
            2 * p,
            u64::MAX - 4095,
        );

        let row = |name: &str, expected: i32, flags: u32, vaddr: u64, size: u64| {
            let iova = IOVA + 0x20_0000;
            let result = c.map(flags, iova, vaddr, size);
            assert_eq!(result, expected, "{profile:?}: {name}");
            if result == OK {
                assert_eq!(c.unmap(0, iova, size), (OK, size), "{profile:?}: {name}");
            }
        };
        row("same vaddr at a second iova", OK, RW, MEMORY + 0x10_0000, p);
        row("vaddr + 1", EINVAL, RW, MEMORY + 1, p);
        row("vaddr + 2048", EINVAL, RW, MEMORY + 2048, p);
        row("vaddr wraps", EOVERFLOW, RW, TOP, 2 * p);
        row("vaddr not there", EFAULT, RW, HOLE, p);
        row("RW of what can be read", EFAULT, RW, READ_ONLY, p);
        row("READ of what can be read", OK, READ, READ_ONLY, p);
        row("READ of what cannot be read", EFAULT, READ, NO_ACCESS, p);
        row("a hole at the tail", EFAULT, RW, MEMORY_END - p, 2 * p);
        row("then the part that is there", OK, RW, MEMORY_END - p, p);

        for (argsz, expected) in [(31, EINVAL), (0, EINVAL), (64, OK)] {
            let result = c.map_with(argsz, RW, IOVA + 0x30_0000, MEMORY, p);
            assert_eq!(result, expected, "{profile:?}: argsz {argsz}");
        }
    }
}

/// What is refused for several reasons is refused for the first.
#[test]
fn maps_are_checked_in_order() {
    use libc::{EEXIST, EFAULT, EINVAL, ENOENT, ENOSPC, EOVERFLOW};
    for profile in BOTH {
        let space = IoAddressSpace::builder()
            .profile(profile)
            .entry_limit(1)
            .iova_ranges(IovaRanges::new(&[0..=0xffff_ffff], &[]).unwrap())
            .build();
        let c = Container(Type1::new(space, User));
        assert_eq!(c.map(RW, IOVA, MEMORY, 0x1000), OK);
        let row = |expected, argsz, flags, iova, vaddr, size| {
            let result = c.map_with(argsz, flags, iova, vaddr, size);
            assert_eq!(
                result, expected,
                "{flags:#x} {iova:#x} {vaddr:#x} {size:#x}"
            );
        };
        row(EINVAL, 31, RW, TOP, 0, 0x2000);
        row(EINVAL, 32, RW | 8, TOP, 0, 0x2000);
        row(EOVERFLOW, 32, 0, TOP, 0, 0x2001);
        row(EOVERFLOW, 32, RW | MAP_VADDR, TOP, 0, 0x2000);
        row(EOVERFLOW, 32, RW | MAP_VADDR, 0, TOP, 0x2000);
        row(EINVAL, 32, RW | MAP_VADDR, IOVA, MEMORY, 0x1000);
        row(EINVAL, 32, MAP_VADDR, IOVA + 1, MEMORY, 0x1000);
        row(EINVAL, 32, RW, IOVA, MEMORY, 0x1001);
        row(ENOENT, 32, MAP_VADDR, 0, HOLE, 0x1000);
        row(EINVAL, 32, MAP_VADDR, IOVA, HOLE, 0x1000);
        row(EEXIST, 32, RW, IOVA, HOLE, 1 << 40);
        row(ENOSPC, 32, RW, 1 << 40, HOLE, 0x1000);
        assert_eq!(c.unmap(0, IOVA, 0x1000), (OK, 0x1000));
        row(EINVAL, 32, RW, 1 << 40, HOLE, 0x1000);
        row(EFAULT, 32, RW, IOVA, HOLE, 0x1000);
    }
}

#[test]
fn the_limit_of_entries() {
    for profile in BOTH {
        let space = IoAddressSpace::builder()
            .profile(profile)
            .entry_limit(4)
            .build();
        let c = Container(Type1::new(space, User));
        for page in 0..4 {
            assert_eq!(c.map(RW, page * 0x1000, MEMORY, 0x1000), OK);
        }
        assert_eq!(c.0.space().info().dma_avail, Some(0));
        assert_eq!(c.map(RW, 0x4000, MEMORY, 0x1000), libc::ENOSPC);
        assert_eq!(c.map(RW, 0x3000, MEMORY, 0x1000), libc::EEXIST);
        assert_eq!(c.unmap(0, 0, 0x1000), (OK, 0x1000));
        assert_eq!(c.map(RW, 0x4000, MEMORY, 0x1000), OK);
    }
}

#[test]
fn memory_is_taken_away_and_given_back() {
    for profile in BOTH {
        let c = Container::with(profile, &[(0, 1), (1, 2)]);
        let resume = |page: u64, size| c.map(MAP_VADDR, IOVA + page * 0x1000, MEMORY, size);
        assert_eq!(resume(9, 0x1000), libc::ENOENT);
        assert_eq!(resume(0, 0x1000), libc::EINVAL);
        assert_eq!(c.unmap(UNMAP_VADDR, IOVA, 0x1000), (OK, 0x1000));
        assert_eq!(c.unmap(UNMAP_VADDR, IOVA, 0x1000), (libc::EINVAL, 0x1000));
        assert_eq!(c.map(MAP_VADDR, IOVA, HOLE, 0x1000), libc::EFAULT);
        assert_eq!(resume(0, 0x2000), libc::EINVAL);
        assert_eq!(resume(0, 0x1000), OK);
        c.0.space().write(IOVA, &[1]).unwrap();

        assert_eq!(
            c.unmap(ALL | UNMAP_VADDR, 0, 0x1000),
            (libc::EINVAL, 0x1000)
        );
        assert_eq!(c.unmap(ALL | UNMAP_VADDR, 0, 0), (OK, 0x3000));
        assert_eq!(
            c.0.space().write(IOVA, &[1]).unwrap_err().errno(),
            libc::EBUSY
        );
        assert_eq!(resume(1, 0x2000), OK);
        assert_eq!(c.map(RW, IOVA, MEMORY, 0x1000), libc::EEXIST);
        assert_eq!(c.unmap(ALL, 0, 0), (OK, 0x3000));
    }
}

/// Mappings as pages and counts, an unmap, what it answers by v1 and by v2, and a map behind it.
#[test]
fn unmaps() {
    use libc::{EEXIST, EINVAL};
    type Row<'a> = (
        &'a [(u64, u64)],
        (u64, u64),
        [(i32, u64); 2],
        Option<((u64, u64), [i32; 2])>,
    );
    let one: &[(u64, u64)] = &[(0, 4)];
    let rows: &[Row<'_>] = &[
        (one, (0, 4), [(OK, 4); 2], Some(((0, 4), [OK; 2]))),
        (&[], (0, 4), [(OK, 0); 2], None),
        (
            one,
            (0, 1),
            [(OK, 4), (EINVAL, 1)],
            Some(((0, 4), [OK, EEXIST])),
        ),
        (
            one,
            (1, 1),
            [(OK, 0), (EINVAL, 1)],
            Some(((1, 1), [EEXIST; 2])),
        ),
        (
            one,
            (2, 2),
            [(OK, 0), (EINVAL, 2)],
            Some(((2, 2), [EEXIST; 2])),
        ),
        (one, (2, 4), [(OK, 0), (EINVAL, 4)], None),
        (&[(2, 4)], (0, 4), [(OK, 4), (EINVAL, 4)], None),
        (&[(0, 2), (2, 2)], (0, 4), [(OK, 4); 2], None),
        (&[(0, 2), (6, 2)], (0, 8), [(OK, 4); 2], None),
        (
            &[(0, 2), (8, 2)],
            (0, 9),
            [(OK, 4), (EINVAL, 9)],
            Some(((0, 2), [OK, EEXIST])),
        ),
        (one, (8, 4), [(OK, 0); 2], None),
    ];
    let iova = |page| IOVA + page * 0x1000;
    for (mapped, (page, count), expected, then) in rows {
        for (index, profile) in BOTH.into_iter().enumerate() {
            let c = Container::with(profile, mapped);
            let (errno, pages) = expected[index];
            let answer = c.unmap(0, iova(*page), count * 0x1000);
            let row = format!("{profile:?}: {mapped:?}, {page}, {count}");
            assert_eq!(answer, (errno, pages * 0x1000), "{row}");
            if let Some(((page, count), expected)) = then {
                let mapped = c.map(RW, iova(*page), MEMORY, count * 0x1000);
                assert_eq!(mapped, expected[index], "{row}");
            }
        }
    }
}

#[test]
fn unmaps_that_are_wrong_in_themselves() {
    use libc::{EINVAL, EOVERFLOW};
    for profile in BOTH {
        let c = Container::with(profile, &[(0, 1)]);
        assert_eq!(c.map(RW, 0x8000, MEMORY, 0x1000), OK);
        let row = |name: &str, expected: i32, argsz, flags, iova, size| {
            let answer = c.unmap_with(argsz, flags, iova, size, None);
            assert_eq!(answer, (expected, size), "{profile:?}: {name}");
        };
        row("size 0", EINVAL, 24, 0, IOVA, 0);
        row("iova unaligned", EINVAL, 24, 0, IOVA + 1, 0x1000);
        row("size unaligned", EINVAL, 24, 0, IOVA, 0x1001);
        row("wraps", EOVERFLOW, 24, 0, TOP, 0x2000);
        row("0 to u64::MAX, size !0", EINVAL, 24, 0, 0, u64::MAX);
        row("ALL with iova and size", EINVAL, 24, ALL, IOVA, 0x1000);
        row("ALL with size", EINVAL, 24, ALL, 0, 0x1000);
        row("ALL with iova", EINVAL, 24, ALL, IOVA, 0);
        row("flags bit 5", EINVAL, 24, 32, IOVA, 0x1000);
        row("argsz 23", EINVAL, 23, 0, IOVA, 0x1000);
        row("GET_DIRTY, argsz 24", EINVAL, 24, GET_DIRTY, IOVA, 0x1000);
        row("GET_DIRTY and ALL", EINVAL, 48, GET_DIRTY | ALL, 0, 0);
        row(
            "GET_DIRTY and VADDR",
            EINVAL,
            48,
            GET_DIRTY | UNMAP_VADDR,
            IOVA,
            0x1000,
        );
        row(
            "GET_DIRTY, no bitmap",
            libc::EFAULT,
            48,
            GET_DIRTY,
            IOVA,
            0x1000,
        );
        let mut data = [0];
        let bitmap = Bitmap {
            pgsize: 0x1000,
            size: 8,
            data: &mut data,
        };
        let answer = c.unmap_with(48, GET_DIRTY, IOVA, 0x1000, Some(bitmap));
        assert_eq!(answer, (EINVAL, 0x1000), "{profile:?}: no tracking");
        // And what they did not touch is there; up to the end of the space.
        assert_eq!(c.unmap(0, 0, TOP), (OK, 0x2000));
        assert_eq!(c.unmap(ALL, 0, 0), (OK, 0));
    }
}

#[test]
fn everything_is_unmapped() {
    for profile in BOTH {
        let c = Container::with(profile, &[(0, 1), (8, 1)]);
        assert_eq!(c.unmap(ALL, 0, 0), (OK, 0x2000));
        assert_eq!(c.unmap(ALL, 0, 0), (OK, 0));
    }
}

#[test]
fn dirty_pages_of_v1() {
    let c = Container::with(Profile::Type1v1, &[(0, 1)]);
    for flags in [0, START, STOP, GET, START | STOP] {
        assert_eq!(errno(c.0.dirty_pages(8, flags, None)), libc::EACCES);
    }
    assert_eq!(errno(c.0.dirty_pages(0, 0, None)), libc::EACCES);
    assert_eq!(
        c.0.space().start_dirty_tracking().unwrap_err().errno(),
        libc::EACCES
    );
}

#[test]
fn dirty_pages_of_v2() {
    use libc::EINVAL;
    let c = Container::with(Profile::Type1v2, &[(0, 4), (60, 8)]);
    let row = |argsz, flags| errno(c.0.dirty_pages(argsz, flags, None));
    assert_eq!(row(8, 0), EINVAL);
    assert_eq!(row(7, START), EINVAL);
    assert_eq!(row(8, 8), EINVAL);
    assert_eq!(row(8, START | STOP), EINVAL);
    assert_eq!(row(8, START), OK);
    assert_eq!(row(8, START), OK);
    assert_eq!(row(8, GET), EINVAL);
    assert_eq!(row(48, GET), libc::EFAULT);

    c.0.space().write(IOVA + 0x1fff, &[1, 2]).unwrap();
    c.0.space().write(IOVA + 63 * 0x1000, &[1; 0x1001]).unwrap();
    let get = |iova, size, pgsize, bytes, data: &mut [u64]| {
        let bitmap = Bitmap {
            pgsize,
            size: bytes,
            data,
        };
        errno(c.0.dirty_pages(48, GET, Some((iova, size, bitmap))))
    };
    let mut data = [u64::MAX; 3];
    let size = 68 * 0x1000;
    for (iova, size, pgsize, bytes, expected) in [
        (IOVA, 0, 0x1000, 24, EINVAL),
        (TOP, 0x2000, 0x1000, 0, libc::EOVERFLOW),
        (IOVA, size, 0x1000, 0, EINVAL),
        (IOVA, size, 0x1000, 8, EINVAL),
        (IOVA, size, 0x1000, (256 << 20) + 1, EINVAL),
        (IOVA, size, 0, 24, EINVAL),
        (IOVA, size, 0x2000, 24, EINVAL),
        (IOVA, size, 0x1001, 1 << 20, EINVAL),
        (IOVA, size, 1 << 63, 24, EINVAL),
        (IOVA + 1, size, 0x1000, 24, EINVAL),
        (IOVA, size + 1, 0x1000, 24, EINVAL),
        (IOVA + 0x1000, size, 0x1000, 24, EINVAL),
        (IOVA, 0x3000, 0x1000, 24, EINVAL),
    ] {
        let result = get(iova, size, pgsize, bytes, &mut data);
        assert_eq!(
            result, expected,
            "{iova:#x} {size:#x} {pgsize:#x} {bytes:#x}"
        );
    }
    assert_eq!(get(IOVA, size, 0x1000, 256 << 20, &mut [0]), libc::EFAULT);
    // Nothing was taken, nothing was written by these.
    assert_eq!(data, [u64::MAX; 3]);
    assert_eq!(get(IOVA, size, 0x1000, 24, &mut data), OK);
    // Words are cleared from where a mapping begins; the word of nobody is left alone.
    assert_eq!(data, [0b110 | 1 << 63, 1, u64::MAX]);
    assert_eq!(get(IOVA, size, 0x1000, 16, &mut data), OK);
    assert_eq!(data, [0, 0, u64::MAX]);

    c.0.space().write(IOVA + 61 * 0x1000, &[1]).unwrap();
    let mut data = [u64::MAX];
    let first = IOVA + 60 * 0x1000;
    let nowhere = Bitmap {
        pgsize: 0x1000,
        size: 8,
        data: &mut [],
    };
    let answer = c.unmap_with(48, GET_DIRTY, first, 0x8000, Some(nowhere));
    assert_eq!(answer, (libc::EFAULT, 0x8000));
    let mut unmap = |pgsize, bytes, flags| {
        let bitmap = Bitmap {
            pgsize,
            size: bytes,
            data: &mut data,
        };
        c.unmap_with(48, flags, first, 0x8000, Some(bitmap))
    };
    assert_eq!(unmap(0x2000, 8, GET_DIRTY), (EINVAL, 0x8000));
    assert_eq!(unmap(0x1000, 0, GET_DIRTY), (EINVAL, 0x8000));
    assert_eq!(unmap(0x1000, 8, GET_DIRTY), (OK, 0x8000));
    assert_eq!(data, [0b10]);
    assert_eq!(row(8, STOP), OK);
    assert_eq!(row(8, STOP), OK);
    assert_eq!(get(IOVA, 0x4000, 0x1000, 8, &mut data), EINVAL);
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_ne_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_ne_bytes(bytes[offset..offset + 8].try_into().unwrap())
}

#[test]
fn info() {
    for profile in BOTH {
        let c = Container::with(profile, &[(0, 1)]);
        assert_eq!(c.info(4, 256).0, libc::EINVAL);
        assert_eq!(c.info(15, 256).0, libc::EINVAL);
        assert_eq!(c.info(16, 15).0, libc::EFAULT);
        assert_eq!(c.info(24, 16).0, libc::EFAULT);
        assert_eq!(c.info(4096, 119).0, libc::EFAULT);

        for argsz in [16, 24, 119] {
            let (result, buf) = c.info(argsz, 256);
            assert_eq!(result, OK);
            assert_eq!((u32_at(&buf, 0), u32_at(&buf, 4)), (120, 3));
            assert_eq!(u64_at(&buf, 8), 0x4020_1000);
            // Not more than what was asked for.
            if argsz == 16 {
                assert_eq!(buf[16..], [0xaa; 240]);
            } else {
                assert_eq!(u32_at(&buf, 16), 0);
                assert_eq!(buf[24..], [0xaa; 232]);
            }
        }
        for argsz in [120, 4096] {
            let (result, buf) = c.info(argsz, 128);
            assert_eq!(result, OK);
            let words: Vec<_> = (0..30).map(|word| u32_at(&buf, word * 4)).collect();
            #[rustfmt::skip]
            let expected = [
                argsz, 3, 0x4020_1000, 0, 24, 0,
                1 << 16 | 2, 56, 0, 0, 0x1000, 0, 0x1000_0000, 0,
                1 << 16 | 3, 72, 65534, 0,
                1 << 16 | 1, 0, 2, 0, 0, 0, 0xfedf_ffff, 0, 0xfef0_0000, 0, 0xffff_ffff, 0xffff,
            ];
            if cfg!(target_endian = "little") {
                assert_eq!(words, expected);
            }
            assert_eq!(buf[120..], [0xaa; 8]);
            assert_eq!(Info::decode(&buf).unwrap(), c.0.space().info());
        }
    }
}

#[test]
fn extensions() {
    for profile in BOTH {
        let c = Container::new(profile);
        let answers = (0..12).map(|extension| c.0.check_extension(extension));
        assert!(answers.eq([0, 1, 0, 1, 0, 0, 0, 0, 0, 1, 1, 0]));
        assert_eq!(c.0.check_extension(u32::MAX), 0);
    }
    assert!(page_size() >= 0x1000);
}

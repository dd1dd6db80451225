// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Sequences of operations: mostly right ones, so that much is mapped, and every way of being wrong.

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use vfio_bindings::bindings::vfio::{
    VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_VADDR, VFIO_DMA_MAP_FLAG_WRITE,
    VFIO_DMA_UNMAP_FLAG_ALL, VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP, VFIO_DMA_UNMAP_FLAG_VADDR,
    VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP, VFIO_IOMMU_DIRTY_PAGES_FLAG_START,
    VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP,
};

use crate::live::{Live, Mapped};
use crate::memory::{Area, BEHIND_FILE, FILE, HOLE, NO_ACCESS, PAGE, PRIVATE, READ_ONLY, SHARED};
use crate::op::{Bitmap, Dirty, Map, Op, Outcome, Unmap, INFO_BYTES};

const READ: u32 = VFIO_DMA_MAP_FLAG_READ;
const WRITE: u32 = VFIO_DMA_MAP_FLAG_WRITE;
const MAP_BYTES: u32 = 32;
const UNMAP_BYTES: u32 = 24;
const WITH_BITMAP: u32 = 48;

/// A flag that no call knows.
const UNKNOWN: u32 = 1 << 5;

/// The last page of the space.
const TOP: u64 = u64::MAX - (PAGE - 1);

/// Where addresses are taken from: how often, the first one, and how many pages. The IOMMU has 48 bits,
/// and interrupts have a window below 4 GiB.
const ZONES: [(u32, u64, u64); 6] = [
    (70, 0, 256),
    (8, 0xfedf_0000, 16),
    (6, 0xfef0_0000, 16),
    (6, (1 << 39) - 8 * PAGE, 16),
    (6, 1 << 47, 16),
    (4, (1 << 48) - 16 * PAGE, 16),
];

/// Makes operations one after the other; what they did steers the next.
#[derive(Debug)]
pub struct Generator {
    rng: SmallRng,
    live: Live,
}

impl Generator {
    /// One whose operations depend on the seed and on what they did only.
    pub fn new(seed: u64) -> Self {
        Generator {
            rng: SmallRng::seed_from_u64(seed),
            live: Live::default(),
        }
    }

    /// What is mapped.
    pub fn live(&self) -> &Live {
        &self.live
    }

    /// Follows what an operation has done.
    pub fn note(&mut self, op: &Op, outcome: &Outcome) {
        self.live.note(op, outcome);
    }

    /// The next operation.
    pub fn next(&mut self) -> Op {
        match self.rng.random_range(0..100) {
            0..55 => Op::Map(self.map()),
            55..83 => Op::Unmap(self.unmap()),
            83..94 => Op::Dirty(self.dirty()),
            94..98 => Op::Info(self.pick(&[0, 4, 15, 16, 17, 23, 24, 64, 96, 119, 120, 128, 512])),
            _ => Op::Extension(self.rng.random_range(0..13)),
        }
    }

    /// How large a container's limit of mappings is: rarely small, because little is mapped then.
    pub fn entry_limit(&mut self) -> u32 {
        if self.chance(10) {
            self.rng.random_range(4..12)
        } else {
            65535
        }
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.rng.random_ratio(percent, 100)
    }

    fn pick<T: Copy>(&mut self, among: &[T]) -> T {
        *among.choose(&mut self.rng).expect("never empty")
    }

    fn zone(&mut self) -> (u64, u64) {
        let zone = ZONES.choose_weighted(&mut self.rng, |zone| zone.0);
        let (_, first, pages) = zone.expect("weights that are not all zero");
        (*first, *pages)
    }

    fn mapped(&mut self) -> Option<Mapped> {
        self.live.all().choose(&mut self.rng).copied()
    }

    fn map(&mut self) -> Map {
        let mut map = self.good_map();
        match self.rng.random_range(0..100) {
            0..72 => (),
            72..76 => map.argsz = self.pick(&[0, 1, 31, 40, 64]),
            76..80 => self.wrong_flags(&mut map),
            80..83 => map.size = self.wrong_size(map.size),
            83..88 => self.wrong_iova(&mut map),
            88..93 => self.wrong_vaddr(&mut map),
            93..97 => self.on_a_mapping(&mut map),
            _ => self.resume(&mut map),
        }
        map
    }

    /// One that fails only where what it would need is taken.
    fn good_map(&mut self) -> Map {
        let pages = if self.chance(5) {
            16
        } else {
            self.rng.random_range(1..=4)
        };
        let size = pages * PAGE;
        let mut iova = 0;
        for _ in 0..16 {
            let (first, zone_pages) = self.zone();
            iova = first + self.rng.random_range(0..=zone_pages - pages) * PAGE;
            if self.live.is_free(iova, iova + (size - 1)) {
                break;
            }
        }
        let area = self.pick(&[PRIVATE, PRIVATE, PRIVATE, READ_ONLY, SHARED, FILE]);
        let pages = pages.min(area.pages);
        let writes = self.pick(&[READ | WRITE, READ | WRITE, READ, WRITE]);
        Map {
            argsz: MAP_BYTES,
            flags: if area.first == READ_ONLY.first {
                READ
            } else {
                writes
            },
            vaddr: self.inside(area, pages),
            iova,
            size: pages * PAGE,
        }
    }

    fn inside(&mut self, area: Area, pages: u64) -> u64 {
        area.first + self.rng.random_range(0..=area.pages - pages) * PAGE
    }

    fn wrong_flags(&mut self, map: &mut Map) {
        let vaddr = VFIO_DMA_MAP_FLAG_VADDR;
        map.flags = self.pick(&[
            0,
            UNKNOWN,
            map.flags | UNKNOWN,
            vaddr | READ,
            vaddr,
            1 << 31,
        ]);
    }

    fn wrong_size(&mut self, size: u64) -> u64 {
        self.pick(&[
            0,
            1,
            size + 1,
            2048,
            size - 1,
            1 << 31,
            1 << 48,
            1 << 63,
            TOP,
            u64::MAX,
        ])
    }

    fn wrong_iova(&mut self, map: &mut Map) {
        map.iova = match self.rng.random_range(0..11) {
            0 => map.iova + 1,
            1 => map.iova + 2048,
            2 => TOP,
            3 => TOP - PAGE,
            4 => u64::MAX,
            5 => 1 << 48,
            6 => (1 << 48) - PAGE,
            7 => 1 << 63,
            8 => 0xfee0_0000,
            9 => 0xfedf_f000,
            _ => 0xfeef_f000,
        };
        if self.chance(50) {
            map.size = 2 * PAGE;
        }
    }

    fn wrong_vaddr(&mut self, map: &mut Map) {
        map.vaddr = match self.rng.random_range(0..10) {
            0 => map.vaddr + 1,
            1 => map.vaddr + 2048,
            2 => HOLE.first,
            3 => NO_ACCESS.first,
            4 => BEHIND_FILE.first - self.pick(&[0, PAGE]),
            5 => HOLE.first - PAGE,
            6 => self.pick(&[TOP, TOP - PAGE, u64::MAX]),
            7 => 0xffff_8000_0000_0000,
            8 => SHARED.first - PAGE,
            _ => READ_ONLY.first - self.pick(&[0, PAGE]),
        };
        if self.chance(50) {
            map.size = 2 * PAGE;
        }
        if self.chance(50) {
            map.flags = READ | WRITE;
        }
    }

    fn on_a_mapping(&mut self, map: &mut Map) {
        let Some(mapped) = self.mapped() else {
            return;
        };
        (map.iova, map.size) = match self.rng.random_range(0..5) {
            0 => (mapped.iova, mapped.size),
            1 => (mapped.iova, mapped.size + PAGE),
            2 => (mapped.iova.saturating_sub(PAGE), 2 * PAGE),
            3 => (mapped.last() & !(PAGE - 1), 2 * PAGE),
            _ => (mapped.iova, PAGE),
        };
        map.vaddr = PRIVATE.first;
    }

    /// Gives memory back to a mapping, mostly one from which it was taken.
    fn resume(&mut self, map: &mut Map) {
        let invalid: Vec<_> = self
            .live
            .all()
            .iter()
            .filter(|mapped| mapped.invalid)
            .collect();
        let Some(mapped) = invalid
            .choose(&mut self.rng)
            .map(|mapped| **mapped)
            .or(self.mapped())
        else {
            return;
        };
        map.flags = VFIO_DMA_MAP_FLAG_VADDR;
        (map.iova, map.size) = match self.rng.random_range(0..10) {
            0 => (mapped.iova, mapped.size + PAGE),
            1 => (mapped.iova + PAGE, mapped.size),
            2 => (mapped.iova + mapped.size, PAGE),
            _ => (mapped.iova, mapped.size),
        };
        // The kernel takes any address for what it gives back, and looks only when it pins. Ours needs memory, so
        // there is some wherever the rest is right.
        let meant =
            |mapped: &Mapped| mapped.invalid && (map.iova, map.size) == (mapped.iova, mapped.size);
        map.vaddr = if self.live.all().iter().any(meant) {
            PRIVATE.first
        } else {
            self.pick(&[PRIVATE.first, HOLE.first])
        };
    }

    fn unmap(&mut self) -> Unmap {
        let (iova, size) = self.range();
        let mut unmap = Unmap {
            argsz: UNMAP_BYTES,
            flags: 0,
            iova,
            size,
            bitmap: None,
        };
        match self.rng.random_range(0..100) {
            0..68 => (),
            68..72 => unmap.argsz = self.pick(&[0, 23, 25, 48]),
            72..75 => unmap.flags = self.pick(&[UNKNOWN, 1 << 31, 3, 5, 7]),
            75..76 => self.all(&mut unmap),
            76..78 => {
                unmap.flags = VFIO_DMA_UNMAP_FLAG_ALL;
                (unmap.iova, unmap.size) = self.pick(&[(0, PAGE), (PAGE, 0), (iova, size)]);
            }
            78..86 => unmap.flags = VFIO_DMA_UNMAP_FLAG_VADDR,
            86..90 => self.wrong_range(&mut unmap),
            _ => {
                unmap.argsz = if self.chance(85) {
                    WITH_BITMAP
                } else {
                    self.pick(&[24, 47, 64])
                };
                unmap.flags = VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP;
                unmap.bitmap = Some(self.bitmap(size));
            }
        }
        unmap
    }

    fn all(&mut self, unmap: &mut Unmap) {
        unmap.flags = VFIO_DMA_UNMAP_FLAG_ALL;
        (unmap.iova, unmap.size) = (0, 0);
        if self.chance(50) {
            unmap.flags |= VFIO_DMA_UNMAP_FLAG_VADDR;
        }
    }

    fn wrong_range(&mut self, unmap: &mut Unmap) {
        (unmap.iova, unmap.size) = match self.rng.random_range(0..10) {
            0 => (unmap.iova + 1, unmap.size),
            1 => (unmap.iova, unmap.size + 1),
            2 => (unmap.iova, 0),
            3 => (TOP, 2 * PAGE),
            4 => (0, u64::MAX),
            5 => (TOP, PAGE),
            6 => (unmap.iova, TOP),
            7 => (PAGE, u64::MAX - PAGE),
            8 => (unmap.iova + 2048, PAGE),
            _ => (1 << 48, 1 << 48),
        };
    }

    /// A range that has to do with a mapping, mostly.
    fn range(&mut self) -> (u64, u64) {
        let (first, pages) = self.zone();
        let elsewhere = (first + self.rng.random_range(0..pages) * PAGE, 2 * PAGE);
        let Some(Mapped { iova, size, .. }) = self.mapped() else {
            return elsewhere;
        };
        if self.chance(3) {
            return self.wide();
        }
        match self.rng.random_range(0..100) {
            0..52 => (iova, size),
            // More than the mapping, neighbours perhaps.
            52..57 => (iova, size + self.rng.random_range(1..8) * PAGE),
            57..61 => (iova.saturating_sub(4 * PAGE), size + 4 * PAGE),
            61..62 => (first, 16 * PAGE),
            // Less: the front, the middle, the tail, across its end, across its beginning.
            62..67 => (iova, PAGE),
            67..71 => (iova + PAGE, PAGE),
            71..75 => (iova + size / PAGE / 2 * PAGE, size),
            75..79 => (iova + size - PAGE, self.rng.random_range(1..4) * PAGE),
            79..83 => (iova.saturating_sub(PAGE), 2 * PAGE),
            _ => elsewhere,
        }
    }

    /// A range of many words of a bitmap, from where a mapping begins to where one ends.
    fn wide(&mut self) -> (u64, u64) {
        const MOST: u64 = Bitmap::WORDS as u64 * 64 * PAGE;
        let ends = (self.mapped(), self.mapped());
        let (Some(one), Some(other)) = ends else {
            return (0, 256 * PAGE);
        };
        let (first, last) = (one.iova.min(other.iova), one.last().max(other.last()));
        if last - first < MOST {
            (first, last - first + 1)
        } else {
            (one.iova, one.size)
        }
    }

    fn dirty(&mut self) -> Dirty {
        let (start, stop) = (
            VFIO_IOMMU_DIRTY_PAGES_FLAG_START,
            VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP,
        );
        let get = VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP;
        let (iova, size) = if self.chance(15) {
            self.wide()
        } else {
            self.range()
        };
        let mut dirty = Dirty {
            argsz: WITH_BITMAP,
            flags: get,
            iova,
            size,
            bitmap: self.bitmap(size),
        };
        match self.rng.random_range(0..100) {
            0..18 => dirty.flags = start,
            18..23 => dirty.flags = stop,
            23..28 => dirty.flags = self.pick(&[0, 3, 5, 6, 7, 8, 12, UNKNOWN, start | UNKNOWN]),
            28..32 => dirty.argsz = self.pick(&[0, 7, 8, 47, 49]),
            32..35 => (dirty.flags, dirty.argsz) = (start, self.pick(&[0, 7, 8])),
            35..40 => {
                (dirty.iova, dirty.size) = self.pick(&[
                    (iova + 1, size),
                    (iova, size + 1),
                    (iova, 0),
                    (TOP, 2 * PAGE),
                    (TOP, PAGE),
                    (iova + 2048, size),
                    (0, u64::MAX),
                ]);
            }
            _ => (),
        }
        dirty
    }

    /// A bitmap for a range of that size, mostly.
    fn bitmap(&mut self, size: u64) -> Bitmap {
        let needed = size.div_ceil(PAGE).div_ceil(64) * 8;
        let mut bitmap = Bitmap {
            pgsize: PAGE,
            size: needed,
            fill: if self.chance(50) {
                self.pick(&[u64::MAX, 0x1111_1111_1111_1111])
            } else {
                0
            },
        };
        match self.rng.random_range(0..100) {
            0..80 => (),
            80..86 => bitmap.pgsize = self.pick(&[1, 1024, 2048, 2 * PAGE, 1 << 21, 1 << 62]),
            86..94 => bitmap.size = self.pick(&[0, 1, needed - 1, needed - 8, (1 << 28) + 8]),
            _ => bitmap.size = self.pick(&[needed + 1, needed + 8, 1 << 28]),
        }
        bitmap
    }
}

const _: () = assert!(INFO_BYTES >= 512);

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Sequences of operations on IOASes: mostly right ones, so that much is mapped, and every way of being
//! wrong.
//!
//! To an IOAS without a device only whole pages of memory that is there are given: the kernel takes single
//! bytes there, and looks for memory once a device is attached.

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::op::{Allow, Copied, Map, Memory, Op, Unmap, ATTACHED, FIXED, READ, SPACES, WRITE};
use super::rules::{Area, Rules};
use super::FILE_PAGES;
use crate::memory::{
    Area as Part, BEHIND_FILE, FILE, HOLE, NO_ACCESS, PAGE, PRIVATE, READ_ONLY, SHARED,
};

/// The last page of the space.
const TOP: u64 = u64::MAX - (PAGE - 1);

/// Where addresses are taken from: how often, the first one, and how many pages.
const ZONES: [(u32, u64, u64); 5] = [
    (76, 0, 128),
    (8, 0xfedf_0000, 16),
    (6, 0xfef0_0000, 16),
    (6, 1 << 47, 16),
    (4, (1 << 48) - 16 * PAGE, 16),
];

/// Ranges that are allowed now and then.
const ALLOWED: [(u64, u64); 4] = [
    (0, 0xffff),
    (0x2_0000, 0x2_3fff),
    (0x4_0800, 0x4_f7ff),
    (1 << 40, (1 << 40) + 0xf_ffff),
];

/// Whether only some addresses are found for mappings.
fn is_limited(space: usize, rules: &Rules) -> bool {
    rules
        .space(space)
        .is_some_and(|space| !space.allowed.is_empty())
}

/// Makes operations one after the other; what is mapped steers the next.
#[derive(Debug)]
pub struct Generator(SmallRng);

impl Generator {
    /// One whose operations depend on the seed and on what they did only.
    pub fn new(seed: u64) -> Self {
        Generator(SmallRng::seed_from_u64(seed))
    }

    /// The next operation.
    pub fn next(&mut self, rules: &Rules) -> Op {
        let space = self.space();
        if rules.space(space).is_none() {
            return self.on_none(space, rules);
        }
        match self.0.random_range(0..1000) {
            0..560 => Op::Map(self.map(space, rules)),
            560..790 => Op::Unmap(self.unmap(space, rules)),
            790..930 => Op::Copy(self.copy(space, rules)),
            930..955 => Op::Ranges(space, self.0.random_range(0..5)),
            955..994 => Op::Allow(self.allow(space)),
            _ => Op::Destroy(self.0.random_range(0..SPACES)),
        }
    }

    /// What is done where no IOAS is: half of it with an id that nothing has.
    fn on_none(&mut self, space: usize, rules: &Rules) -> Op {
        match self.0.random_range(0..8) {
            0 => Op::Map(self.good_map(space, rules)),
            1 => Op::Unmap(Unmap {
                space,
                iova: 0,
                length: PAGE,
            }),
            2 => Op::Destroy(space),
            3 => Op::Ranges(space, 4),
            _ => Op::Alloc(space),
        }
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.0.random_ratio(percent, 100)
    }

    fn pick<T: Copy>(&mut self, among: &[T]) -> T {
        *among.choose(&mut self.0).expect("never empty")
    }

    fn space(&mut self) -> usize {
        self.pick(&[ATTACHED, ATTACHED, ATTACHED, 1, 2])
    }

    fn address(&mut self, pages: u64) -> u64 {
        let zone = ZONES.choose_weighted(&mut self.0, |zone| zone.0);
        let (_, first, zone_pages) = zone.expect("weights that are not all zero");
        first + self.0.random_range(0..=zone_pages - pages) * PAGE
    }

    fn free(&mut self, space: usize, pages: u64, rules: &Rules) -> u64 {
        let mut iova = 0;
        for _ in 0..16 {
            iova = self.address(pages);
            let last = iova + (pages * PAGE - 1);
            if rules.overlapping(space, iova, last).is_empty() {
                break;
            }
        }
        iova
    }

    fn area(&mut self, space: usize, rules: &Rules) -> Option<Area> {
        rules.space(space)?.areas.choose(&mut self.0).copied()
    }

    /// One that fails only where what it would need is taken.
    fn good_map(&mut self, space: usize, rules: &Rules) -> Map {
        let pages = if self.chance(5) {
            16
        } else {
            self.0.random_range(1..=4)
        };
        let part = self.pick(&[PRIVATE, PRIVATE, PRIVATE, READ_ONLY, SHARED, FILE]);
        let pages = pages.min(part.pages);
        let access = self.pick(&[READ | WRITE, READ | WRITE, READ, WRITE]);
        let access = if part.first == READ_ONLY.first {
            READ
        } else {
            access
        };
        let mut map = Map {
            space,
            flags: access | if self.chance(65) { FIXED } else { 0 },
            memory: Memory::Own(self.inside(part, pages)),
            length: pages * PAGE,
            iova: 0,
        };
        // For a file its offset counts, for ours where it is mapped: with little room that shows.
        if self.chance(12) && (map.flags & FIXED != 0 || !is_limited(space, rules)) {
            map.length = map.length.min(4 * PAGE);
            let offset = self.0.random_range(0..=FILE_PAGES - map.length / PAGE);
            map.memory = Memory::File(offset * PAGE);
        }
        if map.flags & FIXED != 0 {
            map.iova = self.free(space, map.length / PAGE, rules);
        }
        map
    }

    fn inside(&mut self, part: Part, pages: u64) -> u64 {
        part.first + self.0.random_range(0..=part.pages - pages) * PAGE
    }

    fn map(&mut self, space: usize, rules: &Rules) -> Map {
        let mut map = self.good_map(space, rules);
        let own = matches!(map.memory, Memory::Own(_));
        if map.flags & FIXED == 0 || !own {
            return self.wrong_elsewhere(map, rules);
        }
        match self.0.random_range(0..100) {
            0..74 => (),
            74..76 => map.flags = FIXED,
            76..84 => self.on_an_area(&mut map, rules),
            84..87 => map.iova = self.pick(&[u64::MAX, TOP]),
            87..89 => map.length = self.pick(&[0, u64::MAX, TOP, TOP - PAGE]),
            _ if space == ATTACHED => self.wrong_here(&mut map),
            _ => (),
        }
        map
    }

    /// Mistakes in what is not at a fixed address, or of a file.
    fn wrong_elsewhere(&mut self, mut map: Map, rules: &Rules) -> Map {
        // Where there may be no room, nothing else is wrong.
        let attached = map.space == ATTACHED && !is_limited(map.space, rules);
        match self.0.random_range(0..100) {
            0..3 if map.memory != Memory::Closed && map.flags & FIXED != 0 => {
                map.memory = Memory::Closed;
            }
            3..6 if attached && matches!(map.memory, Memory::File(_)) => {
                // Behind the end of the file: nothing else is wrong with it.
                map.memory = Memory::File((FILE_PAGES - 1) * PAGE);
                map.length = 2 * PAGE;
                map.flags &= !FIXED;
                map.iova = 0;
            }
            6..10 if attached && matches!(map.memory, Memory::Own(_)) => {
                let of_nobody = self.pick(&[HOLE.first, NO_ACCESS.first, BEHIND_FILE.first]);
                map.memory = Memory::Own(of_nobody);
            }
            10..14 if map.flags & FIXED != 0 => self.on_an_area(&mut map, rules),
            _ => (),
        }
        map
    }

    fn on_an_area(&mut self, map: &mut Map, rules: &Rules) {
        let Some(area) = self.area(map.space, rules) else {
            return;
        };
        (map.iova, map.length) = match self.0.random_range(0..5) {
            0 => (area.iova, area.length),
            1 => (area.iova, area.length + PAGE),
            2 => (area.iova.saturating_sub(PAGE), 2 * PAGE),
            3 => (area.last() & !(PAGE - 1), 2 * PAGE),
            _ => (area.iova, PAGE),
        };
        match &mut map.memory {
            Memory::Own(from) => *from = PRIVATE.first,
            Memory::File(from) => {
                *from = 0;
                map.length = map.length.min(FILE_PAGES * PAGE);
            }
            Memory::Closed => (),
        }
    }

    /// Mistakes that only an IOAS with a device finds.
    fn wrong_here(&mut self, map: &mut Map) {
        let from = PRIVATE.first;
        match self.0.random_range(0..12) {
            0 => map.iova += self.pick(&[1, 2048, PAGE - 1]),
            1 => map.length += self.pick(&[1, 2048, PAGE - 1]),
            2 => map.memory = Memory::Own(from + self.pick(&[1, 2048, PAGE - 1])),
            3 => map.iova = self.pick(&[TOP + 1, 1 << 48, (1 << 48) - PAGE, 1 << 63, TOP - PAGE]),
            4 => map.iova = self.pick(&[0xfee0_0000, 0xfedf_f000, 0xfeef_f000]),
            5 => map.memory = Memory::Own(self.pick(&[TOP, u64::MAX, 0xffff_8000_0000_0000])),
            6 => map.length = self.pick(&[1 << 31, 1 << 48, 1 << 63]),
            7 => map.memory = Memory::Own(self.pick(&[HOLE.first, HOLE.first - PAGE])),
            8 => map.memory = Memory::Own(self.pick(&[NO_ACCESS.first, BEHIND_FILE.first - PAGE])),
            9 => {
                map.memory = Memory::Own(READ_ONLY.first - self.pick(&[0, PAGE]));
                map.flags |= WRITE;
            }
            // Two at once, so that the order shows.
            10 => {
                map.memory = Memory::Own(from + 1);
                map.iova = self.pick(&[map.iova, 0, PAGE, 0xfee0_0000, TOP]);
            }
            _ => {
                map.iova = self.pick(&[0xfedf_e000, 0xfedf_f000, (1 << 48) - 2 * PAGE]);
                map.length = 4 * PAGE;
                map.memory = Memory::Own(from);
            }
        }
        if self.chance(30) {
            map.length = map.length.max(2 * PAGE);
        }
    }

    fn unmap(&mut self, space: usize, rules: &Rules) -> Unmap {
        let elsewhere = self.address(2);
        let Some(Area { iova, length, .. }) = self.area(space, rules) else {
            return Unmap {
                space,
                iova: elsewhere,
                length: 2 * PAGE,
            };
        };
        let (iova, length) = match self.0.random_range(0..1000) {
            0..500 => (iova, length),
            500..560 => (iova, length + self.0.random_range(1..3) * PAGE),
            560..600 => (iova.saturating_sub(PAGE), length + PAGE),
            // Less than an area, which is a cut.
            600..650 => (iova, PAGE),
            650..690 => (iova + PAGE, PAGE),
            690..730 => (iova + length - PAGE, self.0.random_range(1..4) * PAGE),
            730..760 => (iova + 1, length),
            760..780 => (iova, length - 1),
            780..800 => (iova.saturating_sub(1), length + 2),
            800..806 => (0, u64::MAX),
            806..812 => (iova & !0xffff, 0x1_0000),
            812..840 => self.pick(&[(0, 0), (iova, 0), (u64::MAX, 0)]),
            840..870 => self.pick(&[
                (TOP, 2 * PAGE),
                (PAGE, u64::MAX),
                (u64::MAX, 1),
                (iova, TOP),
            ]),
            870..890 => self.pick(&[(TOP, PAGE), (1 << 48, 1 << 48), (u64::MAX - 1, 2)]),
            _ => (elsewhere, 2 * PAGE),
        };
        Unmap {
            space,
            iova,
            length,
        }
    }

    fn copy(&mut self, to: usize, rules: &Rules) -> Copied {
        let mut from = self.space();
        if rules.space(from).is_none() {
            from = to;
        }
        let (mut from_iova, mut length) = (self.address(2), 2 * PAGE);
        let mut flags = self.pick(&[READ, WRITE, READ | WRITE]);
        if let Some(area) = self.area(from, rules) {
            (from_iova, length) = (area.iova, area.length);
            match self.0.random_range(0..20) {
                0..10 => (),
                10..14 => length = PAGE,
                14..16 => from_iova += length - PAGE,
                16..17 => length += PAGE,
                17..19 => self.neighbours(from, rules, &mut from_iova, &mut length),
                _ => from_iova += length,
            }
            if from_iova != area.iova {
                length = length.min(PAGE * 4);
            }
            // Mostly no more than there is.
            if !self.chance(3) {
                flags = area.flags & (READ | WRITE);
                if flags == READ | WRITE && self.chance(30) {
                    flags = READ;
                }
            }
        }
        let pages = (length / PAGE).clamp(1, 16);
        let mut copy = Copied {
            flags: flags | FIXED,
            to,
            from,
            length,
            to_iova: self.free(to, pages, rules),
            from_iova,
        };
        if !is_limited(to, rules) && self.chance(30) {
            (copy.flags, copy.to_iova) = (flags, 0);
        }
        if self.chance(12) {
            self.wrong_copy(&mut copy, rules);
        }
        copy
    }

    /// Two areas that touch, where there are any.
    fn neighbours(&mut self, space: usize, rules: &Rules, iova: &mut u64, length: &mut u64) {
        let areas = rules.space(space).map_or(&[][..], |space| &space.areas);
        let touching: Vec<_> = areas
            .windows(2)
            .filter(|two| two[0].iova + two[0].length == two[1].iova)
            .collect();
        if let Some(two) = touching.choose(&mut self.0) {
            let inside = if two[0].length > PAGE { PAGE } else { 0 };
            *iova = two[0].iova + inside;
            *length = (two[0].length + two[1].length - inside).min(16 * PAGE);
        }
    }

    fn wrong_copy(&mut self, copy: &mut Copied, rules: &Rules) {
        let attached = copy.to == ATTACHED && copy.flags & FIXED != 0;
        match self.0.random_range(0..8) {
            0 => copy.flags &= FIXED,
            1 => copy.length = self.pick(&[0, u64::MAX, TOP]),
            2 => copy.from_iova = self.pick(&[u64::MAX, TOP, 1 << 63]),
            3 => copy.to_iova = u64::MAX,
            4 if attached => copy.to_iova = self.pick(&[0xfee0_0000, 1 << 48, TOP]),
            5 if attached => copy.to_iova += 1,
            6 if attached => copy.from_iova += self.pick(&[1, 2048]),
            _ => {
                if let Some(area) = self.area(copy.to, rules) {
                    copy.to_iova = area.iova;
                }
            }
        }
    }

    fn allow(&mut self, space: usize) -> Allow {
        let mut ranges = [(0, 0); 2];
        let count = self.pick(&[0, 0, 1, 1, 2]);
        ranges[0] = self.pick(&ALLOWED);
        ranges[1] = self.pick(&ALLOWED);
        if count > 0 && self.chance(25) {
            ranges[0] = self.pick(&[
                (0x1000, 0x1000),
                (0x2000, 0x1000),
                (0xfee0_0000, 0xfee0_ffff),
                (0x1_0000, 1 << 49),
            ]);
        }
        Allow {
            space,
            ranges,
            count,
        }
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A context: its image and ring in the GGTT, its page tables, and what a workload makes of them.

mod request;

pub use request::Work;

use rand::rngs::SmallRng;
use rand::Rng;

use crate::engine::Kind;
use crate::memory::{Memory, Page, PAGE};
use crate::pci::Bar;
use crate::tables::Tables;

/// Fields of the ring context: where page 1 has their values.
pub const CTX_CTRL: usize = 0x0c;
pub const HEAD: usize = 0x14;
pub const TAIL: usize = 0x1c;
const START: usize = 0x24;
const CTL: usize = 0x2c;
const BB_PER_CTX: usize = 0x64;
const INDIRECT_CTX: usize = 0x6c;
const TIMESTAMP: usize = 0x8c;
const PDPS: usize = 0x94;
/// Where it ends.
const RING_CONTEXT: usize = 0xd0;

const RESTORE_INHIBIT: u32 = 1 << 0;

/// Where in the GGTT, behind the first page of the context, other pages are.
const RING: u32 = 0x20;
const INDIRECT: u32 = 0x28;
/// Entries of the GGTT that a context has.
const STRIDE: u32 = 0x40;
const FIRST: u32 = 0x100;

/// Numbers in the lowest page table.
const BATCH: usize = 5;
const SECOND_BATCH: usize = 9;
const TARGETS: usize = 200;

/// How a context is to be.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Pages of the ring.
    pub ring: usize,
    /// Addresses of 48 bits, or of 32.
    pub four_level: bool,
    /// Whether its pages follow each other.
    pub scattered: bool,
    /// Whether it begins without an image.
    pub inhibited: bool,
    /// Whether it has a batch of its own that runs first.
    pub indirect: bool,
}

#[derive(Debug)]
pub struct Context {
    pub id: u32,
    pub kind: &'static Kind,
    pub lrca: u32,
    four_level: bool,
    pub image: Vec<Page>,
    ring: Vec<Page>,
    tail: usize,
    pub tables: Tables,
    batches: [Page; 2],
    pub targets: Vec<Page>,
    indirect: Option<Page>,
}

impl Context {
    pub fn new(
        memory: &mut Memory,
        bar: &Bar,
        kind: &'static Kind,
        id: u32,
        shape: Shape,
        rng: &mut SmallRng,
    ) -> Self {
        let image = match shape.scattered {
            true => memory.take_scattered(kind.pages, rng),
            false => memory.take(kind.pages),
        };
        let number = u64::from(id);
        let (levels, base) = match shape.four_level {
            true => (4, number << 39 | (number + 3) << 30 | number << 22),
            false => (2, number << 22),
        };
        let context = Context {
            id,
            kind,
            lrca: FIRST + id * STRIDE,
            four_level: shape.four_level,
            image,
            ring: memory.take(shape.ring),
            tail: 0,
            tables: Tables::new(memory, levels, base),
            batches: [memory.take_one(), memory.take_one()],
            targets: memory.take_scattered(3, rng),
            indirect: shape.indirect.then(|| memory.take_one()),
        };
        context.map_all(memory, bar);
        context.fill_in(memory, shape.inhibited);
        context
    }

    fn map_all(&self, memory: &mut Memory, bar: &Bar) {
        let image = (0..).zip(&self.image);
        let ring = (RING..).zip(&self.ring);
        let indirect = (INDIRECT..).zip(&self.indirect);
        for (at, page) in image.chain(ring).chain(indirect) {
            let whole = at % 2 == 0;
            bar.write_ggtt(self.lrca + at, memory.address(*page) | 1, whole);
        }
        self.tables.map(memory, BATCH, self.batches[0]);
        self.tables.map(memory, SECOND_BATCH, self.batches[1]);
        for (at, target) in self.targets.iter().enumerate() {
            self.tables.map(memory, TARGETS + at, *target);
        }
    }

    /// The ring context. Everything else of the image is whatever it was.
    fn fill_in(&self, memory: &mut Memory, inhibited: bool) {
        let page = self.image[1];
        let inhibited = u32::from(inhibited) * RESTORE_INHIBIT;
        let indirect = self
            .indirect
            .map_or(0, |_| (self.lrca + INDIRECT) << 12 | 1);
        for (field, value) in [
            (CTX_CTRL, 0x0009_0008 | inhibited << 16 | inhibited),
            (HEAD, 0),
            (TAIL, 0),
            (START, (self.lrca + RING) << 12),
            (CTL, ((self.ring.len() as u32 - 1) << 12) | 1),
            (BB_PER_CTX, 0),
            (INDIRECT_CTX, indirect),
        ] {
            memory.write_u32(page, field, value);
        }
        // PDP3 to PDP0, the upper half of each first.
        memory.write(page, PDPS, &[0; RING_CONTEXT - PDPS]);
        let root = self.tables.root(memory);
        memory.write_u32(page, RING_CONTEXT - 0xc, (root >> 32) as u32);
        memory.write_u32(page, RING_CONTEXT - 0x4, root as u32);
        if let Some(page) = self.indirect {
            // A cache line; what a workload writes there comes later.
            memory.write(page, 0, &[0; 64]);
        }
    }

    /// What is written to the submission port.
    pub fn descriptor(&self) -> u64 {
        let mode: u64 = if self.four_level { 3 } else { 1 };
        u64::from(self.id) << 32 | u64::from(self.lrca) << 12 | 1 << 8 | mode << 3 | 1
    }

    /// Pages that a workload reads or writes.
    pub fn pages(&self) -> impl Iterator<Item = Page> + '_ {
        let lists = [
            &self.image[..],
            &self.ring[..],
            &self.tables.levels[..],
            &self.batches[..],
            &self.targets[..],
        ];
        lists.into_iter().flatten().chain(&self.indirect).copied()
    }

    /// Another page in the place of one of the image. What that has held goes along; it stays where it was,
    /// too, and nobody may touch it there any more.
    pub fn move_page(&mut self, memory: &mut Memory, bar: &Bar, rng: &mut SmallRng) {
        let at = rng.random_range(1..self.image.len());
        let to = memory.take_scattered(1, rng)[0];
        let content = *memory.model(self.image[at]);
        memory.write(to, 0, &content);
        bar.write_ggtt(self.lrca + at as u32, memory.address(to) | 1, rng.random());
        memory.give_back(std::mem::replace(&mut self.image[at], to));
    }

    /// Another page in the place of a target. Where the device finds the entry that has changed.
    pub fn move_target(&mut self, memory: &mut Memory, rng: &mut SmallRng) -> u64 {
        let at = rng.random_range(0..self.targets.len());
        let to = memory.take_scattered(1, rng)[0];
        memory.give_back(std::mem::replace(&mut self.targets[at], to));
        self.tables.map(memory, TARGETS + at, to)
    }

    /// Some of the image is changed by the driver.
    pub fn change_image(&self, memory: &mut Memory, rng: &mut SmallRng) {
        let page = self.image[rng.random_range(2..self.image.len())];
        memory.fill(page, rng);
        let word = rng.random_range(RING_CONTEXT / 4..PAGE / 4);
        memory.write_u32(self.image[1], word * 4, rng.random());
    }

    /// The first target is where the device finds that address. Where it finds the entry.
    pub fn aim(&mut self, memory: &mut Memory, address: u64) -> u64 {
        self.tables.map_address(memory, TARGETS, address)
    }

    /// After a reset of the engine in the middle of a workload: the context has to be as it was, and the rest of
    /// its ring is forgotten.
    pub fn forget(&mut self, memory: &mut Memory, done: bool) {
        if done {
            memory.adopt(self.image[1]);
        }
        memory.write_u32(self.image[1], HEAD, self.tail as u32);
    }

    /// The context as the engine leaves it.
    pub fn complete(&self, memory: &mut Memory, work: &Work, sequence: u64) {
        let mut control = self.field(memory, CTX_CTRL);
        if control & RESTORE_INHIBIT != 0 {
            control &= !RESTORE_INHIBIT;
            for page in &self.image[2..] {
                memory.model(*page).fill(0);
            }
        }
        for value in &work.controls {
            let mask = value >> 16;
            control = control & !mask | value & mask;
        }
        for effect in &work.effects {
            effect.apply(memory);
        }
        let began = work.timestamp.unwrap_or_else(|| self.timestamp(memory));
        let timestamp = began.wrapping_add(1000).wrapping_add(sequence as u32);
        for (field, value) in [
            (CTX_CTRL, control),
            (HEAD, work.tail),
            (TIMESTAMP, timestamp),
        ] {
            memory.expect(self.image[1], field, &value.to_le_bytes());
        }
        for (number, page) in self.image.iter().enumerate().skip(1) {
            let from = if number == 1 { RING_CONTEXT } else { 0 };
            mix(&mut memory.model(*page)[from..], from, number, sequence);
        }
    }

    fn timestamp(&self, memory: &mut Memory) -> u32 {
        self.field(memory, TIMESTAMP)
    }

    fn field(&self, memory: &mut Memory, field: usize) -> u32 {
        let bytes = &memory.model(self.image[1])[field..field + 4];
        u32::from_le_bytes(bytes.try_into().expect("four bytes"))
    }
}

/// What the simulated engine does to the bytes of an image, byte `first` of page `page` and those behind it.
fn mix(bytes: &mut [u8], first: usize, page: usize, sequence: u64) {
    let key = 0x5a + 31 * page as u64 + 113 * (sequence & 0xff);
    for (i, byte) in (first as u64..).zip(bytes) {
        *byte = byte.rotate_left(1) ^ (key + 7 * i + 3 * (i >> 8)) as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_mixed_as_the_device_says() {
        for (page, sequence) in [(1, 0), (2, 77), (21, 1_000_003)] {
            let mut bytes: Vec<u8> = (0..PAGE).map(|at| (at * 13 + 5) as u8).collect();
            let before = bytes.clone();
            mix(&mut bytes[RING_CONTEXT..], RING_CONTEXT, page, sequence);
            assert_eq!(bytes[..RING_CONTEXT], before[..RING_CONTEXT]);
            for i in RING_CONTEXT..PAGE {
                let sum = 0x5a + 31 * page + 7 * i + 3 * (i >> 8) + 113 * sequence as usize;
                assert_eq!(
                    bytes[i],
                    before[i].rotate_left(1) ^ (sum % 256) as u8,
                    "{i}"
                );
            }
        }
    }
}

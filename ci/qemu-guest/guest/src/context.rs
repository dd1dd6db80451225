// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A context: its image and ring in the GGTT, its page tables, and what a workload makes of them.

use rand::rngs::SmallRng;
use rand::Rng;

use crate::commands::{self, Effect};
use crate::engine::{Engine, Kind};
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

/// What a workload will do.
#[derive(Debug)]
pub struct Work {
    pub effects: Vec<Effect>,
    controls: Vec<u32>,
    timestamp: Option<u32>,
    /// Of the ring, behind its commands.
    pub tail: u32,
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
        let mut context = Context {
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

    fn map_all(&mut self, memory: &mut Memory, bar: &Bar) {
        let all = self.image.iter().enumerate();
        let all = all.map(|(at, page)| (at as u32, *page));
        let ring = self.ring.iter().enumerate();
        let ring = ring.map(|(at, page)| (RING + at as u32, *page));
        let indirect = self.indirect.iter().map(|page| (INDIRECT, *page));
        for (at, page) in all.chain(ring).chain(indirect) {
            let whole = at % 2 == 0;
            bar.write_ggtt(self.lrca + at, memory.address(page) | 1, whole);
        }
        self.tables.map(memory, BATCH, self.batches[0]);
        self.tables.map(memory, SECOND_BATCH, self.batches[1]);
        for (at, target) in self.targets.clone().into_iter().enumerate() {
            self.tables.map(memory, TARGETS + at, target);
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
        if let Some(pages) = self.image.get(2..).filter(|pages| !pages.is_empty()) {
            memory.fill(pages[rng.random_range(0..pages.len())], rng);
        }
        let word = rng.random_range(RING_CONTEXT / 4..PAGE / 4);
        memory.write_u32(self.image[1], word * 4, rng.random());
    }

    /// Writes a workload into ring and batches: breadcrumbs at both ends, stores in between.
    pub fn request(&mut self, memory: &mut Memory, engine: &Engine, rng: &mut SmallRng) -> Work {
        let mut work = self.begin(memory, engine);
        if let Some(page) = self.indirect {
            let (value, at) = (rng.random(), rng.random_range(0..PAGE / 4) * 4);
            let mut line =
                commands::store_dword(true, engine.scratch_address() + at as u64, value).to_vec();
            line.push(commands::MI_NOOP);
            memory.write(page, 0, &commands::bytes(&line));
            // It runs before the ring.
            let effect = Effect::new(engine.scratch, at, &value.to_le_bytes());
            work.effects.insert(0, effect);
        }
        let stores = rng.random_range(1..=24);
        let first = self.stores(memory, &mut work, stores, rng);
        let second = rng.random_bool(0.3);
        let mut batch = first;
        if second {
            batch.extend(commands::batch_start(
                true,
                self.tables.address(SECOND_BATCH),
            ));
            let mut nested = self.stores(memory, &mut work, 4, rng);
            nested.push(commands::MI_BATCH_BUFFER_END);
            memory.write(self.batches[1], 0, &commands::bytes(&nested));
        }
        batch.push(commands::MI_BATCH_BUFFER_END);
        memory.write(self.batches[0], 0, &commands::bytes(&batch));
        self.emit(
            memory,
            &commands::batch_start(false, self.tables.address(BATCH)),
        );
        if rng.random_bool(0.2) {
            // Bit 3, under its mask.
            let value = 0x0008_0000 | rng.random_range(0..2) << 3;
            self.emit(
                memory,
                &commands::load_register(self.kind.base + 0x244, value),
            );
            work.controls.push(value);
        }
        if rng.random_bool(0.1) {
            let value = rng.random();
            self.emit(
                memory,
                &commands::load_register(self.kind.base + 0x3a8, value),
            );
            work.timestamp = Some(value);
        }
        if self.kind.render && rng.random_bool(0.2) {
            let began = self.timestamp(memory);
            self.emit(memory, &commands::pipe_control_timestamp(0xd0));
            let bytes = u64::from(began).to_le_bytes();
            work.effects.push(Effect::new(engine.status, 0xd0, &bytes));
        }
        self.finish(memory, engine, &mut work);
        work
    }

    /// A workload that runs a batch many times.
    pub fn long_request(&mut self, memory: &mut Memory, engine: &Engine, times: usize) -> Work {
        let mut work = self.begin(memory, engine);
        for _ in 0..times {
            self.emit(
                memory,
                &commands::batch_start(false, self.tables.address(BATCH)),
            );
        }
        self.finish(memory, engine, &mut work);
        work
    }

    /// Writes the batch of [`long_request`](Context::long_request): it stores to the first target all over.
    pub fn long_batch(&mut self, memory: &mut Memory, seed: u32) -> Vec<Effect> {
        let mut batch = Vec::new();
        let mut effects = Vec::new();
        for number in 0..LONG_BATCH {
            let (at, value) = ((number * 16 + 4) % PAGE, seed.wrapping_add(number as u32));
            let address = self.tables.address(TARGETS) + at as u64;
            batch.extend(commands::store_dword(false, address, value));
            effects.push(Effect::new(self.targets[0], at, &value.to_le_bytes()));
        }
        batch.push(commands::MI_BATCH_BUFFER_END);
        memory.write(self.batches[0], 0, &commands::bytes(&batch));
        effects
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

    fn begin(&mut self, memory: &mut Memory, engine: &Engine) -> Work {
        let started = engine.next_seqno().to_le_bytes();
        self.emit(memory, &[commands::MI_ARB_CHECK, commands::MI_NOOP]);
        let value = engine.next_seqno();
        let store = commands::store_qword(true, engine.started_address(), value);
        self.emit(memory, &store);
        Work {
            effects: vec![Effect::new(engine.status, Engine::STARTED, &started)],
            controls: Vec::new(),
            timestamp: None,
            tail: 0,
        }
    }

    fn finish(&mut self, memory: &mut Memory, engine: &Engine, work: &mut Work) {
        let seqno = engine.next_seqno();
        let done = Effect::new(engine.status, Engine::DONE, &seqno.to_le_bytes());
        work.effects.push(done);
        let address = engine.done_address();
        match (self.kind.render, seqno % 2) {
            (true, 0) => self.emit(memory, &commands::pipe_control(address, seqno)),
            (true, _) => {
                let offset = Engine::DONE as u32;
                self.emit(memory, &commands::pipe_control_index(offset, seqno));
            }
            (false, _) => self.emit(memory, &commands::flush_dw(address, seqno)),
        }
        self.emit(memory, &[commands::MI_USER_INTERRUPT, commands::MI_NOOP]);
        if self.tail % 8 != 0 {
            self.emit(memory, &[commands::MI_NOOP]);
        }
        work.tail = self.tail as u32;
        memory.write_u32(self.image[1], TAIL, work.tail);
    }

    /// Commands that store to the targets, or anywhere in them by the large page.
    fn stores(
        &self,
        memory: &Memory,
        work: &mut Work,
        count: usize,
        rng: &mut SmallRng,
    ) -> Vec<u32> {
        let mut batch = Vec::new();
        for _ in 0..count {
            let target = rng.random_range(0..self.targets.len());
            let page = self.targets[target];
            let base = match rng.random_bool(0.2) {
                true => self.tables.huge_address(memory, page),
                false => self.tables.address(TARGETS + target),
            };
            let at = rng.random_range(0..PAGE / 8) * 8;
            let value: u64 = rng.random();
            if rng.random() {
                batch.extend(commands::store_qword(false, base + at as u64, value));
                work.effects
                    .push(Effect::new(page, at, &value.to_le_bytes()));
            } else {
                let value = value as u32;
                batch.extend(commands::store_dword(false, base + at as u64, value));
                work.effects
                    .push(Effect::new(page, at, &value.to_le_bytes()));
            }
        }
        batch
    }

    /// Writes a command at the tail. None goes around the end of the ring.
    fn emit(&mut self, memory: &mut Memory, command: &[u32]) {
        let size = self.ring.len() * PAGE;
        if self.tail + command.len() * 4 > size {
            while self.tail < size {
                self.write_ring(memory, commands::MI_NOOP);
            }
            self.tail = 0;
        }
        for dword in command {
            self.write_ring(memory, *dword);
        }
        self.tail %= size;
    }

    fn write_ring(&mut self, memory: &mut Memory, dword: u32) {
        memory.write_u32(self.ring[self.tail / PAGE], self.tail % PAGE, dword);
        self.tail += 4;
    }

    fn timestamp(&self, memory: &mut Memory) -> u32 {
        self.field(memory, TIMESTAMP)
    }

    fn field(&self, memory: &mut Memory, field: usize) -> u32 {
        let bytes = &memory.model(self.image[1])[field..field + 4];
        u32::from_le_bytes(bytes.try_into().expect("four bytes"))
    }
}

/// Stores of a long batch: what fits into its page.
const LONG_BATCH: usize = PAGE / 16 - 1;

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

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A workload, written into the ring and the batches of its context.

use rand::rngs::SmallRng;
use rand::Rng;

use super::{Context, BATCH, SECOND_BATCH, TAIL, TARGETS};
use crate::commands::{self, Effect};
use crate::engine::Engine;
use crate::memory::{Memory, PAGE};

/// Registers that live in the ring context.
const CTX_CTRL_REGISTER: u32 = 0x244;
const CTX_TIMESTAMP_REGISTER: u32 = 0x3a8;

/// What a workload will do.
#[derive(Debug)]
pub struct Work {
    pub effects: Vec<Effect>,
    pub(super) controls: Vec<u32>,
    pub(super) timestamp: Option<u32>,
    /// Of the ring, behind its commands.
    pub tail: u32,
}

impl Context {
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
        let mut batch = self.stores(memory, &mut work, stores, rng);
        if rng.random_bool(0.3) {
            let second = self.tables.address(SECOND_BATCH);
            batch.extend(commands::batch_start(true, second));
            let mut nested = self.stores(memory, &mut work, 4, rng);
            nested.push(commands::MI_BATCH_BUFFER_END);
            memory.write(self.batches[1], 0, &commands::bytes(&nested));
        }
        batch.push(commands::MI_BATCH_BUFFER_END);
        memory.write(self.batches[0], 0, &commands::bytes(&batch));
        self.run_batch(memory);
        if rng.random_bool(0.2) {
            // Bit 3, under its mask.
            let value = 0x0008_0000 | rng.random_range(0..2) << 3;
            self.load_register(memory, CTX_CTRL_REGISTER, value);
            work.controls.push(value);
        }
        if rng.random_bool(0.1) {
            let value = rng.random();
            self.load_register(memory, CTX_TIMESTAMP_REGISTER, value);
            work.timestamp = Some(value);
        }
        if self.kind.render && rng.random_bool(0.2) {
            let began = u64::from(self.timestamp(memory)).to_le_bytes();
            let at = Engine::TIMESTAMP;
            self.emit(memory, &commands::pipe_control_timestamp(at as u32));
            work.effects.push(Effect::new(engine.status, at, &began));
        }
        self.finish(memory, engine, &mut work);
        work
    }

    /// A workload that runs a batch many times, which stores to the first target all over.
    pub fn long_request(
        &mut self,
        memory: &mut Memory,
        engine: &Engine,
        times: usize,
        rng: &mut SmallRng,
    ) -> Work {
        let mut work = self.begin(memory, engine);
        let mut batch = Vec::new();
        for at in (4..PAGE - 16).step_by(16) {
            let value: u32 = rng.random();
            let address = self.tables.address(TARGETS) + at as u64;
            batch.extend(commands::store_dword(false, address, value));
            let effect = Effect::new(self.targets[0], at, &value.to_le_bytes());
            work.effects.push(effect);
        }
        batch.push(commands::MI_BATCH_BUFFER_END);
        memory.write(self.batches[0], 0, &commands::bytes(&batch));
        for _ in 0..times {
            self.run_batch(memory);
        }
        self.finish(memory, engine, &mut work);
        work
    }

    fn begin(&mut self, memory: &mut Memory, engine: &Engine) -> Work {
        let seqno = engine.next_seqno();
        self.emit(memory, &[commands::MI_ARB_CHECK, commands::MI_NOOP]);
        let store = commands::store_qword(true, engine.started_address(), seqno);
        self.emit(memory, &store);
        let started = Effect::new(engine.status, Engine::STARTED, &seqno.to_le_bytes());
        Work {
            effects: vec![started],
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
            let (address, value) = (base + at as u64, rng.random::<u64>());
            let bytes = value.to_le_bytes();
            // The lower half, or all of it.
            let len = if rng.random() { 8 } else { 4 };
            match len {
                8 => batch.extend(commands::store_qword(false, address, value)),
                _ => batch.extend(commands::store_dword(false, address, value as u32)),
            }
            work.effects.push(Effect::new(page, at, &bytes[..len]));
        }
        batch
    }

    fn run_batch(&mut self, memory: &mut Memory) {
        let batch = self.tables.address(BATCH);
        self.emit(memory, &commands::batch_start(false, batch));
    }

    fn load_register(&mut self, memory: &mut Memory, register: u32, value: u32) {
        let register = self.kind.base + register;
        self.emit(memory, &commands::load_register(register, value));
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
}

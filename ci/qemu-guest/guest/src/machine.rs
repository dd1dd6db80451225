// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The machine: the device with its engines and contexts, and what a driver does with them.

use std::io;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::context::{Context, Shape};
use crate::device::Device;
use crate::engine::{self, Engine, RENDER};
use crate::load::Load;
use crate::memory::Memory;

/// How long a workload may take. The machine may have much else to do.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Interrupt registers: the master, and of the first bank the mask, what has come, and what is let through.
const MASTER_IRQ: u32 = 0x4_4200;
const MASTER: u32 = 1 << 31;
const IMR: u32 = 0x4_4304;
const IIR: u32 = 0x4_4308;
const IER: u32 = 0x4_430c;

/// How a guest says that it wrote page tables: by page, and by entry.
const PAGE_TABLE_WRITTEN: u32 = 0x7_8900;
const ENTRY_WRITTEN: u32 = 0x7_8908;

/// Contexts of the render engine.
const CONTEXTS: u32 = 7;

/// How often registers are compared.
const REGISTERS: u64 = 16;

pub struct Machine {
    pub device: Device,
    pub memory: Memory,
    pub render: Engine,
    pub contexts: Vec<Context>,
    pub load: Option<Load>,
    pub rng: SmallRng,
    /// Which context ran last: its image is not read again, so nobody may change it.
    last: usize,
    pub submissions: u64,
    pub interrupts: u64,
    /// Which interrupts have come.
    seen: u32,
}

impl Machine {
    pub fn new(device: Device, memory: *mut u8, address: u64, seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut memory = Memory::new(memory, address, &mut rng);
        let bar = &device.bar;
        let render = Engine::new(&mut memory, bar, &RENDER);
        let contexts = (1..=CONTEXTS)
            .map(|id| {
                let shape = Shape {
                    ring: if id % 3 == 0 { 4 } else { 1 },
                    four_level: id % 2 == 1,
                    scattered: id % 4 > 1,
                    inhibited: id % 3 == 1,
                    indirect: id % 4 == 1,
                };
                Context::new(&mut memory, bar, &RENDER, id, shape, &mut rng)
            })
            .collect();
        let all = (engine::USER | engine::CONTEXT_SWITCH) * 0x1_0001;
        bar.write(IMR, !all);
        bar.write(IIR, !0);
        bar.write(IER, all);
        bar.write(MASTER_IRQ, MASTER);
        Machine {
            device,
            memory,
            render,
            contexts,
            load: None,
            rng,
            last: 0,
            submissions: 0,
            interrupts: 0,
            seen: 0,
        }
    }

    /// One or two submissions, to their end, and what a driver may do before.
    pub fn step(&mut self) -> io::Result<()> {
        self.meddle();
        let first = self.rng.random_range(0..self.contexts.len());
        let other = |steps| (first + steps) % CONTEXTS as usize;
        let submissions: Vec<Vec<usize>> = match self.rng.random_range(0..10) {
            0 | 1 => vec![vec![first, other(1)]],
            // The second before the first is done.
            2 | 3 => vec![vec![first], vec![other(2)]],
            4 => vec![vec![first, other(3)], vec![other(5)]],
            _ => vec![vec![first]],
        };
        for submission in submissions {
            self.submit(&submission);
        }
        self.wait("render", |machine| machine.render.is_done(&machine.memory))?;
        self.render.complete(&mut self.memory, &self.contexts);
        if self.submissions % REGISTERS == 0 {
            self.render
                .verify_registers(&self.device.bar, &mut self.memory);
            self.verify_ggtt();
        }
        Ok(())
    }

    fn submit(&mut self, numbers: &[usize]) {
        for number in numbers {
            let context = &mut self.contexts[*number];
            let work = context.request(&mut self.memory, &self.render, &mut self.rng);
            self.render.prepare(context, work);
            self.last = *number;
        }
        let contexts: Vec<_> = numbers.iter().map(|at| &self.contexts[*at]).collect();
        let doorbell = self.rng.random_bool(0.8);
        self.render.submit(&self.device.bar, &contexts, doorbell);
        self.submissions += 1;
    }

    /// Changes what a driver may change while no context runs.
    fn meddle(&mut self) {
        let (memory, rng) = (&mut self.memory, &mut self.rng);
        let bar = &self.device.bar;
        let number = rng.random_range(0..self.contexts.len());
        let context = &mut self.contexts[number];
        match rng.random_range(0..16) {
            0 | 1 if number != self.last => context.change_image(memory, rng),
            2 => context.move_page(memory, bar, rng),
            3 => {
                let entry = context.move_target(memory, rng);
                if rng.random() {
                    bar.write(PAGE_TABLE_WRITTEN, (entry >> 12) as u32);
                } else {
                    self.page_table_entry_written(entry);
                }
            }
            _ => {}
        }
    }

    /// Says that an entry of a page table was written.
    pub fn page_table_entry_written(&self, entry: u64) {
        let bar = &self.device.bar;
        bar.write(ENTRY_WRITTEN, entry as u32);
        bar.write(ENTRY_WRITTEN + 4, (entry >> 32) as u32);
    }

    /// Waits for interrupts until something is done. What else is done meanwhile goes on.
    pub fn wait(&mut self, what: &str, done: impl Fn(&Machine) -> bool) -> io::Result<()> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.device.wait(left)? {
                return Err(io::Error::other(self.stuck(what)));
            }
            self.interrupts += 1;
            let bar = &self.device.bar;
            bar.write(MASTER_IRQ, 0);
            let come = bar.read(IIR);
            bar.write(IIR, come);
            bar.write(MASTER_IRQ, MASTER);
            self.device.rearm()?;
            self.seen |= come;
            if let Some(mut load) = self.load.take() {
                load.poll(self);
                self.load = Some(load);
            }
            if done(self) {
                return Ok(());
            }
        }
    }

    /// Whether both interrupts of an engine have come.
    pub fn has_seen_both(&self, engine: &Engine) -> bool {
        let both = engine.interrupts(engine::USER | engine::CONTEXT_SWITCH);
        self.seen & both == both
    }

    fn stuck(&self, what: &str) -> String {
        let bar = &self.device.bar;
        let base = self.render.kind.base;
        let [status, pointers] = [0x234, 0x3a0].map(|register| bar.read(base + register));
        let [master, iir] = [MASTER_IRQ, IIR].map(|register| bar.read(register));
        format!(
            "no interrupt of {what} within {DEADLINE:?}: submission {}, status {status:#x}, pointers \
             {pointers:#x}, master {master:#x}, come {iir:#x}",
            self.submissions
        )
    }

    fn verify_ggtt(&mut self) {
        let context = &self.contexts[self.last];
        for (at, page) in context.image.iter().enumerate().take(2) {
            let got = self.device.bar.read_ggtt(context.lrca + at as u32);
            let expected = self.memory.address(*page) | 1;
            self.memory.verified.bytes += 8;
            if got != expected {
                let what = || format!("an entry of the GGTT is {got:#x}, not {expected:#x}");
                self.memory.verified.wrong(8, what);
            }
        }
    }
}

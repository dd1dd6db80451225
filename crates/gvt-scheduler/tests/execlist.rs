// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the guest reads of its submissions, in registers and in the status page, is what a naive model
//! says, for any sequence of submissions and completions.

mod common;

use std::collections::VecDeque;

use common::{Context, FaultyEngine, Guest, REQUEST};
use gvt_scheduler::{
    ring_context, ring_register, AccessCounts, EngineId, Generation, SimulatedEngine, VgpuConfig,
};
use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;
use vm_memory::{Bytes, GuestAddress};

/// Contexts of an engine.
const CONTEXTS: usize = 3;
/// Status pages, one an engine, begin here.
const STATUS_PAGES: u32 = 0x180;

#[derive(Clone, Debug)]
enum Step {
    /// One element, or two.
    Submit {
        engine: usize,
        first: usize,
        second: Option<usize>,
    },
    Run {
        engine: usize,
    },
    /// The workload fails once it is scheduled in.
    Fail {
        engine: usize,
    },
    Reset {
        engine: usize,
    },
    /// The guest writes the pointers of the buffer, under a mask.
    Pointers {
        engine: usize,
        value: u32,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let engine = 0..EngineId::ALL.len();
    let pointer = prop_oneof![0..6u32, Just(7)];
    prop_oneof![
        4 => (engine.clone(), 0..CONTEXTS, prop::option::of(0..CONTEXTS)).prop_map(
            |(engine, first, second)| Step::Submit {
                engine,
                first,
                // Two elements of one context are not a submission the hardware knows.
                second: second.filter(|second| *second != first),
            }
        ),
        6 => engine.clone().prop_map(|engine| Step::Run { engine }),
        2 => engine.clone().prop_map(|engine| Step::Fail { engine }),
        1 => engine.clone().prop_map(|engine| Step::Reset { engine }),
        1 => (engine, pointer.clone(), pointer, any::<[bool; 2]>()).prop_map(
            |(engine, write, read, [write_too, read_too])| {
                let mask = (u32::from(write_too) * 0x7) | (u32::from(read_too) * 0x700);
                Step::Pointers { engine, value: mask << 16 | read << 8 | write }
            }
        ),
    ]
}

/// An engine as its guest sees it: no slots that are pointed to, but submissions with what is left of
/// each.
struct Model {
    /// Workloads that were submitted, with the submission of each first one.
    queue: VecDeque<(u32, Option<Vec<u32>>)>,
    /// The submissions the hardware has, and in which of its two slots each is.
    hardware: VecDeque<(usize, Vec<u32>)>,
    next_slot: usize,
    buffer: [u64; 6],
    write: u32,
    read: u32,
    status_page: [u64; 6],
    status_page_pointer: u32,
    events: usize,
}

impl Model {
    fn new() -> Self {
        Model {
            queue: VecDeque::new(),
            hardware: VecDeque::new(),
            next_slot: 0,
            buffer: [0; 6],
            write: 7,
            read: 0,
            status_page: [0; 6],
            status_page_pointer: 0,
            events: 0,
        }
    }

    fn submit(&mut self, ids: Vec<u32>) {
        let mut submission = Some(ids.clone());
        for id in ids {
            self.queue.push_back((id, submission.take()));
        }
    }

    fn event(&mut self, reasons: u32, id: u32) {
        self.write = if self.write == 7 {
            0
        } else {
            (self.write + 1) % 6
        };
        let event = u64::from(id) << 32 | u64::from(reasons);
        self.buffer[self.write as usize] = event;
        self.status_page[self.write as usize] = event;
        self.status_page_pointer = self.write;
        self.events += 1;
    }

    /// The workload at the head of the queue runs to its end, or fails before; the errno then.
    fn run(&mut self, fails: bool) -> Option<Result<(), i32>> {
        let (id, submission) = self.queue.pop_front()?;
        if let Some(ids) = submission {
            let continues = self
                .hardware
                .front()
                .is_some_and(|(_, left)| *left == [ids[0]]);
            let slot = self.next_slot;
            match self.hardware.len() {
                0 => self.event(0x1, 0),
                1 if continues => {
                    self.hardware.clear();
                    self.event(0x8002, ids[0]);
                }
                1 => {}
                _ => {
                    self.queue.clear();
                    return Some(Err(libc::EINVAL));
                }
            }
            self.hardware.push_back((slot, ids));
            self.next_slot = 1 - self.hardware[0].0;
        }
        if fails {
            self.queue.clear();
            return Some(Err(libc::EIO));
        }
        if self.queue.front().is_some_and(|(next, _)| *next == id) {
            return Some(Ok(()));
        }
        let Some((_, left)) = self.hardware.front_mut().filter(|(_, left)| left[0] == id) else {
            self.queue.clear();
            return Some(Err(libc::EINVAL));
        };
        left.remove(0);
        if left.is_empty() {
            self.hardware.pop_front();
            self.event(0x18, id);
            if let Some((slot, _)) = self.hardware.front() {
                self.next_slot = 1 - slot;
                self.event(0x1, 0);
            }
        } else {
            self.event(0x14, id);
        }
        Some(Ok(()))
    }

    /// EXECLIST_STATUS: the slot that runs is the current one and the only one that is valid, the other is
    /// written next.
    fn status(&self) -> [u32; 2] {
        let pointers = (1 - self.next_slot as u32) | (self.next_slot as u32) << 1;
        // Before the first submission nothing is current.
        let pointers = if self.events == 0 { 0 } else { pointers };
        let Some((slot, left)) = self.hardware.front() else {
            return [pointers, 0];
        };
        let active = if *slot == 0 {
            1 << 4 | 1 << 18
        } else {
            1 << 3 | 1 << 17
        };
        let full = u32::from(self.hardware.len() == 2) << 2;
        [pointers | active | full, left[0]]
    }
}

struct Test {
    guest: Guest<(), AccessCounts>,
    models: Vec<Model>,
    contexts: Vec<Vec<(Context, u32)>>,
}

impl Test {
    fn new(generation: Generation) -> Self {
        let config = VgpuConfig {
            generation,
            ..VgpuConfig::default()
        };
        let mut guest = Guest::with(config, (), AccessCounts::default());
        let mut contexts = Vec::new();
        for (engine, page) in EngineId::ALL.into_iter().zip(STATUS_PAGES..) {
            let base = engine.mmio_base();
            let hws_pga = base + ring_register::HWS_PGA;
            guest.vgpu.mmio_write(hws_pga, page << 12).unwrap();
            let contexts_of = (0..CONTEXTS as u32).map(|number| {
                let id = 1 + number;
                let lrca = 0x10 + 0x18 * (3 * engine as u32 + number);
                (guest.context(engine, lrca, id), REQUEST)
            });
            contexts.push(contexts_of.collect());
        }
        let models = EngineId::ALL.map(|_| Model::new());
        Test {
            guest,
            models: models.into(),
            contexts,
        }
    }

    fn perform(&mut self, step: Step) -> TestCaseResult {
        match step {
            Step::Submit {
                engine,
                first,
                second,
            } => {
                let mut submitted = Vec::new();
                for number in [Some(first), second].into_iter().flatten() {
                    let (context, tail) = &mut self.contexts[engine][number];
                    // Commands are added to the ring, around its end.
                    *tail = (*tail + REQUEST) % 0x4000;
                    self.guest.set(context, ring_context::TAIL, *tail);
                    submitted.push(*context);
                }
                let ids = submitted.iter().map(|context| context.id).collect();
                let submission = self.guest.submit(&submitted).unwrap();
                prop_assert_eq!(submission.workloads, submitted.len());
                self.models[engine].submit(ids);
            }
            Step::Run { engine } => self.run(engine, false)?,
            Step::Fail { engine } => self.run(engine, true)?,
            Step::Reset { engine } => {
                self.guest.vgpu.reset_engine(EngineId::ALL[engine]);
                let model = &mut self.models[engine];
                // What is in memory stays there.
                *model = Model {
                    status_page: model.status_page,
                    status_page_pointer: model.status_page_pointer,
                    ..Model::new()
                };
            }
            Step::Pointers { engine, value } => {
                let register =
                    EngineId::ALL[engine].mmio_base() + ring_register::CONTEXT_STATUS_POINTER;
                self.guest.vgpu.mmio_write(register, value).unwrap();
                let model = &mut self.models[engine];
                if value & 0x7 << 16 != 0 {
                    model.write = value & 0x7;
                }
                if value & 0x700 << 16 != 0 {
                    model.read = value >> 8 & 0x7;
                }
            }
        }
        self.compare()
    }

    fn run(&mut self, engine: usize, fails: bool) -> TestCaseResult {
        let model = &mut self.models[engine];
        let before = model.events;
        let expected = model.run(fails);
        let told = model.events - before;
        let engine = EngineId::ALL[engine];
        let ran = if fails {
            self.guest.vgpu.run_next(engine, &mut FaultyEngine)
        } else {
            let mut hw = SimulatedEngine::new();
            self.guest.vgpu.run_next(engine, &mut hw)
        };
        match ran {
            Ok(None) => prop_assert_eq!(expected, None),
            Ok(Some(completion)) => {
                prop_assert_eq!(expected, Some(Ok(())));
                prop_assert_eq!(completion.events, told);
            }
            Err(error) => prop_assert_eq!(expected, Some(Err(error.errno())), "{}", error),
        }
        Ok(())
    }

    fn compare(&self) -> TestCaseResult {
        for ((engine, model), page) in EngineId::ALL
            .into_iter()
            .zip(&self.models)
            .zip(STATUS_PAGES..)
        {
            let read = |offset| self.guest.vgpu.mmio_read(engine.mmio_base() + offset);
            let status = [0, 4].map(|dword| read(ring_register::EXECLIST_STATUS + dword));
            prop_assert_eq!(status, model.status(), "{:?}: {:x?}", engine, status);
            let pointers = read(ring_register::CONTEXT_STATUS_POINTER);
            prop_assert_eq!(pointers, model.read << 8 | model.write);
            for (slot, event) in (0..).zip(model.buffer) {
                let at = ring_register::CONTEXT_STATUS_BUFFER + 8 * slot;
                let found = u64::from(read(at + 4)) << 32 | u64::from(read(at));
                prop_assert_eq!(found, event);
            }
            let page = u64::from(page) << 12;
            for (slot, event) in (0..).zip(model.status_page) {
                let at = GuestAddress(page + 0x40 + 8 * slot);
                let found: u64 = self.guest.memory.read_obj(at).unwrap();
                prop_assert_eq!(found, event);
            }
            let at = GuestAddress(page + 0x7c);
            let found: u32 = self.guest.memory.read_obj(at).unwrap();
            prop_assert_eq!(found, model.status_page_pointer);
            prop_assert_eq!(self.guest.vgpu.queued(engine), model.queue.len());
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_guest_reads_what_the_model_says(
        gen8 in any::<bool>(),
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let generation = if gen8 { Generation::Gen8 } else { Generation::Gen9 };
        let mut test = Test::new(generation);
        for step in steps {
            test.perform(step)?;
        }
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An engine as a driver has it: what was submitted, and how it is seen that it is done.

use std::time::Instant;

use crate::context::{Context, Work};
use crate::machine::DEADLINE;
use crate::memory::{Memory, Page};
use crate::pci::Bar;

/// What engines differ in.
#[derive(Debug)]
pub struct Kind {
    pub name: &'static str,
    /// Where its registers begin.
    pub base: u32,
    /// Pages of a context's image.
    pub pages: usize,
    /// Whether it has PIPE_CONTROL instead of MI_FLUSH_DW, and batches that run before the ring.
    pub render: bool,
    /// By how much its bits are shifted in the interrupt registers.
    shift: u32,
    doorbell: u32,
    reset: u32,
    /// Entries of the GGTT for its own pages.
    ggtt: u32,
}

pub static RENDER: Kind = Kind {
    name: "render",
    base: 0x2000,
    pages: 22,
    render: true,
    shift: 0,
    doorbell: 0,
    reset: 1 << 1,
    ggtt: 0x10,
};

pub static BLITTER: Kind = Kind {
    name: "blitter",
    base: 0x2_2000,
    pages: 2,
    render: false,
    shift: 16,
    doorbell: 4,
    reset: 1 << 3,
    ggtt: 0x20,
};

/// Registers of an engine, from its base.
const RING_TAIL: u32 = 0x30;
const RING_HEAD: u32 = 0x34;
const HWS_PGA: u32 = 0x80;
const ELSP: u32 = 0x230;
const EXECLIST_STATUS: u32 = 0x234;
const CONTEXT_STATUS: u32 = 0x370;
const CONTEXT_STATUS_POINTER: u32 = 0x3a0;

/// Those of the device.
const GDRST: u32 = 0x941c;
const DOORBELL: u32 = 0x7_8920;

/// Both interrupts of an engine: user, context switch.
pub const USER: u32 = 1 << 0;
pub const CONTEXT_SWITCH: u32 = 1 << 8;

/// Context status events.
const IDLE_TO_ACTIVE: u32 = 1 << 0;
const ELEMENT_SWITCH: u32 = 1 << 2;
const ACTIVE_TO_IDLE: u32 = 1 << 3;
const COMPLETE: u32 = 1 << 4;

/// The write pointer before the first event, and how many entries there are.
const NOTHING_YET: u32 = 7;
const ENTRIES: u32 = 6;

#[derive(Debug)]
pub struct Engine {
    pub kind: &'static Kind,
    /// The hardware status page.
    pub status: Page,
    /// A page that its rings write through the GGTT.
    pub scratch: Page,
    /// Workloads so far.
    sequence: u64,
    seqno: u64,
    /// Write pointer of the context status buffer, when all that was submitted is done.
    pointer: u32,
    /// What it was when all was done last, and the tail of the ring that ran last.
    completed: (u32, u32),
    submitted: Vec<Submitted>,
    /// What was written to the submission port last.
    last: Vec<u64>,
}

#[derive(Debug)]
struct Submitted {
    /// The context, by its identifier.
    id: u32,
    work: Work,
    sequence: u64,
    /// Reasons and contexts.
    events: Vec<(u32, u32)>,
}

impl Engine {
    /// Where its workloads say that they have begun, and that they are done, in the status page.
    pub const STARTED: usize = 0xc8;
    pub const DONE: usize = 0xc0;
    /// Where some of them write the time stamp.
    pub const TIMESTAMP: usize = 0xd0;
    const EVENTS: usize = 0x40;
    const POINTER: usize = 0x7c;

    pub fn new(memory: &mut Memory, bar: &Bar, kind: &'static Kind) -> Self {
        let [status, scratch] = [memory.take_one(), memory.take_one()];
        for (at, page) in [(0, status), (1, scratch)] {
            bar.write_ggtt(kind.ggtt + at, memory.address(page) | 1, true);
        }
        for offset in [Self::STARTED, Self::DONE] {
            memory.write_u64(status, offset, 0);
        }
        memory.write_u32(status, Self::POINTER, NOTHING_YET);
        bar.write(kind.base + HWS_PGA, kind.ggtt << 12);
        Engine {
            kind,
            status,
            scratch,
            sequence: 0,
            seqno: 0,
            pointer: NOTHING_YET,
            completed: (NOTHING_YET, 0),
            submitted: Vec::new(),
            last: Vec::new(),
        }
    }

    /// What the next workload says.
    pub fn next_seqno(&self) -> u64 {
        self.seqno + 1
    }

    pub fn started_address(&self) -> u64 {
        u64::from(self.kind.ggtt << 12) + Self::STARTED as u64
    }

    pub fn done_address(&self) -> u32 {
        (self.kind.ggtt << 12) + Self::DONE as u32
    }

    pub fn scratch_address(&self) -> u64 {
        u64::from(self.kind.ggtt + 1) << 12
    }

    /// Its bits in the interrupt registers.
    pub fn interrupts(&self, of: u32) -> u32 {
        of << self.kind.shift
    }

    /// Notes a workload that is written into its context; they are submitted in this order.
    pub fn prepare(&mut self, context: &Context, work: Work) {
        self.submitted.push(Submitted {
            id: context.id,
            work,
            sequence: self.sequence,
            events: Vec::new(),
        });
        self.sequence += 1;
        self.seqno += 1;
    }

    /// Submits what was prepared for one or two contexts.
    pub fn submit(&mut self, bar: &Bar, contexts: &[&Context], doorbell: bool) {
        let descriptors: Vec<_> = contexts
            .iter()
            .map(|context| context.descriptor())
            .collect();
        let first = self.submitted.len() - contexts.len();
        for (at, submitted) in self.submitted[first..].iter_mut().enumerate() {
            if at == 0 {
                submitted.events.push((IDLE_TO_ACTIVE, 0));
            }
            let switch = match at + 1 == contexts.len() {
                true => ACTIVE_TO_IDLE,
                false => ELEMENT_SWITCH,
            };
            submitted.events.push((COMPLETE | switch, submitted.id));
            for _ in &submitted.events {
                self.pointer = next(self.pointer);
            }
        }
        if doorbell && descriptors == self.last {
            bar.write(DOORBELL + 4 * self.kind.doorbell, 1);
            return;
        }
        let [one, two] = [0, 1].map(|at| descriptors.get(at).copied().unwrap_or(0));
        for dword in [
            (two >> 32) as u32,
            two as u32,
            (one >> 32) as u32,
            one as u32,
        ] {
            bar.write(self.kind.base + ELSP, dword);
        }
        self.last = descriptors;
    }

    /// Whether all that was submitted is done. The device writes the pointer last.
    pub fn is_done(&self, memory: &Memory) -> bool {
        memory.read_u64(self.status, Self::DONE) == self.seqno
            && memory.read_u32(self.status, Self::POINTER) == self.pointer
    }

    /// Where the engine says which workload it has begun, and which was the last it has done.
    pub fn progress(&self, memory: &Memory) -> [*const u32; 2] {
        [Self::STARTED, Self::DONE].map(|offset| memory.word(self.status, offset))
    }

    /// What it has done goes into the model, and is compared. How many workloads that was.
    pub fn complete(&mut self, memory: &mut Memory, contexts: &[Context]) -> usize {
        let done = std::mem::take(&mut self.submitted);
        let context = |id| contexts.iter().find(|context| context.id == id);
        let (mut slot, mut tail) = self.completed;
        for submitted in &done {
            for (reasons, id) in &submitted.events {
                slot = next(slot);
                let at = Self::EVENTS + 8 * slot as usize;
                memory.expect(self.status, at, &reasons.to_le_bytes());
                memory.expect(self.status, at + 4, &id.to_le_bytes());
                memory.expect(self.status, Self::POINTER, &slot.to_le_bytes());
            }
            if let Some(context) = context(submitted.id) {
                context.complete(memory, &submitted.work, submitted.sequence);
            }
            tail = submitted.work.tail;
        }
        self.completed = (slot, tail);
        let name = self.kind.name;
        for Submitted { id, sequence, .. } in &done {
            let what = format!("{name} workload {sequence}, context {id}");
            memory.verify(&what, context(*id).into_iter().flat_map(Context::pages));
        }
        memory.verify(name, [self.status, self.scratch]);
        done.len()
    }

    /// Resets it in the middle of a workload, which leaves what it has written until then. The context status
    /// buffer is empty. Whether the workload was done all the same.
    pub fn reset(&mut self, bar: &Bar, memory: &mut Memory) -> bool {
        bar.write(GDRST, self.kind.reset);
        // The answer comes when the engine has come to its end.
        bar.read(GDRST);
        let done = memory.read_u64(self.status, Self::DONE) == self.seqno;
        self.submitted.clear();
        self.last.clear();
        memory.adopt(self.status);
        memory.write_u64(self.status, Self::STARTED, self.seqno);
        memory.write_u64(self.status, Self::DONE, self.seqno);
        memory.write_u32(self.status, Self::POINTER, NOTHING_YET);
        self.pointer = NOTHING_YET;
        self.completed.0 = NOTHING_YET;
        done
    }

    /// Compares the registers with what the memory is to be, while the engine does nothing.
    pub fn verify_registers(&self, bar: &Bar, memory: &mut Memory) {
        let name = self.kind.name;
        let base = self.kind.base;
        // An interrupt of before may have woken us between the status page and the registers.
        let deadline = Instant::now() + DEADLINE;
        while bar.read(base + CONTEXT_STATUS_POINTER) & 0x7 != self.pointer
            && Instant::now() < deadline
        {
            std::thread::yield_now();
        }
        let status = *memory.model(self.status);
        let mut check = |what: &str, register, expected, mask| {
            let got = bar.read(base + register) & mask;
            let what = format!("{what} of {name}");
            memory.verified.value(&what, got, expected);
        };
        check(
            "EXECLIST_STATUS, without its pointers,",
            EXECLIST_STATUS,
            0,
            !0x3,
        );
        check("the running context", EXECLIST_STATUS + 4, 0, !0);
        check(
            "the write pointer",
            CONTEXT_STATUS_POINTER,
            self.pointer,
            0x7,
        );
        check("RING_TAIL", RING_TAIL, self.completed.1, !0);
        // Its upper bits count how often it went around.
        check("RING_HEAD", RING_HEAD, self.completed.1, 0x1f_ffff);
        // Before there were as many events memory has something else there.
        if self.sequence >= u64::from(ENTRIES) {
            for dword in 0..2 * ENTRIES {
                let at = Self::EVENTS + 4 * dword as usize;
                let expected = u32::from_le_bytes([0, 1, 2, 3].map(|byte| status[at + byte]));
                check("a context status", CONTEXT_STATUS + 4 * dword, expected, !0);
            }
        }
        // The driver has seen them all.
        bar.write(
            base + CONTEXT_STATUS_POINTER,
            0x0700_0000 | self.pointer << 8,
        );
    }
}

/// The entry behind one.
fn next(pointer: u32) -> u32 {
    match pointer {
        NOTHING_YET => 0,
        pointer => (pointer + 1) % ENTRIES,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_write_pointer_begins_behind_7_and_wraps_behind_5() {
        let pointers: Vec<_> = std::iter::successors(Some(NOTHING_YET), |at| Some(next(*at)))
            .take(9)
            .collect();
        assert_eq!(pointers, [7, 0, 1, 2, 3, 4, 5, 0, 1]);
    }
}

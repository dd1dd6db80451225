// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An independent model of what guest memory must hold after a replay.
//!
//! It shares no code with the scheduler, the IO address space or vm-memory: a map of pages for
//! memory, a map for the GGTT, and the arithmetic of the simulated engine written down once more.
//! It copies no runs and skips nothing: how pages are copied must not show in memory.

use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::plan::{Action, EngineInfo, Event, Plan, ENGINES};

const PAGE: usize = 4096;
const HWS_PGA: u32 = 0x80;
const CSB_IN_HWSP: u64 = 0x40;
const CSB_POINTER_IN_HWSP: u64 = 0x7c;
const CSB_ENTRIES: u32 = 6;
const CSB_POINTER: u32 = 0x3a0;
const CSB_POINTER_BITS: u32 = 7;
/// No event was written yet.
const CSB_RESET: u32 = 7;
const TAIL_BITS: u32 = 0x1f_fff8;
const IDLE_TO_ACTIVE: u32 = 1 << 0;
const ACTIVE_TO_IDLE: u32 = 1 << 3;
const CONTEXT_COMPLETE: u32 = 1 << 4;
const RING_CONTEXT_BYTES: usize = 208;

type Page = [u8; PAGE];

/// What guest memory must hold.
///
/// ```
/// use gvt_replay::aub::Trace;
/// use gvt_replay::{Contiguity, Model, Plan};
///
/// let profile = Contiguity::bundled("consecutive").expect("a bundled profile");
/// let plan = Plan::new(&Trace::bundled()?, &profile)?;
/// let model = Model::after(&plan)?;
/// let last_page = plan.contexts()[0].pages[19];
/// assert!(model.page(last_page).is_some_and(|bytes| bytes.iter().any(|byte| *byte != 0)));
/// # Ok::<(), gvt_replay::Error>(())
/// ```
#[derive(Debug, Default)]
pub struct Model {
    memory: HashMap<u64, Box<Page>>,
    ggtt: HashMap<u32, u64>,
    registers: HashMap<u32, u32>,
    /// Write pointer of the context status buffer, by engine.
    csb_pointers: HashMap<u32, u32>,
    sequence: u64,
}

impl Model {
    /// What guest memory must hold after all that `plan` does.
    ///
    /// # Errors
    ///
    /// [`Error::NotMapped`] if a submission uses a graphics address without a GGTT entry.
    pub fn after(plan: &Plan) -> Result<Self> {
        let mut model = Model::default();
        for event in plan.events() {
            model.play(event)?;
        }
        Ok(model)
    }

    /// What one event does to guest memory; the addresses of the copied context pages if it is a
    /// submission.
    ///
    /// # Errors
    ///
    /// As [`Model::after`].
    pub fn play(&mut self, event: &Event) -> Result<Option<Vec<u64>>> {
        match &event.action {
            Action::Write { gpa, data } => self.write(*gpa, data),
            Action::GgttEntry { index, value } => {
                self.ggtt.insert(*index, *value);
            }
            Action::RegisterWrite { register, value } => {
                self.write_register(*register, *value);
            }
            Action::RegisterPoll { .. } => {}
            Action::Submit { engine, dwords } => {
                return self.run(event.offset, engine, dwords).map(Some);
            }
        }
        Ok(None)
    }

    /// The bytes of the page at `gpa`; `None` if they are all zero.
    pub fn page(&self, gpa: u64) -> Option<&[u8; PAGE]> {
        self.memory.get(&(gpa / PAGE as u64)).map(Box::as_ref)
    }

    /// Addresses of the pages that were ever written, in no order.
    pub fn pages(&self) -> impl Iterator<Item = u64> + '_ {
        self.memory.keys().map(|page| page * PAGE as u64)
    }

    fn write(&mut self, gpa: u64, data: &[u8]) {
        let mut gpa = gpa;
        let mut rest = data;
        while !rest.is_empty() {
            let start = (gpa % PAGE as u64) as usize;
            let (now, later) = rest.split_at(rest.len().min(PAGE - start));
            let page = self
                .memory
                .entry(gpa / PAGE as u64)
                .or_insert_with(|| Box::new([0; PAGE]));
            page[start..start + now.len()].copy_from_slice(now);
            gpa = gpa.wrapping_add(now.len() as u64);
            rest = later;
        }
    }

    fn write_register(&mut self, register: u32, value: u32) {
        self.registers.insert(register, value);
        if ENGINES.iter().any(|e| e.base + CSB_POINTER == register) {
            let mask = value >> 16 & CSB_POINTER_BITS;
            let pointer = self.csb_pointer(register - CSB_POINTER);
            *pointer = (*pointer & !mask) | (value & mask);
        }
    }

    fn csb_pointer(&mut self, engine_base: u32) -> &mut u32 {
        self.csb_pointers.entry(engine_base).or_insert(CSB_RESET)
    }

    fn read_page(&self, gpa: u64) -> Page {
        self.page(gpa).copied().unwrap_or([0; PAGE])
    }

    fn translate(&self, graphics_page: u32) -> Option<u64> {
        let entry = self.ggtt.get(&graphics_page)?;
        (entry & 1 == 1).then_some(entry & 0x3fff_ffff_f000)
    }

    /// One workload alone: the context is loaded, the engine changes it, it is saved.
    fn run(&mut self, offset: u64, engine: &EngineInfo, dwords: &[u32; 4]) -> Result<Vec<u64>> {
        let [_, _, context_id, descriptor] = *dwords;
        let lrca = descriptor >> 12;
        let gpa_of = |index: u32| {
            self.translate(lrca + index).ok_or(Error::NotMapped {
                offset,
                address: u64::from(lrca + index) << 12,
            })
        };
        let page1_gpa = gpa_of(1)?;
        let gpas = (2..2 + engine.copied_pages as u32)
            .map(gpa_of)
            .collect::<Result<Vec<u64>>>()?;

        let mut page1 = self.read_page(page1_gpa);
        let mut pages: Vec<Page> = gpas.iter().map(|gpa| self.read_page(*gpa)).collect();
        // The first event names no context.
        self.context_event(engine, IDLE_TO_ACTIVE, 0);

        let sequence = self.sequence;
        self.sequence += 1;
        if page1[0x0c] & 1 != 0 {
            pages.fill([0; PAGE]);
            page1[0x0c] &= !1;
        }
        churn(
            &mut page1[RING_CONTEXT_BYTES..],
            RING_CONTEXT_BYTES,
            1,
            sequence,
        );
        for (page, index) in pages.iter_mut().zip(2..) {
            churn(page, 0, index, sequence);
        }
        let timestamp = dword(&page1, 0x8c).wrapping_add(1000u32.wrapping_add(sequence as u32));
        let tail = dword(&page1, 0x1c) & TAIL_BITS;

        for (gpa, page) in gpas.iter().zip(&pages) {
            self.write(*gpa, page);
        }
        self.write(page1_gpa + 0x14, &tail.to_le_bytes());
        self.write(page1_gpa + 0x0c, &page1[0x0c..0x10]);
        self.write(page1_gpa + 0x8c, &timestamp.to_le_bytes());
        let rest = RING_CONTEXT_BYTES as u64;
        self.write(page1_gpa + rest, &page1[RING_CONTEXT_BYTES..]);
        self.context_event(engine, CONTEXT_COMPLETE | ACTIVE_TO_IDLE, context_id);
        Ok(gpas)
    }

    /// A context status event lands in the engine's hardware status page, if it has one.
    fn context_event(&mut self, engine: &EngineInfo, status: u32, context_id: u32) {
        let pointer = self.csb_pointer(engine.base);
        *pointer = match *pointer {
            CSB_RESET => 0,
            entry => (entry + 1) % CSB_ENTRIES,
        };
        let entry = *pointer;
        // A register that was never written reads 0.
        let hwsp = self.registers.get(&(engine.base + HWS_PGA));
        let Some(hwsp) = self.translate(hwsp.map_or(0, |address| address >> 12)) else {
            return;
        };
        let event = u64::from(context_id) << 32 | u64::from(status);
        self.write(
            hwsp + CSB_IN_HWSP + 8 * u64::from(entry),
            &event.to_le_bytes(),
        );
        self.write(hwsp + CSB_POINTER_IN_HWSP, &entry.to_le_bytes());
    }
}

/// What the simulated engine does to the bytes of context page `page` from byte `from` on.
fn churn(bytes: &mut [u8], from: usize, page: u64, sequence: u64) {
    let key = 0x5a + 31 * page + 113u64.wrapping_mul(sequence);
    for (byte, at) in bytes.iter_mut().zip(from as u64..) {
        let change = key.wrapping_add(7 * at + (at >> 8) * 3) as u8;
        *byte = byte.rotate_left(1) ^ change;
    }
}

fn dword(page: &Page, at: usize) -> u32 {
    u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_engine_is_as_its_description_says() {
        let mut bytes = [0x81u8; 4096];
        churn(&mut bytes, 0, 3, 5);
        for (i, byte) in bytes.iter().enumerate() {
            let i = i as u64;
            let expected =
                0x81u8.rotate_left(1) ^ (0x5a + 31 * 3 + 7 * i + 113 * 5 + (i >> 8) * 3) as u8;
            assert_eq!(*byte, expected, "byte {i}");
        }
    }

    #[test]
    fn events_go_around_the_six_entries() {
        let mut model = Model::default();
        let engine = &ENGINES[0];
        model.registers.insert(0x2080, 0x5000);
        model.ggtt.insert(5, 0x9001);
        for event in 0..7 {
            model.context_event(engine, event, 0);
        }
        let page = model.read_page(0x9000);
        assert_eq!((page[0x40], page[0x48], page[0x68]), (6, 1, 5));
        assert_eq!(dword(&page, 0x7c), 0);
    }
}

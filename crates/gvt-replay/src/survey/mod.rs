// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A first pass over a trace: which physical pages it uses, and what for.

mod recorded;

use std::collections::{BTreeSet, HashMap, HashSet};

use crate::aub::{is_submission_port, PacketKind, Space, Trace, ELSP_DWORDS};
use crate::error::{Error, Result};
use crate::layout::{guest_pages, PAGE_SIZE};
use crate::plan::{EngineInfo, ENGINES};

pub(crate) use recorded::{entry_page, ggtt_entries, ring_context, Piece, RecordedMachine};

/// Bytes of the ring the recorder makes up for a submission.
pub(crate) const RECORDER_RING_BYTES: usize = 16;
/// MI_BATCH_BUFFER_START of 3 dwords into the PPGTT, the only command in it.
pub(crate) const BATCH_BUFFER_START: u32 = 0x1880_0101;

const ENTRIES: usize = 512;
const ROOT_LEVEL: u8 = 4;

/// A context object by the trace's physical page numbers.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct TraceContext {
    pub(crate) engine: &'static EngineInfo,
    pub(crate) lrca: u32,
    /// Pages 2 and on.
    pub(crate) copied: Vec<u64>,
}

/// Collects the dwords of submissions by port; the fourth gives all four.
#[derive(Default)]
pub(crate) struct Ports(HashMap<u32, Vec<u32>>);

impl Ports {
    /// `None` if the register is no submission port, else the engine and, with the fourth dword,
    /// the submission.
    pub(crate) fn write(
        &mut self,
        register: u32,
        value: u32,
    ) -> Option<(&'static EngineInfo, Option<[u32; ELSP_DWORDS]>)> {
        if !is_submission_port(register) {
            return None;
        }
        let engine = ENGINES.iter().rev().find(|engine| engine.base < register)?;
        let dwords = self.0.entry(register).or_default();
        dwords.push(value);
        let submission = <[u32; ELSP_DWORDS]>::try_from(dwords.as_slice()).ok();
        if submission.is_some() {
            dwords.clear();
        }
        Some((engine, submission))
    }
}

/// Which physical pages a trace uses, and what for.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    machine: RecordedMachine,
    /// In the order the trace first names them.
    pages: Vec<u64>,
    known: HashSet<u64>,
    contexts: Vec<TraceContext>,
    known_contexts: HashSet<TraceContext>,
    /// Page tables by page; bit n stands for level n.
    tables: HashMap<u64, u8>,
    /// Entries of known tables that were written since the last submission.
    dirty: BTreeSet<(u64, usize)>,
    ring_contexts: HashSet<u64>,
    /// Those of contexts with a ring that the recorder made up, and the pages of these rings.
    recorder_ring_contexts: HashSet<u64>,
    recorder_rings: HashSet<u64>,
    submissions: u64,
}

impl Survey {
    pub(crate) fn of(trace: &Trace) -> Result<Self> {
        let mut survey = Survey::default();
        let mut ports = Ports::default();
        for packet in trace.packets() {
            match &packet.kind {
                PacketKind::MemoryWrite {
                    space,
                    address,
                    data,
                } => survey.write(packet.offset, *space, *address, trace.bytes(data))?,
                PacketKind::RegisterWrite { register, value } => {
                    if let Some((engine, Some(dwords))) = ports.write(*register, *value) {
                        survey.submit(packet.offset, engine, dwords)?;
                    }
                }
                PacketKind::RegisterPoll { .. } => {}
            }
        }
        Ok(survey)
    }

    pub(crate) fn pages(&self) -> impl Iterator<Item = u64> + '_ {
        self.pages.iter().copied()
    }

    pub(crate) fn contexts(&self) -> &[TraceContext] {
        &self.contexts
    }

    pub(crate) fn submissions(&self) -> u64 {
        self.submissions
    }

    pub(crate) fn is_table(&self, page: u64) -> bool {
        self.tables.contains_key(&page)
    }

    pub(crate) fn is_ring_context(&self, page: u64) -> bool {
        self.ring_contexts.contains(&page)
    }

    /// Whether the context with this page 1 has a ring that the recorder made up.
    pub(crate) fn has_recorder_ring(&self, page1: u64) -> bool {
        self.recorder_ring_contexts.contains(&page1)
    }

    pub(crate) fn is_recorder_ring(&self, page: u64) -> bool {
        self.recorder_rings.contains(&page)
    }

    pub(crate) fn has_recorder_rings(&self) -> bool {
        !self.recorder_rings.is_empty()
    }

    fn use_page(&mut self, offset: u64, page: u64) -> Result<()> {
        if !self.known.insert(page) {
            return Ok(());
        }
        self.pages.push(page);
        // One page less than there are: the guest's page 0 stays free.
        if self.pages.len() as u64 >= guest_pages() {
            return Err(Error::GuestMemoryFull {
                offset,
                pages: guest_pages(),
            });
        }
        Ok(())
    }

    fn write(&mut self, offset: u64, space: Space, address: u64, bytes: &[u8]) -> Result<()> {
        if space == Space::GgttEntries {
            for (index, value) in ggtt_entries(address, bytes) {
                self.machine.write_ggtt(index, value);
                if let Some(page) = entry_page(value) {
                    self.use_page(offset, page)?;
                }
            }
            return Ok(());
        }
        for piece in self.machine.pieces(offset, space, address, bytes)? {
            self.use_page(offset, piece.page)?;
            self.machine.write(&piece);
            if self.is_table(piece.page) {
                let entries = piece.start / 8..piece.end().div_ceil(8);
                self.dirty.extend(entries.map(|index| (piece.page, index)));
            }
        }
        Ok(())
    }

    fn submit(
        &mut self,
        offset: u64,
        engine: &'static EngineInfo,
        [_, second, _, descriptor]: [u32; ELSP_DWORDS],
    ) -> Result<()> {
        let field = |what, value: u32| Error::Field {
            offset,
            what,
            value: value.into(),
        };
        if second & 1 != 0 {
            return Err(field(
                "the second context descriptor of a submission",
                second,
            ));
        }
        // Valid, 4-level page tables.
        if descriptor & 1 == 0 || (descriptor >> 3) & 3 != 3 {
            return Err(field("the context descriptor", descriptor));
        }
        let lrca = descriptor >> 12;
        let object_page = |index: u64| self.machine.translate(offset, u64::from(lrca) + index);
        let page1 = object_page(1)?;
        let copied = (2..2 + engine.copied_pages as u64)
            .map(object_page)
            .collect::<Result<Vec<_>>>()?;
        let ring_start = self.machine.dword(page1, ring_context::START);
        let ring = self.machine.translate(offset, (ring_start >> 12).into())?;
        let root = self.machine.pdp0(page1);
        if root >= crate::aub::PHYSICAL_LIMIT {
            return Err(Error::Field {
                offset,
                what: "the page table root of a context",
                value: root,
            });
        }

        self.submissions += 1;
        self.note_ring(page1, ring);
        let context = TraceContext {
            engine,
            lrca,
            copied,
        };
        if self.known_contexts.insert(context.clone()) {
            self.contexts.push(context);
        }
        self.find_tables(offset, root / PAGE_SIZE)
    }

    fn note_ring(&mut self, page1: u64, ring: u64) {
        let recorded = self.machine.dword(page1, ring_context::HEAD) == 0
            && self.machine.dword(page1, ring_context::TAIL) as usize == RECORDER_RING_BYTES
            && self.machine.dword(ring, 0) == BATCH_BUFFER_START;
        self.ring_contexts.insert(page1);
        if recorded {
            self.recorder_ring_contexts.insert(page1);
            self.recorder_rings.insert(ring);
        }
    }

    /// Finds the tables that became known since the last submission: through rewritten entries of
    /// known tables and through the root. A table stays known when nothing points to it any more.
    fn find_tables(&mut self, offset: u64, root: u64) -> Result<()> {
        let mut found = vec![(root, ROOT_LEVEL)];
        for (page, index) in std::mem::take(&mut self.dirty) {
            let levels = self.tables.get(&page).copied().unwrap_or(0);
            for level in (1..=ROOT_LEVEL).filter(|level| levels & (1 << level) != 0) {
                self.follow(offset, page, index, level, &mut found)?;
            }
        }
        while let Some((page, level)) = found.pop() {
            self.use_page(offset, page)?;
            let levels = self.tables.entry(page).or_default();
            if *levels & (1 << level) != 0 {
                continue;
            }
            *levels |= 1 << level;
            for index in 0..ENTRIES {
                self.follow(offset, page, index, level, &mut found)?;
            }
        }
        Ok(())
    }

    /// Looks at one entry of a table of `level`; a table it points to is added to `found`.
    fn follow(
        &mut self,
        offset: u64,
        page: u64,
        index: usize,
        level: u8,
        found: &mut Vec<(u64, u8)>,
    ) -> Result<()> {
        const PAGE_SIZE_BIT: u64 = 1 << 7;
        const INTERMEDIATE_PAGE_SIZE: u64 = 1 << 11;
        let entry = self.machine.entry(page, index);
        let Some(target) = entry_page(entry) else {
            return Ok(());
        };
        let large = match level {
            3 => PAGE_SIZE_BIT,
            2 => PAGE_SIZE_BIT | INTERMEDIATE_PAGE_SIZE,
            _ => 0,
        };
        if entry & large != 0 {
            return Err(Error::Field {
                offset,
                what: "a page table entry of pages larger than 4 KiB",
                value: entry,
            });
        }
        if level > 1 {
            found.push((target, level - 1));
            return Ok(());
        }
        self.use_page(offset, target)
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A second pass over a trace: the same writes at the guest's own addresses, with every address
//! inside them changed too, and with what the recorder left out filled in.
//!
//! - Entries of page tables and of the GGTT, and the page table root in a ring context, name the
//!   guest physical address their page was placed at.
//! - The recorder makes up a ring of 16 bytes, one batch start. It becomes a request of
//!   [`REQUEST_BYTES`] around the recorded batch start, and the tail follows.
//! - The recorder leaves a wrong length in RING_CTL. It becomes the one page that is mapped.

use crate::aub::{PacketKind, Space, Trace, MAX_EVENTS};
use crate::error::{Error, Result};
use crate::layout::{Placement, PAGE_SIZE};
use crate::plan::{Action, Event};
use crate::survey::{
    entry_page, ggtt_entries, ring_context, Piece, Ports, RecordedMachine, Survey,
    BATCH_BUFFER_START, RECORDER_RING_BYTES,
};

/// Bytes i915 emits for a request on a gen9 render engine, its batch start among them.
pub const REQUEST_BYTES: usize = 160;

/// RING_CTL of a ring of one page that is enabled.
const RING_CTL_ONE_PAGE: u32 = 1;
const ADDRESS_MASK: u64 = ((1 << 34) - 1) << 12;

/// Turns a trace into what a guest does, given where its pages were placed.
pub(crate) struct Relocator<'a> {
    survey: &'a Survey,
    placement: &'a Placement,
    machine: RecordedMachine,
    ports: Ports,
    events: Vec<Event>,
}

impl<'a> Relocator<'a> {
    pub(crate) fn new(survey: &'a Survey, placement: &'a Placement) -> Self {
        Relocator {
            survey,
            placement,
            machine: RecordedMachine::default(),
            ports: Ports::default(),
            events: Vec::new(),
        }
    }

    pub(crate) fn events(mut self, trace: &Trace) -> Result<Vec<Event>> {
        for packet in trace.packets() {
            if self.events.len() > MAX_EVENTS {
                return Err(Error::TooMany {
                    offset: packet.offset,
                    limit: MAX_EVENTS,
                });
            }
            match &packet.kind {
                PacketKind::MemoryWrite {
                    space: Space::GgttEntries,
                    address,
                    data,
                } => self.write_ggtt(packet.offset, *address, trace.bytes(data)),
                PacketKind::MemoryWrite {
                    space,
                    address,
                    data,
                } => self.write(packet.offset, *space, *address, trace.bytes(data))?,
                PacketKind::RegisterWrite { register, value } => {
                    self.write_register(packet.offset, *register, *value);
                }
                PacketKind::RegisterPoll {
                    register,
                    mask,
                    expected,
                } => self.push(
                    packet.offset,
                    Action::RegisterPoll {
                        register: *register,
                        mask: *mask,
                        expected: *expected,
                    },
                ),
            }
        }
        Ok(self.events)
    }

    fn push(&mut self, offset: u64, action: Action) {
        self.events.push(Event { offset, action });
    }

    fn write_register(&mut self, offset: u64, register: u32, value: u32) {
        match self.ports.write(register, value) {
            None => self.push(offset, Action::RegisterWrite { register, value }),
            Some((_, None)) => {}
            Some((engine, Some(dwords))) => self.push(offset, Action::Submit { engine, dwords }),
        }
    }

    fn write_ggtt(&mut self, offset: u64, address: u64, bytes: &[u8]) {
        for (index, value) in ggtt_entries(address, bytes) {
            self.machine.write_ggtt(index, value);
            let value = self.relocated(value);
            self.push(offset, Action::GgttEntry { index, value });
        }
    }

    fn write(&mut self, offset: u64, space: Space, address: u64, bytes: &[u8]) -> Result<()> {
        for piece in self.machine.pieces(offset, space, address, bytes)? {
            self.machine.write(&piece);
            let (start, data) = if self.survey.is_table(piece.page) {
                self.table_entries(&piece)
            } else if self.survey.is_ring_context(piece.page) {
                (piece.start, self.ring_context(&piece))
            } else if self.survey.is_recorder_ring(piece.page) {
                (piece.start, ring(&piece))
            } else {
                (piece.start, piece.bytes.to_vec())
            };
            // The survey has seen every page that is written, so each has its place.
            if let Some(gpa) = self.placement.gpa(piece.page * PAGE_SIZE + start as u64) {
                self.push(offset, Action::Write { gpa, data });
            }
        }
        Ok(())
    }

    /// The whole entries a write touches, relocated.
    fn table_entries(&self, piece: &Piece<'_>) -> (usize, Vec<u8>) {
        let entries = piece.start / 8..piece.end().div_ceil(8);
        let start = entries.start * 8;
        let data = entries
            .flat_map(|index| {
                self.relocated(self.machine.entry(piece.page, index))
                    .to_le_bytes()
            })
            .collect();
        (start, data)
    }

    /// An entry that points to a page with a place gets that place's address. Others are not
    /// entries that any submission has reached, and stay as they are.
    fn relocated(&self, entry: u64) -> u64 {
        match entry_page(entry).and_then(|page| self.placement.gpa(page * PAGE_SIZE)) {
            Some(gpa) => entry & !ADDRESS_MASK | gpa,
            None => entry,
        }
    }

    fn ring_context(&self, piece: &Piece<'_>) -> Vec<u8> {
        let mut data = piece.bytes.to_vec();
        let mut patch = |at: usize, value: u32| {
            let dword = at
                .checked_sub(piece.start)
                .and_then(|at| data.get_mut(at..at + 4));
            if let Some(dword) = dword {
                dword.copy_from_slice(&value.to_le_bytes());
            }
        };
        if let Some(root) = self.placement.gpa(self.machine.pdp0(piece.page)) {
            patch(ring_context::PDP0_UDW, (root >> 32) as u32);
            patch(ring_context::PDP0_LDW, root as u32);
        }
        if self.survey.has_recorder_ring(piece.page) {
            patch(ring_context::CTL, RING_CTL_ONE_PAGE);
            let tail = self.machine.dword(piece.page, ring_context::TAIL);
            if tail as usize == RECORDER_RING_BYTES {
                patch(ring_context::TAIL, REQUEST_BYTES as u32);
            }
        }
        data
    }
}

/// The recorder's ring as a request; what else is written to a ring page stays as it is.
fn ring(piece: &Piece<'_>) -> Vec<u8> {
    let dwords: Vec<u32> = piece
        .bytes
        .chunks_exact(4)
        .filter_map(|dword| dword.first_chunk())
        .map(|dword| u32::from_le_bytes(*dword))
        .collect();
    match *dwords {
        [BATCH_BUFFER_START, address, address_high, 0] if piece.start == 0 => {
            request(address, address_high)
        }
        _ => piece.bytes.to_vec(),
    }
}

/// A request with the length and the order of the parts i915 emits on gen9. Only the batch start,
/// arbitration and the user interrupt are there; what would carry addresses of the guest driver's
/// own (breadcrumbs, flushes) is MI_NOOP.
fn request(batch: u32, batch_high: u32) -> Vec<u8> {
    const NOOP: u32 = 0;
    const USER_INTERRUPT: u32 = 0x0100_0000;
    const ARB_OFF: u32 = 0x0400_0000;
    const ARB_ON: u32 = 0x0400_0001;

    let initial_breadcrumb = [NOOP; 6];
    let flush = [NOOP; 12];
    let batch_start = [ARB_ON, BATCH_BUFFER_START, batch, batch_high, ARB_OFF, NOOP];
    let final_breadcrumb = [NOOP; 12];
    let interrupt = [USER_INTERRUPT, ARB_ON];
    let tail = [NOOP; 2];
    let parts: [&[u32]; 6] = [
        &initial_breadcrumb,
        &flush,
        &batch_start,
        &final_breadcrumb,
        &interrupt,
        &tail,
    ];
    let dwords = parts.into_iter().flatten();
    dwords.flat_map(|dword| dword.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recorded_ring_becomes_a_request_around_its_batch_start() {
        let mut bytes = BATCH_BUFFER_START.to_le_bytes().to_vec();
        bytes.extend([1, 2, 3, 4, 5, 6, 0, 0, 0, 0, 0, 0]);
        let piece = Piece {
            page: 7,
            start: 0,
            bytes: &bytes,
        };
        let request = ring(&piece);
        assert_eq!(request.len(), REQUEST_BYTES);
        assert!(request.windows(12).any(|window| window == &bytes[..12]));

        let elsewhere = Piece { start: 16, ..piece };
        assert_eq!(ring(&elsewhere), bytes);
    }
}

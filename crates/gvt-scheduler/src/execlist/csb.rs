// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The context status buffer: where an engine tells what became of its contexts.

use vm_memory::GuestAddress;

use crate::error::Result;
use crate::guest_dma::{GuestDma, Port};
use crate::observe::{AccessKind, Observer};
use crate::regs::ring_register;

const ENTRIES: usize = 6;
/// Byte offsets in the hardware status page, generations 8 to 10.
const HWSP_BUFFER: u64 = 0x40;
const HWSP_WRITE_POINTER: u64 = 0x7c;

/// An entry of the context status buffer: why a context was switched, and which.
///
/// ```
/// use gvt_scheduler::CsbEvent;
///
/// let event = CsbEvent::new(CsbEvent::CONTEXT_COMPLETE | CsbEvent::ACTIVE_TO_IDLE, 7);
/// assert_eq!(u64::from(event), 0x7_0000_0018);
/// ```
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct CsbEvent(u64);

impl CsbEvent {
    /// A submission reached an idle engine.
    pub const IDLE_TO_ACTIVE: u32 = 1 << 0;
    /// A submission took the place of the running one.
    pub const PREEMPTED: u32 = 1 << 1;
    /// The second element of a submission follows the first.
    pub const ELEMENT_SWITCH: u32 = 1 << 2;
    /// The last element of a submission is done.
    pub const ACTIVE_TO_IDLE: u32 = 1 << 3;
    /// A context reached its tail.
    pub const CONTEXT_COMPLETE: u32 = 1 << 4;
    /// The new submission continues the running context.
    pub const LITE_RESTORE: u32 = 1 << 15;

    /// An event of these reasons for the context with this identifier (0 for an idle engine).
    pub const fn new(reasons: u32, context_id: u32) -> Self {
        Self((context_id as u64) << 32 | reasons as u64)
    }

    /// The reasons: bits 31:0.
    pub const fn reasons(self) -> u32 {
        self.0 as u32
    }

    /// The identifier of the context: bits 63:32.
    pub const fn context_id(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

impl From<u64> for CsbEvent {
    fn from(entry: u64) -> Self {
        Self(entry)
    }
}

impl From<CsbEvent> for u64 {
    fn from(event: CsbEvent) -> Self {
        event.0
    }
}

/// The buffer of one engine with its pointers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ContextStatusBuffer {
    entries: [u64; ENTRIES],
    /// Write pointer in bits 2:0, read pointer in bits 10:8.
    pointers: u32,
}

impl Default for ContextStatusBuffer {
    fn default() -> Self {
        Self {
            entries: [0; ENTRIES],
            pointers: Self::NOTHING_YET,
        }
    }
}

impl ContextStatusBuffer {
    /// The write pointer before the first event.
    const NOTHING_YET: u32 = 7;
    const WRITE_POINTER: u32 = 0x7;
    const READ_POINTER: u32 = 0x700;

    /// Appends an event, also to the hardware status page if that translates.
    pub(crate) fn push<M: GuestDma, O: Observer>(
        &mut self,
        event: CsbEvent,
        status_page: Option<GuestAddress>,
        port: &mut Port<'_, M, O>,
    ) -> Result<()> {
        let slot = self.next_slot();
        if let Some(entry) = self.entries.get_mut(slot as usize) {
            *entry = event.0;
        }
        self.pointers = self.pointers & !Self::WRITE_POINTER | slot;
        let Some(GuestAddress(page)) = status_page else {
            return Ok(());
        };
        let entry = GuestAddress(page + HWSP_BUFFER + 8 * u64::from(slot));
        let pointer = GuestAddress(page + HWSP_WRITE_POINTER);
        port.write(AccessKind::Completion, entry, &event.0.to_le_bytes())?;
        port.write(AccessKind::Completion, pointer, &slot.to_le_bytes())
    }

    /// The value of a register, `offset` being relative to the engine's base.
    pub(crate) fn read(&self, offset: u32) -> Option<u32> {
        if offset == ring_register::CONTEXT_STATUS_POINTER {
            return Some(self.pointers);
        }
        let dword = offset.checked_sub(ring_register::CONTEXT_STATUS_BUFFER)? / 4;
        let entry = *self.entries.get(dword as usize / 2)?;
        Some((entry >> (32 * (dword % 2))) as u32)
    }

    /// A write of the pointer register: bits 31:16 say which bits to take.
    pub(crate) fn write_pointers(&mut self, value: u32) {
        let mask = value >> 16 & (Self::WRITE_POINTER | Self::READ_POINTER);
        self.pointers = self.pointers & !mask | value & mask;
    }

    fn next_slot(&self) -> u32 {
        match self.pointers & Self::WRITE_POINTER {
            Self::NOTHING_YET => 0,
            slot => (slot + 1) % ENTRIES as u32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryMmap};

    const PAGE: GuestAddress = GuestAddress(0x1000);

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x3000)]).unwrap()
    }

    fn push(csb: &mut ContextStatusBuffer, memory: &GuestMemoryMmap, event: u64) {
        let mut observer = ();
        let mut port = Port::strict(memory, &mut observer);
        csb.push(event.into(), Some(PAGE), &mut port).unwrap();
    }

    #[test]
    fn slots_begin_behind_7_and_wrap_behind_5() {
        let memory = memory();
        let mut csb = ContextStatusBuffer::default();
        assert_eq!(csb.read(0x3a0), Some(7));
        for i in 0..20u64 {
            push(&mut csb, &memory, ((0x100 + i) << 32) | i);
            let slot = i as u32 % 6;
            assert_eq!(csb.read(0x3a0), Some(slot));
            assert_eq!(csb.read(0x370 + 8 * slot), Some(i as u32));
            assert_eq!(csb.read(0x374 + 8 * slot), Some(0x100 + i as u32));
            let entry: u64 = memory
                .read_obj(GuestAddress(PAGE.0 + 0x40 + 8 * u64::from(slot)))
                .unwrap();
            assert_eq!(entry, ((0x100 + i) << 32) | i);
            let pointer: u32 = memory.read_obj(GuestAddress(PAGE.0 + 0x7c)).unwrap();
            assert_eq!(pointer, slot);
        }
        assert_eq!(csb.read(0x36c), None);
        assert_eq!(csb.read(0x3a4), None);
    }

    #[test]
    fn pointers_are_written_under_their_mask() {
        let mut csb = ContextStatusBuffer::default();
        csb.write_pointers(0x0700_0502);
        assert_eq!(csb.read(0x3a0), Some(0x507));
        csb.write_pointers(0xffff_0101);
        assert_eq!(csb.read(0x3a0), Some(0x101));
        csb.write_pointers(0x0000_ffff);
        assert_eq!(csb.read(0x3a0), Some(0x101));
    }

    #[test]
    fn a_guest_set_write_pointer_stays_in_the_buffer() {
        let memory = memory();
        for pointer in 0..8 {
            let mut csb = ContextStatusBuffer::default();
            csb.write_pointers(0xffff_0000 | pointer);
            push(&mut csb, &memory, 1);
            assert!(csb.read(0x3a0).unwrap() < 6);
        }
    }

    #[test]
    fn without_a_status_page_only_the_registers_tell() {
        let memory = memory();
        let mut csb = ContextStatusBuffer::default();
        let mut observer = ();
        let mut port = Port::strict(&memory, &mut observer);
        csb.push(CsbEvent::new(1, 2), None, &mut port).unwrap();
        assert_eq!(csb.read(0x374), Some(2));
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0x1040)).unwrap(), 0);
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where things are in the MMIO BAR, beside what gvt-scheduler names.

use gvt_scheduler::EngineId;

/// Size of the BAR: registers, then the GGTT.
pub const BAR_SIZE: u64 = 16 << 20;
/// Size of the registers; more than half of the way to the GGTT is empty.
pub const REGISTERS: u64 = 2 << 20;
/// Where the entries of the GGTT begin.
pub const GGTT: u64 = 8 << 20;

/// GEN6_GDRST: a bit resets an engine, or all of them, and is clear when that is done.
pub const GDRST: u32 = 0x941c;
const GDRST_FULL: u32 = 1 << 0;

/// The engines that a write of [`GDRST`] resets.
pub fn reset_by(value: u32) -> impl Iterator<Item = EngineId> {
    EngineId::ALL.into_iter().filter(move |engine| {
        let bit = match engine {
            EngineId::Rcs => 1 << 1,
            EngineId::Vcs => 1 << 2,
            EngineId::Bcs => 1 << 3,
            EngineId::Vecs => 1 << 4,
            EngineId::Vcs2 => 1 << 7,
        };
        value & (bit | GDRST_FULL) != 0
    })
}

/// The page through which a guest and its vGPU talk (VGT_PVINFO).
pub mod pvinfo {
    /// First and last register.
    pub const FIRST: u32 = 0x7_8000;
    pub const LAST: u32 = 0x7_8ffc;
    /// The magic number, 64 bits.
    pub const MAGIC: u32 = FIRST;
    pub const MAGIC_VALUE: u64 = 0x4776_5447_7654_4776;
    /// Version 1.0.
    pub const VERSION: u32 = FIRST + 0x8;
    pub const VERSION_VALUE: u32 = 1;
    /// A notification of the guest.
    pub const G2V_NOTIFY: u32 = FIRST + 0x818;
    /// PDP0 to PDP3 that it is about, low dword first.
    pub const PDP: u32 = FIRST + 0x838;
    /// The page tables with these PDPs are given up.
    pub const L3_PAGE_TABLE_DESTROY: u32 = 3;
    pub const L4_PAGE_TABLE_DESTROY: u32 = 5;

    /// Ours: a guest page of page tables was written, by its frame number.
    pub const PAGE_TABLE_WRITTEN: u32 = FIRST + 0x900;
    /// Ours: an entry of a page table was written, by its guest address; the upper dword is what counts.
    pub const ENTRY_WRITTEN: u32 = FIRST + 0x908;
    /// Ours: a dword for each engine; a write submits again what was submitted last.
    pub const DOORBELL: u32 = FIRST + 0x920;
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Numbers of commands: bits 28:23 of an MI command.

pub(crate) const NOOP: u8 = 0x00;
pub(crate) const USER_INTERRUPT: u8 = 0x02;
pub(crate) const ARB_CHECK: u8 = 0x05;
pub(crate) const ARB_ON_OFF: u8 = 0x08;
pub(crate) const BATCH_BUFFER_END: u8 = 0x0a;
pub(crate) const SEMAPHORE_WAIT: u8 = 0x1c;
pub(crate) const STORE_DATA_IMM: u8 = 0x20;
pub(crate) const STORE_DATA_INDEX: u8 = 0x21;
pub(crate) const LOAD_REGISTER_IMM: u8 = 0x22;
pub(crate) const UPDATE_GTT: u8 = 0x23;
pub(crate) const STORE_REGISTER_MEM: u8 = 0x24;
pub(crate) const FLUSH_DW: u8 = 0x26;
pub(crate) const CLFLUSH: u8 = 0x27;
pub(crate) const REPORT_PERF_COUNT: u8 = 0x28;
pub(crate) const LOAD_REGISTER_MEM: u8 = 0x29;
pub(crate) const LOAD_REGISTER_REG: u8 = 0x2a;
pub(crate) const COPY_MEM_MEM: u8 = 0x2e;
pub(crate) const BATCH_BUFFER_START: u8 = 0x31;
pub(crate) const CONDITIONAL_BATCH_BUFFER_END: u8 = 0x36;

/// Bits 31:16 of a PIPE_CONTROL.
pub(crate) const PIPE_CONTROL: u32 = 0x7a00;

/// The number of an MI command; `None` for the commands of the blitter, render and media pipelines.
pub(crate) const fn mi(header: u32) -> Option<u8> {
    if header >> 29 == 0 {
        Some((header >> 23 & 0x3f) as u8)
    } else {
        None
    }
}

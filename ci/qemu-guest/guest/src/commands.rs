// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Commands, as an engine of generation 9 takes them.

use crate::memory::{Memory, Page};

/// A write to memory that a command makes.
#[derive(Clone, Debug)]
pub struct Effect {
    pub page: Page,
    pub offset: usize,
    pub bytes: Vec<u8>,
}

impl Effect {
    pub fn new(page: Page, offset: usize, bytes: &[u8]) -> Self {
        Effect {
            page,
            offset,
            bytes: bytes.to_vec(),
        }
    }

    pub fn apply(&self, memory: &mut Memory) {
        memory.expect(self.page, self.offset, &self.bytes);
    }
}

pub const MI_NOOP: u32 = 0;
pub const MI_USER_INTERRUPT: u32 = 0x02 << 23;
pub const MI_ARB_CHECK: u32 = 0x05 << 23;
pub const MI_BATCH_BUFFER_END: u32 = 0x0a << 23;

const fn low(address: u64) -> u32 {
    address as u32
}

const fn high(address: u64) -> u32 {
    (address >> 32) as u32
}

/// Stores four bytes: at an address of the context, or of the GGTT.
pub fn store_dword(global: bool, address: u64, value: u32) -> [u32; 4] {
    let header = 0x20 << 23 | u32::from(global) << 22 | 2;
    [header, low(address), high(address), value]
}

/// Stores eight bytes.
pub fn store_qword(global: bool, address: u64, value: u64) -> [u32; 5] {
    let header = 0x20 << 23 | u32::from(global) << 22 | 1 << 21 | 3;
    [header, low(address), high(address), low(value), high(value)]
}

/// Runs a batch at an address of the context, from the ring or from another batch.
pub fn batch_start(second_level: bool, address: u64) -> [u32; 3] {
    let header = 0x31 << 23 | u32::from(second_level) << 22 | 1 << 8 | 1;
    [header, low(address), high(address)]
}

pub fn load_register(register: u32, value: u32) -> [u32; 3] {
    [0x22 << 23 | 1, register, value]
}

const POST_SYNC_IMMEDIATE: u32 = 1 << 14;
const POST_SYNC_TIMESTAMP: u32 = 3 << 14;
const STATUS_PAGE: u32 = 1 << 21;
const PIPE_CONTROL: u32 = 0x7a00_0004;

/// Waits for the pipeline, then writes a value to an address of the GGTT.
pub fn pipe_control(address: u32, value: u64) -> [u32; 6] {
    const GLOBAL: u32 = 1 << 24;
    let flags = POST_SYNC_IMMEDIATE | GLOBAL;
    [PIPE_CONTROL, flags, address, 0, low(value), high(value)]
}

/// The same, to the status page.
pub fn pipe_control_index(offset: u32, value: u64) -> [u32; 6] {
    let flags = POST_SYNC_IMMEDIATE | STATUS_PAGE;
    [PIPE_CONTROL, flags, offset, 0, low(value), high(value)]
}

/// Waits for the pipeline, then writes the time stamp to the status page.
pub fn pipe_control_timestamp(offset: u32) -> [u32; 6] {
    let flags = POST_SYNC_TIMESTAMP | STATUS_PAGE;
    [PIPE_CONTROL, flags, offset, 0, 0, 0]
}

/// The same as [`pipe_control`], of the other engines.
pub fn flush_dw(address: u32, value: u64) -> [u32; 5] {
    const GLOBAL: u32 = 1 << 2;
    let header = 0x26 << 23 | POST_SYNC_IMMEDIATE | 3;
    [header, address | GLOBAL, 0, low(value), high(value)]
}

/// Commands as they lie in memory.
pub fn bytes(dwords: &[u32]) -> Vec<u8> {
    dwords
        .iter()
        .flat_map(|dword| dword.to_le_bytes())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_reference_has_them() {
        assert_eq!(
            store_dword(true, 0x1_0000_5000, 7),
            [0x1040_0002, 0x5000, 1, 7]
        );
        assert_eq!(
            store_qword(false, 0x5000, 7 << 32 | 8),
            [0x1020_0003, 0x5000, 0, 8, 7]
        );
        assert_eq!(
            batch_start(false, 0x12_0000_5000),
            [0x1880_0101, 0x5000, 0x12]
        );
        assert_eq!(batch_start(true, 0x5000), [0x18c0_0101, 0x5000, 0]);
        assert_eq!(load_register(0x2244, 5), [0x1100_0001, 0x2244, 5]);
        assert_eq!(flush_dw(0x1000, 3), [0x1300_4003, 0x1004, 0, 3, 0]);
        assert_eq!(
            pipe_control(0x1000, 3),
            [0x7a00_0004, 0x0100_4000, 0x1000, 0, 3, 0]
        );
        assert_eq!(MI_BATCH_BUFFER_END, 0x0500_0000);
    }
}

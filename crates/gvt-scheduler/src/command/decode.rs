// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a command does, of those that a vGPU looks at.

use crate::command::{opcode, Gtt};

/// Bits 47:0 of an address.
const ADDRESS: u64 = (1 << 48) - 1;

/// A command, decoded.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Operation<'a> {
    /// Changes nothing that a guest sees.
    Nothing,
    UserInterrupt,
    BatchEnd,
    BatchStart(BatchStart),
    Store(Store),
    /// Pairs of register and value.
    LoadRegisters(&'a [u32]),
    /// Something else.
    Other,
}

/// MI_BATCH_BUFFER_START.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct BatchStart {
    pub(crate) gtt: Gtt,
    pub(crate) gma: u64,
    pub(crate) second_level: bool,
}

/// A write to memory: MI_STORE_DATA_IMM, or at the end of a flush.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Store {
    pub(crate) target: Target,
    pub(crate) value: Value,
}

/// Where a [`Store`] goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Target {
    Memory {
        gtt: Gtt,
        gma: u64,
    },
    /// An offset in the hardware status page.
    StatusPage(u64),
}

/// What a [`Store`] writes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Value {
    Dword(u32),
    Qword(u64),
    Timestamp,
}

impl Store {
    /// Bytes that are written.
    pub(crate) const fn len(&self) -> u64 {
        match self.value {
            Value::Dword(_) => 4,
            Value::Qword(_) | Value::Timestamp => 8,
        }
    }
}

impl<'a> Operation<'a> {
    /// Decodes the dwords of a command. One that has not the dwords its fields need is something else.
    pub(crate) fn decode(dwords: &'a [u32]) -> Self {
        let Some(header) = dwords.first().copied() else {
            return Operation::Other;
        };
        if header >> 16 == opcode::PIPE_CONTROL {
            return pipe_control(dwords);
        }
        match opcode::mi(header) {
            Some(opcode::NOOP | opcode::ARB_CHECK | opcode::ARB_ON_OFF) => Operation::Nothing,
            Some(opcode::USER_INTERRUPT) => Operation::UserInterrupt,
            Some(opcode::BATCH_BUFFER_END) => Operation::BatchEnd,
            Some(opcode::BATCH_BUFFER_START) => batch_start(dwords),
            Some(opcode::STORE_DATA_IMM) => store_data_imm(dwords),
            Some(opcode::LOAD_REGISTER_IMM) if dwords.len() % 2 == 1 => {
                Operation::LoadRegisters(&dwords[1..])
            }
            Some(opcode::FLUSH_DW) => flush_dw(dwords),
            _ => Operation::Other,
        }
    }
}

fn batch_start(dwords: &[u32]) -> Operation<'_> {
    const SECOND_LEVEL: u32 = 1 << 22;
    const PER_PROCESS: u32 = 1 << 8;
    let &[header, low, high] = dwords else {
        return Operation::Other;
    };
    Operation::BatchStart(BatchStart {
        gtt: gtt(header & PER_PROCESS == 0),
        gma: join(low, high) & ADDRESS & !0x3,
        second_level: header & SECOND_LEVEL != 0,
    })
}

fn store_data_imm(dwords: &[u32]) -> Operation<'_> {
    const GLOBAL: u32 = 1 << 22;
    const QWORD: u32 = 1 << 21;
    let (header, low, high, value) = match *dwords {
        [header, low, high, value] if header & QWORD == 0 => {
            (header, low, high, Value::Dword(value))
        }
        [header, low, high, value, upper] if header & QWORD != 0 => {
            (header, low, high, Value::Qword(join(value, upper)))
        }
        _ => return Operation::Other,
    };
    let target = Target::Memory {
        gtt: gtt(header & GLOBAL != 0),
        gma: join(low, high) & ADDRESS & !0x3,
    };
    Operation::Store(Store { target, value })
}

fn flush_dw(dwords: &[u32]) -> Operation<'_> {
    const GLOBAL: u32 = 1 << 2;
    let (header, low, high, value) = match *dwords {
        [header, low, high, value] => (header, low, high, Value::Dword(value)),
        [header, low, high, value, upper] => (header, low, high, Value::Qword(join(value, upper))),
        _ => return Operation::Other,
    };
    let target = target(header, low & GLOBAL != 0, low, high);
    post_sync(header, target, value)
}

fn pipe_control(dwords: &[u32]) -> Operation<'_> {
    const GLOBAL: u32 = 1 << 24;
    let &[_, flags, low, high, value, upper] = dwords else {
        return Operation::Other;
    };
    let target = target(flags, flags & GLOBAL != 0, low, high);
    post_sync(flags, target, Value::Qword(join(value, upper)))
}

/// Where the post-sync operation of a flush writes.
fn target(flags: u32, global: bool, low: u32, high: u32) -> Target {
    const STORE_DATA_INDEX: u32 = 1 << 21;
    if flags & STORE_DATA_INDEX != 0 {
        return Target::StatusPage(u64::from(low) & 0xff8);
    }
    Target::Memory {
        gtt: gtt(global),
        gma: join(low, high) & ADDRESS & !0x7,
    }
}

/// The post-sync operation in bits 15:14 of `flags`.
fn post_sync<'a>(flags: u32, target: Target, value: Value) -> Operation<'a> {
    let value = match flags >> 14 & 0x3 {
        0 => return Operation::Nothing,
        1 => value,
        3 => Value::Timestamp,
        // The count of depth tests that have passed.
        _ => return Operation::Other,
    };
    Operation::Store(Store { target, value })
}

fn gtt(global: bool) -> Gtt {
    if global {
        Gtt::Global
    } else {
        Gtt::PerProcess
    }
}

fn join(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(gtt: Gtt, gma: u64, value: Value) -> Operation<'static> {
        let target = Target::Memory { gtt, gma };
        Operation::Store(Store { target, value })
    }

    #[test]
    fn fields_are_where_the_hardware_has_them() {
        let global = Gtt::Global;
        let cases: [(&[u32], Operation<'_>); 13] = [
            (&[0], Operation::Nothing),
            (&[0x0280_0000], Operation::Nothing),
            (&[0x0400_0001], Operation::Nothing),
            (&[0x0100_0000], Operation::UserInterrupt),
            (&[0x0500_0000], Operation::BatchEnd),
            (
                &[0x1880_0101, 0x5003, 0xffff_0012],
                Operation::BatchStart(BatchStart {
                    gtt: Gtt::PerProcess,
                    gma: 0x12_0000_5000,
                    second_level: false,
                }),
            ),
            (
                &[0x18c0_0001, 0x5000, 0],
                Operation::BatchStart(BatchStart {
                    gtt: global,
                    gma: 0x5000,
                    second_level: true,
                }),
            ),
            (
                &[0x1040_0002, 0x5004, 0, 7],
                store(global, 0x5004, Value::Dword(7)),
            ),
            (
                &[0x1020_0003, 0x5008, 1, 7, 8],
                store(Gtt::PerProcess, 0x1_0000_5008, Value::Qword(0x8_0000_0007)),
            ),
            (
                &[0x1300_4002, 0x5004, 0, 7],
                store(global, 0x5000, Value::Dword(7)),
            ),
            (
                &[0x7a00_0004, 0x0100_4000, 0x5000, 0, 7, 8],
                store(global, 0x5000, Value::Qword(0x8_0000_0007)),
            ),
            (
                &[0x7a00_0004, 0x0020_c000, 0xffff_f0d7, 0, 0, 0],
                Operation::Store(Store {
                    target: Target::StatusPage(0xd0),
                    value: Value::Timestamp,
                }),
            ),
            (
                &[0x1100_0001, 0x2244, 9],
                Operation::LoadRegisters(&[0x2244, 9]),
            ),
        ];
        for (dwords, expected) in cases {
            assert_eq!(Operation::decode(dwords), expected, "{dwords:x?}");
        }
    }

    #[test]
    fn a_command_of_the_wrong_length_is_something_else() {
        for dwords in [
            &[][..],
            &[0x1880_0100, 0x5000],
            &[0x1040_0003, 0x5000, 0, 7, 8],
            &[0x1060_0002, 0x5000, 0, 7],
            &[0x1100_0000, 0x2244],
            &[0x1300_4000, 0x5004],
            &[0x7a00_0003, 0, 0, 0, 0],
            &[0x7a00_0004, 0x8000, 0, 0, 0, 0],
        ] {
            assert_eq!(Operation::decode(dwords), Operation::Other, "{dwords:x?}");
        }
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How many dwords a command has.

use crate::command::opcode;

/// The MI commands of generations 8 and 9 that have more than one dword: number, name, and the bits of
/// the header that hold the length, less two.
const LONG_MI: [(u8, &str, u32); 25] = [
    (0x12, "MI_LOAD_SCAN_LINES_INCL", 0x3f),
    (0x13, "MI_LOAD_SCAN_LINES_EXCL", 0x3f),
    (0x14, "MI_DISPLAY_FLIP", 0xff),
    (0x16, "MI_SEMAPHORE_MBOX", 0xff),
    (0x18, "MI_SET_CONTEXT", 0xff),
    (0x1a, "MI_MATH", 0xff),
    (0x1b, "MI_SEMAPHORE_SIGNAL", 0xff),
    (opcode::SEMAPHORE_WAIT, "MI_SEMAPHORE_WAIT", 0xff),
    (0x1d, "MI_FORCE_WAKEUP", 0xff),
    (opcode::STORE_DATA_IMM, "MI_STORE_DATA_IMM", 0x3ff),
    (opcode::STORE_DATA_INDEX, "MI_STORE_DATA_INDEX", 0xff),
    (opcode::LOAD_REGISTER_IMM, "MI_LOAD_REGISTER_IMM", 0xff),
    (opcode::UPDATE_GTT, "MI_UPDATE_GTT", 0x3ff),
    (opcode::STORE_REGISTER_MEM, "MI_STORE_REGISTER_MEM", 0xff),
    (opcode::FLUSH_DW, "MI_FLUSH_DW", 0x3f),
    (opcode::CLFLUSH, "MI_CLFLUSH", 0x3ff),
    (opcode::REPORT_PERF_COUNT, "MI_REPORT_PERF_COUNT", 0x3f),
    (opcode::LOAD_REGISTER_MEM, "MI_LOAD_REGISTER_MEM", 0xff),
    (opcode::LOAD_REGISTER_REG, "MI_LOAD_REGISTER_REG", 0xff),
    (0x2b, "MI_RS_STORE_DATA_IMM", 0xff),
    (0x2c, "MI_LOAD_URB_MEM", 0xff),
    (0x2d, "MI_STORE_URB_MEM", 0xff),
    (opcode::COPY_MEM_MEM, "MI_COPY_MEM_MEM", 0xff),
    (opcode::BATCH_BUFFER_START, "MI_BATCH_BUFFER_START", 0xff),
    (
        opcode::CONDITIONAL_BATCH_BUFFER_END,
        "MI_CONDITIONAL_BATCH_BUFFER_END",
        0xff,
    ),
];

/// The MI commands of one dword.
const SHORT_MI: [(u8, &str); 14] = [
    (opcode::NOOP, "MI_NOOP"),
    (0x01, "MI_SET_PREDICATE"),
    (opcode::USER_INTERRUPT, "MI_USER_INTERRUPT"),
    (0x03, "MI_WAIT_FOR_EVENT"),
    (0x04, "MI_FLUSH"),
    (opcode::ARB_CHECK, "MI_ARB_CHECK"),
    (0x06, "MI_RS_CONTROL"),
    (0x07, "MI_REPORT_HEAD"),
    (opcode::ARB_ON_OFF, "MI_ARB_ON_OFF"),
    (opcode::BATCH_BUFFER_END, "MI_BATCH_BUFFER_END"),
    (0x0b, "MI_SUSPEND_FLUSH"),
    (0x0c, "MI_PREDICATE"),
    (0x0d, "MI_TOPOLOGY_FILTER"),
    (0x0e, "MI_SET_APPID"),
];

/// Commands of the render pipeline that have one dword: bits 31:16 of PIPELINE_SELECT and of the two
/// forms of 3DSTATE_VF_STATISTICS.
const SHORT_RENDER: [u32; 3] = [0x6904, 0x680b, 0x690b];

/// Dwords of the command that begins with `header`; `None` if no engine has it.
pub(crate) fn length(header: u32) -> Option<usize> {
    let field = |mask: u32| (header & mask) as usize + 2;
    match header >> 29 {
        0 => {
            let number = opcode::mi(header)?;
            if SHORT_MI.iter().any(|(short, _)| *short == number) {
                return Some(1);
            }
            let long = LONG_MI.iter().find(|(long, ..)| *long == number);
            long.map(|(_, _, mask)| field(*mask))
        }
        // The blitter's.
        2 => Some(field(0xff)),
        // Render and media: media commands have lengths of up to 16 bits.
        3 if SHORT_RENDER.contains(&(header >> 16)) => Some(1),
        3 => Some(field(if header >> 27 & 0x3 == 2 {
            0xffff
        } else {
            0xff
        })),
        _ => None,
    }
}

/// What the command is called, if it is an MI command or a PIPE_CONTROL.
pub(crate) fn name(header: u32) -> Option<&'static str> {
    if header >> 16 == opcode::PIPE_CONTROL {
        return Some("PIPE_CONTROL");
    }
    let number = opcode::mi(header)?;
    let short = SHORT_MI.iter().map(|(number, name)| (*number, *name));
    let long = LONG_MI.iter().map(|(number, name, _)| (*number, *name));
    short
        .chain(long)
        .find(|(known, _)| *known == number)
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_those_of_the_reference() {
        for (header, expected) in [
            (0x0000_0000, Some(1)),
            // MI_NOOP with an identification number.
            (0x0040_1234, Some(1)),
            (0x0100_0000, Some(1)),
            (0x0500_0000, Some(1)),
            (0x1040_0002, Some(4)),
            (0x1060_0003, Some(5)),
            (0x1100_0001, Some(3)),
            (0x1100_101b, Some(29)),
            (0x1300_4002, Some(4)),
            (0x1880_0101, Some(3)),
            (0x7a00_0004, Some(6)),
            (0x6904_0300, Some(1)),
            (0x5400_0006, Some(8)),
            // No such MI command, no such client.
            (0x0880_0000, None),
            (0x2000_0000, None),
            (0xe000_0000, None),
        ] {
            assert_eq!(length(header), expected, "{header:#010x}");
        }
    }

    #[test]
    fn a_number_stands_for_one_command() {
        let mut numbers: Vec<_> = SHORT_MI.iter().map(|(number, _)| *number).collect();
        numbers.extend(LONG_MI.iter().map(|(number, ..)| *number));
        numbers.sort_unstable();
        let all = numbers.len();
        numbers.dedup();
        assert_eq!(numbers.len(), all);
        // Short ones are those below 16.
        assert!(SHORT_MI.iter().all(|(number, _)| *number < 0x10));
        assert!(LONG_MI.iter().all(|(number, ..)| *number >= 0x10));
    }

    #[test]
    fn commands_have_names() {
        assert_eq!(name(0x1880_0101), Some("MI_BATCH_BUFFER_START"));
        assert_eq!(name(0x7a00_0004), Some("PIPE_CONTROL"));
        assert_eq!(name(0x5400_0006), None);
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A trace as bytes.
//!
//! All numbers are little-endian. First comes a header of 24 bytes:
//!
//! | bytes | |
//! |---|---|
//! | 0..8 | `GVTTRACE` |
//! | 8..12 | version: 1 |
//! | 12..16 | bytes of an access: 24 |
//! | 16..24 | number of accesses |
//!
//! then 24 bytes an access, in order, and nothing behind:
//!
//! | bytes | |
//! |---|---|
//! | 0..8 | time in nanoseconds, on whatever clock it was recorded |
//! | 8..16 | I/O virtual address |
//! | 16..20 | length in bytes |
//! | 20..22 | number of the vGPU |
//! | 22 | step: 0 create, 1 scan, 2 populate, 3 prepare, 4 execute, 5 complete |
//! | 23 | 0 read, 1 written |

use std::io::{self, Write};
use std::time::Duration;

use crate::observe::Step;
use crate::policy::nanoseconds;
use crate::trace::{TraceError, TracedAccess};

/// The version that is written, and the only one that is read.
pub const VERSION: u32 = 1;

/// Accesses of a trace at most: 384 MiB of them.
pub const MAX_ACCESSES: usize = 1 << 24;

/// Bytes of an access at most. A vGPU's longest is a context of 80 KiB, or a page of a ring.
pub const MAX_ACCESS_BYTES: u32 = 16 << 20;

const MAGIC: &[u8; 8] = b"GVTTRACE";
const HEADER_BYTES: usize = 24;
const ACCESS_BYTES: usize = 24;

const STEPS: [Step; 6] = [
    Step::Create,
    Step::Scan,
    Step::Populate,
    Step::Prepare,
    Step::Execute,
    Step::Complete,
];

pub(super) fn parse(bytes: &[u8]) -> Result<Vec<TracedAccess>, TraceError> {
    let header = bytes.first_chunk::<HEADER_BYTES>();
    let header = header.filter(|header| header.starts_with(MAGIC));
    let header = header.ok_or(TraceError::NotATrace)?;
    let version = u32_at(header, 8);
    if version != VERSION {
        return Err(TraceError::Version { version });
    }
    if u32_at(header, 12) as usize != ACCESS_BYTES {
        return Err(TraceError::NotATrace);
    }
    let accesses = u64_at(header, 16);
    if accesses > MAX_ACCESSES as u64 {
        return Err(TraceError::TooMany { accesses });
    }
    let expected = HEADER_BYTES as u64 + accesses * ACCESS_BYTES as u64;
    if expected != bytes.len() as u64 {
        return Err(TraceError::Length {
            accesses,
            expected,
            actual: bytes.len() as u64,
        });
    }
    let stored = bytes[HEADER_BYTES..].chunks_exact(ACCESS_BYTES);
    let mut accesses = Vec::new();
    reserve(&mut accesses, stored.len())?;
    for (index, bytes) in stored.enumerate() {
        accesses.push(access(index, bytes)?);
    }
    Ok(accesses)
}

/// Makes room for so many values more.
pub(super) fn reserve<T>(list: &mut Vec<T>, more: usize) -> Result<(), TraceError> {
    let bytes = list
        .len()
        .saturating_add(more)
        .saturating_mul(size_of::<T>());
    let reserved = list.try_reserve(more);
    reserved.map_err(|_| TraceError::NoMemory { bytes })
}

fn access(index: usize, bytes: &[u8]) -> Result<TracedAccess, TraceError> {
    let bad = |field, value: u8| TraceError::Field {
        index,
        field,
        value: value.into(),
    };
    let step = STEPS.get(usize::from(bytes[22])).copied();
    let access = TracedAccess {
        time: Duration::from_nanos(u64_at(bytes, 0)),
        iova: u64_at(bytes, 8),
        len: u32_at(bytes, 16),
        vgpu: u16::from_le_bytes([bytes[20], bytes[21]]),
        step: step.ok_or(bad("step", bytes[22]))?,
        write: match bytes[23] {
            0 => false,
            1 => true,
            other => return Err(bad("direction", other)),
        },
    };
    match access.is_possible() {
        true => Ok(access),
        false => Err(TraceError::Range {
            index,
            iova: access.iova,
            len: access.len,
        }),
    }
}

pub(super) fn write(accesses: &[TracedAccess], mut to: impl Write) -> io::Result<()> {
    to.write_all(MAGIC)?;
    to.write_all(&VERSION.to_le_bytes())?;
    to.write_all(&(ACCESS_BYTES as u32).to_le_bytes())?;
    to.write_all(&(accesses.len() as u64).to_le_bytes())?;
    for access in accesses {
        let mut bytes = [0; ACCESS_BYTES];
        bytes[0..8].copy_from_slice(&nanoseconds(access.time).to_le_bytes());
        bytes[8..16].copy_from_slice(&access.iova.to_le_bytes());
        bytes[16..20].copy_from_slice(&access.len.to_le_bytes());
        bytes[20..22].copy_from_slice(&access.vgpu.to_le_bytes());
        bytes[22] = code(access.step);
        bytes[23] = u8::from(access.write);
        to.write_all(&bytes)?;
    }
    Ok(())
}

/// The place of a step in [`STEPS`].
fn code(step: Step) -> u8 {
    match step {
        Step::Create => 0,
        Step::Scan => 1,
        Step::Populate => 2,
        Step::Prepare => 3,
        Step::Execute => 4,
        Step::Complete => 5,
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(value)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_step_has_the_code_of_its_place() {
        for (place, step) in STEPS.into_iter().enumerate() {
            assert_eq!(usize::from(code(step)), place);
        }
    }

    /// The bytes of the documentation, by hand.
    #[test]
    fn the_bytes_are_those_of_the_documentation() {
        let access = TracedAccess {
            time: Duration::from_nanos(0x0102),
            vgpu: 0x0304,
            step: Step::Populate,
            write: true,
            iova: 0x1_0000_5000,
            len: 0x0607,
        };
        let mut bytes = Vec::new();
        write(&[access], &mut bytes).unwrap();
        let mut expected = b"GVTTRACE".to_vec();
        expected.extend([1, 0, 0, 0, 24, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend([2, 1, 0, 0, 0, 0, 0, 0, 0, 0x50, 0, 0, 1, 0, 0, 0]);
        expected.extend([7, 6, 0, 0, 4, 3, 2, 1]);
        assert_eq!(bytes, expected);
    }
}

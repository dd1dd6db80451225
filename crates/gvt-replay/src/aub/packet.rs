// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One packet: its header, and the fields of each kind.

use super::{PacketKind, Space, GGTT_ENTRIES, PHYSICAL_LIMIT};
use crate::error::{Error, Result};

const GGTT_LIMIT: u64 = (GGTT_ENTRIES as u64) << 12;
const GGTT_TABLE_LIMIT: u64 = GGTT_ENTRIES as u64 * 8;
const REGISTER_LIMIT: u32 = 1 << 24;

const FILE_VERSION: u32 = 1;
const DEVICE_SKYLAKE: u32 = 12;
/// Type and opcode (bits 31:23) of every packet of a memory trace.
const MEMTRACE: u32 = (7 << 6) | 0x2e;
const VERSION: u32 = 0x0e;
const REGISTER_WRITE: u32 = 0x03;
const REGISTER_POLL: u32 = 0x02;
const MEMORY_WRITE: u32 = 0x06;
/// Size "dword" (bits 19:16) in the MMIO register space (bits 31:28).
const REGISTER_DWORD: u32 = 2 << 16;

/// A packet that lies wholly in the file; its contents are not looked at yet.
pub(super) struct RawPacket<'a> {
    start: usize,
    sub_opcode: u32,
    bytes: &'a [u8],
}

impl<'a> RawPacket<'a> {
    /// The version packet every file begins with.
    pub(super) fn first(data: &'a [u8]) -> Result<Self> {
        match RawPacket::at(data, 0) {
            Ok(first) if first.sub_opcode == VERSION => Ok(first),
            Err(error @ Error::Truncated { .. }) if begins_with_version(data) => Err(error),
            _ => Err(Error::NotAub),
        }
    }

    pub(super) fn at(data: &'a [u8], start: usize) -> Result<Self> {
        let rest = data.get(start..).unwrap_or_default();
        let truncated = |needed: u64| Error::Truncated {
            offset: start as u64,
            needed,
            available: rest.len() as u64,
        };
        let header = dword(rest, 0).ok_or_else(|| truncated(4))?;
        if header >> 23 != MEMTRACE {
            return Err(Error::UnknownPacket {
                offset: start as u64,
                header,
            });
        }
        let len = ((header & 0xffff) as usize + 1) * 4;
        Ok(RawPacket {
            start,
            sub_opcode: (header >> 16) & 0x7f,
            bytes: rest.get(..len).ok_or_else(|| truncated(len as u64))?,
        })
    }

    pub(super) fn offset(&self) -> u64 {
        self.start as u64
    }

    pub(super) fn end(&self) -> usize {
        self.start + self.bytes.len()
    }

    /// The program a version packet names, if it is of a version and a GPU that are supported.
    pub(super) fn program(&self) -> Result<String> {
        parse_version(self)
    }

    /// What a packet after the version packet asks for.
    pub(super) fn kind(&self) -> Result<PacketKind> {
        match self.sub_opcode {
            MEMORY_WRITE => parse_memory_write(self),
            REGISTER_WRITE => parse_register_write(self),
            REGISTER_POLL => parse_register_poll(self),
            _ => Err(Error::UnknownPacket {
                offset: self.offset(),
                header: dword(self.bytes, 0).unwrap_or_default(),
            }),
        }
    }

    fn dwords(&self) -> u32 {
        (self.bytes.len() / 4) as u32
    }

    /// Dword `index`; a packet that is too short for it has a wrong length.
    fn dword(&self, index: usize, kind: &'static str) -> Result<u32> {
        dword(self.bytes, index * 4).ok_or_else(|| self.length_error(kind, index as u64 + 1))
    }

    fn length_error(&self, kind: &'static str, expected: u64) -> Error {
        Error::PacketLength {
            offset: self.offset(),
            kind,
            dwords: self.dwords(),
            expected,
        }
    }

    fn expect_dwords(&self, kind: &'static str, expected: u64) -> Result<()> {
        if u64::from(self.dwords()) == expected {
            Ok(())
        } else {
            Err(self.length_error(kind, expected))
        }
    }

    fn expect_field(&self, what: &'static str, value: u32, expected: u32) -> Result<()> {
        if value == expected {
            Ok(())
        } else {
            Err(Error::Field {
                offset: self.offset(),
                what,
                value: value.into(),
            })
        }
    }
}

fn dword(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_le_bytes(*bytes))
}

fn begins_with_version(data: &[u8]) -> bool {
    dword(data, 0).is_some_and(|header| header >> 16 == (MEMTRACE << 7) | VERSION)
}

fn parse_version(raw: &RawPacket) -> Result<String> {
    let version = |what, value, supported| {
        if value == supported {
            Ok(())
        } else {
            Err(Error::Version {
                offset: raw.offset(),
                what,
                value,
                supported,
            })
        }
    };
    version("the file version", raw.dword(1, "version")?, FILE_VERSION)?;
    let device = (raw.dword(2, "version")? >> 8) & 0xff;
    version("the device", device, DEVICE_SKYLAKE)?;
    let text = raw.bytes.get(20..).unwrap_or_default();
    Ok(String::from_utf8_lossy(text)
        .chars()
        .filter(|c| !c.is_control())
        .collect())
}

fn parse_memory_write(raw: &RawPacket) -> Result<PacketKind> {
    const KIND: &str = "memory write";
    const HEAD_DWORDS: usize = 5;
    let low = raw.dword(1, KIND)?;
    let high = raw.dword(2, KIND)?;
    let address = u64::from(high) << 32 | u64::from(low);
    let space = raw.dword(3, KIND)?;
    let length = raw.dword(4, KIND)?;
    raw.expect_dwords(KIND, HEAD_DWORDS as u64 + u64::from(length.div_ceil(4)))?;

    let (space, name, limit) = match space {
        0x0000_0000 => (Space::Ggtt, "graphics", GGTT_LIMIT),
        0x2000_0000 => (Space::Physical, "physical", PHYSICAL_LIMIT),
        0x4000_0000 => (Space::GgttEntries, "GGTT table", GGTT_TABLE_LIMIT),
        other => {
            return Err(Error::Field {
                offset: raw.offset(),
                what: "the address space",
                value: other.into(),
            })
        }
    };
    let fits = address
        .checked_add(length.into())
        .is_some_and(|end| end <= limit);
    let whole = space != Space::GgttEntries || (address | u64::from(length)) % 8 == 0;
    if !fits || !whole {
        return Err(Error::Address {
            offset: raw.offset(),
            space: name,
            address,
            length: length.into(),
        });
    }
    let start = raw.start + HEAD_DWORDS * 4;
    Ok(PacketKind::MemoryWrite {
        space,
        address,
        data: start..start + length as usize,
    })
}

fn parse_register_write(raw: &RawPacket) -> Result<PacketKind> {
    const KIND: &str = "register write";
    raw.expect_dwords(KIND, 6)?;
    raw.expect_field("the register size", raw.dword(2, KIND)?, REGISTER_DWORD)?;
    raw.expect_field("the write mask", raw.dword(3, KIND)?, u32::MAX)?;
    raw.expect_field("the write mask's upper half", raw.dword(4, KIND)?, 0)?;
    Ok(PacketKind::RegisterWrite {
        register: register(raw, KIND)?,
        value: raw.dword(5, KIND)?,
    })
}

fn parse_register_poll(raw: &RawPacket) -> Result<PacketKind> {
    const KIND: &str = "register poll";
    raw.expect_dwords(KIND, 6)?;
    raw.expect_field("the register size", raw.dword(2, KIND)?, REGISTER_DWORD)?;
    raw.expect_field("the poll mask's upper half", raw.dword(4, KIND)?, 0)?;
    Ok(PacketKind::RegisterPoll {
        register: register(raw, KIND)?,
        mask: raw.dword(3, KIND)?,
        expected: raw.dword(5, KIND)?,
    })
}

fn register(raw: &RawPacket, kind: &'static str) -> Result<u32> {
    let register = raw.dword(1, kind)?;
    if register < REGISTER_LIMIT && register % 4 == 0 {
        Ok(register)
    } else {
        Err(Error::Field {
            offset: raw.offset(),
            what: "the register offset",
            value: register.into(),
        })
    }
}

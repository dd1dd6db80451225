// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The AUB trace format, as Mesa's recorder writes it: a list of memory writes, register writes
//! and register polls.
//!
//! Everything a file says is checked here once: lengths, address ranges, field values. What the
//! format allows and the replay does not know is refused, never skipped.

mod packet;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::Path;

use crate::decompress::decompress;
use crate::error::{Error, Result};

use packet::RawPacket;

/// Name of the recording that [`Trace::bundled`] gives.
pub const BUNDLED: &str = "glmark2-skl.aub.xz";
/// Largest trace taken in, decompressed, in bytes. The recordings at hand have 5 MB and less.
pub const MAX_TRACE_BYTES: u64 = 256 << 20;
/// Most packets, and most table entries they write, that are kept: a small file must not fill the
/// memory when it is unpacked. The recordings at hand have 3 000 and fewer.
pub const MAX_EVENTS: usize = 1 << 20;
/// End of the physical addresses a GPU page table entry can name (address bits 45:12).
pub const PHYSICAL_LIMIT: u64 = 1 << 46;
/// Entries of the GGTT: 4 GiB of graphics addresses.
pub const GGTT_ENTRIES: u32 = 1 << 20;

/// Dwords of a submission to an execlist port.
pub(crate) const ELSP_DWORDS: usize = 4;

/// Offset of the execlist submission port in an engine's registers.
pub(crate) const ELSP: u32 = 0x230;

/// Which addresses a memory write is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Graphics addresses, translated by the GGTT.
    Ggtt,
    /// Physical addresses.
    Physical,
    /// Bytes of the GGTT itself: 8 per entry.
    GgttEntries,
}

/// What a packet asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PacketKind {
    /// Write these bytes of the trace (see [`Trace::bytes`]) to memory.
    MemoryWrite {
        /// Which addresses.
        space: Space,
        /// First address. For [`Space::GgttEntries`] a multiple of 8, as is the length.
        address: u64,
        /// Where the bytes lie in the trace.
        data: Range<usize>,
    },
    /// Write a 32-bit register.
    RegisterWrite {
        /// Offset of the register.
        register: u32,
        /// Value.
        value: u32,
    },
    /// Wait until a 32-bit register, under a mask, has a value.
    RegisterPoll {
        /// Offset of the register.
        register: u32,
        /// Bits that count.
        mask: u32,
        /// Their value.
        expected: u32,
    },
}

/// A packet and where it begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Byte offset in the decompressed trace.
    pub offset: u64,
    /// What it asks for.
    pub kind: PacketKind,
}

/// A parsed trace.
///
/// ```
/// use gvt_replay::aub::{PacketKind, Trace};
///
/// let trace = Trace::bundled()?;
/// assert!(trace.program().contains("glmark2"));
/// let polls = trace.packets().iter().filter(|packet| {
///     matches!(packet.kind, PacketKind::RegisterPoll { .. })
/// });
/// assert_eq!(polls.count(), 202);
/// # Ok::<(), gvt_replay::Error>(())
/// ```
#[derive(Debug)]
pub struct Trace {
    data: Vec<u8>,
    program: String,
    packets: Vec<Packet>,
}

impl Trace {
    /// The bundled recording of glmark2 on a Skylake render engine.
    ///
    /// # Errors
    ///
    /// As [`from_bytes`](Self::from_bytes), where the file was changed.
    pub fn bundled() -> Result<Self> {
        Self::from_bytes(include_bytes!("../../data/glmark2-skl.aub.xz"))
    }

    /// Every recording that is bundled, by its name, glmark2 first.
    ///
    /// # Errors
    ///
    /// As [`bundled`](Self::bundled), with its name.
    pub fn all_bundled() -> Result<Vec<(&'static str, Self)>> {
        let stored: [(&str, &[u8]); 3] = [
            (BUNDLED, include_bytes!("../../data/glmark2-skl.aub.xz")),
            (
                "ncnn-vulkan-skl.aub.xz",
                include_bytes!("../../data/ncnn-vulkan-skl.aub.xz"),
            ),
            (
                "h264-vcs-skl.aub.xz",
                include_bytes!("../../data/h264-vcs-skl.aub.xz"),
            ),
        ];
        let parsed = stored.into_iter().map(|(name, stored)| {
            let trace = Self::from_bytes(stored).map_err(|error| error.in_trace(name))?;
            Ok((name, trace))
        });
        parsed.collect()
    }

    /// Reads a trace file: plain, xz or gzip.
    ///
    /// # Errors
    ///
    /// [`Error::File`]; otherwise as [`from_bytes`](Self::from_bytes).
    pub fn open(path: &Path) -> Result<Self> {
        let file = |source| Error::File {
            path: path.to_owned(),
            source,
        };
        let mut stored = Vec::new();
        File::open(path)
            .and_then(|opened| opened.take(MAX_TRACE_BYTES + 1).read_to_end(&mut stored))
            .map_err(file)?;
        Self::from_bytes(&stored)
    }

    /// Parses a trace in memory: plain, xz or gzip.
    ///
    /// # Errors
    ///
    /// [`Error::Compressed`], [`Error::TooLarge`], [`Error::TooMany`]; [`Error::NotAub`] and the others that say what is wrong
    /// with a packet, and where.
    pub fn from_bytes(stored: &[u8]) -> Result<Self> {
        Self::parse(decompress(stored, MAX_TRACE_BYTES)?)
    }

    /// The program the recorder names.
    pub fn program(&self) -> &str {
        &self.program
    }

    /// The packets after the version packet, in file order.
    pub fn packets(&self) -> &[Packet] {
        &self.packets
    }

    /// The bytes a memory write of this trace carries.
    pub fn bytes(&self, data: &Range<usize>) -> &[u8] {
        self.data.get(data.clone()).unwrap_or_default()
    }

    /// Length of the decompressed trace in bytes.
    pub fn len(&self) -> u64 {
        self.data.len() as u64
    }

    /// Whether there is no packet after the version packet.
    pub fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    fn parse(data: Vec<u8>) -> Result<Self> {
        let first = RawPacket::first(&data)?;
        let program = first.program()?;
        let mut packets = Vec::new();
        let mut submissions = Submissions::default();
        let mut offset = first.end();
        while offset < data.len() {
            let raw = RawPacket::at(&data, offset)?;
            let kind = raw.kind()?;
            if let PacketKind::RegisterWrite { register, .. } = kind {
                submissions.register_write(register, raw.offset());
            }
            if packets.len() >= MAX_EVENTS {
                return Err(Error::TooMany {
                    offset: raw.offset(),
                    limit: MAX_EVENTS,
                });
            }
            packets.push(Packet {
                offset: raw.offset(),
                kind,
            });
            offset = raw.end();
        }
        submissions.finish()?;
        Ok(Trace {
            data,
            program,
            packets,
        })
    }
}

/// Whether `register` is the execlist submission port of an engine.
pub(crate) fn is_submission_port(register: u32) -> bool {
    crate::plan::ENGINES
        .iter()
        .any(|engine| engine.base + ELSP == register)
}

/// Counts the dwords written to each submission port.
#[derive(Default)]
struct Submissions {
    /// By port: offset of the current submission's first packet, dwords written.
    open: BTreeMap<u32, (u64, usize)>,
}

impl Submissions {
    fn register_write(&mut self, register: u32, offset: u64) {
        if !is_submission_port(register) {
            return;
        }
        let (_, dwords) = self.open.entry(register).or_insert((offset, 0));
        *dwords += 1;
        if *dwords == ELSP_DWORDS {
            self.open.remove(&register);
        }
    }

    fn finish(self) -> Result<()> {
        match self.open.into_iter().next() {
            None => Ok(()),
            Some((register, (offset, dwords))) => Err(Error::IncompleteSubmission {
                offset,
                dwords,
                register,
            }),
        }
    }
}

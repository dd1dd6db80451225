// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The machine that was recorded, as far as a trace shows it.

use std::collections::HashMap;

use crate::aub::Space;
use crate::error::{Error, Result};
use crate::layout::PAGE_SIZE;

/// Byte offsets of values in the ring context (page 1 of a context object).
pub(crate) mod ring_context {
    pub(crate) const HEAD: usize = 0x14;
    pub(crate) const TAIL: usize = 0x1c;
    pub(crate) const START: usize = 0x24;
    pub(crate) const CTL: usize = 0x2c;
    pub(crate) const PDP0_UDW: usize = 0xc4;
    pub(crate) const PDP0_LDW: usize = 0xcc;
}

const PFN_MASK: u64 = (1 << 34) - 1;

/// Physical page number an entry of the GGTT or of a page table names, if it is present.
pub(crate) fn entry_page(entry: u64) -> Option<u64> {
    (entry & 1 != 0).then_some((entry >> 12) & PFN_MASK)
}

/// The memory of the machine that was recorded, and its GGTT.
#[derive(Debug, Default)]
pub(crate) struct RecordedMachine {
    memory: HashMap<u64, Box<[u8; PAGE_SIZE as usize]>>,
    ggtt: HashMap<u32, u64>,
}

impl RecordedMachine {
    pub(crate) fn write(&mut self, piece: &Piece<'_>) {
        let page = self
            .memory
            .entry(piece.page)
            .or_insert_with(|| Box::new([0; PAGE_SIZE as usize]));
        page[piece.start..piece.end()].copy_from_slice(piece.bytes);
    }

    /// The 4096 bytes of a page, if it was ever written.
    pub(crate) fn page(&self, page: u64) -> Option<&[u8; PAGE_SIZE as usize]> {
        self.memory.get(&page).map(Box::as_ref)
    }

    pub(crate) fn dword(&self, page: u64, at: usize) -> u32 {
        self.page(page)
            .and_then(|bytes| bytes[at..].first_chunk())
            .map_or(0, |bytes| u32::from_le_bytes(*bytes))
    }

    pub(crate) fn entry(&self, page: u64, index: usize) -> u64 {
        self.page(page)
            .and_then(|bytes| bytes[index * 8..].first_chunk())
            .map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }

    pub(crate) fn pdp0(&self, page1: u64) -> u64 {
        let high = self.dword(page1, ring_context::PDP0_UDW);
        let low = self.dword(page1, ring_context::PDP0_LDW);
        u64::from(high) << 32 | u64::from(low)
    }

    pub(crate) fn write_ggtt(&mut self, index: u32, value: u64) {
        match entry_page(value) {
            Some(page) => self.ggtt.insert(index, page),
            None => self.ggtt.remove(&index),
        };
    }

    /// Physical page of a graphics page.
    pub(crate) fn translate(&self, offset: u64, graphics_page: u64) -> Result<u64> {
        u32::try_from(graphics_page)
            .ok()
            .and_then(|index| self.ggtt.get(&index).copied())
            .ok_or(Error::NotMapped {
                offset,
                address: graphics_page << 12,
            })
    }

    /// Splits a memory write into pieces of physical pages.
    pub(crate) fn pieces<'a>(
        &self,
        offset: u64,
        space: Space,
        address: u64,
        bytes: &'a [u8],
    ) -> Result<Vec<Piece<'a>>> {
        let mut pieces = Vec::new();
        let mut address = address;
        let mut rest = bytes;
        while !rest.is_empty() {
            let start = (address % PAGE_SIZE) as usize;
            let (bytes, after) = rest.split_at(rest.len().min(PAGE_SIZE as usize - start));
            let page = match space {
                Space::Physical => address / PAGE_SIZE,
                _ => self.translate(offset, address / PAGE_SIZE)?,
            };
            pieces.push(Piece { page, start, bytes });
            // The parser has checked that address + length stays below 2^46.
            address += bytes.len() as u64;
            rest = after;
        }
        Ok(pieces)
    }
}

/// The part of a memory write that lies in one physical page.
pub(crate) struct Piece<'a> {
    pub(crate) page: u64,
    pub(crate) start: usize,
    pub(crate) bytes: &'a [u8],
}

impl Piece<'_> {
    pub(crate) fn end(&self) -> usize {
        self.start + self.bytes.len()
    }
}

/// The GGTT entries in the bytes of a write to the GGTT's table.
pub(crate) fn ggtt_entries(address: u64, bytes: &[u8]) -> impl Iterator<Item = (u32, u64)> + '_ {
    bytes
        .chunks_exact(8)
        .zip(address / 8..)
        .map(|(entry, index)| {
            let value = entry.first_chunk().map_or(0, |e| u64::from_le_bytes(*e));
            (index as u32, value)
        })
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Page tables of a context: one table on each level, and a directory entry that maps all of the memory.

use crate::memory::{Memory, Page, PAGE};

const PRESENT_WRITABLE: u64 = 0x3;
/// In a page directory: two mebibytes instead of a table.
const HUGE: u64 = 1 << 7;
const TWO_MIB: u64 = 2 << 20;

/// The tables of a context, the uppermost first. The lowest maps pages from `base` on.
#[derive(Debug)]
pub struct Tables {
    pub levels: Vec<Page>,
    base: u64,
}

impl Tables {
    /// Four levels, or the two that are in memory where addresses have 32 bits. `base` is aligned to two
    /// mebibytes, and an even multiple of them.
    pub fn new(memory: &mut Memory, levels: usize, base: u64) -> Self {
        let tables = Tables {
            levels: memory.take(levels),
            base,
        };
        for level in &tables.levels {
            memory.write(*level, 0, &[0; PAGE]);
        }
        for (depth, pair) in tables.levels.windows(2).enumerate() {
            let entry = memory.address(pair[1]) | PRESENT_WRITABLE;
            let shift = 12 + 9 * (levels - 1 - depth);
            memory.write_u64(pair[0], index(base, shift) * 8, entry);
        }
        let directory = tables.levels[levels - 2];
        let entry = memory.base() | PRESENT_WRITABLE | HUGE;
        memory.write_u64(directory, index(base + TWO_MIB, 21) * 8, entry);
        tables
    }

    /// Where the device finds the uppermost.
    pub fn root(&self, memory: &Memory) -> u64 {
        memory.address(self.levels[0])
    }

    /// Maps a page as the `number`th. Where the device finds the entry.
    pub fn map(&self, memory: &mut Memory, number: usize, page: Page) -> u64 {
        self.map_address(memory, number, memory.address(page))
    }

    /// Maps what the device finds at an address.
    pub fn map_address(&self, memory: &mut Memory, number: usize, address: u64) -> u64 {
        let lowest = self.levels[self.levels.len() - 1];
        memory.write_u64(lowest, number * 8, address | PRESENT_WRITABLE);
        memory.address(lowest) + number as u64 * 8
    }

    /// The address of the `number`th page in the context.
    pub fn address(&self, number: usize) -> u64 {
        self.base + (number * PAGE) as u64
    }

    /// The address of any page of the memory in the context, by the entry that maps all of it.
    pub fn huge_address(&self, memory: &Memory, page: Page) -> u64 {
        self.base + TWO_MIB + memory.offset(page)
    }
}

fn index(address: u64, shift: usize) -> usize {
    (address >> shift) as usize % 512
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::SeedableRng;

    use super::*;
    use crate::memory::{allocate, PAGES};

    /// Walks the tables as the device does. Where it ends.
    fn walk(memory: &Memory, tables: &Tables, address: u64) -> u64 {
        let page = |at: u64| {
            let number = (at - memory.base()) as usize / PAGE;
            let mut levels = tables.levels.iter();
            *levels
                .find(|page| memory.offset(**page) as usize / PAGE == number)
                .unwrap()
        };
        let mut table = tables.root(memory);
        for depth in (0..tables.levels.len()).rev() {
            let shift = 12 + 9 * depth;
            let entry = memory.read_u64(page(table), index(address, shift) * 8);
            assert_eq!(entry & PRESENT_WRITABLE, PRESENT_WRITABLE, "{depth}");
            table = entry & !0xfff;
            if entry & HUGE != 0 || depth == 0 {
                return table | address & ((1 << shift) - 1);
            }
        }
        unreachable!()
    }

    #[test]
    fn addresses_lead_to_their_pages() {
        let mut rng = SmallRng::seed_from_u64(1);
        let at = allocate(PAGES, false).unwrap();
        let mut memory = Memory::new(at, 0x4000_0000, &mut rng);
        for (levels, base) in [(4, 5 << 39 | 8 << 30 | 5 << 22), (2, 6 << 22)] {
            let tables = Tables::new(&mut memory, levels, base);
            let page = memory.take_one();
            let entry = tables.map(&mut memory, 77, page);
            assert_eq!(entry, memory.address(tables.levels[levels - 1]) + 77 * 8);
            for address in [tables.address(77), tables.huge_address(&memory, page)] {
                assert_eq!(
                    walk(&memory, &tables, address + 8),
                    memory.address(page) + 8
                );
            }
        }
    }
}

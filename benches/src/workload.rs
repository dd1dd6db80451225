// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is accessed: how memory is mapped, and which addresses of it are read in which order.

use crate::world::TOTAL;

/// Where the mappings begin, so that no I/O virtual address is a guest physical one.
const IOVA_BASE: u64 = 1 << 32;

/// Bytes that a workload goes through at most, and accesses that it consists of at most: they stay
/// in the last-level cache, so that it does not matter whose turn was before.
const FOOTPRINT: usize = 8 << 20;
const ACCESSES: usize = 1 << 16;

/// The same memory cut into mappings, the more of them the smaller.
///
/// Mappings are next to each other in I/O virtual addresses and never in memory: nobody can merge
/// them.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// How many mappings.
    pub mappings: u64,
    /// Bytes of each.
    pub len: u64,
}

impl Layout {
    /// [`TOTAL`] bytes of memory in `mappings` mappings of equal size, a power of two.
    pub fn new(mappings: u64) -> Self {
        Layout {
            mappings,
            len: TOTAL / mappings.next_power_of_two(),
        }
    }

    /// I/O virtual address of a mapping.
    pub fn iova(&self, mapping: u64) -> u64 {
        IOVA_BASE + mapping * self.len
    }

    /// Guest physical address of a mapping.
    pub fn gpa(&self, mapping: u64) -> u64 {
        // An odd factor permutes the residues of a power of two.
        let slots = TOTAL / self.len;
        mapping * 40_503 % slots * self.len
    }

    /// Guest physical address behind an I/O virtual one.
    pub fn translate(&self, iova: u64) -> u64 {
        let offset = iova - IOVA_BASE;
        self.gpa(offset / self.len) + offset % self.len
    }

    /// An I/O virtual address that is not mapped.
    pub fn elsewhere(&self) -> u64 {
        IOVA_BASE << 8
    }

    fn mapped(&self) -> u64 {
        self.mappings * self.len
    }
}

/// In which order addresses are accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// The same address every time.
    Hot,
    /// An address in each mapping, or in each of 1 024 mappings where there are more; of fewer where
    /// accesses are so large that they would not stay in the cache.
    Spread,
    /// Any address.
    Uniform,
}

impl Pattern {
    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Pattern::Hot => "hot",
            Pattern::Spread => "spread",
            Pattern::Uniform => "uniform",
        }
    }
}

/// Accesses of one size.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Bytes of each access.
    pub size: usize,
    /// I/O virtual addresses; as many as a power of two.
    pub iovas: Vec<u64>,
    /// The guest physical addresses behind them.
    pub gpas: Vec<u64>,
}

impl Workload {
    /// Accesses of `size` bytes, aligned to 64 bytes, those of a page or more to a page.
    pub fn new(layout: &Layout, pattern: Pattern, size: usize) -> Self {
        Workload::shifted(layout, pattern, size, 0)
    }

    /// As [`new`](Workload::new), `shift` bytes further.
    pub fn shifted(layout: &Layout, pattern: Pattern, size: usize, shift: u64) -> Self {
        let unit = if size < 4096 { 64 } else { 4096 };
        // As many as a power of two, also of sizes that are none.
        let accesses = 1_usize << (FOOTPRINT / size).clamp(1, ACCESSES).ilog2();
        let room = layout.mapped() - size as u64 - shift;
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let mut place = |mapping: u64| {
            let inside = layout.len.saturating_sub(size as u64 + shift);
            mapping * layout.len + random.below(inside / unit + 1) * unit
        };
        let offsets: Vec<u64> = match pattern {
            Pattern::Hot => vec![place(layout.mappings / 2)],
            Pattern::Spread => {
                let visited = layout.mappings.min(1024).min(accesses as u64);
                let step = layout.mappings / visited;
                // Not in order: a prefetcher would guess the next.
                (0..visited)
                    .map(|i| place(i * 421 % visited * step))
                    .collect()
            }
            Pattern::Uniform => (0..accesses)
                .map(|_| random.below(room / unit + 1) * unit)
                .collect(),
        };
        let iovas: Vec<u64> = offsets
            .into_iter()
            .map(|offset| IOVA_BASE + offset.min(room / unit * unit) + shift)
            .collect();
        let last = TOTAL - size as u64;
        let gpas = iovas.iter().map(|iova| layout.translate(*iova).min(last));
        Workload {
            size,
            gpas: gpas.collect(),
            iovas,
        }
    }
}

/// xorshift64: the same addresses in every run.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    /// The numbers below `end` in random order.
    pub fn order(end: u64) -> Vec<u64> {
        let mut random = Random(0x2545_f491_4f6c_dd1d);
        let mut order: Vec<u64> = (0..end).collect();
        for i in (1..order.len()).rev() {
            order.swap(i, random.below(i as u64 + 1) as usize);
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COUNTS: [u64; 4] = [1, 16, 1024, 65_535];

    #[test]
    fn no_two_mappings_share_memory_or_can_be_merged() {
        for layout in COUNTS.map(Layout::new) {
            let mut gpas: Vec<_> = (0..layout.mappings).map(|i| layout.gpa(i)).collect();
            assert!(gpas.windows(2).all(|pair| pair[0] + layout.len != pair[1]));
            gpas.sort_unstable();
            assert!(gpas.windows(2).all(|pair| pair[0] + layout.len <= pair[1]));
            assert!(gpas.last().is_some_and(|last| last + layout.len <= TOTAL));
        }
    }

    #[test]
    fn every_access_is_mapped() {
        for layout in COUNTS.map(Layout::new) {
            for pattern in [Pattern::Hot, Pattern::Spread, Pattern::Uniform] {
                for size in [8, 64, 4096, 1 << 20] {
                    let work = Workload::shifted(&layout, pattern, size, 3);
                    assert!(work.iovas.len().is_power_of_two());
                    let end = IOVA_BASE + layout.mapped() - size as u64;
                    assert!(work
                        .iovas
                        .iter()
                        .all(|iova| (IOVA_BASE..=end).contains(iova)));
                    let end = TOTAL - size as u64;
                    assert!(work.gpas.iter().all(|gpa| *gpa <= end));
                }
            }
        }
    }

    #[test]
    fn spread_visits_as_many_mappings_as_it_says() {
        for (mappings, visited) in [(16, 16), (1024, 1024), (65_535, 1024)] {
            let layout = Layout::new(mappings);
            let work = Workload::new(&layout, Pattern::Spread, 64);
            let mut at: Vec<_> = work
                .iovas
                .iter()
                .map(|iova| (iova - IOVA_BASE) / layout.len)
                .collect();
            at.sort_unstable();
            at.dedup();
            assert_eq!(at.len(), visited);
        }
    }

    #[test]
    fn an_order_has_every_number_once() {
        let mut order = Random::order(1000);
        assert!(order.windows(2).any(|pair| pair[0] > pair[1]));
        order.sort_unstable();
        assert!(order.into_iter().eq(0..1000));
    }
}

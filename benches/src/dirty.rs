// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Keeping which pages are written: what a write pays for it, and what asking takes.

use iommu_type1::{IoAddressSpace, ReaderBarrier};

use crate::candidates::ours;
use crate::compare::{Candidate, ROUNDS};
use crate::cycles;
use crate::stats::Measure;
use crate::workload::{Layout, Pattern, Workload};
use crate::world::{mapped, Memory};

/// How mappings lie in the table, which decides how a write gets to its mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Mappings of many pages: a look-up ends at the mapping.
    Large,
    /// Mappings of a page each next to each other: a look-up ends at a word of the page.
    Pages,
}

impl Shape {
    /// Both.
    pub const ALL: [Shape; 2] = [Shape::Large, Shape::Pages];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Shape::Large => "64 mappings of 4 MiB",
            Shape::Pages => "65 535 mappings of 4 KiB",
        }
    }

    fn layout(self) -> Layout {
        match self {
            Shape::Large => Layout::new(64),
            Shape::Pages => Layout::new(65_535),
        }
    }
}

/// The same mappings in two spaces, of which one keeps the pages that are written: where one space
/// changed between the two, they could not take turns.
#[derive(Debug)]
pub struct Spaces {
    layout: Layout,
    untracked: IoAddressSpace,
    tracked: IoAddressSpace,
}

impl Spaces {
    /// # Panics
    ///
    /// Panics where the memory cannot be mapped.
    pub fn new(shape: Shape, memory: &Memory) -> Self {
        let layout = shape.layout();
        let [untracked, tracked] =
            [(); 2].map(|()| mapped(layout, memory, ReaderBarrier::default()));
        tracked.start_dirty_tracking().expect("nobody accesses it");
        Spaces {
            layout,
            untracked,
            tracked,
        }
    }

    /// Writes of 64 bytes at the same address by a handle, without and with tracking.
    ///
    /// # Panics
    ///
    /// The candidates panic where nothing is mapped.
    pub fn writing(&self) -> Vec<Candidate<'_>> {
        let work = Workload::new(&self.layout, Pattern::Hot, 64);
        let iova = work.iovas[0];
        let spaces = [("off", &self.untracked), ("on", &self.tracked)];
        let writing = spaces.map(|(name, space)| {
            let handle = space.handle();
            Candidate::of(name, move || ours::handle_write(&handle, iova, &[1; 64]))
        });
        writing.into()
    }

    /// What it takes to ask for the first `pages` pages, which make whole mappings, when each was
    /// written, and when none was.
    ///
    /// # Panics
    ///
    /// Panics where not as many pages are dirty as were written.
    pub fn taking(&self, pages: u64) -> [(&'static str, Measure); 2] {
        const PAGE: u64 = 4096;
        let first = self.layout.iova(0);
        let handle = self.tracked.handle();
        let taken = |dirty| {
            let cycles: Vec<f64> = (0..ROUNDS)
                .map(|_| {
                    for page in 0..dirty {
                        ours::handle_write(&handle, first + page * PAGE, &[1; 64]);
                    }
                    let mut taken = None;
                    let cycles = cycles::of(|| {
                        taken = self.tracked.take_dirty(first, pages * PAGE).ok();
                    });
                    let taken = taken.expect("nobody accesses it");
                    assert_eq!(taken.iter().count() as u64, dirty);
                    cycles as f64
                })
                .collect();
            Measure::of(&cycles)
        };
        [("all written", taken(pages)), ("none written", taken(0))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_taken_in_either_shape_and_only_where_tracked() {
        let memory = Memory::new();
        for shape in Shape::ALL {
            let spaces = Spaces::new(shape, &memory);
            for mut candidate in spaces.writing() {
                candidate.run(2);
            }
            let iova = Workload::new(&spaces.layout, Pattern::Hot, 64).iovas[0];
            let mapping = iova - (iova - spaces.layout.iova(0)) % spaces.layout.len;
            let taken = spaces.tracked.take_dirty(mapping, spaces.layout.len);
            assert_eq!(taken.expect("tracked").iter().count(), 1, "{shape:?}");
            let refused = spaces.untracked.take_dirty(mapping, spaces.layout.len);
            assert!(refused.is_err(), "{shape:?}");
            spaces.taking(1024);
        }
    }
}

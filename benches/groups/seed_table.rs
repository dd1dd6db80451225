// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The comparison that the kernel's `vfio_dma_rw` came with: cycles of a read and write call minus
//! those of a loop over pages, beside a copy of the same bytes.

use benches::candidates::Reader;
use benches::cycles;
use benches::harness::Bench;
use benches::record::Row;
use benches::workload::{Pattern, Workload};
use benches::world::{Memory, World};

const SIZES: [(&str, usize); 5] = [
    ("8 B", 8),
    ("64 B", 64),
    ("1 page", 4096),
    ("5 pages", 5 * 4096),
    ("20 pages", 20 * 4096),
];

/// The second neither a multiple of any word nor near one.
const SHIFTS: [(&str, u64); 2] = [("aligned", 0), ("not aligned", 35)];

fn main() {
    Bench::run("seed_table", |bench| {
        let world = World::new(16, &Memory::new());
        for pattern in [Pattern::Hot, Pattern::Uniform] {
            for (alignment, shift) in SHIFTS {
                let section = format!("{}, {alignment}", pattern.name());
                for (case, size) in SIZES {
                    let work = Workload::shifted(&world.layout, pattern, size, shift);
                    let readers = [Reader::Handle, Reader::PageLoop, Reader::Memcpy];
                    let candidates = readers.map(|reader| reader.reading(&world, &work));
                    let all = bench.compare(&section, case, candidates.into());
                    let [handle, page_loop, memcpy] = &all[..] else {
                        continue;
                    };
                    let section = format!("{section}: minus the page loop");
                    for series in [handle, memcpy] {
                        let difference = series.minus(page_loop);
                        let name = series.name;
                        bench.row(Row::new(&section, case, name, difference, cycles::UNIT));
                    }
                }
            }
        }
    });
}

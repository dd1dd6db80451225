// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reads through each of our faces, beside everything a VMM can use today.

use benches::candidates::Reader;
use benches::harness::Bench;
use benches::workload::{Pattern, Workload};
use benches::world::{Memory, World};

const MAPPINGS: [u64; 4] = [1, 16, 1024, 65_535];

const SIZES: [(&str, usize); 5] = [
    ("8 B", 8),
    ("64 B", 64),
    ("4 KiB", 4096),
    ("80 KiB", 20 * 4096),
    ("1 MiB", 1 << 20),
];

fn main() {
    Bench::run("peers", |bench| {
        let memory = Memory::new();
        for mappings in MAPPINGS {
            let world = World::new(mappings, &memory);
            for pattern in [Pattern::Hot, Pattern::Spread, Pattern::Uniform] {
                let section = format!("{} addresses, mappings: {mappings}", pattern.name());
                for (case, size) in SIZES {
                    let work = Workload::new(&world.layout, pattern, size);
                    let candidates = Reader::ALL.map(|reader| reader.reading(&world, &work));
                    bench.compare(&section, case, candidates.into());
                }
            }
        }
    });
}

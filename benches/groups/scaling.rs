// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Readers beside each other, and a reader beside a writer.

use benches::candidates::Reader;
use benches::compare::Series;
use benches::harness::Bench;
use benches::parallel::{beside_a_writer, in_two_threads, Pace, Pair};
use benches::record::Row;
use benches::workload::{Pattern, Workload};
use benches::world::{Memory, World};

const SIZES: [(&str, usize); 2] = [("64 B", 64), ("4 KiB", 4096)];

fn main() {
    Bench::run("scaling", |bench| {
        // Threads are measured all at once: there is nothing for criterion to do.
        if bench.compares() {
            let world = World::new(1024, &Memory::new());
            for (case, size) in SIZES {
                let spread = Workload::new(&world.layout, Pattern::Spread, size);
                two_readers(bench, &world, &spread, case);
                let hot = Workload::new(&world.layout, Pattern::Hot, size);
                beside_writers(bench, &world, &hot, case);
            }
        }
    });
}

fn two_readers(bench: &mut Bench, world: &World, work: &Workload, case: &str) {
    const SECTION: &str = "speed-up of two readers over one, spread over 1 024 mappings";
    let readers = [
        Reader::Memcpy,
        Reader::Handle,
        Reader::HandleMembarrier,
        Reader::Shared,
        Reader::Guard,
        Reader::Atomic,
        Reader::Iommu,
        Reader::Tree,
    ];
    let makers = readers.map(|reader| move || reader.reading(world, work));
    let speed_ups: Vec<Series> = in_two_threads(&makers).iter().map(Pair::speed_up).collect();
    for series in &speed_ups {
        let measure = series.measure();
        bench.row(Row::new(SECTION, case, series.name, measure, "x"));
    }
}

fn beside_writers(bench: &mut Bench, world: &World, work: &Workload, case: &str) {
    let paces = [
        (Pace::Steady, "250 000 pairs/s"),
        (Pace::Unlimited, "as fast as it can"),
    ];
    let readers = [
        Reader::Handle,
        Reader::HandleMembarrier,
        Reader::Guard,
        Reader::Iommu,
        Reader::Tree,
    ];
    for (pace, how) in paces {
        let case = format!("{case}, {how}");
        for reader in readers {
            let beside = beside_a_writer(world, work, reader, pace);
            let kept = "part of its speed that a reader keeps beside a writer, hot";
            let pairs = "map and unmap pairs a second of that writer";
            let name = reader.name();
            bench.row(Row::new(kept, &case, name, beside.kept, "x"));
            bench.row(Row::new(
                pairs,
                &case,
                name,
                beside.pairs_per_second,
                "pairs/s",
            ));
        }
    }
}

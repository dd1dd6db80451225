// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Changing mappings: pairs and batches, latencies beside handles, leases and readers, handles, pins,
//! dirty pages, bytes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use benches::churn::{
    beside_a_lease, beside_a_reader, page, pairs, space, space_with, unmap_latencies, PAGE,
};
use benches::compare::Candidate;
use benches::cycles;
use benches::dirty::{Shape, Spaces};
use benches::footprint::{bytes_of_one, bytes_per_mapping, tebibyte, CountingAllocator};
use benches::harness::Bench;
use benches::record::Row;
use benches::stats::percentile;
use benches::workload::Random;
use benches::world::Memory;
use iommu_type1::{Interest, IoAddressSpace, ReaderBarrier};
use vm_memory::Permissions;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

fn main() {
    Bench::run("map_unmap", |bench| {
        steady_pairs(bench);
        handles_and_pins(bench);
        dirty_pages(bench);
        if bench.compares() {
            latencies(bench);
            latencies_beside_a_reader(bench);
            bytes(bench);
            one_tebibyte(bench);
        }
    });
}

fn steady_pairs(bench: &mut Bench) {
    for mappings in [1_000, 65_000, 1_000_000] {
        let case = format!("mappings: {mappings}");
        let ascending: Vec<u64> = (0..mappings).collect();
        bench.compare("unmap + map, ascending", &case, pairs(&ascending));
        bench.compare(
            "unmap + map, random",
            &case,
            pairs(&Random::order(mappings)),
        );
    }
}

fn handles_and_pins(bench: &mut Bench) {
    let page = page();
    let space = space(1024, PAGE, &page);
    let pinner = space.pinner("bench", Interest::Holder, Arc::new(|_: u64, _: u64| ()));
    let handle = Candidate::of("handle + drop", || drop(space.handle()));
    bench.compare("users", "1 024 mappings", vec![handle]);
    for npages in [1, 512] {
        let pin = Candidate::of("pin + unpin", || {
            let pinned = pinner.pin_pages(0, npages, Permissions::ReadWrite);
            drop(pinned.expect("mapped"));
        });
        bench.compare("pins", &format!("pages: {npages}"), vec![pin]);
    }
}

fn dirty_pages(bench: &mut Bench) {
    const PAGES: u64 = 1024;
    let memory = Memory::new();
    for shape in Shape::ALL {
        let spaces = Spaces::new(shape, &memory);
        let case = shape.name();
        bench.compare(
            "write of 64 B by whether dirty pages are kept, hot",
            case,
            spaces.writing(),
        );
        if bench.compares() {
            for (name, measure) in spaces.taking(PAGES) {
                let section = "take_dirty of 1 024 pages";
                bench.row(Row::new(section, case, name, measure, cycles::UNIT));
            }
        }
    }
}

fn latencies(bench: &mut Bench) {
    const TIME: Duration = Duration::from_millis(500);
    let space = space(1024, PAGE, &page());
    let mut report = |case: &str, latencies: &[f64]| {
        for (name, percent) in [("p50", 50.0), ("p99", 99.0)] {
            let value = percentile(latencies, percent);
            bench.row(Row::new("unmap of an unused page", case, name, value, "ns"));
        }
    };
    for idle in [1, 16, 256] {
        let handles: Vec<_> = (0..idle).map(|_| space.handle()).collect();
        let latencies = unmap_latencies(&space, TIME, Duration::ZERO);
        report(&format!("idle handles: {}", handles.len()), &latencies);
    }
    let latencies = beside_a_lease(&space, || unmap_latencies(&space, TIME, Duration::ZERO));
    report("a lease elsewhere", &latencies);
}

fn latencies_beside_a_reader(bench: &mut Bench) {
    // Between the latter a reader that can do without barriers goes back to that.
    const PAUSES: [(&str, Duration); 2] = [
        ("without pause", Duration::ZERO),
        ("1 ms apart", Duration::from_millis(1)),
    ];
    const TIME: Duration = Duration::from_secs(1);
    for (barrier, name) in [
        (ReaderBarrier::Fence, "fence"),
        (ReaderBarrier::Membarrier, "membarrier"),
    ] {
        let space = space_with(barrier, 1024, PAGE, &page());
        for (apart, pause) in PAUSES {
            let latencies = beside_a_reader(&space, || unmap_latencies(&space, TIME, pause));
            let case = format!("{name}, {apart}");
            for (name, percent) in [("p50", 50.0), ("p99", 99.0)] {
                let value = percentile(&latencies, percent);
                let section = "unmap of an unused page beside a reader elsewhere";
                bench.row(Row::new(section, &case, name, value, "ns"));
            }
        }
    }
}

fn bytes(bench: &mut Bench) {
    let strides = [
        ("next to each other", PAGE),
        ("one in every 2 MiB", 2 << 20),
    ];
    for (name, stride) in strides {
        for mappings in [1_000, 65_000, 1_000_000] {
            let case = format!("mappings: {mappings}");
            let value = bytes_per_mapping(mappings, stride);
            bench.row(Row::new(
                "bytes a mapping of 4 KiB",
                &case,
                name,
                value,
                "bytes",
            ));
        }
    }
}

fn one_tebibyte(bench: &mut Bench) {
    let Ok(backing) = tebibyte() else {
        eprintln!("no address space for 1 TiB");
        return;
    };
    let (section, case) = ("one mapping", "1 TiB");
    let value = bytes_of_one(&backing);
    bench.row(Row::new(section, case, "table", value, "bytes"));
    let space = IoAddressSpace::new();
    let start = Instant::now();
    let mapped = space.map(0, backing, Permissions::ReadWrite);
    let value = start.elapsed().as_nanos() as f64;
    mapped.expect("an empty space");
    bench.row(Row::new(section, case, "map", value, "ns"));
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Changing mappings: pairs, latencies beside idle handles and leases, handles, pins, bytes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use benches::churn::{beside_a_lease, page, pairs, space, unmap_latencies, PAGE};
use benches::compare::Candidate;
use benches::footprint::{bytes_of_one, bytes_per_mapping, tebibyte, CountingAllocator};
use benches::harness::Bench;
use benches::record::Row;
use benches::stats::percentile;
use benches::workload::Random;
use iommu_type1::{Interest, IoAddressSpace};
use vm_memory::Permissions;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

fn main() {
    Bench::run("map_unmap", |bench| {
        steady_pairs(bench);
        handles_and_pins(bench);
        if bench.compares() {
            latencies(bench);
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

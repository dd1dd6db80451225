// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Mixed load for a bounded time, with a checker that knows what every byte must be.
//!
//! Two threads unmap and map slots of a space, each time with other memory. Three read and write lanes of their
//! own in all pages, through handles, the shared path, guards and scatter lists; one reads across slots; one
//! pins; one harvests dirty pages. Whoever finds bytes, errors or marks that cannot be counts a difference. In
//! between it is looked at what the process has: memory, mappings and file descriptors must not grow.
//!
//! `SECONDS_OF_SOAK` in the environment says how long; `ci/soak` runs it for long.

mod check;
#[path = "../common/deadline.rs"]
mod deadline;
mod process;
mod slot;
mod workers;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use iommu_type1::IoAddressSpace;

use check::Differences;
use deadline::{within, Over, DEADLINE};
use process::Process;
use slot::{Slot, SLOTS};

/// Threads with lanes of their own.
const LANES: usize = 3;
/// Threads that unmap and map.
const MAPPERS: usize = 2;
/// How often it is looked at what the process has.
const SAMPLES: u32 = 16;

struct Soak {
    space: IoAddressSpace,
    slots: Vec<Slot>,
    stop: AtomicBool,
    operations: [AtomicU64; 6],
    /// Harvests of dirty pages that have begun.
    harvests: AtomicU64,
    differences: Differences,
}

/// What is counted, in the order of `Soak::operations`.
#[derive(Clone, Copy)]
enum Kind {
    Map,
    Access,
    Lease,
    Pin,
    Harvest,
    Refused,
}

const NAMES: [&str; 6] = ["maps", "accesses", "leases", "pins", "harvests", "refused"];

impl Soak {
    fn new() -> Self {
        let soak = Soak {
            space: IoAddressSpace::builder()
                // Whoever uses a slot lets go of it as soon as it gets the processor.
                .unmap_deadline(DEADLINE)
                .build()
                .named("soak"),
            slots: (0..SLOTS).map(Slot::new).collect(),
            stop: AtomicBool::new(false),
            operations: Default::default(),
            harvests: AtomicU64::new(0),
            differences: Differences::default(),
        };
        soak.space.start_dirty_tracking().unwrap();
        soak.slots.iter().for_each(|slot| slot.map_first(&soak));
        soak
    }

    fn count(&self, kind: Kind) {
        self.operations[kind as usize].fetch_add(1, Ordering::Relaxed);
    }

    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }
}

#[test]
fn mixed_load() {
    let seconds = std::env::var("SECONDS_OF_SOAK")
        .map_or(2.0, |value| value.parse().expect("SECONDS_OF_SOAK"));
    let length = Duration::from_secs_f64(seconds);
    let soak = Soak::new();
    let samples = thread::scope(|threads| {
        let _over = Over(&soak.stop);
        for number in 0..MAPPERS {
            let soak = &soak;
            threads.spawn(move || workers::unmap_and_map(soak, number));
        }
        for lane in 0..LANES {
            let soak = &soak;
            threads.spawn(move || workers::read_and_write(soak, lane));
        }
        threads.spawn(|| workers::read_across(&soak));
        threads.spawn(|| workers::pin(&soak));
        threads.spawn(|| workers::harvest(&soak));
        let samples = sample(length);
        // A thread that did nothing has shown nothing.
        for (name, count) in NAMES.iter().zip(&soak.operations) {
            within(&format!("there are {name}"), || {
                count.load(Ordering::Relaxed) != 0
            });
        }
        samples
    });
    report(&soak, &samples, length);

    assert_eq!(soak.differences.count(), 0);
    process::assert_flat(&samples);
    assert_eq!(soak.space.stats().leases, 0);
    assert_eq!(
        soak.space.unmap_all().unwrap(),
        slot::BYTES as u64 * SLOTS as u64
    );
}

/// What the process has, at equal distances.
fn sample(length: Duration) -> Vec<Process> {
    let begun = Instant::now();
    (1..=SAMPLES)
        .map(|nth| {
            let at = begun + length * nth / SAMPLES;
            thread::sleep(at.saturating_duration_since(Instant::now()));
            Process::now()
        })
        .collect()
}

fn report(soak: &Soak, samples: &[Process], length: Duration) {
    let counts: Vec<u64> = soak
        .operations
        .iter()
        .map(|count| count.load(Ordering::Relaxed))
        .collect();
    for (name, count) in NAMES.iter().zip(&counts) {
        println!("{name}: {count}");
    }
    let (first, last) = (&samples[samples.len() / 4], &samples[samples.len() - 1]);
    println!("a quarter of the way: {first}");
    println!("at the end:           {last}");
    println!(
        "soak: {} operations in {:.0} s, {} differences",
        counts.iter().sum::<u64>(),
        length.as_secs_f64(),
        soak.differences.count()
    );
}

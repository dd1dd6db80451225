// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How the lines are measured.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use iommu_type1::{IoAddressSpace, ReaderBarrier};
use vm_memory::Permissions;

use crate::candidates::{ours, Reader};
use crate::chain::Device;
use crate::compare::{interleave, Candidate, Series, ROUNDS};
use crate::dirty::{Shape, Spaces};
use crate::parallel::Pace;
use crate::stats::{percentile, Measure};
use crate::workload::{Pattern, Random, Workload};
use crate::world::{Memory, World};
use crate::{churn, footprint, parallel};

/// What a line showed.
#[derive(Clone, Debug)]
pub struct Measured {
    /// The median, or the figure.
    pub value: f64,
    /// Around the median; 0 of a figure.
    pub spread: f64,
    /// Whether it was measured under the conditions that the line demands.
    pub is_valid: bool,
    /// What else is to be known.
    pub note: String,
}

impl Measured {
    /// A figure that does not depend on the machine's load.
    pub fn count(value: f64) -> Self {
        Measure::from(value).into()
    }
}

impl From<Measure> for Measured {
    fn from(measure: Measure) -> Self {
        Measured {
            value: measure.value,
            spread: measure.spread,
            is_valid: true,
            note: String::new(),
        }
    }
}

/// Memory and mappings, made when a line first asks for them.
#[derive(Debug, Default)]
pub struct Rig {
    memory: OnceCell<Memory>,
    worlds: std::cell::RefCell<BTreeMap<u64, Rc<World>>>,
}

impl Rig {
    /// The world of so many mappings.
    pub fn world(&self, mappings: u64) -> Rc<World> {
        let memory = self.memory();
        let mut worlds = self.worlds.borrow_mut();
        let world = worlds
            .entry(mappings)
            .or_insert_with(|| Rc::new(World::new(mappings, memory)));
        world.clone()
    }

    fn memory(&self) -> &Memory {
        self.memory.get_or_init(Memory::new)
    }
}

/// How often candidates are made and measured: where their memory lies makes a difference of some per cent,
/// which is not to decide.
const MAKINGS: usize = 3;

/// The first is ours, by a user of a space with this barrier, who is given time to go without.
fn interleave_often<'a>(
    barrier: ReaderBarrier,
    make: impl Fn() -> Vec<Candidate<'a>>,
) -> Vec<Series> {
    const UNTIL_UNFENCED: u64 = 1 << 17;
    let mut all: Vec<Series> = Vec::new();
    for _ in 0..MAKINGS {
        let mut candidates = make();
        if barrier == ReaderBarrier::Membarrier {
            candidates[0].run(UNTIL_UNFENCED);
        }
        let series = interleave(&mut candidates);
        if all.is_empty() {
            all = series;
        } else {
            all.iter_mut()
                .zip(series)
                .for_each(|(all, more)| all.append(more));
        }
    }
    all
}

/// The handle of the space with this barrier, and peers in turns with it.
fn handle_and<const N: usize>(
    rig: &Rig,
    barrier: ReaderBarrier,
    mappings: u64,
    pattern: Pattern,
    size: usize,
    peers: [Reader; N],
) -> (Series, [Series; N]) {
    let world = rig.world(mappings);
    let work = Workload::new(&world.layout, pattern, size);
    let readers = [&[Reader::handle(barrier)], &peers[..]].concat();
    let all = interleave_often(barrier, || {
        let reading = readers.iter().map(|reader| reader.reading(&world, &work));
        reading.collect()
    });
    let peers = std::array::from_fn(|i| all[i + 1].clone());
    (all[0].clone(), peers)
}

pub(super) fn minus_memcpy(rig: &Rig, barrier: ReaderBarrier, mappings: u64) -> Measured {
    let peer = [Reader::Memcpy];
    let (ours, [memcpy]) = handle_and(rig, barrier, mappings, Pattern::Hot, 64, peer);
    ours.minus(&memcpy).into()
}

pub(super) fn ratio(
    rig: &Rig,
    barrier: ReaderBarrier,
    mappings: u64,
    size: usize,
    peer: Reader,
) -> Measured {
    let (ours, [peer]) = handle_and(rig, barrier, mappings, Pattern::Hot, size, [peer]);
    Measured {
        note: cycles_of(&ours, &peer),
        ..ours.over(&peer).measure().into()
    }
}

pub(super) fn against_memcpy(
    rig: &Rig,
    barrier: ReaderBarrier,
    mappings: u64,
    size: usize,
) -> Measured {
    ratio(rig, barrier, mappings, size, Reader::Memcpy)
}

pub(super) fn speed_up(
    rig: &Rig,
    barrier: ReaderBarrier,
    mappings: u64,
    pattern: Pattern,
    size: usize,
) -> Measured {
    let (ours, [peer]) = handle_and(rig, barrier, mappings, pattern, size, [Reader::Iommu]);
    Measured {
        note: cycles_of(&ours, &peer),
        ..peer.over(&ours).measure().into()
    }
}

fn cycles_of(ours: &Series, peer: &Series) -> String {
    let [ours, peer] = [ours, peer].map(|series| series.measure().value);
    format!("{ours:.1} against {peer:.1} cycles")
}

/// 20 pages against the page loops, and how much of them the copy alone takes.
pub(super) fn pages_against_loops(rig: &Rig) -> Measured {
    const PAGES: usize = 20 * 4096;
    let world = rig.world(1);
    let readers = [
        Reader::Handle,
        Reader::PageLoop16,
        Reader::PageLoop,
        Reader::Memcpy,
    ];
    let all_at = |shift| {
        let work = Workload::shifted(&world.layout, Pattern::Hot, PAGES, shift);
        interleave_often(ReaderBarrier::Fence, || {
            let reading = readers.iter().map(|reader| reader.reading(&world, &work));
            reading.collect()
        })
    };
    let over = |series: &Series, peer: &Series| series.over(peer).measure().value;
    let (aligned, shifted) = (all_at(0), all_at(8));
    let [ours, loop_16, loop_1, memcpy] = [0, 1, 2, 3].map(|i| &aligned[i]);
    Measured {
        note: format!(
            "memcpy {:.2}x; 1 region {:.2}x, memcpy {:.2}x; 1 region, not aligned {:.2}x, memcpy {:.2}x",
            over(memcpy, loop_16),
            over(ours, loop_1),
            over(memcpy, loop_1),
            over(&shifted[0], &shifted[2]),
            over(&shifted[3], &shifted[2]),
        ),
        ..ours.over(loop_16).measure().into()
    }
}

pub(super) fn guard_cycles(rig: &Rig) -> Measured {
    let world = rig.world(16);
    let guard = || vec![Candidate::of("guard", || ours::guard_alone(&world.space))];
    interleave_often(ReaderBarrier::Fence, guard)[0]
        .measure()
        .into()
}

pub(super) fn chain_against(
    rig: &Rig,
    barrier: ReaderBarrier,
    peer: Device,
    relate: impl Fn(&Series, &Series) -> Series,
) -> Measured {
    let world = rig.world(1024);
    let devices = [Device::guard(barrier), peer];
    let all = interleave_often(barrier, || {
        devices.map(|device| device.reading(&world, 512)).into()
    });
    Measured {
        note: cycles_of(&all[0], &all[1]),
        ..relate(&all[0], &all[1]).measure().into()
    }
}

pub(super) fn two_readers(rig: &Rig) -> Measured {
    let world: &World = &rig.world(1024);
    let work = &Workload::new(&world.layout, Pattern::Spread, 64);
    let makers = [Reader::Handle, Reader::Memcpy].map(|reader| move || reader.reading(world, work));
    let pairs = parallel::in_two_threads(&makers);
    let [ours, memcpy] = [&pairs[0], &pairs[1]].map(parallel::Pair::speed_up);
    Measured {
        note: format!("memcpy's own speed-up is {:.2}x", memcpy.measure().value),
        ..ours.over(&memcpy).measure().into()
    }
}

pub(super) fn beside_writer(rig: &Rig, barrier: ReaderBarrier, size: usize) -> Measured {
    const LEAST_PAIRS: f64 = 200_000.0;
    let world = rig.world(16);
    let work = Workload::new(&world.layout, Pattern::Hot, size);
    let beside = parallel::beside_a_writer(&world, &work, Reader::handle(barrier), Pace::Steady);
    Measured {
        is_valid: beside.pairs_per_second >= LEAST_PAIRS,
        note: format!("{:.0} pairs/s", beside.pairs_per_second),
        ..beside.kept.into()
    }
}

pub(super) fn pairs_against_tree(_: &Rig) -> Measured {
    let order = Random::order(65_000);
    let mut candidates = churn::pairs(&order);
    candidates.truncate(2);
    let all = interleave(&mut candidates);
    all[0].over(&all[1]).measure().into()
}

pub(super) fn held_elsewhere(_: &Rig) -> Measured {
    const HELD: Duration = Duration::from_secs(10);
    const PAUSE: Duration = Duration::from_micros(50);
    let space = churn::space(16, churn::PAGE, &churn::page());
    let latencies = churn::beside_a_lease(&space, || churn::unmap_latencies(&space, HELD, PAUSE));
    let p50 = percentile(&latencies, 50.0) / 1000.0;
    Measured {
        note: format!("{} unmaps, p50 {p50:.2} us", latencies.len()),
        ..Measured::count(percentile(&latencies, 99.0) / 1000.0)
    }
}

pub(super) fn more_when_tracked(rig: &Rig, shape: Shape) -> Measured {
    let spaces = Spaces::new(shape, rig.memory());
    let all = interleave_often(ReaderBarrier::Fence, || spaces.writing());
    all[1].minus(&all[0]).into()
}

pub(super) fn dense_bytes(_: &Rig) -> Measured {
    Measured::count(footprint::bytes_per_mapping(65_536, churn::PAGE))
}

pub(super) fn sparse_bytes(_: &Rig) -> Measured {
    Measured::count(footprint::bytes_per_mapping(16_384, 2 << 20))
}

pub(super) fn tebibyte_bytes(_: &Rig) -> Measured {
    let backing = footprint::tebibyte().expect("address space for 1 TiB");
    Measured::count(footprint::bytes_of_one(&backing))
}

pub(super) fn tebibyte_micros(_: &Rig) -> Measured {
    let backing = footprint::tebibyte().expect("address space for 1 TiB");
    let space = IoAddressSpace::new();
    let times: Vec<_> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            let mapped = space.map(0, backing.clone(), Permissions::ReadWrite);
            let time = start.elapsed();
            mapped.expect("an empty space");
            space
                .unmap(0, backing.len() as u64)
                .expect("nobody holds it");
            time.as_nanos() as f64 / 1000.0
        })
        .collect();
    Measure::of(&times).into()
}

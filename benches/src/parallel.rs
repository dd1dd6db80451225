// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Threads beside each other: readers, and a reader beside a writer.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Barrier;
use std::thread::{park, ScopedJoinHandle, Thread};
use std::time::{Duration, Instant};

use crate::candidates::Reader;
use crate::compare::{Candidate, Series};
use crate::cpus::Cpus;
use crate::cycles;
use crate::stats::Measure;
use crate::workload::Workload;
use crate::world::World;

/// How long a turn is where threads meet: long against starting and stopping them.
const TURN: Duration = Duration::from_millis(20);

const ROUNDS: usize = 31;

/// What one candidate takes alone, and in two threads at once.
#[derive(Clone, Debug)]
pub struct Pair {
    /// [`cycles::UNIT`]s an operation of one thread alone.
    pub alone: Series,
    /// [`cycles::UNIT`]s an operation of either of two threads, half of what one of them takes.
    pub together: Series,
}

impl Pair {
    /// How many times faster two threads are than one: 2 where they do not meet.
    pub fn speed_up(&self) -> Series {
        self.alone.over(&self.together)
    }
}

/// Measures candidates, all in turns, alone and in two threads. Each thread makes its own.
pub fn in_two_threads<'a, F>(makers: &[F]) -> Vec<Pair>
where
    F: Fn() -> Candidate<'a> + Sync,
{
    let turns: Vec<u64> = makers.iter().map(|make| filling(&mut make())).collect();
    let mut samples = vec![(Vec::new(), Vec::new()); makers.len()];
    for _ in 0..ROUNDS {
        for ((make, n), (alone, together)) in makers.iter().zip(&turns).zip(&mut samples) {
            alone.push(per_operation(make, *n, 1));
            together.push(per_operation(make, *n, 2));
        }
    }
    let named = makers.iter().map(|make| make().name()).zip(samples);
    named
        .map(|(name, (alone, together))| Pair {
            alone: Series::new(name, alone),
            together: Series::new(name, together),
        })
        .collect()
}

/// Operations that fill a turn when alone.
fn filling(candidate: &mut Candidate<'_>) -> u64 {
    let n = candidate.fill_a_turn();
    let start = Instant::now();
    candidate.run(n);
    let turns = TURN.as_nanos() / start.elapsed().as_nanos().max(1);
    n * (turns.max(1) as u64)
}

fn per_operation<'a>(make: &(impl Fn() -> Candidate<'a> + Sync), n: u64, threads: usize) -> f64 {
    let start = Barrier::new(threads);
    let cpus = Cpus::allowed();
    let run = |cpu| {
        let _stay = cpus.stay_on(cpu);
        let mut candidate = make();
        start.wait();
        n as f64 / cycles::of(|| candidate.run(n)) as f64
    };
    let rate: f64 = std::thread::scope(|scope| {
        let run = &run;
        let threads: Vec<_> = (0..threads)
            .map(|cpu| scope.spawn(move || run(cpu)))
            .collect();
        let rates = threads.into_iter().map(|thread| thread.join());
        rates.map(|rate| rate.expect("a reader that reads")).sum()
    });
    1.0 / rate
}

/// Pairs a second of a writer that keeps pace. The bars speak of at least 200 000: this is as much
/// more as a writer loses whose thread is away for a while.
pub const PACE: u32 = 250_000;

/// How fast a writer works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// [`PACE`], or as near as it gets: readers of different spaces are beside the same work.
    Steady,
    /// As fast as it can.
    Unlimited,
}

/// A reader beside a writer.
#[derive(Clone, Copy, Debug)]
pub struct Beside {
    /// Which part of its speed alone the reader keeps.
    pub kept: Measure,
    /// Map and unmap pairs a second that the writer did meanwhile.
    pub pairs_per_second: f64,
}

/// A reader of `work`, in turns alone and beside a thread that maps and unmaps a page elsewhere.
///
/// # Panics
///
/// Panics where `reader` has no mappings to change.
pub fn beside_a_writer(world: &World, work: &Workload, reader: Reader, pace: Pace) -> Beside {
    let writer = Writer::default();
    let mut churn = reader.churning(world).expect("one who maps");
    let mut candidate = reader.reading(world, work);
    let n = filling(&mut candidate);
    let cpus = Cpus::allowed();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let _stay = cpus.stay_on(1);
            writer.run(pace, &mut churn);
        });
        let end = End(&writer, thread.thread().clone());
        let _stay = cpus.stay_on(0);
        let mut kept = Vec::with_capacity(ROUNDS);
        let (mut pairs, mut writing) = (0, Duration::ZERO);
        for _ in 0..ROUNDS {
            let alone = cycles::of(|| candidate.run(n));
            writer.go(true, &thread);
            // Not what it does before and after: this thread may be away for a while there.
            let (start, before) = (Instant::now(), writer.pairs.load(Ordering::Relaxed));
            let beside = cycles::of(|| candidate.run(n));
            pairs += writer.pairs.load(Ordering::Relaxed) - before;
            writing += start.elapsed();
            writer.go(false, &thread);
            kept.push(alone as f64 / beside as f64);
        }
        drop(end);
        Beside {
            kept: Measure::of(&kept),
            pairs_per_second: pairs as f64 / writing.as_secs_f64(),
        }
    })
}

/// A writer that works when told to.
#[derive(Default)]
struct Writer {
    wanted: AtomicBool,
    working: AtomicBool,
    ended: AtomicBool,
    pairs: AtomicU64,
}

impl Writer {
    fn run(&self, pace: Pace, mut churn: impl FnMut()) {
        let interval = Duration::from_secs(1) / PACE;
        let mut due = None;
        while !self.ended.load(Ordering::Acquire) {
            let wanted = self.wanted.load(Ordering::Acquire);
            self.working.store(wanted, Ordering::Release);
            if !wanted {
                due = None;
                // A reader alone is alone: a processor that spins can slow the one beside it.
                park();
                continue;
            }
            if pace == Pace::Steady {
                let now = Instant::now();
                // Who was away for a while catches up, within a turn of the reader.
                let at = *due.get_or_insert(now);
                if now < at {
                    spin_loop();
                    continue;
                }
                due = Some(at + interval);
            }
            churn();
            self.pairs.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Starts or stops it, and waits until it has.
    fn go(&self, wanted: bool, thread: &ScopedJoinHandle<'_, ()>) {
        self.wanted.store(wanted, Ordering::Release);
        thread.thread().unpark();
        while self.working.load(Ordering::Acquire) != wanted {
            assert!(!thread.is_finished(), "the writer has failed");
            spin_loop();
        }
    }
}

/// Ends the writer, also where the reader fails.
struct End<'a>(&'a Writer, Thread);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::Release);
        self.1.unpark();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writer_works_only_when_told_to() {
        let writer = Writer::default();
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| writer.run(Pace::Unlimited, || {}));
            let _end = End(&writer, thread.thread().clone());
            assert_eq!(writer.pairs.load(Ordering::Relaxed), 0);
            writer.go(true, &thread);
            while writer.pairs.load(Ordering::Relaxed) < 10 {
                spin_loop();
            }
            writer.go(false, &thread);
            let pairs = writer.pairs.load(Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(1));
            assert_eq!(writer.pairs.load(Ordering::Relaxed), pairs);
        });
    }
    #[test]
    fn a_steady_writer_is_never_ahead_of_its_pace() {
        let writer = Writer::default();
        let start = Instant::now();
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| writer.run(Pace::Steady, || {}));
            let _end = End(&writer, thread.thread().clone());
            writer.go(true, &thread);
            while writer.pairs.load(Ordering::Relaxed) < 1000 {
                spin_loop();
            }
        });
        let pairs = writer.pairs.load(Ordering::Relaxed);
        // The first is due at once.
        let due = start.elapsed().as_secs_f64() * f64::from(PACE) + 1.0;
        assert!(pairs as f64 <= due, "{pairs} of {due}");
    }
}

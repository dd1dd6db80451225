// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Comparisons that a change of the machine's load does not decide: the candidates take turns.

use std::fmt;

use crate::cycles;
use crate::stats::{percentile, Measure};

/// Rounds of a comparison, and so ratios its median is taken of.
pub const ROUNDS: usize = 101;

/// A spread above this says more about the machine than about the candidates.
pub const NOISY: f64 = 0.15;

/// The fastest candidate runs at least this long in a round: against it reading the clock is
/// nothing, and it is short enough that an interrupt or another process hits few rounds.
const TURN: u64 = 100_000;

/// Something that can be done any number of times in a row.
pub struct Candidate<'a> {
    name: &'static str,
    run: Box<dyn FnMut(u64) + 'a>,
}

impl<'a> Candidate<'a> {
    /// `run` does the operation as many times as it is told.
    pub fn new(name: &'static str, run: impl FnMut(u64) + 'a) -> Self {
        Candidate {
            name,
            run: Box::new(run),
        }
    }

    /// `op` is the operation.
    pub fn of(name: &'static str, mut op: impl FnMut() + 'a) -> Self {
        Candidate::new(name, move |n| {
            for _ in 0..n {
                op();
            }
        })
    }

    /// Its name in tables.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Does it `n` times.
    pub fn run(&mut self, n: u64) {
        (self.run)(n);
    }

    /// How often one must do it to fill a turn; warms up on the way.
    pub fn fill_a_turn(&mut self) -> u64 {
        let mut n = 1;
        while cycles::of(|| self.run(n)) < TURN && n < 1 << 40 {
            n *= 2;
        }
        n
    }
}

impl fmt::Debug for Candidate<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Candidate").field(&self.name).finish()
    }
}

/// What one candidate showed, one sample a round: [`cycles::UNIT`]s an operation, or a ratio of
/// them.
#[derive(Clone, Debug)]
pub struct Series {
    /// Name of the candidate.
    pub name: &'static str,
    samples: Vec<f64>,
}

impl Series {
    /// Samples taken elsewhere.
    pub fn new(name: &'static str, samples: Vec<f64>) -> Self {
        Series { name, samples }
    }

    /// Has the samples of further rounds, too.
    pub fn append(&mut self, mut more: Series) {
        self.samples.append(&mut more.samples);
    }

    /// The median.
    pub fn measure(&self) -> Measure {
        Measure::of(&self.samples)
    }

    /// What it takes as a part of what `other` takes, each round for itself.
    pub fn over(&self, other: &Series) -> Series {
        self.by_round(other, |own, others| own / others)
    }

    /// What it takes more than `other`, each round for itself. The spread is relative to what this
    /// candidate takes: a difference may be 0.
    pub fn minus(&self, other: &Series) -> Measure {
        let differences = self.by_round(other, |own, others| own - others);
        Measure::relative_to(&differences.samples, percentile(&self.samples, 50.0))
    }

    fn by_round(&self, other: &Series, relate: impl Fn(f64, f64) -> f64) -> Series {
        let rounds = self.samples.iter().zip(&other.samples);
        let related = rounds.map(|(own, others)| relate(*own, *others));
        Series::new(self.name, related.collect())
    }
}

/// Measures all candidates in turns (A B C A B C ...), each the same number of times.
pub fn interleave(candidates: &mut [Candidate<'_>]) -> Vec<Series> {
    let n = candidates.iter_mut().map(Candidate::fill_a_turn).max();
    let n = n.unwrap_or(0);
    let mut all: Vec<_> = candidates
        .iter()
        .map(|candidate| Series::new(candidate.name, Vec::with_capacity(ROUNDS)))
        .collect();
    for _ in 0..ROUNDS {
        for (candidate, series) in candidates.iter_mut().zip(&mut all) {
            let taken = cycles::of(|| candidate.run(n));
            series.samples.push(taken as f64 / n as f64);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn candidates_take_turns_with_the_same_work() {
        let turns = RefCell::new(Vec::new());
        let note = |name| {
            let turns = &turns;
            Candidate::new(name, move |n| {
                turns.borrow_mut().push((name, n));
                (0..n).for_each(|i| {
                    std::hint::black_box(i);
                });
            })
        };
        let all = interleave(&mut [note("a"), note("b")]);
        assert!(all.iter().all(|series| series.samples.len() == ROUNDS));

        let turns = turns.borrow();
        let measured = &turns[turns.len() - 2 * ROUNDS..];
        let n = measured[0].1;
        assert!(measured
            .chunks(2)
            .all(|round| round == [("a", n), ("b", n)]));
    }

    #[test]
    fn rounds_are_related_one_by_one() {
        // The load of the machine doubles half-way: the ratio does not care.
        let ours = Series::new("ours", vec![10.0, 10.0, 20.0, 20.0]);
        let peer = Series::new("peer", vec![40.0, 40.0, 80.0, 80.0]);
        let quarter = Measure {
            value: 0.25,
            spread: 0.0,
        };
        assert_eq!(ours.over(&peer).measure(), quarter);
        assert_eq!(peer.minus(&ours).value, 30.0);
    }
}

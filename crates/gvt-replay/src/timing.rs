// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How long copying the pages of a context takes, page by page against in runs.

use std::time::{Duration, Instant};

use gvt_scheduler::{ContextPages, CopyMode, Observer};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::layout::PAGE_SIZE;
use crate::machine::Machine;
use crate::plan::Plan;

/// Rounds of a comparison. Each gives a time page by page, a time in runs and their ratio.
pub const ROUNDS: usize = 61;
/// Turns of each way of copying in a round. They alternate, so that what slows the machine down for
/// a while slows both down.
const TURNS: usize = 10;
/// How long a turn takes, about; a round takes a millisecond each way.
const TURN: Duration = Duration::from_micros(100);
/// Spread above which a comparison is called noisy.
pub const NOISY_SPREAD: f64 = 0.15;
/// Contexts whose copies are timed at most: the first ones of the plan.
const MAX_CONTEXTS: usize = 64;

/// Time of one copy of a context's pages: medians over the rounds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct CopyTime {
    /// Nanoseconds.
    pub ns: f64,
    /// Cycles of the time stamp counter, where there is one.
    pub cycles: Option<f64>,
}

/// Page by page against in runs.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Comparison {
    /// A copy page by page.
    pub page: CopyTime,
    /// A copy in runs.
    pub run: CopyTime,
    /// Time page by page over time in runs: the median of the rounds' ratios. The ratio of the
    /// median times above can be a little different.
    pub ratio: f64,
    /// Interquartile range of the rounds' ratios, as a part of their median.
    pub spread: f64,
    /// Whether the spread is above [`NOISY_SPREAD`].
    pub noisy: bool,
}

/// Both directions.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Timing {
    /// From guest memory.
    pub populate: Comparison,
    /// To guest memory.
    pub write_back: Comparison,
}

/// Times the copies of all contexts of a machine that has replayed `plan`. `None` if its contexts
/// have no pages to copy. Guest memory is the same afterwards: what is written was read before.
pub(crate) fn time_copies<O: Observer>(
    machine: &Machine<O>,
    plan: &Plan,
) -> Result<Option<Timing>> {
    let mut contexts: Vec<(ContextPages<'_>, Vec<u8>)> = plan
        .contexts()
        .iter()
        .filter(|context| !context.pages.is_empty())
        .take(MAX_CONTEXTS)
        .map(|context| {
            let count = context.pages.len();
            let pages = ContextPages::new(machine.vgpu().ggtt(), context.lrca, count + 2);
            (pages, vec![0; count * PAGE_SIZE as usize])
        })
        .collect();
    if contexts.is_empty() {
        return Ok(None);
    }
    let copies = contexts.len();
    let dma = machine.dma();
    let populate = compare(copies, |mode| {
        for (context, pages) in &mut contexts {
            context
                .populate(&dma, mode, pages, &mut ())
                .map_err(Error::machine("populate a context"))?;
        }
        Ok(())
    })?;
    let write_back = compare(copies, |mode| {
        for (context, pages) in &contexts {
            context
                .write_back(&dma, mode, pages, &mut ())
                .map_err(Error::machine("write a context back"))?;
        }
        Ok(())
    })?;
    Ok(Some(Timing {
        populate,
        write_back,
    }))
}

/// Compares the two modes of `pass`, which makes `copies` copies.
fn compare(copies: usize, mut pass: impl FnMut(CopyMode) -> Result<()>) -> Result<Comparison> {
    let mut both = || pass(CopyMode::PerPage).and_then(|()| pass(CopyMode::Coalesced));
    // The first time only touches all memory.
    both()?;
    let begun = Instant::now();
    both()?;
    let passes = 2 * TURN.as_nanos() / begun.elapsed().as_nanos().max(1);
    compare_turns((passes as usize).max(1), copies, pass)
}

/// Compares the two modes of `pass` in turns of `passes` passes.
fn compare_turns(
    passes: usize,
    copies: usize,
    mut pass: impl FnMut(CopyMode) -> Result<()>,
) -> Result<Comparison> {
    let copies = (TURNS * passes * copies) as f64;
    let (mut pages, mut runs) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let (mut page, mut run) = (Elapsed::default(), Elapsed::default());
        for _ in 0..TURNS {
            page.add(|| (0..passes).try_for_each(|_| pass(CopyMode::PerPage)))?;
            run.add(|| (0..passes).try_for_each(|_| pass(CopyMode::Coalesced)))?;
        }
        pages.push(page.divided_by(copies));
        runs.push(run.divided_by(copies));
    }
    let ratios = sorted(pages.iter().zip(&runs).map(|(page, run)| page.ns / run.ns));
    let ratio = at(&ratios, 0.5);
    let spread = (at(&ratios, 0.75) - at(&ratios, 0.25)) / ratio;
    Ok(Comparison {
        page: median(&pages),
        run: median(&runs),
        ratio,
        spread,
        noisy: spread > NOISY_SPREAD,
    })
}

/// What the turns of one round took.
#[derive(Default)]
struct Elapsed {
    time: Duration,
    cycles: Option<u64>,
}

impl Elapsed {
    fn add(&mut self, turn: impl FnOnce() -> Result<()>) -> Result<()> {
        let (begun, first) = (Instant::now(), time_stamp());
        turn()?;
        let (time, last) = (begun.elapsed(), time_stamp());
        self.time += time;
        let cycles = first
            .zip(last)
            .map(|(first, last)| last.wrapping_sub(first));
        self.cycles = cycles.map(|cycles| self.cycles.unwrap_or(0).wrapping_add(cycles));
        Ok(())
    }

    fn divided_by(&self, copies: f64) -> CopyTime {
        CopyTime {
            // A clock too coarse to see the round would give a ratio of nothing.
            ns: self.time.as_nanos().max(1) as f64 / copies,
            cycles: self.cycles.map(|cycles| cycles as f64 / copies),
        }
    }
}

fn median(times: &[CopyTime]) -> CopyTime {
    let cycles = sorted(times.iter().filter_map(|time| time.cycles));
    CopyTime {
        ns: at(&sorted(times.iter().map(|time| time.ns)), 0.5),
        cycles: (!cycles.is_empty()).then(|| at(&cycles, 0.5)),
    }
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

/// The value a `part` of the way through sorted values.
fn at(sorted: &[f64], part: f64) -> f64 {
    let index = (sorted.len().saturating_sub(1) as f64 * part).round() as usize;
    sorted.get(index).copied().unwrap_or(f64::NAN)
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
fn time_stamp() -> Option<u64> {
    // SAFETY: every x86-64 CPU has the instruction, and it touches no memory.
    Some(unsafe { std::arch::x86_64::_rdtsc() })
}

#[cfg(not(target_arch = "x86_64"))]
fn time_stamp() -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_of_sorted_values() {
        let values = sorted([5.0, 1.0, 4.0, 2.0, 3.0].into_iter());
        assert_eq!(at(&values, 0.5), 3.0);
        assert_eq!((at(&values, 0.0), at(&values, 1.0)), (1.0, 5.0));
        assert!(at(&[], 0.5).is_nan());
    }

    #[test]
    fn the_modes_take_turns() {
        let mut modes = Vec::new();
        compare_turns(3, 1, |mode| {
            modes.push(matches!(mode, CopyMode::PerPage));
            Ok(())
        })
        .unwrap();
        assert_eq!(modes.len(), 2 * 3 * TURNS * ROUNDS);
        let turns = [true, true, true, false, false, false];
        assert!(modes.chunks(6).all(|modes| modes == turns));
    }

    #[test]
    fn an_error_ends_the_comparison() {
        assert!(compare(1, |_| Err(Error::NothingToInject)).is_err());
    }
}

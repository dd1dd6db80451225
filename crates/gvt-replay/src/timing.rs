// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How long copying the pages of a context takes, page by page against in runs.

use std::time::Instant;

use gvt_scheduler::{ContextPages, CopyMode, Observer};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::layout::PAGE_SIZE;
use crate::machine::Machine;
use crate::plan::Plan;

/// Rounds of a comparison. Each times all contexts page by page, then all contexts in runs.
pub const ROUNDS: usize = 21;
/// Copies a round makes at least in each way, so that the clock's resolution does not show.
const COPIES: usize = 136;
/// Spread above which a comparison is called noisy.
pub const NOISY_SPREAD: f64 = 0.15;

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
    /// How often the time in runs goes into the time page by page: median of the rounds' ratios.
    pub ratio: f64,
    /// Distance of the ratios' first and last decile, as a part of their median.
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
        .map(|context| {
            let count = context.pages.len();
            let pages = ContextPages::new(machine.vgpu().ggtt(), context.lrca, count + 2);
            (pages, vec![0; count * PAGE_SIZE as usize])
        })
        .collect();
    if contexts.is_empty() {
        return Ok(None);
    }
    let repeats = COPIES.div_ceil(contexts.len());
    let copies = repeats * contexts.len();
    let dma = machine.dma();
    let populate = compare(copies, |mode| {
        for _ in 0..repeats {
            for (context, pages) in &mut contexts {
                context
                    .populate(&dma, mode, pages, &mut ())
                    .map_err(Error::machine("populate a context"))?;
            }
        }
        Ok(())
    })?;
    let write_back = compare(copies, |mode| {
        for _ in 0..repeats {
            for (context, pages) in &contexts {
                context
                    .write_back(&dma, mode, pages, &mut ())
                    .map_err(Error::machine("write a context back"))?;
            }
        }
        Ok(())
    })?;
    Ok(Some(Timing {
        populate,
        write_back,
    }))
}

/// Runs `round`, which makes `copies` copies, in turn in the two modes.
fn compare(copies: usize, mut round: impl FnMut(CopyMode) -> Result<()>) -> Result<Comparison> {
    let mut page = Vec::new();
    let mut run = Vec::new();
    // One round to touch all memory, not counted.
    round(CopyMode::PerPage)?;
    round(CopyMode::Coalesced)?;
    for _ in 0..ROUNDS {
        page.push(sample(copies, || round(CopyMode::PerPage))?);
        run.push(sample(copies, || round(CopyMode::Coalesced))?);
    }
    let ratios = sorted(page.iter().zip(&run).map(|(page, run)| page.ns / run.ns));
    let ratio = at(&ratios, 0.5);
    let spread = (at(&ratios, 0.9) - at(&ratios, 0.1)) / ratio;
    Ok(Comparison {
        page: median(&page),
        run: median(&run),
        ratio,
        spread,
        noisy: spread > NOISY_SPREAD,
    })
}

fn sample(copies: usize, round: impl FnOnce() -> Result<()>) -> Result<CopyTime> {
    let (start, first) = (Instant::now(), time_stamp());
    round()?;
    let (elapsed, last) = (start.elapsed(), time_stamp());
    let copies = copies as f64;
    Ok(CopyTime {
        // A clock too coarse to see the round would give a ratio of nothing.
        ns: elapsed.as_nanos().max(1) as f64 / copies,
        cycles: first
            .zip(last)
            .map(|(first, last)| last.wrapping_sub(first) as f64 / copies),
    })
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
        compare(1, |mode| {
            modes.push(matches!(mode, CopyMode::PerPage));
            Ok(())
        })
        .unwrap();
        assert_eq!(modes.len(), 2 * (ROUNDS + 1));
        assert!(modes.chunks(2).all(|pair| pair == [true, false]));
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the DMA path has to reach, as data: [`LINES`].

mod lines;
mod measured;

use serde::{Deserialize, Serialize};

use iommu_type1::ReaderBarrier;

use crate::compare::NOISY;

pub use lines::LINES;
pub use measured::{Measured, Rig};

/// A line of the table.
pub struct Line {
    /// What to call it, as an argument too.
    pub name: &'static str,
    /// What is measured.
    pub how: &'static str,
    /// What it has to reach.
    pub bar: Bar,
    /// How to measure it.
    pub measuring: Measuring,
}

/// How a line is measured, and in which spaces it decides.
#[derive(Clone, Copy, Debug)]
pub enum Measuring {
    /// In spaces as they are by default only: the barrier is no part of it to speak of.
    ByDefault(fn(&Rig) -> Measured),
    /// With either barrier; what spaces are by default decides.
    Fenced(fn(&Rig, ReaderBarrier) -> Measured),
    /// With either barrier; `ReaderBarrier::Membarrier` decides.
    Unfenced(fn(&Rig, ReaderBarrier) -> Measured),
}

impl std::fmt::Debug for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Line")
            .field("name", &self.name)
            .field("bar", &self.bar)
            .finish_non_exhaustive()
    }
}

impl Line {
    /// The barrier of the spaces in which it decides.
    pub fn meant_for(&self) -> ReaderBarrier {
        match self.measuring {
            Measuring::ByDefault(_) | Measuring::Fenced(_) => ReaderBarrier::Fence,
            Measuring::Unfenced(_) => ReaderBarrier::Membarrier,
        }
    }

    /// The other barrier that it is measured with.
    pub fn also_with(&self) -> Option<ReaderBarrier> {
        match self.measuring {
            Measuring::ByDefault(_) => None,
            Measuring::Fenced(_) => Some(ReaderBarrier::Membarrier),
            Measuring::Unfenced(_) => Some(ReaderBarrier::Fence),
        }
    }

    /// Measures it with this barrier; again, up to three times, while it is noisy or the conditions
    /// are not those of the line. The quietest under its conditions counts.
    pub fn judge(&self, rig: &Rig, barrier: ReaderBarrier) -> Outcome {
        let measure = || match self.measuring {
            Measuring::ByDefault(measure) => measure(rig),
            Measuring::Fenced(measure) | Measuring::Unfenced(measure) => measure(rig, barrier),
        };
        let mut best = measure();
        for _ in 1..3 {
            if best.is_valid && !best.is_noisy() {
                break;
            }
            let next = measure();
            if (next.is_valid, best.spread) > (best.is_valid, next.spread) {
                best = next;
            }
        }
        Outcome::new(self, barrier, best)
    }
}

/// What spaces with this barrier are called.
pub fn spaces(barrier: ReaderBarrier) -> &'static str {
    match barrier {
        ReaderBarrier::Membarrier => "membarrier",
        _ => "default",
    }
}

/// A limit.
#[derive(Clone, Copy, Debug)]
pub enum Bar {
    /// Less is better; the unit follows.
    AtMost(f64, &'static str),
    /// More is better; the unit follows.
    AtLeast(f64, &'static str),
}

impl Bar {
    fn unit(self) -> &'static str {
        match self {
            Bar::AtMost(_, unit) | Bar::AtLeast(_, unit) => unit,
        }
    }

    fn is_reached(self, value: f64) -> bool {
        match self {
            Bar::AtMost(limit, _) => value <= limit,
            Bar::AtLeast(limit, _) => value >= limit,
        }
    }
}

impl std::fmt::Display for Bar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (sign, limit) = match self {
            Bar::AtMost(limit, _) => ("<=", limit),
            Bar::AtLeast(limit, _) => (">=", limit),
        };
        write!(f, "{sign} {limit} {}", self.unit())
    }
}

/// What became of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The bar is reached.
    Pass,
    /// It is not.
    Short,
    /// The machine was too busy to tell.
    Noisy,
}

impl Verdict {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Pass => "pass",
            Verdict::Short => "short",
            Verdict::Noisy => "noisy",
        }
    }
}

/// A line, measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// Of the line.
    pub name: String,
    /// The spaces it was measured in, as [`spaces`] calls them.
    pub spaces: String,
    /// Whether these are those that the line is meant for.
    pub decides: bool,
    /// Of the line.
    pub how: String,
    /// The median.
    pub value: f64,
    /// Around it.
    pub spread: f64,
    /// Of the value.
    pub unit: String,
    /// The bar, as text.
    pub bar: String,
    /// Pass or not.
    pub verdict: Verdict,
    /// What else is to be known.
    pub note: String,
}

impl Outcome {
    fn new(line: &Line, barrier: ReaderBarrier, measured: Measured) -> Self {
        let verdict = if measured.is_noisy() {
            Verdict::Noisy
        } else if line.bar.is_reached(measured.value) && measured.is_valid {
            Verdict::Pass
        } else {
            Verdict::Short
        };
        Outcome {
            name: line.name.to_owned(),
            spaces: spaces(barrier).to_owned(),
            decides: barrier == line.meant_for(),
            how: line.how.to_owned(),
            value: measured.value,
            spread: measured.spread,
            unit: line.bar.unit().to_owned(),
            bar: line.bar.to_string(),
            verdict,
            note: measured.note,
        }
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let verdict = self.verdict.name();
        let value = format!("{:.2} {}", self.value, self.unit);
        let (name, spaces) = (&self.name, &self.spaces);
        let (bar, spread) = (&self.bar, self.spread * 100.0);
        write!(
            f,
            "{name:<20} {spaces:<10} {value:>14}  {bar:<14} {verdict:<6}"
        )?;
        write!(f, " spread {spread:.0} %")?;
        if !self.note.is_empty() {
            write!(f, "; {}", self.note)?;
        }
        Ok(())
    }
}

impl Measured {
    fn is_noisy(&self) -> bool {
        self.spread > NOISY
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::Measure;

    fn verdict(bar: Bar, value: f64, spread: f64) -> Verdict {
        let line = Line {
            name: "line",
            how: "",
            bar,
            measuring: Measuring::ByDefault(|_| Measured::count(0.0)),
        };
        let measured = Measured::from(Measure { value, spread });
        Outcome::new(&line, ReaderBarrier::Fence, measured).verdict
    }

    #[test]
    fn a_noisy_line_has_no_verdict() {
        assert_eq!(verdict(Bar::AtMost(2.0, "x"), 1.0, 0.16), Verdict::Noisy);
        assert_eq!(verdict(Bar::AtMost(2.0, "x"), 3.0, 0.16), Verdict::Noisy);
    }

    #[test]
    fn a_bar_is_reached_at_its_limit() {
        assert_eq!(verdict(Bar::AtMost(2.0, "x"), 2.0, 0.0), Verdict::Pass);
        assert_eq!(verdict(Bar::AtMost(2.0, "x"), 2.1, 0.0), Verdict::Short);
        assert_eq!(verdict(Bar::AtLeast(2.0, "x"), 2.0, 0.0), Verdict::Pass);
        assert_eq!(verdict(Bar::AtLeast(2.0, "x"), 1.9, 0.0), Verdict::Short);
        assert_eq!(
            verdict(Bar::AtMost(2.0, "x"), f64::NAN, 0.0),
            Verdict::Short
        );
    }

    #[test]
    fn names_are_unique() {
        let mut names: Vec<_> = LINES.iter().map(|line| line.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), LINES.len());
    }

    #[test]
    fn a_line_decides_in_one_configuration_only() {
        for line in LINES {
            assert_ne!(line.also_with(), Some(line.meant_for()), "{}", line.name);
        }
        let meant_for = |barrier| LINES.iter().any(|line| line.meant_for() == barrier);
        assert!(meant_for(ReaderBarrier::Fence) && meant_for(ReaderBarrier::Membarrier));
    }

    #[test]
    fn what_is_noisy_or_not_under_its_conditions_is_measured_again() {
        use std::sync::atomic::{AtomicUsize, Ordering};
        static RUNS: AtomicUsize = AtomicUsize::new(0);
        let shown = |_: &Rig, _: ReaderBarrier| {
            let runs = [(0.1, false), (0.5, true), (0.2, true)];
            let (spread, is_valid) = runs[RUNS.fetch_add(1, Ordering::Relaxed)];
            let measured = Measured::from(Measure { value: 1.0, spread });
            Measured {
                is_valid,
                ..measured
            }
        };
        let line = Line {
            name: "line",
            how: "",
            bar: Bar::AtMost(2.0, "x"),
            measuring: Measuring::Fenced(shown),
        };
        let outcome = line.judge(&Rig::default(), ReaderBarrier::Membarrier);
        assert_eq!(
            (outcome.spaces.as_str(), outcome.decides),
            ("membarrier", false)
        );
        assert_eq!((outcome.spread, outcome.verdict), (0.2, Verdict::Noisy));
    }
}

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

/// How a line is measured.
#[derive(Clone, Copy, Debug)]
pub enum Measuring {
    /// In spaces as they are by default.
    Once(fn(&Rig) -> Measured),
    /// In spaces with either barrier, which is an option of theirs.
    With(fn(&Rig, ReaderBarrier) -> Measured),
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
    /// What it is called when measured with this barrier; `None` where it is not.
    pub fn name_with(&self, barrier: ReaderBarrier) -> Option<String> {
        match (barrier, self.measuring) {
            (ReaderBarrier::Fence, _) => Some(self.name.to_owned()),
            (ReaderBarrier::Membarrier, Measuring::With(_)) => {
                Some(format!("{}/membarrier", self.name))
            }
            _ => None,
        }
    }

    /// Measures it with this barrier; again, up to three times, while it is noisy or the conditions
    /// are not those of the line. The quietest under its conditions counts. `None` where it is not
    /// measured with this barrier.
    pub fn judge(&self, rig: &Rig, barrier: ReaderBarrier) -> Option<Outcome> {
        let name = self.name_with(barrier)?;
        let measure = || match self.measuring {
            Measuring::Once(measure) => measure(rig),
            Measuring::With(measure) => measure(rig, barrier),
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
        Some(Outcome::new(name, self, best))
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
    /// What the line is called with the barrier it was measured with.
    pub name: String,
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
    fn new(name: String, line: &Line, measured: Measured) -> Self {
        let verdict = if measured.is_noisy() {
            Verdict::Noisy
        } else if line.bar.is_reached(measured.value) && measured.is_valid {
            Verdict::Pass
        } else {
            Verdict::Short
        };
        Outcome {
            name,
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
        let (name, bar, spread) = (&self.name, &self.bar, self.spread * 100.0);
        write!(f, "{name:<31} {value:>18}  {bar:<14} {verdict:<6}")?;
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
            measuring: Measuring::Once(|_| Measured::count(0.0)),
        };
        let measured = Measured::from(Measure { value, spread });
        Outcome::new(String::new(), &line, measured).verdict
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
        let barriers = [ReaderBarrier::Fence, ReaderBarrier::Membarrier];
        let names = |barrier| LINES.iter().filter_map(move |line| line.name_with(barrier));
        let mut names: Vec<_> = barriers.into_iter().flat_map(names).collect();
        let measured = names.len();
        assert!(measured > LINES.len());
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), measured);
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
            measuring: Measuring::With(shown),
        };
        let outcome = line.judge(&Rig::default(), ReaderBarrier::Membarrier);
        let outcome = outcome.expect("an option's line");
        assert_eq!(
            (outcome.name.as_str(), outcome.spread),
            ("line/membarrier", 0.2)
        );
        assert_eq!(outcome.verdict, Verdict::Noisy);
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What was counted beside what is kept.

use std::fmt;

use crate::figures::Figures;

/// How far a count may be from the kept one: the larger of a share of it and a few instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tolerance {
    /// Percent of the kept count.
    pub percent: u64,
    /// Instructions.
    pub least: u64,
}

impl Tolerance {
    /// With what the figures were made with.
    pub const SAME: Tolerance = Tolerance {
        percent: 5,
        least: 3,
    };
    /// With another compiler, architecture, C library or valgrind: what is found is a loop that was
    /// not there, not an instruction.
    pub const OTHER: Tolerance = Tolerance {
        percent: 25,
        least: 15,
    };

    fn around(self, kept: u64) -> u64 {
        (kept.saturating_mul(self.percent) / 100).max(self.least)
    }
}

/// What is to be said about an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As many instructions as are kept.
    Same,
    /// More: fails.
    More,
    /// Fewer: the kept figure should follow, lest they be lost again unseen.
    Fewer,
    /// Counted, but not kept: fails.
    New,
    /// Kept, but not counted: fails.
    Gone,
}

impl Verdict {
    /// Whether it is a failure.
    pub fn fails(self) -> bool {
        matches!(self, Verdict::More | Verdict::New | Verdict::Gone)
    }

    fn says(self) -> &'static str {
        match self {
            Verdict::Same => "",
            Verdict::More => "MORE",
            Verdict::Fewer => "fewer: lower the kept figure",
            Verdict::New => "NOT KEPT",
            Verdict::Gone => "NOT COUNTED",
        }
    }
}

/// An operation, kept and now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Its name.
    pub name: String,
    /// Instructions as they are kept.
    pub kept: Option<u64>,
    /// Instructions as they were counted.
    pub now: Option<u64>,
    /// What is to be said.
    pub verdict: Verdict,
}

/// All operations, kept or counted, and how far counts may be from what is kept.
///
/// ```
/// use instructions::comparison::{Comparison, Tolerance, Verdict};
///
/// let kept = "made with rustc 1.95\nguard 50\n".parse()?;
/// let now = "made with rustc 1.95\nguard 54\n".parse()?;
/// let comparison = Comparison::new(&kept, &now);
/// assert_eq!(comparison.tolerance, Tolerance::SAME);
/// assert_eq!(comparison.lines[0].verdict, Verdict::More);
/// assert!(comparison.fails());
/// # Ok::<(), String>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Comparison {
    /// By name.
    pub lines: Vec<Line>,
    /// What the verdicts were made with.
    pub tolerance: Tolerance,
}

impl Comparison {
    /// Compares.
    pub fn new(kept: &Figures, now: &Figures) -> Self {
        let tolerance = if kept.made_with == now.made_with {
            Tolerance::SAME
        } else {
            Tolerance::OTHER
        };
        let mut names: Vec<_> = kept.counts.keys().chain(now.counts.keys()).collect();
        names.sort_unstable();
        names.dedup();
        let line = |name: &String| {
            let (kept, now) = (kept.counts.get(name), now.counts.get(name));
            Line {
                name: name.clone(),
                kept: kept.copied(),
                now: now.copied(),
                verdict: judge(kept.copied(), now.copied(), tolerance),
            }
        };
        Comparison {
            lines: names.into_iter().map(line).collect(),
            tolerance,
        }
    }

    /// Whether an operation fails, or there is none.
    pub fn fails(&self) -> bool {
        self.lines.is_empty() || self.lines.iter().any(|line| line.verdict.fails())
    }
}

fn judge(kept: Option<u64>, now: Option<u64>, tolerance: Tolerance) -> Verdict {
    match (kept, now) {
        (Some(kept), Some(now)) if now.abs_diff(kept) <= tolerance.around(kept) => Verdict::Same,
        (Some(kept), Some(now)) if now > kept => Verdict::More,
        (Some(_), Some(_)) => Verdict::Fewer,
        (None, _) => Verdict::New,
        (Some(_), None) => Verdict::Gone,
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |count: Option<u64>| count.map_or("-".to_owned(), |count| count.to_string());
        let difference = match (self.kept, self.now) {
            (Some(kept), Some(now)) if kept > 0 => {
                let percent = (now as f64 / kept as f64 - 1.0) * 100.0;
                format!("{percent:+.1} %")
            }
            _ => "-".to_owned(),
        };
        let (kept, now, says) = (count(self.kept), count(self.now), self.verdict.says());
        let line = format!(
            "{:<27} {kept:>8}{now:>8}{difference:>12}  {says}",
            self.name
        );
        f.write_str(line.trim_end())
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tolerance { percent, least } = self.tolerance;
        let heads = ["kept", "now", "difference"];
        writeln!(
            f,
            "{:<27} {:>8}{:>8}{:>12}",
            "operation", heads[0], heads[1], heads[2]
        )?;
        for line in &self.lines {
            writeln!(f, "{line}")?;
        }
        let failed = self.lines.iter().filter(|line| line.verdict.fails());
        writeln!(
            f,
            "{} operations, {} failed; tolerance: {percent} %, at least {least} instructions",
            self.lines.len(),
            failed.count()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(made_with: &str, counts: &[(&str, u64)]) -> Figures {
        Figures {
            made_with: made_with.to_owned(),
            counts: counts.iter().map(|(n, c)| ((*n).to_owned(), *c)).collect(),
        }
    }

    fn verdict(kept: u64, now: u64, tolerance: Tolerance) -> Verdict {
        judge(Some(kept), Some(now), tolerance)
    }

    #[test]
    fn more_and_fewer_begin_where_the_tolerance_ends() {
        // Small counts by instructions, others by percent.
        for (tolerance, kept, allowed) in [
            (Tolerance::SAME, 0, 3),
            (Tolerance::SAME, 20, 3),
            (Tolerance::SAME, 1000, 50),
            (Tolerance::OTHER, 20, 15),
            (Tolerance::OTHER, 1000, 250),
        ] {
            assert_eq!(verdict(kept, kept + allowed, tolerance), Verdict::Same);
            assert_eq!(verdict(kept, kept + allowed + 1, tolerance), Verdict::More);
            if kept > allowed {
                assert_eq!(verdict(kept, kept - allowed, tolerance), Verdict::Same);
                assert_eq!(verdict(kept, kept - allowed - 1, tolerance), Verdict::Fewer);
            }
        }
    }

    #[test]
    fn an_operation_that_only_one_side_has_fails() {
        let kept = figures("a", &[("both", 1), ("kept", 2)]);
        let now = figures("a", &[("both", 1), ("counted", 3)]);
        let comparison = Comparison::new(&kept, &now);
        let verdicts: Vec<_> = comparison.lines.iter().map(|line| line.verdict).collect();
        assert_eq!(verdicts, [Verdict::Same, Verdict::New, Verdict::Gone]);
        assert!(comparison.fails());
        assert!(Comparison::new(&kept, &figures("a", &[])).fails());
        assert!(Comparison::new(&figures("a", &[]), &figures("a", &[])).fails());
    }

    #[test]
    fn fewer_do_not_fail() {
        let kept = figures("a", &[("x", 100)]);
        let comparison = Comparison::new(&kept, &figures("a", &[("x", 10)]));
        assert_eq!(comparison.lines[0].verdict, Verdict::Fewer);
        assert!(!comparison.fails());
    }

    #[test]
    fn another_compiler_widens_the_tolerance() {
        let kept = figures("a", &[("x", 100)]);
        let now = [("x", 120)];
        assert!(Comparison::new(&kept, &figures("a", &now)).fails());
        assert!(!Comparison::new(&kept, &figures("b", &now)).fails());
    }

    #[test]
    fn the_table_says_what_fails() {
        let kept = figures("a", &[("x", 100), ("y", 100)]);
        let table = Comparison::new(&kept, &figures("a", &[("x", 125)])).to_string();
        assert!(
            table.contains(" 100     125     +25.0 %  MORE\n"),
            "{table}"
        );
        assert!(
            table.contains(" 100       -           -  NOT COUNTED\n"),
            "{table}"
        );
        assert!(table.contains("2 operations, 2 failed"), "{table}");
    }
}

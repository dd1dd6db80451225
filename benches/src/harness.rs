// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the groups share: their command line, their comparisons, their criterion.

use std::fmt;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion};

use crate::compare::{interleave, Candidate, Series};
use crate::cycles;
use crate::record::{save, Row};
use crate::report::number;
use crate::stats::Measure;

/// A group of benches.
///
/// Its comparisons are printed and kept for the report. Then criterion measures each candidate by
/// itself, for those who want to see a change of one; `BENCH_NO_CRITERION=1` leaves that out.
pub struct Bench {
    name: &'static str,
    rows: Vec<Row>,
    compares: bool,
    criterion: Option<Criterion>,
}

impl fmt::Debug for Bench {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bench")
            .field("name", &self.name)
            .field("rows", &self.rows)
            .finish_non_exhaustive()
    }
}

impl Bench {
    /// Runs the group as cargo's command line says.
    ///
    /// # Panics
    ///
    /// Panics where the figures cannot be kept.
    pub fn run(name: &'static str, body: impl FnOnce(&mut Bench)) {
        let without_criterion = std::env::var_os("BENCH_NO_CRITERION").is_some();
        let criterion = (!without_criterion).then(|| {
            Criterion::default()
                .sample_size(20)
                .warm_up_time(Duration::from_millis(100))
                .measurement_time(Duration::from_millis(500))
                .configure_from_args()
        });
        let mut bench = Bench {
            name,
            rows: Vec::new(),
            compares: !std::env::args().any(|arg| arg == "--test" || arg == "--list"),
            criterion,
        };
        body(&mut bench);
        if bench.compares {
            save(name, &bench.rows).expect("the target folder can be written");
        }
        if let Some(criterion) = &mut bench.criterion {
            criterion.final_summary();
        }
    }

    /// Compares the first candidate with the others; returns what each showed, nothing where
    /// comparisons are not wanted.
    pub fn compare(
        &mut self,
        section: &str,
        case: &str,
        mut candidates: Vec<Candidate<'_>>,
    ) -> Vec<Series> {
        let mut all = Vec::new();
        if self.compares {
            all = interleave(&mut candidates);
            self.series(section, case, &all);
        }
        self.by_itself(section, case, &mut candidates);
        all
    }

    /// Compares the first candidate with the others as [`compare`](Bench::compare) does, and reports how
    /// often each does it in a second; returns what each showed in cycles.
    pub fn rates(
        &mut self,
        section: &str,
        case: &str,
        unit: &str,
        mut candidates: Vec<Candidate<'_>>,
    ) -> Vec<Series> {
        let (per_second, all) = match self.compares {
            true => (cycles::per_second(), interleave(&mut candidates)),
            false => (0.0, Vec::new()),
        };
        self.by_itself(section, case, &mut candidates);
        for (i, series) in all.iter().enumerate() {
            let Measure { value, spread } = series.measure();
            let value = per_second / value;
            let mut row = Row::new(section, case, series.name, Measure { value, spread }, unit);
            if i > 0 {
                row = row.with_ratio(all[0].over(series).measure());
            }
            self.row(row);
        }
        all
    }

    /// Reports series of cycles that were taken in turns.
    pub fn series(&mut self, section: &str, case: &str, all: &[Series]) {
        for (i, series) in all.iter().enumerate() {
            let measure = series.measure();
            let mut row = Row::new(section, case, series.name, measure, cycles::UNIT);
            if i > 0 {
                row = row.with_ratio(all[0].over(series).measure());
            }
            self.row(row);
        }
    }

    /// Has criterion measure each candidate, where it is wanted.
    fn by_itself(&mut self, section: &str, case: &str, candidates: &mut [Candidate<'_>]) {
        if let Some(criterion) = &mut self.criterion {
            let mut group = criterion.benchmark_group(format!("{}/{section}", self.name));
            for candidate in candidates {
                group.bench_function(BenchmarkId::new(candidate.name(), case), |bencher| {
                    bencher.iter_custom(|n| {
                        let start = Instant::now();
                        candidate.run(n);
                        start.elapsed()
                    });
                });
            }
            group.finish();
        }
    }

    /// Reports a figure.
    pub fn row(&mut self, row: Row) {
        let verdict = row.verdict();
        println!(
            "{}: {}: {}: {}: {} {}{}",
            self.name,
            row.section,
            row.case,
            row.candidate,
            number(row.value),
            row.unit,
            verdict.as_deref().unwrap_or(" (noisy)")
        );
        self.rows.push(row);
    }

    /// Whether there is somebody to report to.
    pub fn compares(&self) -> bool {
        self.compares
    }
}

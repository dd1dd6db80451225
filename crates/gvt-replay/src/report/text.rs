// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The report as text for people.

use std::fmt;

use gvt_scheduler::AccessKind;

use super::{Report, VgpuDifference, SIDE_BY_SIDE};
use crate::access_trace::TraceCheck;
use crate::relocate::REQUEST_BYTES;
use crate::replay::{Count, Outcome};
use crate::side_by_side::{MEASURED, TOLERANCE};
use crate::timing::{Comparison, CopyTime, NOISY_SPREAD, ROUNDS};

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bundled = if self.bundled { ", bundled" } else { "" };
        writeln!(
            f,
            "{}{bundled} ({})",
            one_line(&self.trace),
            one_line(&self.program)
        )?;
        self.write_verdict(f)?;
        writeln!(
            f,
            "\n{} of {} on {}; context pages lie as in profile {}",
            counted(self.workloads, "workload"),
            counted(self.contexts as u64, "context"),
            counted(self.vgpus as u64, "vGPU"),
            one_line(&self.profile)
        )?;
        if !self.shares.is_empty() {
            self.write_shares(f)?;
        }
        for outcome in &self.outcomes {
            self.write_accesses(f, outcome)?;
        }
        if !self.copies_context_pages {
            writeln!(
                f,
                "\nThis recording copies no context pages, so contiguity makes no difference to it."
            )?;
        }
        if !self.contiguity.is_empty() {
            self.write_contiguity(f)?;
            self.write_timing(f)?;
        }
        self.write_provenance(f)
    }
}

impl Report {
    fn write_verdict(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "verified: {}", self.verified)?;
        if let Some(fault) = self.injected {
            writeln!(f, "  injected fault: {fault}")?;
        }
        for outcome in &self.outcomes {
            let mode = outcome.mode.name();
            let pages: u64 = outcome.verdicts.iter().map(|verdict| verdict.pages).sum();
            let different: u64 = outcome.verdicts.iter().map(|v| v.different).sum();
            writeln!(
                f,
                "  mode {mode}: {pages} pages of guest memory compared with the model, \
                 {different} differ"
            )?;
            for VgpuDifference { vgpu, difference } in
                self.differences.get(mode).into_iter().flatten()
            {
                writeln!(f, "    vGPU {vgpu}, {difference}")?;
            }
        }
        for VgpuDifference { vgpu, difference } in
            self.differences.get(SIDE_BY_SIDE).into_iter().flatten()
        {
            writeln!(f, "  side by side: vGPU {vgpu}, {difference}")?;
        }
        for figures in self
            .contiguity
            .iter()
            .filter(|figures| !figures.memory_as_expected)
        {
            writeln!(
                f,
                "  profile {}: guest memory differs from the model",
                one_line(&figures.profile)
            )?;
        }
        if let Some(check) = &self.trace_check {
            write_trace_check(f, check)?;
        }
        Ok(())
    }

    fn write_shares(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\nside by side on one GPU, for {:.0} s of virtual time; a share may be {:.0} % off\n  \
             vGPU weight  workloads  share  expected        longest wait  recording",
            MEASURED.as_secs_f64(),
            TOLERANCE * 100.0
        )?;
        for share in &self.shares {
            writeln!(
                f,
                "  {:>4} {:>6} {:>10} {:>6.3} {:>9.3}   {:<4} {:>9.1} ms  {}",
                share.vgpu,
                share.weight,
                share.workloads,
                share.share,
                share.expected,
                if share.fair { "fair" } else { "NOT" },
                share.longest_wait_ns as f64 / 1e6,
                one_line(&share.recording)
            )?;
        }
        Ok(())
    }

    fn write_accesses(&self, f: &mut fmt::Formatter<'_>, outcome: &Outcome) -> fmt::Result {
        let mode = outcome.mode.name();
        let expected = self.expected.as_ref().and_then(|modes| modes.get(mode));
        let heads = ["reads", "bytes", "writes", "bytes"];
        write!(f, "\naccesses to guest memory, mode {mode}\n  {:<14}", "")?;
        write_columns(f, heads)?;
        if expected.is_some() {
            write!(f, "   expected:")?;
            write_columns(f, heads)?;
        }
        writeln!(f)?;
        let mut total = Count::default();
        for kind in AccessKind::ALL {
            let count = outcome.count(kind);
            total += count;
            write_count(f, kind.name(), count)?;
            if let Some(expected) = expected.and_then(|kinds| kinds.get(kind.name())) {
                let same = *expected == count;
                write!(f, "   {:<9}", if same { "the same" } else { "NOT" })?;
                write_columns(f, columns(*expected))?;
            }
            writeln!(f)?;
        }
        write_count(f, "total", total)?;
        writeln!(f)
    }

    fn write_contiguity(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.profile_width();
        writeln!(
            f,
            "\npages a call when copied in runs (beside it the mean of the whole profile), and pages the\n\
             kernel's loop loses: it leaves out a last page that is not adjacent to the one before\n  \
             {:<width$}{:>8}{:>8}{:>9}{:>15}{:>18}   memory then",
            "profile", "read", "write", "profile", "not read", "not written back"
        )?;
        for figures in &self.contiguity {
            let loss = figures.upstream;
            let memory = match loss.memory_as_expected {
                true => "as it must be",
                false => "wrong",
            };
            writeln!(
                f,
                "  {:<width$}{:>8}{:>8}{:>9.2}{:>15}{:>18}   {memory}",
                one_line(&figures.profile),
                mean(figures.pages_per_read),
                mean(figures.pages_per_write),
                figures.mean_run,
                format!("{} of {}", loss.unread, loss.reads),
                format!("{} of {}", loss.unwritten, loss.writes),
            )?;
        }
        Ok(())
    }

    fn write_timing(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.profile_width();
        writeln!(
            f,
            "\ntime of copying the pages of a context through the DMA path, page by page and in runs\n\
             page/run is the median of the ratios of {ROUNDS} rounds, in each of which the two take turns.\n\
             The times are medians of the same rounds, so their quotient can be a little different.\n\
             spread is the interquartile range of the ratios by their median, noisy above {:.0} %.\n  \
             {:<width$}{:<12}{:>20}{:>20}{:>10}{:>8}",
            NOISY_SPREAD * 100.0,
            "profile",
            "",
            "page: ns (cycles)",
            "run: ns (cycles)",
            "page/run",
            "spread"
        )?;
        for figures in &self.contiguity {
            let Some(timing) = figures.timing else {
                continue;
            };
            let name = one_line(&figures.profile);
            write!(f, "  {name:<width$}{:<12}", "populate")?;
            write_comparison(f, timing.populate)?;
            write!(f, "  {name:<width$}{:<12}", "write back")?;
            write_comparison(f, timing.write_back)?;
        }
        Ok(())
    }

    /// Width of the column with the names of the profiles.
    fn profile_width(&self) -> usize {
        let names = self
            .contiguity
            .iter()
            .map(|figures| one_line(&figures.profile));
        names.map(|name| name.chars().count()).max().unwrap_or(0) + 2
    }

    fn write_provenance(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "\nReal in a recording: the order and number of submissions, their engine and context, the\n\
             batches and their addresses, which objects are mapped and when. Made up by the recorder:\n\
             rings, context images, context ids and physical addresses. Made up by the replay: where\n\
             pages lie in the guest, and what the engine does."
        )?;
        if self.modelled_rings {
            write!(
                f,
                " The ring of each submission is modelled at\n\
                 the {REQUEST_BYTES} bytes of an i915 request; 16 are recorded."
            )?;
        }
        Ok(())
    }
}

/// `text` with what would end or disturb a line of output escaped: a file's name may hold anything.
///
/// ```
/// assert_eq!(gvt_replay::report::one_line("a\nb\u{1b}.aub"), "a\\nb\\u{1b}.aub");
/// ```
pub fn one_line(text: &str) -> String {
    let mut line = String::new();
    for c in text.chars() {
        match c {
            '\u{2028}' | '\u{2029}' => line.extend(c.escape_unicode()),
            c if c.is_control() => line.extend(c.escape_default()),
            c => line.push(c),
        }
    }
    line
}

fn counted(count: u64, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

fn write_count(f: &mut fmt::Formatter<'_>, name: &str, count: Count) -> fmt::Result {
    write!(f, "  {name:<14}")?;
    write_columns(f, columns(count))
}

fn columns(count: Count) -> [u64; 4] {
    [
        count.reads,
        count.read_bytes,
        count.writes,
        count.written_bytes,
    ]
}

fn write_trace_check(f: &mut fmt::Formatter<'_>, check: &TraceCheck) -> fmt::Result {
    let Some(difference) = &check.first_difference else {
        return writeln!(f, "  trace: {} accesses, the same", check.accesses);
    };
    let shown = |access: &Option<String>| access.clone().unwrap_or_else(|| "nothing".into());
    writeln!(
        f,
        "  trace: access {} is NOT the same: expected {}, made {}",
        difference.access,
        shown(&difference.expected),
        shown(&difference.made)
    )
}

fn write_columns<T: fmt::Display>(f: &mut fmt::Formatter<'_>, columns: [T; 4]) -> fmt::Result {
    let [reads, read_bytes, writes, written_bytes] = columns;
    write!(
        f,
        "{reads:>8}{read_bytes:>12}{writes:>8}{written_bytes:>12}"
    )
}

fn write_comparison(f: &mut fmt::Formatter<'_>, comparison: Comparison) -> fmt::Result {
    writeln!(
        f,
        "{:>20}{:>20}{:>10.2}{:>7.0}%{}",
        copy_time(comparison.page),
        copy_time(comparison.run),
        comparison.ratio,
        comparison.spread * 100.0,
        if comparison.noisy { " noisy" } else { "" }
    )
}

fn copy_time(time: CopyTime) -> String {
    match time.cycles {
        Some(cycles) => format!("{:.0} ({cycles:.0})", time.ns),
        None => format!("{:.0} (-)", time.ns),
    }
}

fn mean(pages: Option<f64>) -> String {
    pages.map_or_else(|| "-".into(), |pages| format!("{pages:.2}"))
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a run of the replay found: as one JSON object, or as text for people.

use std::collections::BTreeMap;
use std::fmt;

use gvt_scheduler::AccessKind;
use serde::Serialize;

use crate::contiguity::Contiguity;
use crate::expected;
use crate::inject::Fault;
use crate::plan::Plan;
use crate::profiles::ProfileFigures;
use crate::relocate::REQUEST_BYTES;
use crate::replay::{Count, Outcome};
use crate::timing::{Comparison, CopyTime};
use crate::verify::Difference;

/// What a run of the replay found.
///
/// ```
/// use gvt_replay::aub::Trace;
/// use gvt_replay::{Contiguity, Mode, Model, Plan, ProfileFigures, Replay, Report};
///
/// let trace = Trace::from_bytes(include_bytes!("../data/ncnn-vulkan-skl.aub.xz"))?;
/// let profile = Contiguity::bundled("recycled").expect("a bundled profile");
/// let plan = Plan::new(&trace, &profile)?;
/// let model = Model::after(&plan)?;
/// let outcome = Replay::new(&plan, &model).run(Mode::Run, &mut |_| Ok(()))?;
/// let figures = ProfileFigures::measure(&trace, &profile, &mut |_| Ok(()))?;
/// assert_eq!(figures.pages_per_read, Some(1.0));
///
/// let file = Some("ncnn-vulkan".to_owned());
/// let report = Report::new(file, "ncnn", &profile, &plan, None, vec![outcome], vec![figures]);
/// assert!(report.to_string().ends_with("verified: true"));
/// # Ok::<(), gvt_replay::Error>(())
/// ```
#[derive(Debug, Serialize)]
pub struct Report {
    /// The file, or what stands for it.
    pub trace: String,
    /// The program that was recorded.
    pub program: String,
    /// How context objects lie in the guest.
    pub profile: String,
    /// Virtual machines, each with a vGPU.
    pub vgpus: usize,
    /// Workloads that were submitted in each mode, on all vGPUs.
    pub workloads: u64,
    /// Context objects, of all vGPUs.
    pub contexts: usize,
    /// The fault that was injected.
    pub injected: Option<&'static str>,
    /// Whether guest memory is what it must be in every mode and every profile.
    pub verified: bool,
    /// Accesses to guest memory by mode and kind, on all vGPUs.
    pub modes: BTreeMap<&'static str, BTreeMap<&'static str, Count>>,
    /// The first bytes of guest memory that are not what they must be, by mode.
    pub differences: BTreeMap<&'static str, Vec<Difference>>,
    /// What each contiguity profile makes of the copies of context pages.
    pub contiguity: Vec<ProfileFigures>,
    #[serde(skip)]
    outcomes: Vec<Outcome>,
    #[serde(skip)]
    modelled_rings: bool,
    #[serde(skip)]
    bundled: bool,
}

impl Report {
    /// Puts the outcomes of replaying `plan` and the figures of the profiles together. `trace` is
    /// the file, `None` for the bundled recording.
    pub fn new(
        trace: Option<String>,
        program: &str,
        profile: &Contiguity,
        plan: &Plan,
        fault: Option<Fault>,
        outcomes: Vec<Outcome>,
        contiguity: Vec<ProfileFigures>,
    ) -> Self {
        let vgpus = outcomes.first().map_or(0, |outcome| outcome.verdicts.len());
        Report {
            bundled: trace.is_none(),
            trace: trace.unwrap_or_else(|| "glmark2-skl.aub.xz, bundled".into()),
            program: program.to_owned(),
            profile: profile.name().to_owned(),
            vgpus,
            workloads: plan.submissions() * vgpus as u64,
            contexts: plan.contexts().len() * vgpus,
            injected: fault.map(Fault::name),
            verified: outcomes.iter().all(Outcome::verified)
                && contiguity.iter().all(|figures| figures.verified),
            modes: outcomes
                .iter()
                .map(|outcome| (outcome.mode.name(), outcome.accesses.clone()))
                .collect(),
            differences: outcomes
                .iter()
                .map(|outcome| {
                    let first = outcome.verdicts.iter().flat_map(|v| v.first.clone());
                    (outcome.mode.name(), first.collect())
                })
                .collect(),
            contiguity,
            outcomes,
            modelled_rings: plan.modelled_rings(),
        }
    }

    /// What the replay must count, where that is known beforehand.
    fn expected(&self, outcome: &Outcome, kind: AccessKind) -> Option<Count> {
        let known = self.bundled && self.profile == "consecutive";
        let one = expected::bundled(outcome.mode, kind).filter(|_| known)?;
        let vgpus = self.vgpus as u64;
        Some(Count {
            reads: one.reads * vgpus,
            read_bytes: one.read_bytes * vgpus,
            writes: one.writes * vgpus,
            written_bytes: one.written_bytes * vgpus,
        })
    }

    fn write_accesses(&self, f: &mut fmt::Formatter<'_>, outcome: &Outcome) -> fmt::Result {
        writeln!(
            f,
            "\naccesses to guest memory, mode {}",
            outcome.mode.name()
        )?;
        let heads = ["reads", "bytes", "writes", "bytes"];
        write!(f, "  {:<14}", "")?;
        write_columns(f, heads)?;
        write!(f, "   expected:")?;
        write_columns(f, heads)?;
        writeln!(f)?;
        for kind in AccessKind::ALL {
            let count = outcome.count(kind);
            write_count(f, kind.name(), count)?;
            if let Some(expected) = self.expected(outcome, kind) {
                let same = expected == count;
                write!(f, "   {:<9}", if same { "the same" } else { "NOT" })?;
                write_columns(f, columns(expected))?;
            }
            writeln!(f)?;
        }
        let mut total = Count::default();
        for count in outcome.accesses.values() {
            total.reads += count.reads;
            total.read_bytes += count.read_bytes;
            total.writes += count.writes;
            total.written_bytes += count.written_bytes;
        }
        write_count(f, "total", total)?;
        writeln!(f)
    }

    fn write_profiles(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\npages a call when copied in runs, and pages the kernel's loop loses (a last page that \
             is not adjacent)\n  {:<14}{:>8}{:>8}{:>15}{:>20}{:>20}  memory after the kernel's loop",
            "profile",
            "read",
            "write",
            "whole profile", "not read", "not written back"
        )?;
        for figures in &self.contiguity {
            let loss = figures.upstream;
            writeln!(
                f,
                "  {:<14}{:>8}{:>8}{:>15.2}{:>20}{:>20}  {}",
                figures.profile,
                mean(figures.pages_per_read),
                mean(figures.pages_per_write),
                figures.mean_run,
                format!("{} of {}", loss.unread, loss.reads),
                format!("{} of {}", loss.unwritten, loss.writes),
                if loss.verified {
                    "as it must be"
                } else {
                    "wrong"
                }
            )?;
        }
        let timings: Vec<_> = self
            .contiguity
            .iter()
            .filter_map(|figures| Some((&figures.profile, figures.timing?)))
            .collect();
        if timings.is_empty() {
            return Ok(());
        }
        writeln!(
            f,
            "\ncopying the pages of a context through the DMA path: page by page, in runs, and how \
             often the one is the other\n  {:<14}{:<12}{:>22}{:>22}{:>8}{:>9}",
            "profile", "", "page: ns (cycles)", "run: ns (cycles)", "ratio", "spread"
        )?;
        for (profile, timing) in timings {
            write_timing(f, profile, "populate", timing.populate)?;
            write_timing(f, profile, "write back", timing.write_back)?;
        }
        Ok(())
    }

    fn write_provenance(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\nReal in a recording: the order and number of submissions, their engine and context, \
             the batches and\ntheir addresses, which objects are mapped and when. Made up by the \
             recorder: rings, context images,\ncontext ids and physical addresses. Contexts lie in \
             the guest as profile {} says; the engine is simulated.",
            self.profile
        )?;
        if self.modelled_rings {
            writeln!(
                f,
                "Each submission's ring is modelled at the {REQUEST_BYTES} bytes of an i915 request \
                 (recorded: 16)."
            )?;
        }
        Ok(())
    }

    fn write_verdict(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f)?;
        if let Some(fault) = self.injected {
            writeln!(f, "injected fault: {fault}")?;
        }
        for outcome in &self.outcomes {
            for (vgpu, verdict) in outcome.verdicts.iter().enumerate() {
                writeln!(
                    f,
                    "mode {}, guest {vgpu}: {} pages of memory compared with the model, {} differ",
                    outcome.mode.name(),
                    verdict.pages,
                    verdict.different
                )?;
                for difference in &verdict.first {
                    writeln!(f, "  {difference}")?;
                }
            }
        }
        for figures in self.contiguity.iter().filter(|figures| !figures.verified) {
            writeln!(
                f,
                "profile {}: guest memory differs from the model",
                figures.profile
            )?;
        }
        write!(f, "verified: {}", self.verified)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} ({})\n{} workloads of {} contexts on {} vGPU{}, contexts laid out: {}",
            self.trace,
            self.program,
            self.workloads,
            self.contexts,
            self.vgpus,
            if self.vgpus == 1 { "" } else { "s" },
            self.profile
        )?;
        for outcome in &self.outcomes {
            self.write_accesses(f, outcome)?;
        }
        if !self.contiguity.is_empty() {
            self.write_profiles(f)?;
        }
        self.write_provenance(f)?;
        self.write_verdict(f)
    }
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

fn write_columns<T: fmt::Display>(f: &mut fmt::Formatter<'_>, columns: [T; 4]) -> fmt::Result {
    let [reads, read_bytes, writes, written_bytes] = columns;
    write!(
        f,
        "{reads:>8}{read_bytes:>12}{writes:>8}{written_bytes:>12}"
    )
}

fn write_timing(
    f: &mut fmt::Formatter<'_>,
    profile: &str,
    direction: &str,
    comparison: Comparison,
) -> fmt::Result {
    writeln!(
        f,
        "  {profile:<14}{direction:<12}{:>22}{:>22}{:>8.2}{:>8.0}%{}",
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

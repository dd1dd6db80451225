// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a run of the replay found: as one JSON object, or as text for people.

mod text;

use std::collections::BTreeMap;

use gvt_scheduler::AccessKind;
use serde::Serialize;

use crate::access_trace::TraceCheck;
use crate::aub::BUNDLED;
use crate::contiguity::Contiguity;
use crate::expected;
use crate::inject::Fault;
use crate::plan::Plan;
use crate::profiles::ProfileFigures;
use crate::replay::{Count, Outcome};
use crate::side_by_side::{Share, SideBySide};
use crate::verify::{Difference, Verdict};

pub use text::one_line;

/// By mode and [`AccessKind::name`].
pub type Accesses = BTreeMap<&'static str, BTreeMap<&'static str, Count>>;

/// A byte that is not what it must be, and in which guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VgpuDifference {
    /// Number of the guest's vGPU, from 0.
    pub vgpu: usize,
    /// Where, and what is there.
    #[serde(flatten)]
    pub difference: Difference,
}

/// What a run of the replay found.
///
/// ```
/// use gvt_replay::{Contiguity, Mode, Model, Plan, ProfileFigures, Replay, Report, Trace};
///
/// let trace = Trace::from_bytes(include_bytes!("../../data/ncnn-vulkan-skl.aub.xz"))?;
/// let profile = Contiguity::bundled("recycled").expect("a bundled profile");
/// let plan = Plan::new(&trace, &profile)?;
/// let model = Model::after(&plan)?;
/// let outcome = Replay::new(&plan, &model).run(Mode::Run, &mut |_| Ok(()))?;
/// let figures = ProfileFigures::measure(&trace, &profile, &mut |_| Ok(()))?;
/// assert_eq!(figures.pages_per_read, Some(1.0));
///
/// let file = Some("ncnn-vulkan".to_owned());
/// let report = Report::new(file, "ncnn", &profile, &plan, None, vec![outcome], vec![figures]);
/// assert!(report.to_string().starts_with("ncnn-vulkan (ncnn)\nverified: true\n"));
/// # Ok::<(), gvt_replay::Error>(())
/// ```
#[derive(Debug, Serialize)]
pub struct Report {
    /// Path of the trace, or name of the bundled one.
    pub trace: String,
    /// Whether it is the bundled one.
    pub bundled: bool,
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
    /// Accesses to guest memory, on all vGPUs.
    pub modes: Accesses,
    /// What they must be, where that is known beforehand.
    pub expected: Option<Accesses>,
    /// The first bytes of guest memory that are not what they must be, by mode.
    pub differences: BTreeMap<&'static str, Vec<VgpuDifference>>,
    /// What each contiguity profile makes of the copies of context pages.
    pub contiguity: Vec<ProfileFigures>,
    /// What each vGPU had of a GPU that they shared by weights; none where they did not.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub shares: Vec<Share>,
    /// Whether the accesses are those of a trace, where there is one to compare them with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_check: Option<TraceCheck>,
    #[serde(skip)]
    outcomes: Vec<Outcome>,
    #[serde(skip)]
    copies_context_pages: bool,
    #[serde(skip)]
    modelled_rings: bool,
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
        let known = trace.is_none() && profile.name() == "consecutive";
        Report {
            bundled: trace.is_none(),
            trace: trace.unwrap_or_else(|| BUNDLED.into()),
            program: program.to_owned(),
            profile: profile.name().to_owned(),
            vgpus,
            workloads: plan.submissions() * vgpus as u64,
            contexts: plan.contexts().len() * vgpus,
            injected: fault.map(Fault::name),
            verified: outcomes.iter().all(Outcome::verified)
                && contiguity.iter().all(|figures| figures.memory_as_expected),
            modes: outcomes
                .iter()
                .map(|outcome| (outcome.mode.name(), outcome.accesses.clone()))
                .collect(),
            expected: known.then(|| expected_accesses(&outcomes, vgpus as u64)),
            differences: outcomes
                .iter()
                .map(|outcome| (outcome.mode.name(), differences(&outcome.verdicts)))
                .collect(),
            contiguity,
            shares: Vec::new(),
            trace_check: None,
            outcomes,
            copies_context_pages: plan.copies_context_pages(),
            modelled_rings: plan.modelled_rings(),
        }
    }
}

impl Report {
    /// Adds what came of vGPUs that shared a GPU.
    pub fn with_shares(mut self, shared: SideBySide) -> Self {
        self.verified &= shared.verified();
        let found = differences(&shared.verdicts);
        self.differences.insert(SIDE_BY_SIDE, found);
        self.shares = shared.shares;
        self
    }

    /// Adds how the accesses compare with a trace.
    pub fn with_trace_check(mut self, check: TraceCheck) -> Self {
        self.trace_check = Some(check);
        self
    }

    /// Whether guest memory is what it must be, every vGPU got its share, and the accesses are those
    /// of the trace they are compared with.
    pub fn passed(&self) -> bool {
        let accesses = self.trace_check.as_ref().is_none_or(|check| check.same);
        self.verified && accesses && self.shares.iter().all(|share| share.fair)
    }
}

/// What stands for a mode in [`Report::differences`] where vGPUs shared a GPU.
const SIDE_BY_SIDE: &str = "side-by-side";

fn expected_accesses(outcomes: &[Outcome], vgpus: u64) -> Accesses {
    let modes = outcomes.iter().map(|outcome| {
        let kinds = AccessKind::ALL.into_iter().filter_map(|kind| {
            let one = expected::bundled(outcome.mode, kind)?;
            let all = Count {
                reads: one.reads * vgpus,
                read_bytes: one.read_bytes * vgpus,
                writes: one.writes * vgpus,
                written_bytes: one.written_bytes * vgpus,
            };
            Some((kind.name(), all))
        });
        (outcome.mode.name(), kinds.collect())
    });
    modes.collect()
}

fn differences(verdicts: &[Verdict]) -> Vec<VgpuDifference> {
    let vgpus = verdicts.iter().enumerate();
    vgpus
        .flat_map(|(vgpu, verdict)| {
            let first = verdict.first.iter().cloned();
            first.map(move |difference| VgpuDifference { vgpu, difference })
        })
        .collect()
}

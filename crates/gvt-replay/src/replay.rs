// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Replays a plan on one or more virtual machines, and counts and verifies.

use std::collections::BTreeMap;
use std::ops::AddAssign;
use std::sync::Arc;

use gvt_scheduler::policy::VirtualClock;
use gvt_scheduler::trace::{Recorder, TracedAccess};
use gvt_scheduler::{Access, AccessCounts, AccessKind, CopyMode, Observer, Step, VgpuConfig};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::inject::Fault;
use crate::machine::Machine;
use crate::model::Model;
use crate::plan::{Action, Event, Plan};
use crate::side_by_side::workload_time;
use crate::verify::Verdict;

/// How the pages of a context are copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Page by page.
    Page,
    /// A run of adjacent pages at once.
    Run,
    /// A run of adjacent pages at once, and unchanged contexts are not read again.
    Skip,
    /// In runs as the kernel makes them: a last page that is not adjacent is lost.
    Upstream,
}

impl Mode {
    /// The modes that must leave guest memory as the model has it.
    pub const CORRECT: [Mode; 3] = [Mode::Page, Mode::Run, Mode::Skip];

    /// Its name: `page`, `run`, `skip` or `upstream`.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Page => "page",
            Mode::Run => "run",
            Mode::Skip => "skip",
            Mode::Upstream => "upstream",
        }
    }

    pub(crate) fn config(self) -> VgpuConfig {
        VgpuConfig {
            copy_mode: match self {
                Mode::Page => CopyMode::PerPage,
                Mode::Run | Mode::Skip => CopyMode::Coalesced,
                Mode::Upstream => CopyMode::UpstreamTail,
            },
            skip_unchanged: self == Mode::Skip,
            ..VgpuConfig::default()
        }
    }
}

/// Accesses of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Count {
    /// Calls that read guest memory.
    pub reads: u64,
    /// Bytes they read.
    pub read_bytes: u64,
    /// Calls that write guest memory.
    pub writes: u64,
    /// Bytes they write.
    pub written_bytes: u64,
}

impl AddAssign for Count {
    fn add_assign(&mut self, other: Count) {
        self.reads += other.reads;
        self.read_bytes += other.read_bytes;
        self.writes += other.writes;
        self.written_bytes += other.written_bytes;
    }
}

/// A workload that was replayed.
#[derive(Debug)]
pub struct Workload {
    /// Number of the vGPU, from 0.
    pub vgpu: usize,
    /// Number of the submission on this vGPU, from 0.
    pub submission: u64,
    /// The accesses since the workload before, if they are recorded.
    pub accesses: Vec<Access>,
    /// The same with their steps and times, on a clock on which a workload takes
    /// [`workload_time`].
    pub traced: Vec<TracedAccess>,
}

/// What a replay gives.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// How context pages were copied.
    pub mode: Mode,
    /// Workloads, of all vGPUs.
    pub workloads: u64,
    /// Accesses by [`AccessKind::name`], of all vGPUs.
    pub accesses: BTreeMap<&'static str, Count>,
    /// One for each vGPU.
    pub verdicts: Vec<Verdict>,
}

impl Outcome {
    /// Whether the memory of every guest is what it must be.
    pub fn verified(&self) -> bool {
        self.verdicts.iter().all(Verdict::verified)
    }

    /// The accesses to whole context pages.
    pub fn context_pages(&self) -> Count {
        self.count(AccessKind::ContextPage)
    }

    /// The accesses of a kind.
    pub fn count(&self, kind: AccessKind) -> Count {
        self.accesses.get(kind.name()).copied().unwrap_or_default()
    }
}

/// What to replay, and on what.
///
/// ```
/// use gvt_replay::aub::Trace;
/// use gvt_replay::{Contiguity, Mode, Model, Plan, Replay};
///
/// let trace = Trace::from_bytes(include_bytes!("../data/ncnn-vulkan-skl.aub.xz"))?;
/// let plan = Plan::new(&trace, &Contiguity::bundled("as-found").expect("a bundled profile"))?;
/// let model = Model::after(&plan)?;
/// let outcome = Replay::new(&plan, &model).run(Mode::Run, &mut |_| Ok(()))?;
/// assert!(outcome.verified());
/// assert_eq!(outcome.workloads, 6);
/// # Ok::<(), gvt_replay::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Replay<'a> {
    plan: &'a Plan,
    model: &'a Model,
    vgpus: usize,
    fault: Option<Fault>,
    record: bool,
}

impl<'a> Replay<'a> {
    /// Replays `plan` on one virtual machine; `model` is what its memory must hold afterwards.
    pub fn new(plan: &'a Plan, model: &'a Model) -> Self {
        Replay {
            plan,
            model,
            vgpus: 1,
            fault: None,
            record: false,
        }
    }

    /// Replays on `vgpus` virtual machines, each with a vGPU, taking turns by submission.
    pub fn vgpus(mut self, vgpus: usize) -> Self {
        self.vgpus = vgpus;
        self
    }

    /// Puts a fault in the way to guest memory.
    pub fn fault(mut self, fault: Option<Fault>) -> Self {
        self.fault = fault;
        self
    }

    /// Hands the accesses of each workload to the watcher of [`Replay::run`].
    pub fn record_accesses(mut self, record: bool) -> Self {
        self.record = record;
        self
    }

    /// Replays on fresh virtual machines. `watch` is called after each workload.
    ///
    /// # Errors
    ///
    /// As [`Machine::new`] and [`Machine::play`]; [`Error::NotCompleted`]: a submission has not run; and what `watch` says.
    pub fn run(
        &self,
        mode: Mode,
        watch: &mut dyn FnMut(Workload) -> Result<()>,
    ) -> Result<Outcome> {
        let guests = self.play(mode, watch)?;
        let mut outcome = Outcome {
            mode,
            workloads: guests.iter().map(|guest| guest.workloads).sum(),
            accesses: BTreeMap::new(),
            verdicts: Vec::new(),
        };
        for guest in guests {
            let machine = guest.machine;
            add(&mut outcome.accesses, &machine.vgpu().observer().counts);
            let mut verdict = guest.verdict;
            verdict.append(machine.verify(self.model, self.plan)?);
            outcome.verdicts.push(verdict);
        }
        Ok(outcome)
    }

    /// Replays on fresh virtual machines and gives them back as they are then.
    pub(crate) fn play(
        &self,
        mode: Mode,
        watch: &mut dyn FnMut(Workload) -> Result<()>,
    ) -> Result<Vec<Guest>> {
        if self.fault.is_some() && !self.plan.copies_context_pages() {
            return Err(Error::NothingToInject);
        }
        let clock = Arc::new(VirtualClock::default());
        let mut guests = (0..self.vgpus)
            .map(|id| {
                let recorder = || Recorder::new(id as u16, clock.clone());
                let tally = Tally {
                    recorder: self.record.then(recorder),
                    ..Tally::default()
                };
                let machine = Machine::new(id as u32, self.plan, mode.config(), self.fault, tally)?;
                Ok(Guest {
                    machine,
                    verdict: Verdict::default(),
                    workloads: 0,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        // All guests do the same, so one model serves them: that of the submission they are at.
        let mut model = Model::default();
        let mut events = self.plan.events();
        while let Some(at) = events.iter().position(|event| event.action.is_submission()) {
            let (turn, later) = events.split_at(at + 1);
            events = later;
            let mut pages = Vec::new();
            for event in turn {
                pages.extend(model.play(event)?.into_iter().flatten());
            }
            for (vgpu, guest) in guests.iter_mut().enumerate() {
                let submission = guest.workloads;
                guest.play(turn)?;
                guest.verdict.append(
                    guest
                        .machine
                        .verify_context(&model, self.plan, &pages, submission)?,
                );
                clock.advance(workload_time(written(turn)));
                let (accesses, traced) = guest.machine.observer_mut().take()?;
                watch(Workload {
                    vgpu,
                    submission,
                    accesses,
                    traced,
                })?;
            }
        }
        for guest in &mut guests {
            guest.play(events)?;
        }
        Ok(guests)
    }
}

/// A virtual machine in a replay.
pub(crate) struct Guest {
    pub(crate) machine: Machine<Tally>,
    /// Of the contexts as they were written back.
    verdict: Verdict,
    /// Workloads that completed.
    workloads: u64,
}

impl Guest {
    fn play(&mut self, events: &[Event]) -> Result<()> {
        for event in events {
            let completion = self.machine.play(event)?;
            if completion.is_some() != event.action.is_submission() {
                let offset = event.offset;
                return Err(Error::NotCompleted { offset });
            }
            self.workloads += u64::from(completion.is_some());
        }
        Ok(())
    }
}

/// Bytes of memory that a guest writes.
fn written(events: &[Event]) -> u64 {
    let bytes = events.iter().map(|event| match &event.action {
        Action::Write { data, .. } => data.len() as u64,
        _ => 0,
    });
    bytes.sum()
}

fn add(sums: &mut BTreeMap<&'static str, Count>, counts: &AccessCounts) {
    for kind in AccessKind::ALL {
        let count = counts.get(kind);
        *sums.entry(kind.name()).or_default() += Count {
            reads: count.reads,
            read_bytes: count.read_bytes,
            writes: count.writes,
            written_bytes: count.written_bytes,
        };
    }
}

/// Counts the accesses of a vGPU, and keeps them if asked to.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    counts: AccessCounts,
    recorder: Option<Recorder<Arc<VirtualClock>>>,
    accesses: Vec<Access>,
}

impl Tally {
    /// The accesses since the last call, if they are kept.
    fn take(&mut self) -> Result<(Vec<Access>, Vec<TracedAccess>)> {
        let traced = match &mut self.recorder {
            Some(recorder) => {
                let trace = recorder.take().map_err(Error::machine("record accesses"))?;
                trace.accesses().to_vec()
            }
            None => Vec::new(),
        };
        Ok((std::mem::take(&mut self.accesses), traced))
    }
}

impl Observer for Tally {
    fn access(&mut self, access: &Access) {
        self.counts.access(access);
        if let Some(recorder) = &mut self.recorder {
            recorder.access(access);
            self.accesses.push(*access);
        }
    }

    fn step(&mut self, sequence: u64, step: Step) {
        if let Some(recorder) = &mut self.recorder {
            recorder.step(sequence, step);
        }
    }
}

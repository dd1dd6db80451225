// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What each contiguity profile makes of the copies of context pages.

use serde::Serialize;

use crate::aub::Trace;
use crate::contiguity::Contiguity;
use crate::error::Result;
use crate::layout::PAGE_SIZE;
use crate::model::Model;
use crate::plan::Plan;
use crate::replay::{Count, Mode, Replay, Workload};
use crate::timing::{time_copies, Timing};

/// What the kernel's loop, which loses a last page that is not adjacent to the one before, does
/// not transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct UpstreamLoss {
    /// Pages not read.
    pub unread: u64,
    /// Pages to read.
    pub reads: u64,
    /// Pages not written back.
    pub unwritten: u64,
    /// Pages to write back.
    pub writes: u64,
    /// Whether guest memory is what it must be all the same.
    pub memory_as_expected: bool,
}

/// What a contiguity profile makes of the copies of context pages, from replaying the trace on one
/// vGPU in runs and again with the kernel's loop.
#[derive(Clone, Debug, Serialize)]
pub struct ProfileFigures {
    /// Name of the profile.
    pub profile: String,
    /// Mean pages of a run over all objects of the profile. A trace uses the first few of them.
    pub mean_run: f64,
    /// Whether guest memory is what it must be after the copies in runs.
    pub memory_as_expected: bool,
    /// Mean pages of a reading call; `None` if there is no such call.
    pub pages_per_read: Option<f64>,
    /// Mean pages of a writing call; `None` if there is no such call.
    pub pages_per_write: Option<f64>,
    /// What the kernel's loop would have lost.
    pub upstream: UpstreamLoss,
    /// Page by page against in runs; `None` if the trace copies no context pages.
    pub timing: Option<Timing>,
}

impl ProfileFigures {
    /// Replays of a trace that [`measure`](Self::measure) makes.
    pub const REPLAYS: u64 = 3;

    /// Replays and times `trace` in a guest that follows `profile`; `watch` is called
    /// after each workload.
    ///
    /// # Errors
    ///
    /// As [`Plan::new`], [`Model::after`] and [`Replay::run`].
    pub fn measure(
        trace: &Trace,
        profile: &Contiguity,
        watch: &mut dyn FnMut(Workload) -> Result<()>,
    ) -> Result<Self> {
        let plan = Plan::new(trace, profile)?;
        let model = Model::after(&plan)?;
        let replay = Replay::new(&plan, &model);
        let run = replay.run(Mode::Run, watch)?;
        let upstream = replay.run(Mode::Upstream, watch)?;
        let (all, kept) = (run.context_pages(), upstream.context_pages());
        Ok(ProfileFigures {
            profile: profile.name().to_owned(),
            mean_run: profile.mean_run(),
            memory_as_expected: run.verified(),
            pages_per_read: mean(all.read_bytes, all.reads),
            pages_per_write: mean(all.written_bytes, all.writes),
            upstream: upstream_loss(all, kept, upstream.verified()),
            timing: Self::time(&replay, &plan, watch)?,
        })
    }

    fn time(
        replay: &Replay<'_>,
        plan: &Plan,
        watch: &mut dyn FnMut(Workload) -> Result<()>,
    ) -> Result<Option<Timing>> {
        match replay
            .play(Mode::Run, watch)?
            .first()
            .map(|guest| &guest.machine)
        {
            Some(machine) => time_copies(machine, plan),
            None => Ok(None),
        }
    }
}

fn upstream_loss(all: Count, kept: Count, memory_as_expected: bool) -> UpstreamLoss {
    UpstreamLoss {
        unread: all.read_bytes.saturating_sub(kept.read_bytes) / PAGE_SIZE,
        reads: all.read_bytes / PAGE_SIZE,
        unwritten: all.written_bytes.saturating_sub(kept.written_bytes) / PAGE_SIZE,
        writes: all.written_bytes / PAGE_SIZE,
        memory_as_expected,
    }
}

fn mean(bytes: u64, calls: u64) -> Option<f64> {
    (calls > 0).then(|| (bytes / PAGE_SIZE) as f64 / calls as f64)
}

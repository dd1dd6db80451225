// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! vGPUs that share a GPU by weight.

use gvt_replay::side_by_side::{play, Player};
use gvt_replay::{Contiguity, Mode, Plan, Result, SideBySide, Trace};

use crate::args::Args;
use crate::progress::Progress;

/// Has one vGPU for each weight play the trace that was given, whose plan this is, or else the bundled
/// recordings in turn. In the mode that was asked for, or in the last one.
pub(crate) fn share(
    args: &Args,
    profile: &Contiguity,
    plan: &Plan,
    progress: &Progress,
) -> Result<SideBySide> {
    let bundled = match &args.trace {
        Some(_) => Vec::new(),
        None => bundled_plans(profile)?,
    };
    let recording = |vgpu: usize| match (&args.trace, bundled.len()) {
        (Some(path), _) => (plan, path.display().to_string()),
        (None, recordings) => {
            let (name, plan) = &bundled[vgpu % recordings];
            (plan, (*name).to_owned())
        }
    };
    let players: Vec<Player<'_>> = args
        .weights()
        .iter()
        .enumerate()
        .map(|(vgpu, weight)| {
            let (plan, recording) = recording(vgpu);
            Player {
                plan,
                recording,
                weight: *weight,
            }
        })
        .collect();
    progress.begin("vGPUs", "side by side", 0, 1);
    let mode = args.modes().last().copied().unwrap_or(Mode::Skip);
    play(&players, mode, args.fault(), &mut || progress.step())
}

fn bundled_plans(profile: &Contiguity) -> Result<Vec<(&'static str, Plan)>> {
    let plan = |(name, trace)| Ok((name, Plan::new(&trace, profile)?));
    Trace::all_bundled()?.into_iter().map(plan).collect()
}

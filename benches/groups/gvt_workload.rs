// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! GPU workloads a second, before and after the kernel's series, and ours.

use benches::gvt::Scheme;
use benches::harness::Bench;
use gvt_replay::{Contiguity, Plan, Trace};

fn main() {
    Bench::run("gvt_workload", |bench| {
        let trace = Trace::bundled().expect("the bundled recording");
        let plans: Vec<_> = profiles()
            .into_iter()
            .map(|profile| {
                let plan = Plan::new(&trace, &profile).expect("a plan");
                (profile.name().to_owned(), plan)
            })
            .collect();
        for vgpus in [1, 2] {
            for (profile, plan) in &plans {
                let section = format!("vGPUs: {vgpus}");
                let candidates = Scheme::ALL.map(|scheme| scheme.running(plan, vgpus));
                bench.rates(&section, profile, "workloads/s", candidates.into());
            }
        }
        for (profile, plan) in &plans {
            let candidates = Scheme::STEPS.map(|scheme| scheme.running(plan, 1));
            let section = "Switch by switch, vGPUs: 1";
            bench.rates(section, profile, "workloads/s", candidates.into());
        }
    });
}

/// The measured ones, and some of which nobody knows whether there are such guests.
fn profiles() -> Vec<Contiguity> {
    let bundled = |name| Contiguity::bundled(name).expect("a bundled profile");
    let measured = Contiguity::NAMES.into_iter().map(bundled);
    let supposed = ["consecutive", "as-found", "recycled"].map(|name| bundled(name).descending());
    measured.chain(supposed).collect()
}

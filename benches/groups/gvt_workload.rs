// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! GPU workloads a second, before and after the kernel's series, and ours.

use std::env;
use std::process::ExitCode;

use benches::compare::{Series, NOISY};
use benches::gvt::Scheme;
use benches::harness::Bench;
use gvt_replay::{Contiguity, Plan, Trace};

fn main() -> ExitCode {
    let mut short = 0;
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
                let all = bench.rates(&section, profile, "workloads/s", candidates.into());
                short += all
                    .iter()
                    .skip(1)
                    .filter(|base| is_short(profile, &all[0], base))
                    .count();
            }
        }
        for (profile, plan) in &plans {
            let candidates = Scheme::STEPS.map(|scheme| scheme.running(plan, 1));
            let section = "Switch by switch, vGPUs: 1";
            bench.rates(section, profile, "workloads/s", candidates.into());
        }
    });
    // Those who only want the figures get them anyway.
    ExitCode::from(u8::from(short > 0 && env::var_os("BENCH_BARS").is_some()))
}

/// Ours is never slower than any of the others; on fresh pages it takes at most 0.8 of the time of what
/// was before the series. Where the rounds do not agree nothing can be said.
fn is_short(profile: &str, ours: &Series, other: &Series) -> bool {
    let part = ours.over(other).measure();
    let is_after = other.name == Scheme::SERIES.name();
    let bar = if profile == "fresh" && !is_after {
        0.8
    } else {
        1.0
    };
    let short = part.spread <= NOISY && part.value > bar;
    if short {
        println!("{profile}: {:.2} of {}, not {bar}", part.value, other.name);
    }
    short
}

/// The measured ones, and some of which nobody knows whether there are such guests.
fn profiles() -> Vec<Contiguity> {
    let bundled = |name| Contiguity::bundled(name).expect("a bundled profile");
    let measured = Contiguity::NAMES.into_iter().map(bundled);
    let supposed = ["consecutive", "as-found", "recycled"].map(|name| bundled(name).descending());
    measured.chain(supposed).collect()
}

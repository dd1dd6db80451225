// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests that share a GPU: each gets its share, nobody starves, and contexts that mix are found.

use gvt_replay::inject::Fault;
use gvt_replay::side_by_side::{play, play_on, Player, MEASURED};
use gvt_replay::{Contiguity, Mode, Plan, SideBySide, Trace};
use gvt_scheduler::policy::{Weight, BALANCE_PERIOD};
use gvt_scheduler::{Engine, EngineFault, EngineJob, Executed, SimulatedEngine};

const GLMARK2: &[u8] = include_bytes!("../data/glmark2-skl.aub.xz");
const NCNN: &[u8] = include_bytes!("../data/ncnn-vulkan-skl.aub.xz");
const H264: &[u8] = include_bytes!("../data/h264-vcs-skl.aub.xz");

fn plan(stored: &[u8], profile: &str) -> Plan {
    let trace = Trace::from_bytes(stored).unwrap();
    Plan::new(&trace, &Contiguity::bundled(profile).unwrap()).unwrap()
}

fn players<'a>(plans: &[&'a Plan], weights: &[u8]) -> Vec<Player<'a>> {
    let player = |(plan, weight): (&&'a Plan, &u8)| Player {
        plan,
        recording: "some".to_owned(),
        weight: Weight::new(*weight).unwrap(),
    };
    plans.iter().zip(weights).map(player).collect()
}

fn assert_fair(outcome: &SideBySide) {
    for share in &outcome.shares {
        assert!(share.fair, "{:?}", outcome.shares);
        assert!(share.workloads > 0);
        let longest = 2 * BALANCE_PERIOD.as_nanos();
        assert!(u128::from(share.longest_wait_ns) < longest, "{share:?}");
    }
    let used: u64 = outcome.shares.iter().map(|share| share.used_ns).sum();
    assert!(u128::from(used) <= MEASURED.as_nanos());
}

#[test]
fn two_recordings_get_their_shares_and_keep_their_contexts() {
    let (glmark2, ncnn) = (plan(GLMARK2, "consecutive"), plan(NCNN, "as-found"));
    for mode in [Mode::Skip, Mode::Page] {
        let mut steps = 0;
        let players = players(&[&glmark2, &ncnn], &[2, 1]);
        let outcome = play(&players, mode, None, &mut || steps += 1).unwrap();
        assert!(outcome.verified(), "{mode:?}: {:?}", outcome.verdicts);
        assert_fair(&outcome);
        assert!(
            outcome.shares[0].workloads > 202,
            "the recording begins again"
        );
        assert_eq!(steps, SideBySide::STEPS);
    }
}

#[test]
fn three_guests_on_two_engines() {
    let plans = [GLMARK2, NCNN, H264].map(|stored| plan(stored, "fresh"));
    let players = players(&plans.each_ref(), &[3, 16, 8]);
    let outcome = play(&players, Mode::Skip, None, &mut || ()).unwrap();
    assert!(outcome.verified(), "{:?}", outcome.verdicts);
    assert_fair(&outcome);
}

#[test]
fn one_guest_has_all_of_it() {
    let glmark2 = plan(GLMARK2, "consecutive");
    let outcome = play(&players(&[&glmark2], &[1]), Mode::Run, None, &mut || ()).unwrap();
    assert!(outcome.verified());
    assert!(outcome.shares[0].share > 0.99, "{:?}", outcome.shares);
}

#[test]
fn the_same_twice_is_the_same() {
    let glmark2 = plan(GLMARK2, "recycled");
    let shares = [(); 2].map(|()| {
        let players = players(&[&glmark2, &glmark2], &[1, 4]);
        play(&players, Mode::Skip, None, &mut || ()).unwrap().shares
    });
    assert_eq!(shares[0], shares[1]);
}

#[test]
fn a_page_that_is_lost_on_the_way_is_found() {
    let glmark2 = plan(GLMARK2, "consecutive");
    let players = players(&[&glmark2, &glmark2], &[1, 1]);
    let outcome = play(&players, Mode::Run, Some(Fault::LoseTail), &mut || ()).unwrap();
    assert!(outcome.verdicts.iter().all(|verdict| !verdict.verified()));
}

/// A GPU that once begins a workload with the last page of the context that was loaded before.
struct Leaking {
    gpu: SimulatedEngine,
    workloads: u32,
    last_page: Vec<u8>,
}

impl Engine for Leaking {
    fn run(&mut self, job: EngineJob<'_>) -> Result<Executed, EngineFault> {
        let pages = job.image.pages_mut();
        let last_page = pages.len() - 4096..;
        self.workloads += 1;
        if self.workloads == 300 {
            pages[last_page].copy_from_slice(&self.last_page);
        } else {
            self.last_page = pages[last_page].to_vec();
        }
        self.gpu.run(job)
    }
}

#[test]
fn a_context_that_gets_into_another_is_found() {
    // Guests that play the same have the same in their contexts, one after the other.
    let (glmark2, ncnn) = (plan(GLMARK2, "consecutive"), plan(NCNN, "consecutive"));
    let players = players(&[&glmark2, &ncnn], &[1, 1]);
    let mut gpu = Leaking {
        gpu: SimulatedEngine::without_commands(),
        workloads: 0,
        last_page: Vec::new(),
    };
    let outcome = play_on(&mut gpu, &players, Mode::Run, None, &mut || ()).unwrap();
    let different: Vec<u64> = outcome.verdicts.iter().map(|v| v.different).collect();
    assert!(!outcome.verified(), "{different:?}");
}

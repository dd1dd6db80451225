// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Several guests on one GPU, which the time-based policy gives to one after the other.
//!
//! Time is virtual. A workload takes [`WORKLOAD`] and [`PER_BYTE`] for each byte that its guest has
//! written to memory since its last submission (commands, state, data), [`LONGEST`] at most: larger
//! frames take longer, which is all that is true of it. A guest takes no time between the end of a
//! workload and its next submission, and begins its recording again at the end of it.
//!
//! All guests are started at once and do nothing while they are new, as machines that boot; then they
//! play for [`MEASURED`]. Contexts must not mix: the pages of a context are compared with its guest's
//! own model when it has been written back, those of the context that ran last again when its guest
//! gets the GPU once more, and all of each guest's memory at the end.

use std::time::Duration;

use gvt_scheduler::policy::{
    Clock, PolicyError, TimeBased, VgpuId, VirtualClock, Weight, START_PRIORITY, TICK,
};
use gvt_scheduler::{Engine, EngineId, SimulatedEngine};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::inject::Fault;
use crate::machine::Machine;
use crate::model::Model;
use crate::plan::{Action, Event, Plan};
use crate::replay::Mode;
use crate::verify::Verdict;

/// What every workload takes.
pub const WORKLOAD: Duration = Duration::from_micros(250);
/// What a byte takes that the guest has written for it.
pub const PER_BYTE: Duration = Duration::from_nanos(1);
/// What a workload takes at most.
pub const LONGEST: Duration = Duration::from_millis(2);
/// For how long the guests play.
pub const MEASURED: Duration = Duration::from_secs(1);
/// How far a share may be from what it is to be, as a part of that.
pub const TOLERANCE: f64 = 0.05;

/// A guest, and what it plays.
#[derive(Clone, Debug)]
pub struct Player<'a> {
    /// What is played.
    pub plan: &'a Plan,
    /// Its name.
    pub recording: String,
    /// The weight of the guest's vGPU.
    pub weight: Weight,
}

/// What one vGPU had of the GPU.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Share {
    /// Number of the vGPU, from 0.
    pub vgpu: usize,
    /// What its guest played.
    pub recording: String,
    /// Its weight.
    pub weight: u8,
    /// Workloads that ran.
    pub workloads: u64,
    /// For how long it owned the GPU, in nanoseconds.
    pub used_ns: u64,
    /// The same as a part of the time that was measured.
    pub share: f64,
    /// Its weight as a part of the sum of weights.
    pub expected: f64,
    /// Whether the two agree but for [`TOLERANCE`].
    pub fair: bool,
    /// The longest time that a workload waited for its turn, in nanoseconds.
    pub longest_wait_ns: u64,
}

/// What came of guests that shared a GPU.
#[derive(Clone, Debug)]
pub struct SideBySide {
    /// One for each vGPU.
    pub shares: Vec<Share>,
    /// One for each guest's memory.
    pub verdicts: Vec<Verdict>,
}

impl SideBySide {
    /// Steps of [`play`]: what it calls `watch` for.
    pub const STEPS: u64 = (MEASURED.as_nanos() / TICK.as_nanos()) as u64 + 1;

    /// Whether the memory of every guest is what it must be.
    pub fn verified(&self) -> bool {
        self.verdicts.iter().all(Verdict::verified)
    }

    /// Whether every vGPU got its share.
    pub fn fair(&self) -> bool {
        self.shares.iter().all(|share| share.fair)
    }
}

/// Has `players` share a GPU that changes every byte of a context.
///
/// ```
/// use gvt_replay::side_by_side::{play, Player};
/// use gvt_replay::{Contiguity, Mode, Plan, Trace};
/// use gvt_scheduler::policy::Weight;
///
/// let trace = Trace::from_bytes(include_bytes!("../data/h264-vcs-skl.aub.xz"))?;
/// let plan = Plan::new(&trace, &Contiguity::bundled("fresh").expect("a bundled profile"))?;
/// let player = |weight| Player {
///     plan: &plan,
///     recording: "h264-vcs".to_owned(),
///     weight: Weight::new(weight).expect("1 to 16"),
/// };
/// let outcome = play(&[player(3), player(1)], Mode::Skip, None, &mut || ())?;
/// assert!(outcome.verified() && outcome.fair());
/// assert!((outcome.shares[0].share - 0.75).abs() < 0.01);
/// # Ok::<(), gvt_replay::Error>(())
/// ```
///
/// # Errors
///
/// As [`Replay::run`](crate::Replay::run).
pub fn play(
    players: &[Player<'_>],
    mode: Mode,
    fault: Option<Fault>,
    watch: &mut dyn FnMut(),
) -> Result<SideBySide> {
    let mut gpu = SimulatedEngine::without_commands();
    play_on(&mut gpu, players, mode, fault, watch)
}

/// The same on a GPU of the caller's. One that keeps anything of a context for the next is found out.
///
/// # Errors
///
/// As [`play`].
pub fn play_on(
    gpu: &mut dyn Engine,
    players: &[Player<'_>],
    mode: Mode,
    fault: Option<Fault>,
    watch: &mut dyn FnMut(),
) -> Result<SideBySide> {
    let clock = VirtualClock::default();
    let mut policy = TimeBased::new(&clock);
    let mut guests = Vec::new();
    for (number, player) in players.iter().enumerate() {
        let vgpu = policy.add(player.weight);
        policy.start(vgpu)?;
        let machine = Machine::new(number as u32, player.plan, mode.config(), fault, ())?;
        guests.push(Guest::new(vgpu, player.plan, machine));
    }
    let mut host = Host {
        clock: &clock,
        policy,
        guests,
        running: None,
    };
    host.boot()?;
    host.play(gpu, watch)?;
    host.outcome(players)
}

impl From<PolicyError> for Error {
    fn from(source: PolicyError) -> Self {
        Error::machine("share the GPU")(source)
    }
}

struct Host<'a> {
    clock: &'a VirtualClock,
    policy: TimeBased<&'a VirtualClock>,
    guests: Vec<Guest<'a>>,
    /// Whose workload runs, on which engine, until when.
    running: Option<(usize, EngineId, Duration)>,
}

impl Host<'_> {
    /// Lets time pass until nobody is new any more.
    fn boot(&mut self) -> Result<()> {
        let mut tick = Duration::ZERO;
        while tick < START_PRIORITY {
            self.clock.advance_to(tick);
            self.policy.tick();
            tick += TICK;
        }
        self.clock.advance_to(START_PRIORITY);
        Ok(())
    }

    fn play(&mut self, gpu: &mut dyn Engine, watch: &mut dyn FnMut()) -> Result<()> {
        let mut tick = START_PRIORITY;
        let end = START_PRIORITY + MEASURED;
        for guest in 0..self.guests.len() {
            self.submit(guest)?;
        }
        loop {
            let now = self.clock.now();
            if now == tick {
                self.policy.tick();
                tick += TICK;
                watch();
            }
            if let Some((guest, engine, _)) = self.running.take_if(|(.., until)| *until <= now) {
                self.policy.finish(engine)?;
                self.submit(guest)?;
            }
            if now >= end {
                return Ok(());
            }
            if self.running.is_none() {
                self.begin(gpu)?;
            }
            let next = self.running.map_or(tick, |(.., until)| until.min(tick));
            self.clock.advance_to(next);
        }
    }

    /// A guest plays on to its next submission.
    fn submit(&mut self, guest: usize) -> Result<()> {
        let now = self.clock.now();
        let guest = &mut self.guests[guest];
        let engine = guest.submit(now)?;
        self.policy.queue(guest.vgpu, engine)?;
        Ok(())
    }

    fn begin(&mut self, gpu: &mut dyn Engine) -> Result<()> {
        for engine in EngineId::ALL {
            let Some(vgpu) = self.policy.begin(engine) else {
                continue;
            };
            let found = self.guests.iter().position(|guest| guest.vgpu == vgpu);
            let Some(number) = found else { continue };
            let now = self.clock.now();
            let length = self.guests[number].run(engine, gpu, now)?;
            self.running = Some((number, engine, now + length));
            return Ok(());
        }
        Ok(())
    }

    fn outcome(self, players: &[Player<'_>]) -> Result<SideBySide> {
        let weights: u32 = players.iter().map(|p| u32::from(p.weight.get())).sum();
        let mut outcome = SideBySide {
            shares: Vec::new(),
            verdicts: Vec::new(),
        };
        for ((vgpu, guest), player) in self.guests.into_iter().enumerate().zip(players) {
            let used = self.policy.used(guest.vgpu).unwrap_or_default();
            let share = used.as_secs_f64() / MEASURED.as_secs_f64();
            let expected = f64::from(player.weight.get()) / f64::from(weights);
            outcome.shares.push(Share {
                vgpu,
                recording: player.recording.clone(),
                weight: player.weight.get(),
                workloads: guest.workloads,
                used_ns: nanoseconds(used),
                share,
                expected,
                fair: (share - expected).abs() <= TOLERANCE * expected,
                longest_wait_ns: nanoseconds(guest.longest_wait),
            });
            let mut verdict = guest.verdict;
            verdict.append(guest.machine.verify(&guest.model, guest.plan)?);
            outcome.verdicts.push(verdict);
        }
        Ok(outcome)
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

struct Guest<'a> {
    vgpu: VgpuId,
    plan: &'a Plan,
    /// What the guest does next, by index.
    next: usize,
    machine: Machine<()>,
    /// Of what has run: behind the guest by the workload that is queued.
    model: Model,
    verdict: Verdict,
    workloads: u64,
    /// Bytes that were written since the last submission.
    written: u64,
    /// The submission that is queued, and since when.
    queued: Option<(&'a Event, Duration)>,
    longest_wait: Duration,
    /// Copied pages of the context that ran last.
    last: Vec<u64>,
}

impl<'a> Guest<'a> {
    fn new(vgpu: VgpuId, plan: &'a Plan, machine: Machine<()>) -> Self {
        Guest {
            vgpu,
            plan,
            next: 0,
            machine,
            model: Model::default(),
            verdict: Verdict::default(),
            workloads: 0,
            written: 0,
            queued: None,
            longest_wait: Duration::ZERO,
            last: Vec::new(),
        }
    }

    /// Plays on to the next submission, which is queued; gives its engine.
    fn submit(&mut self, now: Duration) -> Result<EngineId> {
        loop {
            // A plan has at least one submission, so this ends.
            let event = &self.plan.events()[self.next];
            self.next = (self.next + 1) % self.plan.events().len();
            let offset = event.offset;
            match &event.action {
                Action::Submit { engine, dwords } => {
                    let submission = self.machine.submit(offset, engine, dwords)?;
                    let submission = submission.ok_or(Error::NotCompleted { offset })?;
                    self.queued = Some((event, now));
                    return Ok(submission.engine);
                }
                action => {
                    if let Action::Write { data, .. } = action {
                        self.written += data.len() as u64;
                    }
                    self.machine.play(event)?;
                    self.model.play(event)?;
                }
            }
        }
    }

    /// Runs the workload that is queued; gives what it takes.
    fn run(&mut self, engine: EngineId, gpu: &mut dyn Engine, now: Duration) -> Result<Duration> {
        let Some((event, since)) = self.queued.take() else {
            return Ok(Duration::ZERO);
        };
        self.longest_wait = self.longest_wait.max(now.saturating_sub(since));
        let last = std::mem::take(&mut self.last);
        self.verify(&last)?;
        let offset = event.offset;
        let completion = self.machine.run_next(offset, engine, gpu)?;
        completion.ok_or(Error::NotCompleted { offset })?;
        self.last = self.model.play(event)?.unwrap_or_default();
        let pages = std::mem::take(&mut self.last);
        self.verify(&pages)?;
        self.last = pages;
        self.workloads += 1;
        Ok(workload_time(std::mem::take(&mut self.written)))
    }

    fn verify(&mut self, pages: &[u64]) -> Result<()> {
        let verdict = self
            .machine
            .verify_context(&self.model, self.plan, pages, self.workloads)?;
        self.verdict.append(verdict);
        Ok(())
    }
}

/// What a workload takes whose guest has written that many bytes since the one before.
pub fn workload_time(written: u64) -> Duration {
    let bytes = u32::try_from(written).unwrap_or(u32::MAX);
    LONGEST.min(WORKLOAD + PER_BYTE * bytes)
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Any sequence of events, beside the rules written down once more: every list is searched, every sum
//! is summed up, and time is a number of nanoseconds.

use std::time::Duration;

use gvt_scheduler::policy::{PolicyError, TimeBased, VgpuId, VirtualClock, Weight};
use gvt_scheduler::EngineId;
use proptest::prelude::*;

const MS: i128 = 1_000_000;

#[derive(Clone, Debug)]
enum Event {
    Add(u8),
    Remove(usize),
    Start(usize),
    Stop(usize),
    Queue(usize, usize),
    Clear(usize, usize),
    Begin(usize),
    Finish(usize),
    Tick,
    Wait(u64),
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        1 => (1..=16u8).prop_map(Event::Add),
        1 => (0..5usize).prop_map(Event::Remove),
        3 => (0..5usize).prop_map(Event::Start),
        1 => (0..5usize).prop_map(Event::Stop),
        8 => (0..5usize, 0..3usize).prop_map(|(vgpu, engine)| Event::Queue(vgpu, engine)),
        1 => (0..5usize, 0..3usize).prop_map(|(vgpu, engine)| Event::Clear(vgpu, engine)),
        12 => (0..3usize).prop_map(Event::Begin),
        10 => (0..3usize).prop_map(Event::Finish),
        8 => Just(Event::Tick),
        6 => (0..3_000_000u64).prop_map(Event::Wait),
        2 => (0..700_000_000u64).prop_map(Event::Wait),
    ];
    let vgpus = prop::collection::vec((1..=16u8).prop_map(Event::Add), 0..4);
    (vgpus, prop::collection::vec(event, 0..400))
        .prop_map(|(vgpus, events)| [vgpus, events].concat())
}

#[derive(Default)]
struct Vgpu {
    gone: bool,
    weight: i128,
    started: bool,
    start_time: i128,
    new: bool,
    allocated: i128,
    left: i128,
    used: i128,
    since: i128,
    queued: [usize; 3],
}

/// The state of the world, and nothing precomputed.
#[derive(Default)]
struct Model {
    now: i128,
    vgpus: Vec<Vgpu>,
    /// Of least recent turn first.
    order: Vec<usize>,
    owner: Option<usize>,
    /// How many workloads the owner has begun in its turn.
    begun: usize,
    change: Option<Option<usize>>,
    running: [Option<usize>; 3],
    balances: usize,
    balance_time: i128,
}

impl Model {
    fn runs(&self, vgpu: usize) -> bool {
        self.running.contains(&Some(vgpu))
    }

    fn pay(&mut self) {
        if let Some(owner) = self.owner {
            let vgpu = &mut self.vgpus[owner];
            vgpu.left -= self.now - vgpu.since;
            vgpu.used += self.now - vgpu.since;
            vgpu.since = self.now;
        }
    }

    fn decide(&mut self) {
        self.pay();
        if self.change.is_none() {
            let mut chosen = None;
            for &vgpu in &self.order.clone() {
                let busy = self.runs(vgpu) || self.vgpus[vgpu].queued.iter().sum::<usize>() > 0;
                if !busy {
                    continue;
                }
                if self.vgpus[vgpu].new && self.now - self.vgpus[vgpu].start_time >= 2000 * MS {
                    self.vgpus[vgpu].new = false;
                }
                if self.vgpus[vgpu].new {
                    chosen = Some(vgpu);
                    break;
                }
                if self.vgpus[vgpu].left > 0 {
                    self.order.retain(|other| *other != vgpu);
                    self.order.push(vgpu);
                    chosen = Some(vgpu);
                    break;
                }
            }
            if chosen != self.owner {
                self.change = Some(chosen);
            }
        }
        if let (Some(next), [None, None, None]) = (self.change, self.running) {
            self.owner = next;
            self.begun = 0;
            self.change = None;
            if let Some(owner) = next {
                self.vgpus[owner].since = self.now;
            }
        }
    }

    fn tick(&mut self) {
        if self.now >= self.balance_time {
            self.balance_time = self.now + 100 * MS;
            let started = || self.order.iter().copied();
            if self.balances % 10 == 0 {
                let sum: i128 = started().map(|vgpu| self.vgpus[vgpu].weight).sum();
                for vgpu in self.order.clone() {
                    let vgpu = &mut self.vgpus[vgpu];
                    vgpu.allocated = 100 * MS / sum * vgpu.weight;
                    vgpu.left = vgpu.allocated;
                }
            } else {
                for vgpu in self.order.clone() {
                    self.vgpus[vgpu].left += self.vgpus[vgpu].allocated;
                }
            }
            self.balances += 1;
        }
        self.decide();
    }

    /// What the policy must answer: whether there was an error, and which vGPU it is about.
    fn event(&mut self, event: &Event) -> Result<Option<usize>, ()> {
        let known = |model: &Model, vgpu: usize| match model.vgpus.get(vgpu) {
            Some(found) if !found.gone => Ok(()),
            _ => Err(()),
        };
        match *event {
            Event::Add(weight) => self.vgpus.push(Vgpu {
                weight: weight.into(),
                ..Vgpu::default()
            }),
            Event::Remove(vgpu) => {
                known(self, vgpu)?;
                if self.vgpus[vgpu].started || self.runs(vgpu) {
                    return Err(());
                }
                self.vgpus[vgpu].gone = true;
            }
            Event::Start(vgpu) => {
                known(self, vgpu)?;
                if !self.vgpus[vgpu].started {
                    self.vgpus[vgpu].started = true;
                    self.vgpus[vgpu].new = true;
                    self.vgpus[vgpu].start_time = self.now;
                    self.order.insert(0, vgpu);
                }
            }
            Event::Stop(vgpu) => {
                known(self, vgpu)?;
                if self.vgpus[vgpu].started {
                    self.vgpus[vgpu].started = false;
                    self.order.retain(|other| *other != vgpu);
                    if self.change == Some(Some(vgpu)) {
                        self.change = None;
                    }
                    if self.owner == Some(vgpu) {
                        self.pay();
                        self.owner = None;
                    }
                }
            }
            Event::Queue(vgpu, engine) => {
                known(self, vgpu)?;
                self.vgpus[vgpu].queued[engine] += 1;
                let waits = |vgpu: usize| self.vgpus[vgpu].queued.iter().any(|queued| *queued > 0);
                let begins = self.begun == 0 && self.owner.is_some_and(waits);
                if !begins {
                    self.decide();
                }
            }
            Event::Clear(vgpu, engine) => {
                known(self, vgpu)?;
                self.vgpus[vgpu].queued[engine] = 0;
            }
            Event::Begin(engine) => {
                let owner = self.owner.filter(|owner| {
                    self.change.is_none()
                        && self.running[engine].is_none()
                        && self.vgpus[*owner].queued[engine] > 0
                });
                if let Some(owner) = owner {
                    self.vgpus[owner].queued[engine] -= 1;
                    self.running[engine] = Some(owner);
                    self.begun += 1;
                }
                return Ok(owner);
            }
            Event::Finish(engine) => {
                let vgpu = self.running[engine].take().ok_or(())?;
                if self.change.is_some() || self.owner != Some(vgpu) {
                    self.decide();
                }
                return Ok(Some(vgpu));
            }
            Event::Tick => self.tick(),
            Event::Wait(nanoseconds) => self.now += i128::from(nanoseconds),
        }
        Ok(None)
    }
}

/// The policy, with vGPUs by the order in which they were added.
struct Real<'a> {
    clock: &'a VirtualClock,
    policy: TimeBased<&'a VirtualClock>,
    ids: Vec<VgpuId>,
}

impl Real<'_> {
    fn id(&self, vgpu: usize) -> Result<VgpuId, ()> {
        self.ids.get(vgpu).copied().ok_or(())
    }

    fn number(&self, vgpu: Option<VgpuId>) -> Option<usize> {
        let vgpu = vgpu?;
        self.ids.iter().position(|id| *id == vgpu)
    }

    fn event(&mut self, event: &Event) -> Result<Option<usize>, ()> {
        let refused = |_: PolicyError| ();
        match *event {
            Event::Add(weight) => {
                let weight = Weight::new(weight).map_err(refused)?;
                self.ids.push(self.policy.add(weight));
            }
            Event::Remove(vgpu) => self.policy.remove(self.id(vgpu)?).map_err(refused)?,
            Event::Start(vgpu) => self.policy.start(self.id(vgpu)?).map_err(refused)?,
            Event::Stop(vgpu) => self.policy.stop(self.id(vgpu)?).map_err(refused)?,
            Event::Queue(vgpu, engine) => {
                let queued = self.policy.queue(self.id(vgpu)?, EngineId::ALL[engine]);
                queued.map_err(refused)?;
            }
            Event::Clear(vgpu, engine) => {
                let cleared = self.policy.clear(self.id(vgpu)?, EngineId::ALL[engine]);
                cleared.map_err(refused)?;
            }
            Event::Begin(engine) => {
                let vgpu = self.policy.begin(EngineId::ALL[engine]);
                return Ok(self.number(vgpu));
            }
            Event::Finish(engine) => {
                let vgpu = self.policy.finish(EngineId::ALL[engine]).map_err(refused)?;
                return Ok(self.number(Some(vgpu)));
            }
            Event::Tick => self.policy.tick(),
            Event::Wait(nanoseconds) => self.clock.advance(Duration::from_nanos(nanoseconds)),
        }
        Ok(None)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn the_policy_is_what_its_rules_say(events in events()) {
        let clock = VirtualClock::default();
        let policy = TimeBased::new(&clock);
        let mut real = Real { clock: &clock, policy, ids: Vec::new() };
        let mut model = Model::default();
        for (at, event) in events.iter().enumerate() {
            prop_assert_eq!(real.event(event), model.event(event), "{}: {:?}", at, event);
            prop_assert_eq!(real.number(real.policy.current()), model.owner, "{}: {:?}", at, event);
            prop_assert_eq!(real.policy.is_draining(), model.change.is_some(), "{}: {:?}", at, event);
            for (number, (id, vgpu)) in real.ids.iter().zip(&model.vgpus).enumerate() {
                if vgpu.gone {
                    prop_assert_eq!(real.policy.left(*id), None);
                    continue;
                }
                let running = if model.owner == Some(number) { model.now - vgpu.since } else { 0 };
                let used = real.policy.used(*id).map(|used| used.as_nanos() as i128);
                prop_assert_eq!(used, Some(vgpu.used + running), "{}: {:?}", at, event);
                let left = real.policy.left(*id).map(i128::from);
                prop_assert_eq!(left, Some(vgpu.left), "{}: {:?}", at, event);
                let busy = model.runs(number) || vgpu.queued.iter().sum::<usize>() > 0;
                prop_assert_eq!(real.policy.has_workload(*id), busy);
            }
        }
    }
}

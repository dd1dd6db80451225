// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The kernel's time-based policy ("tbs") as a state machine.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::time::Duration;

use crate::policy::clock::nanoseconds;
use crate::policy::slice::Slice;
use crate::policy::{Clock, PolicyError, Weight, BALANCE_PERIOD, STAGES};
use crate::regs::EngineId;

/// A vGPU to a [`TimeBased`] policy, which gave the number.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct VgpuId(u64);

impl fmt::Display for VgpuId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vGPU {}", self.0)
    }
}

/// Which vGPU owns the engines, decided by weight and time.
///
/// The rules, which are the kernel's:
///
/// - One vGPU at a time owns all engines. It changes when no workload runs: a decision to change
///   ([`TimeBased::is_draining`]) stops [`TimeBased::begin`] until those that run have finished.
/// - Every [`BALANCE_PERIOD`], at a tick, each started vGPU gets its weight's part of that period. What
///   is left of it adds up, and a workload that outlasts it makes debt; after [`STAGES`] periods both
///   are forgotten.
/// - Each decision goes through the started vGPUs, that of least recent turn first, and takes the first
///   that has a workload and either was started less than [`START_PRIORITY`](crate::policy::START_PRIORITY) ago or has time left. It
///   is the last from then on, unless it came first because it is new. A vGPU begins in front.
/// - Who has just got its turn keeps it until it has begun a workload, or the next tick. The kernel has
///   no such rule: there a turn is lost to whatever is queued before the one who has it begins, and with
///   loads that keep in step the same vGPU can lose each of its turns, for periods.
/// - Nobody is charged while nobody can be chosen. Who has its turn is charged until the next
///   decision, also if it has nothing to do.
///
/// Decisions are made by ticks, and when a workload is queued, or finishes while a change is due.
///
/// What the rules imply: a vGPU that is always busy gets its share of the sum of weights of *started*
/// vGPUs, and no more when others are idle; and of two new ones that are always busy the second has
/// all of the first [`START_PRIORITY`](crate::policy::START_PRIORITY). An error is one of the caller's own making.
///
/// ```
/// use gvt_scheduler::policy::{TimeBased, VirtualClock, Weight, START_PRIORITY, TICK};
/// use gvt_scheduler::EngineId;
///
/// let clock = VirtualClock::default();
/// let mut policy = TimeBased::new(&clock);
/// let light = policy.add(Weight::new(1)?);
/// let heavy = policy.add(Weight::new(3)?);
/// policy.start(light)?;
/// policy.start(heavy)?;
///
/// // While they are new, they have nothing to do.
/// for _ in 0..2000 {
///     clock.advance(TICK);
///     policy.tick();
/// }
/// policy.queue(light, EngineId::Rcs)?;
/// policy.queue(heavy, EngineId::Rcs)?;
/// // For a second, each has a workload of a tick's length whenever the one before has finished.
/// for _ in 0..1000 {
///     let owner = policy.begin(EngineId::Rcs);
///     clock.advance(TICK);
///     policy.tick();
///     if let Some(owner) = owner {
///         policy.finish(EngineId::Rcs)?;
///         policy.queue(owner, EngineId::Rcs)?;
///     }
/// }
/// let used = [light, heavy].map(|vgpu| policy.used(vgpu).unwrap().as_millis());
/// assert!((245..=255).contains(&used[0]) && (745..=755).contains(&used[1]), "{used:?}");
/// # Ok::<(), gvt_scheduler::policy::PolicyError>(())
/// ```
#[derive(Debug)]
pub struct TimeBased<C> {
    clock: C,
    vgpus: BTreeMap<VgpuId, Slice>,
    /// The started ones, that of least recent turn first.
    queue: VecDeque<VgpuId>,
    current: Option<VgpuId>,
    /// Who is to be current when nothing runs any more.
    next: Option<Option<VgpuId>>,
    running: [Option<VgpuId>; EngineId::ALL.len()],
    stage: u32,
    balance_at: u64,
    next_id: u64,
}

impl<C: Clock> TimeBased<C> {
    /// A policy without vGPUs.
    pub fn new(clock: C) -> Self {
        TimeBased {
            clock,
            vgpus: BTreeMap::new(),
            queue: VecDeque::new(),
            current: None,
            next: None,
            running: Default::default(),
            stage: 0,
            balance_at: 0,
            next_id: 0,
        }
    }

    /// One more vGPU, which is not started.
    pub fn add(&mut self, weight: Weight) -> VgpuId {
        let vgpu = VgpuId(self.next_id);
        self.next_id = self.next_id.wrapping_add(1);
        self.vgpus.insert(vgpu, Slice::new(weight));
        vgpu
    }

    /// Forgets a vGPU, and what is queued for it.
    ///
    /// # Errors
    ///
    /// [`PolicyError::NoVgpu`] (ENODEV), [`PolicyError::InUse`] (EBUSY).
    pub fn remove(&mut self, vgpu: VgpuId) -> Result<(), PolicyError> {
        let slice = self.slice(vgpu)?;
        if slice.started || slice.running > 0 {
            return Err(PolicyError::InUse { vgpu });
        }
        self.vgpus.remove(&vgpu);
        Ok(())
    }

    /// A vGPU takes part from now on, first of all. One that does so already goes on as it is.
    ///
    /// # Errors
    ///
    /// [`PolicyError::NoVgpu`] (ENODEV).
    pub fn start(&mut self, vgpu: VgpuId) -> Result<(), PolicyError> {
        let now = self.now();
        let slice = self.slice_mut(vgpu)?;
        if !slice.started {
            slice.start(now);
            self.queue.push_front(vgpu);
        }
        Ok(())
    }

    /// A vGPU takes part no longer: no workload of it begins. One that runs goes on to its end, and
    /// nobody else's begins before. What is queued stays queued.
    ///
    /// # Errors
    ///
    /// [`PolicyError::NoVgpu`] (ENODEV).
    pub fn stop(&mut self, vgpu: VgpuId) -> Result<(), PolicyError> {
        let now = self.now();
        let slice = self.slice_mut(vgpu)?;
        if slice.started {
            slice.started = false;
            self.queue.retain(|other| *other != vgpu);
            if self.next == Some(Some(vgpu)) {
                self.next = None;
            }
            if self.current == Some(vgpu) {
                self.charge(now);
                self.current = None;
            }
        }
        Ok(())
    }

    /// A vGPU has one more workload for an engine.
    ///
    /// # Errors
    ///
    /// [`PolicyError::NoVgpu`] (ENODEV).
    pub fn queue(&mut self, vgpu: VgpuId, engine: EngineId) -> Result<(), PolicyError> {
        let queued = &mut self.slice_mut(vgpu)?.queued[engine as usize];
        *queued = queued.saturating_add(1);
        if !self.is_about_to_begin() {
            self.schedule();
        }
        Ok(())
    }

    /// The workloads of a vGPU that wait for an engine are gone, as after a reset.
    ///
    /// # Errors
    ///
    /// [`PolicyError::NoVgpu`] (ENODEV).
    pub fn clear(&mut self, vgpu: VgpuId, engine: EngineId) -> Result<(), PolicyError> {
        self.slice_mut(vgpu)?.queued[engine as usize] = 0;
        Ok(())
    }

    /// Begins a workload on an engine: whose it is, or `None` where the engine is busy, or the vGPU
    /// that owns it has none for it, or must not begin any now. The engine is busy until
    /// [`finish`](Self::finish).
    pub fn begin(&mut self, engine: EngineId) -> Option<VgpuId> {
        if self.is_draining() || self.running[engine as usize].is_some() {
            return None;
        }
        let vgpu = self.current?;
        let slice = self.vgpus.get_mut(&vgpu)?;
        let queued = &mut slice.queued[engine as usize];
        *queued = queued.checked_sub(1)?;
        slice.running += 1;
        slice.has_begun = true;
        self.running[engine as usize] = Some(vgpu);
        Some(vgpu)
    }

    /// The workload on an engine has ended, well or not; gives whose it was.
    ///
    /// # Errors
    ///
    /// [`PolicyError::Idle`] (EINVAL) where none runs.
    pub fn finish(&mut self, engine: EngineId) -> Result<VgpuId, PolicyError> {
        let running = self.running[engine as usize].take();
        let vgpu = running.ok_or(PolicyError::Idle { engine })?;
        if let Some(slice) = self.vgpus.get_mut(&vgpu) {
            slice.running = slice.running.saturating_sub(1);
        }
        if self.is_draining() || self.current != Some(vgpu) {
            self.schedule();
        }
        Ok(vgpu)
    }

    /// [`TICK`](crate::policy::TICK) has passed, or more: time is given out if it is time for that,
    /// and a decision made.
    pub fn tick(&mut self) {
        let now = self.now();
        if now >= self.balance_at {
            self.balance();
            self.balance_at = now.saturating_add(nanoseconds(BALANCE_PERIOD));
        }
        self.schedule();
    }

    /// Who owns the engines.
    pub fn current(&self) -> Option<VgpuId> {
        self.current
    }

    /// Whether the owner is about to change, for which running workloads are waited for.
    pub fn is_draining(&self) -> bool {
        self.next.is_some()
    }

    /// Whether a vGPU has a workload, waiting or running; false for one that there is not.
    pub fn has_workload(&self, vgpu: VgpuId) -> bool {
        self.vgpus.get(&vgpu).is_some_and(Slice::has_workload)
    }

    /// For how long a vGPU has owned the engines, until now; `None` for one that there is not.
    pub fn used(&self, vgpu: VgpuId) -> Option<Duration> {
        let slice = self.vgpus.get(&vgpu)?;
        let used = match self.current == Some(vgpu) {
            true => slice.used_until(self.now()),
            false => slice.used,
        };
        Some(Duration::from_nanos(used))
    }

    /// Nanoseconds that a vGPU had left at the last decision, less than 0 for debt; `None` for one that
    /// there is not.
    pub fn left(&self, vgpu: VgpuId) -> Option<i64> {
        self.vgpus.get(&vgpu).map(|slice| slice.left)
    }

    /// Gives out the time of a period.
    fn balance(&mut self) {
        let started = self.vgpus.values_mut().filter(|slice| slice.started);
        if self.stage == 0 {
            let started: Vec<_> = started.collect();
            let weights: u64 = started.iter().map(|slice| weight(slice)).sum();
            for slice in started {
                slice.allocate(nanoseconds(BALANCE_PERIOD) / weights * weight(slice));
            }
        } else {
            started.for_each(Slice::replenish);
        }
        self.stage = (self.stage + 1) % STAGES;
    }

    /// Decides who is next, unless that is decided, and makes the change if nothing runs.
    fn schedule(&mut self) {
        let now = self.now();
        self.charge(now);
        if self.next.is_none() {
            let chosen = self.choose(now);
            // A vGPU that was stopped may have workloads that run, and owns nothing any more.
            self.next = (chosen != self.current).then_some(chosen);
        }
        if self.running.iter().any(Option::is_some) {
            return;
        }
        if let Some(next) = self.next.take() {
            self.current = next;
            if let Some(slice) = next.and_then(|next| self.vgpus.get_mut(&next)) {
                slice.enter(now);
            }
        }
    }

    /// Whether the owner has just got its turn, and has a workload that it has not begun yet.
    fn is_about_to_begin(&self) -> bool {
        let owner = self.current.and_then(|vgpu| self.vgpus.get(&vgpu));
        owner.is_some_and(|slice| !slice.has_begun && slice.has_workload())
    }

    fn choose(&mut self, now: u64) -> Option<VgpuId> {
        for at in 0..self.queue.len() {
            let vgpu = self.queue[at];
            let Some(slice) = self.vgpus.get_mut(&vgpu) else {
                continue;
            };
            if !slice.has_workload() {
                continue;
            }
            if slice.has_priority(now) {
                return Some(vgpu);
            }
            if slice.left > 0 {
                self.queue.remove(at);
                self.queue.push_back(vgpu);
                return Some(vgpu);
            }
        }
        None
    }

    fn charge(&mut self, now: u64) {
        let current = self.current;
        if let Some(slice) = current.and_then(|vgpu| self.vgpus.get_mut(&vgpu)) {
            slice.charge(now);
        }
    }

    fn now(&self) -> u64 {
        nanoseconds(self.clock.now())
    }

    fn slice(&self, vgpu: VgpuId) -> Result<&Slice, PolicyError> {
        self.vgpus.get(&vgpu).ok_or(PolicyError::NoVgpu { vgpu })
    }

    fn slice_mut(&mut self, vgpu: VgpuId) -> Result<&mut Slice, PolicyError> {
        let found = self.vgpus.get_mut(&vgpu);
        found.ok_or(PolicyError::NoVgpu { vgpu })
    }
}

fn weight(slice: &Slice) -> u64 {
    slice.weight.get().into()
}

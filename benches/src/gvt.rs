// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! GPU workloads: from the guest's submission to the events that tell it of the end.

use std::sync::Arc;
use std::time::Duration;

use gvt_replay::plan::{Action, EngineInfo};
use gvt_replay::relocate::REQUEST_BYTES;
use gvt_replay::{Holds, Machine, Plan};
use gvt_scheduler::policy::{TimeBased, VgpuId, VirtualClock, Weight, START_PRIORITY, TICK};
use gvt_scheduler::{
    ring_context, CopyMode, Engine, EngineFault, EngineId, EngineJob, Executed, VgpuConfig,
    PAGE_SIZE,
};
use vm_memory::{Bytes, GuestAddress};

use crate::compare::Candidate;

/// How a scheduler gets at guest memory: a setting of each switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scheme {
    name: &'static str,
    holds: Holds,
    copy_mode: CopyMode,
    skip_unchanged: bool,
}

impl Scheme {
    /// A held handle, scatter lists, and contexts that have not changed are not read again.
    pub const OURS: Scheme = Scheme {
        name: "ours",
        holds: Holds::Handle,
        copy_mode: CopyMode::Scattered,
        skip_unchanged: true,
    };

    /// What the kernel's series made of it: a held external user, pages in runs.
    pub const SERIES: Scheme = Scheme {
        name: "base + series",
        holds: Holds::User,
        copy_mode: CopyMode::Coalesced,
        skip_unchanged: false,
    };

    /// What was before it: the group is looked up for every access, and each page is one.
    pub const BASE: Scheme = Scheme {
        name: "base",
        holds: Holds::Nothing,
        copy_mode: CopyMode::PerPage,
        skip_unchanged: false,
    };

    /// `kvm_read_guest` in user space: guest memory by slots, page by page. Nothing is translated,
    /// and an unmap is not waited for.
    pub const SLOTS: Scheme = Scheme {
        name: "slots, page by page",
        holds: Holds::Slots,
        ..Scheme::BASE
    };

    /// Those to be compared, ours first.
    pub const ALL: [Scheme; 4] = [Scheme::OURS, Scheme::SERIES, Scheme::BASE, Scheme::SLOTS];

    /// From ours to base, one switch after the other. Base takes several times as long as the others, and
    /// leaves less of theirs in the caches: behind it comes one that is not of the series of steps.
    pub const STEPS: [Scheme; 7] = [
        Scheme::OURS,
        Scheme {
            name: "without scatter lists",
            copy_mode: CopyMode::Coalesced,
            ..Scheme::OURS
        },
        Scheme {
            name: "nor skip",
            holds: Holds::Handle,
            ..Scheme::SERIES
        },
        Scheme {
            name: "nor handle (base + series)",
            ..Scheme::SERIES
        },
        Scheme {
            name: "nor runs",
            copy_mode: CopyMode::PerPage,
            ..Scheme::SERIES
        },
        Scheme {
            name: "nor held user (base)",
            ..Scheme::BASE
        },
        Scheme::SLOTS,
    ];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        self.name
    }

    fn config(self) -> VgpuConfig {
        VgpuConfig {
            copy_mode: self.copy_mode,
            skip_unchanged: self.skip_unchanged,
            ..VgpuConfig::default()
        }
    }

    /// Workloads of `vgpus` guests that have replayed `plan`, one after the other, as the policy says.
    ///
    /// # Panics
    ///
    /// Panics where the plan cannot be replayed.
    pub fn running(self, plan: &Plan, vgpus: u32) -> Candidate<'static> {
        let mut guests = Guests::new(self, plan, vgpus);
        Candidate::of(self.name, move || guests.workload())
    }
}

/// A GPU that takes no time and changes nothing: what is measured is the scheduler.
#[derive(Debug)]
struct NoTime;

impl Engine for NoTime {
    fn run(&mut self, _: EngineJob<'_>) -> Result<Executed, EngineFault> {
        Ok(Executed::default())
    }
}

/// Guests of the same weight that always have a workload.
struct Guests {
    clock: Arc<VirtualClock>,
    policy: TimeBased<Arc<VirtualClock>>,
    guests: Vec<(VgpuId, Guest)>,
    next_tick: Duration,
}

impl Guests {
    /// A workload takes this long on the policy's clock, so that there is a tick every few.
    const WORKLOAD: Duration = Duration::from_micros(250);

    fn new(scheme: Scheme, plan: &Plan, vgpus: u32) -> Self {
        let clock = Arc::new(VirtualClock::default());
        let mut policy = TimeBased::new(clock.clone());
        let mut guests = Vec::new();
        for id in 0..vgpus {
            let vgpu = policy.add(Weight::MIN);
            policy.start(vgpu).expect("just added");
            guests.push((vgpu, Guest::new(scheme, plan, id)));
        }
        let mut all = Guests {
            clock,
            policy,
            guests,
            next_tick: Duration::ZERO,
        };
        // None of them is new any more.
        all.pass(START_PRIORITY);
        for (vgpu, guest) in &mut all.guests {
            let engine = guest.submit();
            all.policy.queue(*vgpu, engine).expect("just added");
        }
        all
    }

    fn pass(&mut self, time: Duration) {
        use gvt_scheduler::policy::Clock;
        self.clock.advance(time);
        while self.next_tick <= self.clock.now() {
            self.policy.tick();
            self.next_tick += TICK;
        }
    }

    fn workload(&mut self) {
        let vgpu = loop {
            match self.policy.begin(EngineId::Rcs) {
                Some(vgpu) => break vgpu,
                // All have used up their time: more is given out later.
                None => self.pass(TICK),
            }
        };
        let found = self.guests.iter_mut().find(|(id, _)| *id == vgpu);
        let (_, guest) = found.expect("the policy was told of no other");
        guest.run(EngineId::Rcs);
        self.pass(Self::WORKLOAD);
        self.policy.finish(EngineId::Rcs).expect("just begun");
        let found = self.guests.iter_mut().find(|(id, _)| *id == vgpu);
        let (_, guest) = found.expect("the policy was told of no other");
        let engine = guest.submit();
        self.policy.queue(vgpu, engine).expect("never removed");
    }
}

/// A guest that submits again what it has submitted in the recording, in that order.
struct Guest {
    machine: Machine<()>,
    submissions: Vec<Submission>,
    next: usize,
}

struct Submission {
    engine: &'static EngineInfo,
    dwords: [u32; 4],
    /// HEAD to TAIL in the ring context, with what they are between requests.
    pointers: GuestAddress,
    bytes: Vec<u8>,
}

impl Guest {
    fn new(scheme: Scheme, plan: &Plan, id: u32) -> Self {
        let machine = Machine::holding(scheme.holds, id, plan, scheme.config(), None, ());
        let mut machine = machine.expect("a machine");
        for event in plan.events() {
            machine.play(event).expect("a recording that verifies");
        }
        let submitted = plan.events().iter().filter_map(|event| match event.action {
            Action::Submit { engine, dwords } => Some((engine, dwords)),
            _ => None,
        });
        let submissions = submitted.map(|(engine, dwords)| {
            let lrca = u64::from(dwords[3]) / PAGE_SIZE as u64;
            let ring_context = (lrca + 1) * PAGE_SIZE as u64;
            let gpa = machine.vgpu().ggtt().translate(ring_context);
            let gpa = gpa.expect("submitted before").0;
            let pointers = GuestAddress(gpa + ring_context::HEAD as u64);
            let mut bytes = vec![0; ring_context::TAIL + 4 - ring_context::HEAD];
            let read = machine.dma().read_slice(&mut bytes, pointers);
            read.expect("guest memory");
            let (tail, request) = (bytes.len() - 4, REQUEST_BYTES as u32);
            bytes[..4].fill(0);
            bytes[tail..].copy_from_slice(&request.to_le_bytes());
            Submission {
                engine,
                dwords,
                pointers,
                bytes,
            }
        });
        let submissions = submissions.collect();
        Guest {
            machine,
            submissions,
            next: 0,
        }
    }

    fn submit(&mut self) -> EngineId {
        let next = &self.submissions[self.next];
        self.next = (self.next + 1) % self.submissions.len();
        let written = self.machine.guest_write(next.pointers.0, &next.bytes);
        written.expect("guest memory");
        let submitted = self.machine.submit(0, next.engine, &next.dwords);
        let submission = submitted.expect("submitted before");
        submission.expect("four dwords").engine
    }

    fn run(&mut self, engine: EngineId) {
        let run = self.machine.run_next(0, engine, &mut NoTime);
        let completion = run.expect("run before").expect("just submitted");
        assert!(completion.written_back, "its pages are mapped");
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An observer that keeps what it sees.

use crate::observe::{Access, Observer, Step};
use crate::policy::Clock;
use crate::trace::{AccessTrace, TraceError, TracedAccess};

/// An observer that makes a trace of the accesses of one vGPU.
///
/// ```
/// use gvt_scheduler::policy::VirtualClock;
/// use gvt_scheduler::trace::Recorder;
/// use gvt_scheduler::{Access, AccessKind, Observer, Step};
/// use vm_memory::GuestAddress;
///
/// let clock = VirtualClock::default();
/// let mut recorder = Recorder::new(0, &clock);
/// recorder.step(0, Step::Scan);
/// let access = Access { kind: AccessKind::Ring, write: false, gpa: GuestAddress(0x2000), len: 160 };
/// recorder.access(&access);
/// let trace = recorder.take()?;
/// assert_eq!(trace.accesses()[0].to_string(), "vGPU 0 Scan R 0x2000 160");
/// # Ok::<(), gvt_scheduler::trace::TraceError>(())
/// ```
#[derive(Debug)]
pub struct Recorder<C> {
    vgpu: u16,
    clock: C,
    step: Step,
    trace: AccessTrace,
    refused: Option<TraceError>,
}

impl<C: Clock> Recorder<C> {
    /// A recorder of the vGPU of that number, whose times are the clock's.
    pub fn new(vgpu: u16, clock: C) -> Self {
        Recorder {
            vgpu,
            clock,
            step: Step::Create,
            trace: AccessTrace::default(),
            refused: None,
        }
    }

    /// What was recorded since the last call.
    ///
    /// # Errors
    ///
    /// [`TraceError::TooMany`] if that is more than a trace may have, [`TraceError::NoMemory`] if there was no memory for it;
    /// it is lost then.
    pub fn take(&mut self) -> Result<AccessTrace, TraceError> {
        let trace = std::mem::take(&mut self.trace);
        match self.refused.take() {
            Some(error) => Err(error),
            None => Ok(trace),
        }
    }
}

impl<C: Clock> Observer for Recorder<C> {
    fn access(&mut self, access: &Access) {
        let pushed = self.trace.push(TracedAccess {
            time: self.clock.now(),
            vgpu: self.vgpu,
            step: self.step,
            write: access.write,
            iova: access.gpa.0,
            // What does not fit is no access that succeeds, and refused by the trace.
            len: u32::try_from(access.len).unwrap_or(u32::MAX),
        });
        if let Err(error) = pushed {
            self.refused.get_or_insert(error);
        }
    }

    fn step(&mut self, _: u64, step: Step) {
        self.step = step;
    }
}

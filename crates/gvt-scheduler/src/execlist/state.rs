// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The execlist state machine of an engine: two slots that are filled in turn.

use crate::descriptor::ContextDescriptor;
use crate::error::{Error, Result};
use crate::execlist::csb::CsbEvent;
use crate::regs::EngineId;

/// The events of a transition, at most two. They share one interrupt.
pub(crate) type Events = [Option<CsbEvent>; 2];

const NO_EVENTS: Events = [None, None];

/// The two slots, which of them runs, and what EXECLIST_STATUS says.
///
/// # Invariants
/// A slot is pending only while the other one runs.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ExeclistState {
    slots: [[ContextDescriptor; 2]; 2],
    running: Option<Running>,
    pending: Option<usize>,
    /// Lower dword of EXECLIST_STATUS; an idle engine keeps its pointers.
    status: u32,
}

#[derive(Clone, Copy, Debug)]
struct Running {
    slot: usize,
    context: ContextDescriptor,
}

impl ExeclistState {
    const CURRENT_POINTER: u32 = 1 << 0;
    const WRITE_POINTER: u32 = 1 << 1;
    const QUEUE_FULL: u32 = 1 << 2;
    const SLOT_1_VALID: u32 = 1 << 3;
    const SLOT_0_VALID: u32 = 1 << 4;
    const SLOT_1_ACTIVE: u32 = 1 << 17;
    const SLOT_0_ACTIVE: u32 = 1 << 18;

    /// A submission is given to the hardware.
    pub(crate) fn schedule_in(
        &mut self,
        engine: EngineId,
        contexts: [ContextDescriptor; 2],
    ) -> Result<Events> {
        if self.pending.is_some() {
            return Err(Error::QueueFull { engine });
        }
        let slot = usize::from(self.status & Self::WRITE_POINTER != 0);
        let continued = self
            .running
            .is_some_and(|running| self.is_continued_by(running, &contexts[0]));
        self.slots[slot] = contexts;
        let event = if self.running.is_none() {
            self.run(Some(slot));
            Some(CsbEvent::new(CsbEvent::IDLE_TO_ACTIVE, 0))
        } else if continued {
            self.run(Some(slot));
            let reasons = CsbEvent::LITE_RESTORE | CsbEvent::PREEMPTED;
            Some(CsbEvent::new(reasons, contexts[0].context_id()))
        } else {
            self.pending = Some(slot);
            None
        };
        self.update_status();
        Ok([event, None])
    }

    /// A context has reached its tail and nothing continues it.
    pub(crate) fn schedule_out(
        &mut self,
        engine: EngineId,
        context: &ContextDescriptor,
    ) -> Result<Events> {
        let running = self
            .running
            .filter(|running| running.context.same_context(context))
            .ok_or(Error::NotRunning {
                engine,
                context_id: context.context_id(),
            })?;
        let [first, second] = self.slots[running.slot];
        let id = context.context_id();
        let mut events = NO_EVENTS;
        if second.valid() && first.same_context(context) {
            self.running = Some(Running {
                context: second,
                ..running
            });
            let reasons = CsbEvent::CONTEXT_COMPLETE | CsbEvent::ELEMENT_SWITCH;
            events[0] = Some(CsbEvent::new(reasons, id));
        } else {
            let reasons = CsbEvent::CONTEXT_COMPLETE | CsbEvent::ACTIVE_TO_IDLE;
            events[0] = Some(CsbEvent::new(reasons, id));
            events[1] = self
                .pending
                .map(|_| CsbEvent::new(CsbEvent::IDLE_TO_ACTIVE, 0));
            let pending = self.pending.take();
            self.run(pending);
        }
        self.update_status();
        Ok(events)
    }

    /// EXECLIST_STATUS, lower and upper dword.
    pub(crate) fn status(&self) -> [u32; 2] {
        let context_id = self
            .running
            .map_or(0, |running| running.context.context_id());
        [self.status, context_id]
    }

    /// Whether a submission that begins with `next` only moves the tail of the last context that
    /// is still to finish in the running slot.
    fn is_continued_by(&self, running: Running, next: &ContextDescriptor) -> bool {
        let [first, second] = &self.slots[running.slot];
        if second.valid() {
            second.same_context(next) && !first.same_context(&running.context)
        } else {
            first.same_context(next)
        }
    }

    fn run(&mut self, slot: Option<usize>) {
        self.running = slot.map(|slot| Running {
            slot,
            context: self.slots[slot][0],
        });
    }

    fn update_status(&mut self) {
        self.status &= Self::CURRENT_POINTER | Self::WRITE_POINTER;
        match self.running.map(|running| running.slot) {
            Some(0) => {
                self.status = Self::WRITE_POINTER | Self::SLOT_0_VALID | Self::SLOT_0_ACTIVE;
            }
            Some(_) => {
                self.status = Self::CURRENT_POINTER | Self::SLOT_1_VALID | Self::SLOT_1_ACTIVE;
            }
            None => {}
        }
        if self.pending.is_some() {
            self.status |= Self::QUEUE_FULL;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;
    use crate::descriptor::AddressingMode;

    const RCS: EngineId = EngineId::Rcs;
    const NONE: u32 = 0;

    fn context(id: u32) -> ContextDescriptor {
        match id {
            NONE => ContextDescriptor::default(),
            id => ContextDescriptor::new(0x10 * id, id, AddressingMode::Legacy64),
        }
    }

    fn events(events: Events) -> Vec<(u32, u32)> {
        events
            .into_iter()
            .flatten()
            .map(|event| (event.reasons(), event.context_id()))
            .collect()
    }

    fn schedule_in(state: &mut ExeclistState, first: u32, second: u32) -> Vec<(u32, u32)> {
        events(
            state
                .schedule_in(RCS, [context(first), context(second)])
                .unwrap(),
        )
    }

    fn schedule_out(state: &mut ExeclistState, id: u32) -> Vec<(u32, u32)> {
        events(state.schedule_out(RCS, &context(id)).unwrap())
    }

    #[test]
    fn one_context_goes_active_and_idle_and_the_slots_alternate() {
        let mut state = ExeclistState::default();
        for slot in [0, 1, 0] {
            assert_eq!(schedule_in(&mut state, 7, NONE), [(0x1, 0)]);
            let active = if slot == 0 { 0x4_0012 } else { 0x2_0009 };
            assert_eq!(state.status(), [active, 7]);
            assert_eq!(schedule_out(&mut state, 7), [(0x18, 7)]);
            assert_eq!(state.status(), [active & 0x3, 0]);
        }
    }

    #[test]
    fn the_second_element_follows_the_first() {
        let mut state = ExeclistState::default();
        assert_eq!(schedule_in(&mut state, 7, 8), [(0x1, 0)]);
        assert_eq!(schedule_out(&mut state, 7), [(0x14, 7)]);
        assert_eq!(state.status()[1], 8);
        assert_eq!(schedule_out(&mut state, 8), [(0x18, 8)]);
    }

    #[test]
    fn a_pending_submission_follows_with_a_second_event() {
        let mut state = ExeclistState::default();
        schedule_in(&mut state, 7, NONE);
        assert_eq!(schedule_in(&mut state, 8, NONE), []);
        assert_eq!(state.status()[0] & 0x4, 0x4);
        let full = state.schedule_in(RCS, [context(9), context(NONE)]);
        assert!(matches!(full, Err(Error::QueueFull { engine: RCS })));
        assert_eq!(schedule_out(&mut state, 7), [(0x18, 7), (0x1, 0)]);
        assert_eq!(state.status(), [0x2_0009, 8]);
        assert_eq!(schedule_out(&mut state, 8), [(0x18, 8)]);
    }

    #[test]
    fn the_running_context_submitted_again_is_a_lite_restore() {
        let mut state = ExeclistState::default();
        schedule_in(&mut state, 7, NONE);
        assert_eq!(schedule_in(&mut state, 7, 8), [(0x8002, 7)]);
        assert_eq!(schedule_out(&mut state, 7), [(0x14, 7)]);
        assert_eq!(schedule_in(&mut state, 8, NONE), [(0x8002, 8)]);
        assert_eq!(schedule_out(&mut state, 8), [(0x18, 8)]);
    }

    #[test]
    fn the_second_context_submitted_again_waits_while_the_first_runs() {
        let mut state = ExeclistState::default();
        schedule_in(&mut state, 7, 8);
        assert_eq!(schedule_in(&mut state, 8, NONE), []);
        assert_eq!(schedule_out(&mut state, 7), [(0x14, 7)]);
        assert_eq!(schedule_out(&mut state, 8), [(0x18, 8), (0x1, 0)]);
    }

    #[test]
    fn only_the_running_context_can_finish() {
        let mut state = ExeclistState::default();
        assert!(state.schedule_out(RCS, &context(7)).is_err());
        schedule_in(&mut state, 7, 8);
        let error = state.schedule_out(RCS, &context(8)).unwrap_err();
        assert_eq!(error.errno(), libc::EINVAL);
        assert_eq!(schedule_out(&mut state, 7), [(0x14, 7)]);
    }

    /// The submissions the hardware has, each with the contexts it has still to finish. Says the
    /// same as the state machine without slots, pointers or status bits.
    #[derive(Default)]
    struct Model {
        submissions: VecDeque<VecDeque<u32>>,
    }

    impl Model {
        fn schedule_in(&mut self, ids: &[u32]) -> Option<Vec<(u32, u32)>> {
            let submission = ids.iter().copied().collect();
            match self.submissions.len() {
                0 => {
                    self.submissions.push_back(submission);
                    Some(vec![(0x1, 0)])
                }
                1 if self.submissions[0] == [ids[0]] => {
                    self.submissions[0] = submission;
                    Some(vec![(0x8002, ids[0])])
                }
                1 => {
                    self.submissions.push_back(submission);
                    Some(vec![])
                }
                _ => None,
            }
        }

        fn schedule_out(&mut self, id: u32) -> Option<Vec<(u32, u32)>> {
            let running = self.submissions.front_mut()?;
            if running.front() != Some(&id) {
                return None;
            }
            running.pop_front();
            if !running.is_empty() {
                return Some(vec![(0x14, id)]);
            }
            self.submissions.pop_front();
            let mut events = vec![(0x18, id)];
            if !self.submissions.is_empty() {
                events.push((0x1, 0));
            }
            Some(events)
        }

        fn running(&self) -> u32 {
            let running = self.submissions.front();
            running.and_then(|ids| ids.front().copied()).unwrap_or(0)
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        In(u32, u32),
        Out(u32),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            // Two elements of one context are not a submission the hardware knows.
            (1..5u32, 0..5u32).prop_map(|(a, b)| Step::In(a, if a == b { 0 } else { b })),
            (1..5u32).prop_map(Step::Out),
        ]
    }

    proptest! {
        #[test]
        fn behaves_as_the_model(steps in prop::collection::vec(step(), 0..60)) {
            let mut state = ExeclistState::default();
            let mut model = Model::default();
            for step in steps {
                let (found, expected) = match step {
                    Step::In(a, b) => {
                        let ids = if b == NONE { vec![a] } else { vec![a, b] };
                        let contexts = [context(a), context(b)];
                        (state.schedule_in(RCS, contexts), model.schedule_in(&ids))
                    }
                    Step::Out(id) => {
                        (state.schedule_out(RCS, &context(id)), model.schedule_out(id))
                    }
                };
                prop_assert_eq!(found.ok().map(events), expected);
                prop_assert_eq!(state.status()[1], model.running());
                prop_assert_eq!(state.status()[0] & 4 != 0, model.submissions.len() == 2);
                prop_assert_eq!(state.status()[0] >> 17 != 0, !model.submissions.is_empty());
            }
        }
    }
}

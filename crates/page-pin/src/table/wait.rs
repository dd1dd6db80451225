// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Waiting until pins are gone or a notice is over.

use std::time::Instant;

use checked_sync::{lock, wait_until, MutexGuard};

use super::state::State;
use super::Shared;
use crate::pages::PageRange;
use crate::{AccessId, Holder};

impl Shared {
    pub(crate) fn wait_released_by(
        &self,
        id: AccessId,
        deadline: Instant,
    ) -> std::result::Result<(), Vec<Holder>> {
        let holds = |state: &State| state.accesses.get(&id).is_some_and(|entry| entry.pins > 0);
        let (state, free) = self.wait(deadline, |state| !holds(state));
        if free {
            return Ok(());
        }
        let everything = PageRange {
            first: 0,
            last: self.page_of(u64::MAX),
        };
        let mut holders = self.holders(&state, everything);
        holders.retain(|holder| holder.id == id);
        Err(holders)
    }

    /// Waits until something `holds`, or until the deadline; whether it does.
    pub(super) fn wait(
        &self,
        deadline: Instant,
        holds: impl Fn(&State) -> bool,
    ) -> (MutexGuard<'_, State>, bool) {
        let mut state = lock(&self.state);
        while !holds(&state) {
            state.waiters += 1;
            let woken = wait_until(&self.released, &self.state, state, deadline);
            let late = woken.is_none();
            state = woken.unwrap_or_else(|| lock(&self.state));
            state.waiters -= 1;
            if late {
                let holds = holds(&state);
                return (state, holds);
            }
        }
        (state, true)
    }

    #[inline]
    pub(super) fn wake(&self, state: &State) {
        if state.waiters > 0 {
            self.released.notify_all();
        }
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whom to tell, and whose notice runs.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use checked_sync::{current, lock, ThreadId};

use super::state::{keys, State};
use super::Shared;
use crate::owner::Registration;
use crate::pages::PageRange;
use crate::{AccessId, Error, Holder, Result};

impl Shared {
    /// Whether anyone holds a pin in the range, and whom to tell.
    pub(super) fn interested(
        &self,
        iova: u64,
        last: u64,
        range: PageRange,
    ) -> (bool, Vec<Arc<Registration>>) {
        let state = lock(&self.state);
        if state.accesses.is_empty() {
            // Nor are there pins.
            return (false, Vec::new());
        }
        // As many as there are owners, and not as there are pins.
        let pins = state.pins.range(keys(range));
        let ids: BTreeSet<AccessId> = pins.map(|((_, id), _)| *id).collect();
        let accesses = state
            .accesses
            .iter()
            .filter(|(id, entry)| entry.interest.covers(iova, last) || ids.contains(id));
        let interested = accesses.filter_map(|(_, entry)| entry.registration.upgrade());
        (!ids.is_empty(), interested.collect())
    }

    /// The registrations of holders, as far as they still are.
    pub(super) fn registrations(&self, holders: &[Holder]) -> Vec<Arc<Registration>> {
        let state = lock(&self.state);
        let entries = holders
            .iter()
            .filter_map(|holder| state.accesses.get(&holder.id));
        entries
            .filter_map(|entry| entry.registration.upgrade())
            .collect()
    }

    /// A call of the owner's notice, until the result is dropped; `None` if it has ended.
    pub(crate) fn begin_notice(&self, id: AccessId) -> Option<RunningNotice<'_>> {
        let mut state = lock(&self.state);
        let entry = state.accesses.get_mut(&id).filter(|entry| !entry.ended)?;
        let thread = current().id();
        entry.running.push(thread);
        Some(RunningNotice {
            shared: self,
            id,
            thread,
        })
    }

    pub(crate) fn end(&self, owner: &Registration, deadline: Instant) -> Result<()> {
        let mut state = lock(&self.state);
        if let Some(entry) = state.accesses.get_mut(&owner.id) {
            entry.closed = true;
            entry.ended = true;
        }
        drop(state);
        let me = current().id();
        let over = |state: &State| {
            let entry = state.accesses.get(&owner.id);
            // Two notices that end their own access would wait for each other.
            entry.is_none_or(|entry| entry.running.is_empty() || entry.running.contains(&me))
        };
        match self.wait(deadline, over) {
            (_, true) => Ok(()),
            (_, false) => Err(Error::NoticeRuns {
                id: owner.id.0,
                name: owner.name.clone(),
            }),
        }
    }
}

/// A notice that runs.
pub(crate) struct RunningNotice<'a> {
    shared: &'a Shared,
    id: AccessId,
    thread: ThreadId,
}

impl Drop for RunningNotice<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.shared.state);
        if let Some(entry) = state.accesses.get_mut(&self.id) {
            let at = entry.running.iter().position(|id| *id == self.thread);
            if let Some(at) = at {
                entry.running.swap_remove(at);
            }
        }
        self.shared.wake(&state);
    }
}

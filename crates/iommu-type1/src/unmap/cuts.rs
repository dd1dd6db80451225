// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Mappings of which an unmap takes a part, and what is said of that.

use std::sync::Arc;

use crate::mapping::Mapping;
use crate::turn::Turn;

/// Mappings that were cut, and their parts.
#[derive(Default)]
pub(crate) struct Cuts {
    pub(crate) before: Vec<Arc<Mapping>>,
    pub(crate) after: Vec<Arc<Mapping>>,
}

impl Cuts {
    /// Tells those who listen of what was mapped before the turn and what is left at its end. What was revoked is
    /// among the mappings before.
    pub(super) fn tell(mut self, turn: Turn<'_>) {
        if !turn.is_heard {
            return;
        }
        if !self.after.is_empty() {
            self.leave_out_what_came_and_went();
        }
        turn.report(&self.before, &self.after);
    }

    fn leave_out_what_came_and_went(&mut self) {
        let has = |list: &[Arc<Mapping>], mapping: &Arc<Mapping>| {
            let at = list.binary_search_by_key(&Arc::as_ptr(mapping), Arc::as_ptr);
            at.is_ok()
        };
        let Cuts { before, after } = self;
        after.sort_unstable_by_key(Arc::as_ptr);
        before.sort_unstable_by_key(|mapping| (has(after, mapping), Arc::as_ptr(mapping)));
        let stayed = before.partition_point(|mapping| !has(after, mapping));
        after.retain(|mapping| !has(&before[stayed..], mapping));
        before.truncate(stayed);
        before.sort_unstable_by_key(|mapping| mapping.range.first);
        after.sort_unstable_by_key(|mapping| mapping.range.first);
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Mappings of which an unmap takes a part, and what is said of that.

use std::collections::HashSet;
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
    /// Tells those who listen of what was mapped before the turn and what is left at its end, when `revoked`
    /// has gone.
    pub(super) fn tell(self, turn: Turn<'_>, revoked: &[Arc<Mapping>]) {
        if !turn.is_heard {
            return;
        }
        let address = |mapping: &Arc<Mapping>| Arc::as_ptr(mapping);
        let came: HashSet<_> = self.after.iter().map(address).collect();
        let gone = self.before.iter().chain(revoked);
        let went: HashSet<_> = gone.clone().map(address).collect();
        let before = gone.filter(|mapping| !came.contains(&address(mapping)));
        let before: Vec<_> = before.cloned().collect();
        let after = self.after.iter();
        let after = after.filter(|mapping| !went.contains(&address(mapping)));
        let after: Vec<_> = after.cloned().collect();
        turn.report(&before, &after);
    }
}

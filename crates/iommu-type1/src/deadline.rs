// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! When to wait no longer.

use std::cell::Cell;
use std::time::{Duration, Instant};

use checked_sync::{now, CHECKED, LONGEST};

/// A deadline whose time begins when somebody first waits for it: most never do, and reading the clock
/// costs as much as the rest of a look-up.
pub(crate) struct Deadline {
    after: Duration,
    begun: Cell<Option<Instant>>,
}

impl Deadline {
    pub(crate) fn after(after: Duration) -> Self {
        Deadline {
            after,
            // In a model time passes once, and not before it is looked at.
            begun: Cell::new(CHECKED.then(now)),
        }
    }

    pub(crate) fn instant(&self) -> Instant {
        self.begun() + self.after.min(LONGEST)
    }

    /// How long it has been waited for.
    pub(crate) fn age(&self) -> Duration {
        now().saturating_duration_since(self.begun())
    }

    /// Whether anybody has waited.
    pub(crate) fn was_waited_for(&self) -> bool {
        self.begun.get().is_some()
    }

    fn begun(&self) -> Instant {
        self.begun.get().unwrap_or_else(|| {
            let begun = now();
            self.begun.set(Some(begun));
            begun
        })
    }
}

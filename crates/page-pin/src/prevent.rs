// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Ranges in which nothing may be pinned for a while.

use std::sync::Arc;

use crate::table::Shared;

/// As long as it lives, pins in its range are refused with [`Error::Prevented`](crate::Error::Prevented).
///
/// Made by [`PinTable::prevent`](crate::PinTable::prevent): with it the pins of a range can only become
/// fewer, so whoever is told and lets go is done.
#[derive(Debug)]
#[must_use = "dropping it allows pins again"]
pub struct Prevented {
    shared: Arc<Shared>,
    key: u64,
}

impl Prevented {
    pub(crate) fn new(shared: Arc<Shared>, key: u64) -> Self {
        Prevented { shared, key }
    }
}

impl Drop for Prevented {
    fn drop(&mut self) {
        self.shared.allow(self.key);
    }
}

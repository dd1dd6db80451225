// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What cannot be, and was found.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// So many are printed.
const PRINTED: u64 = 8;

#[derive(Default)]
pub(crate) struct Differences(AtomicU64);

impl Differences {
    /// Counts one unless `holds`.
    pub(crate) fn expect(&self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.found(&what());
        }
    }

    pub(crate) fn found(&self, what: &dyn fmt::Display) {
        if self.0.fetch_add(1, Ordering::Relaxed) < PRINTED {
            println!("difference: {what}");
        }
    }

    pub(crate) fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

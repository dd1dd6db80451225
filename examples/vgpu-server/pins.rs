// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pins that an unmap takes away at once.
//!
//! The thread that serves the socket unmaps, and cannot wait until an engine's thread has time to let go: that
//! may itself wait for memory that only the socket can bring. So the guards lie here, where the notice reaches
//! them, and the vGPU has tokens. Nothing reads or writes through a pin: engines access memory by its address,
//! and are refused once it is unmapped.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iommu_type1::{page_size, Interest, PinPages};
use vfio_user_dma::{DmaTable, TablePin, TablePins};
use vm_memory::Permissions;

/// Most pages that the vGPU pins at once: those of a page of 2 MiB.
const MAX_PAGES: u64 = 512;

/// The guards by first address and a number; with their last address.
type Held = BTreeMap<(u64, u64), (u64, TablePin)>;

#[derive(Debug)]
pub struct Pins {
    pins: TablePins,
    held: Arc<Guards>,
}

#[derive(Debug, Default)]
struct Guards(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    held: Held,
    next: u64,
}

/// A pin of the vGPU's.
pub struct Token {
    held: Arc<Guards>,
    key: (u64, u64),
}

impl Pins {
    /// Pins in the name of an engine; `lost` is told what was taken away.
    pub fn new(
        table: &DmaTable,
        name: &str,
        lost: impl Fn(u64, u64) + Send + Sync + 'static,
    ) -> Self {
        let held = Arc::new(Guards::default());
        let guards = held.clone();
        let notice = move |iova: u64, size: u64| {
            guards.release(iova, size);
            lost(iova, size);
        };
        Pins {
            pins: table.pins(name, Interest::Holder, Arc::new(notice)),
            held,
        }
    }
}

impl PinPages for Pins {
    type Pinned = Token;
    type Error = vfio_user_dma::Error;

    fn pin_pages(
        &self,
        iova: u64,
        npages: usize,
        prot: Permissions,
    ) -> Result<Token, vfio_user_dma::Error> {
        // Before it is pinned: the notice of an unmap that comes now waits here, and finds the pin.
        let mut state = self.held.lock();
        let pin = self.pins.pin_pages(iova, npages, prot)?;
        let last = iova.saturating_add((npages as u64).saturating_mul(page_size()) - 1);
        let key = (iova, state.next);
        state.next += 1;
        state.held.insert(key, (last, pin));
        Ok(Token {
            held: self.held.clone(),
            key,
        })
    }
}

impl Guards {
    /// Lets go of all pins that touch a range.
    fn release(&self, iova: u64, size: u64) {
        let last = iova.saturating_add(size.saturating_sub(1));
        let mut state = self.lock();
        // A pin that begins before the range may reach into it.
        let longest = MAX_PAGES.saturating_mul(page_size());
        let touched: Vec<_> = state
            .held
            .range((iova.saturating_sub(longest), 0)..=(last, u64::MAX))
            .filter(|(_, (end, _))| *end >= iova)
            .map(|(key, _)| *key)
            .collect();
        let pins: Vec<_> = touched
            .iter()
            .filter_map(|key| state.held.remove(key))
            .collect();
        drop(state);
        drop(pins);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        let pin = self.held.lock().held.remove(&self.key);
        drop(pin);
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Token").field(&self.key).finish()
    }
}

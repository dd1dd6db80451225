// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Leases: what keeps an unmap waiting while slices of a mapping are outside of a call.

use std::collections::btree_map::{BTreeMap, Entry};
use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use vm_memory::Permissions;

use crate::holder::HolderKind;
use crate::mapping::Mapping;
use crate::range::IovaRange;
use crate::space::View;
use crate::sync::{lock, read, wait_until, Condvar, Mutex};
use crate::{Error, Holder, Result};

/// Every lease of a space, ordered by the address of its mapping.
#[derive(Default)]
pub(crate) struct Ledger {
    state: Mutex<LedgerState>,
    released: Condvar,
}

#[derive(Default)]
struct LedgerState {
    next_id: u64,
    leases: BTreeMap<LeaseKey, Record>,
}

/// Unique while the lease lives: its mapping stays in the table that long.
type LeaseKey = (u64, u64);

struct Record {
    name: String,
    size: u64,
    since: Instant,
}

impl Ledger {
    /// Waits until nothing in `range` is leased; returns who still leases at the deadline.
    pub(crate) fn wait_released(&self, range: IovaRange, deadline: Instant) -> Vec<Holder> {
        let keys = (range.first, 0)..=(range.last, u64::MAX);
        let mut state = lock(&self.state);
        while state.leases.range(keys.clone()).next().is_some() {
            match wait_until(&self.released, state, deadline) {
                Some(guard) => state = guard,
                None => {
                    state = lock(&self.state);
                    break;
                }
            }
        }
        let now = Instant::now();
        state
            .leases
            .range(keys)
            .map(|((iova, _), record)| Holder {
                kind: HolderKind::Lease,
                name: record.name.clone(),
                iova: *iova,
                size: record.size,
                age: now.saturating_duration_since(record.since),
            })
            .collect()
    }

    fn add(&self, mapping: &Mapping, name: &str) -> LeaseKey {
        let mut state = lock(&self.state);
        let key = (mapping.range.first, state.next_id);
        state.next_id += 1;
        state.leases.insert(
            key,
            Record {
                name: name.to_owned(),
                size: mapping.range.size(),
                since: Instant::now(),
            },
        );
        key
    }

    fn release(&self, keys: impl Iterator<Item = LeaseKey>) {
        let mut state = lock(&self.state);
        for key in keys {
            state.leases.remove(&key);
        }
        self.released.notify_all();
    }
}

/// The leases of one holder, at most one a mapping; dropping it returns them.
pub(crate) struct LeaseSet {
    view: Arc<View>,
    leases: BTreeMap<u64, Lease>,
}

struct Lease {
    key: LeaseKey,
    /// Keeps the memory mapped, also past the deadline of an unmap.
    _mapping: Arc<Mapping>,
}

impl LeaseSet {
    pub(crate) fn new(view: Arc<View>) -> Self {
        LeaseSet {
            view,
            leases: BTreeMap::new(),
        }
    }

    pub(crate) fn view(&self) -> &Arc<View> {
        &self.view
    }

    /// Leases the mapping that contains `iova`; returns it and how many of `len` bytes, at least
    /// one, lie in it.
    pub(crate) fn lease(
        &mut self,
        iova: u64,
        len: usize,
        access: Permissions,
    ) -> Result<(Arc<Mapping>, usize)> {
        let space = self.view.space.clone();
        // Held until the lease is taken: see the invariant of `Space`.
        let table = read(&space.table);
        let first = table.walk(iova, len, access, |mapping, _, n, _| {
            ControlFlow::Break((mapping.clone(), n))
        })?;
        let (mapping, n) = first.ok_or(Error::Empty { iova })?;
        self.take(&mapping);
        Ok((mapping, n))
    }

    /// Leases a mapping that was found live under the table's lock, which is still held.
    pub(crate) fn take(&mut self, mapping: &Arc<Mapping>) {
        if let Entry::Vacant(vacant) = self.leases.entry(mapping.range.first) {
            vacant.insert(Lease {
                key: self.view.space.leases.add(mapping, &self.view.name),
                _mapping: mapping.clone(),
            });
        }
    }
}

impl Drop for LeaseSet {
    fn drop(&mut self) {
        if !self.leases.is_empty() {
            let keys = self.leases.values().map(|lease| lease.key);
            self.view.space.leases.release(keys);
        }
    }
}

impl fmt::Debug for LeaseSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeaseSet")
            .field("view", &self.view)
            .field("mappings", &self.leases.len())
            .finish()
    }
}

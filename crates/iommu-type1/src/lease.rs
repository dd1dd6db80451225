// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Leases: what keeps an unmap waiting while slices of a mapping are outside of a call.
//!
//! A mapping counts its leases; that is what an unmap waits on. Who has them is looked up only when
//! it waited in vain.

use std::fmt;
use std::ptr;
use std::sync::atomic::AtomicPtr;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use vm_memory::Permissions;

use crate::holder::HolderKind;
use crate::mapping::{needed_for, Mapping};
use crate::range::IovaRange;
use crate::space::View;
use crate::sync::{fence, lock, now, wait_until, AtomicUsize, Condvar, Mutex, Ordering};
use crate::table::Table;
use crate::{Holder, Result};

/// Every holder of leases in a space, and those who wait for them.
pub(crate) struct Ledger {
    records: Mutex<Vec<Arc<Record>>>,
    /// How many unmaps wait, so that whoever returns a lease need not look further when none does.
    waiting: AtomicUsize,
    gate: Mutex<()>,
    returned: Condvar,
}

/// The leases of one holder.
struct Record {
    view: Arc<View>,
    since: Instant,
    /// At most once each; kept until the holder is dropped.
    held: Mutex<Vec<Arc<Mapping>>>,
}

impl Default for Ledger {
    fn default() -> Self {
        Ledger {
            records: Mutex::new(Vec::new()),
            waiting: AtomicUsize::new(0),
            gate: Mutex::new(()),
            returned: Condvar::new(),
        }
    }
}

impl Ledger {
    /// Waits until nobody leases the mapping; returns who still does at the deadline.
    ///
    /// The mapping is out of the table and a grace period has passed: no lease can be added.
    pub(crate) fn wait_released(&self, mapping: &Mapping, deadline: Instant) -> Vec<Holder> {
        if mapping.leases.load(Ordering::Acquire) == 0 {
            return Vec::new();
        }
        self.waiting.fetch_add(1, Ordering::SeqCst);
        order_for_model();
        let mut gate = lock(&self.gate);
        while mapping.leases.load(Ordering::SeqCst) != 0 {
            match wait_until(&self.returned, &self.gate, gate, deadline) {
                Some(guard) => gate = guard,
                None => break,
            }
        }
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        if mapping.leases.load(Ordering::Acquire) == 0 {
            return Vec::new();
        }
        self.holders(mapping)
    }

    fn holders(&self, mapping: &Mapping) -> Vec<Holder> {
        let now = now();
        let has_it = |record: &&Arc<Record>| {
            let held = lock(&record.held);
            held.iter().any(|other| ptr::eq(&**other, mapping))
        };
        lock(&self.records)
            .iter()
            .filter(has_it)
            .map(|record| Holder {
                kind: HolderKind::Lease,
                name: record.view.name.clone(),
                iova: mapping.range.first,
                size: mapping.range.size(),
                age: now.saturating_duration_since(record.since),
            })
            .collect()
    }

    fn enrol(&self, view: &Arc<View>) -> Arc<Record> {
        let record = Arc::new(Record {
            view: view.clone(),
            since: now(),
            held: Mutex::new(Vec::new()),
        });
        lock(&self.records).push(record.clone());
        record
    }

    fn give_back(&self, record: &Arc<Record>) {
        for mapping in lock(&record.held).drain(..) {
            mapping.leases.fetch_sub(1, Ordering::SeqCst);
        }
        let mut records = lock(&self.records);
        if let Some(at) = records.iter().position(|other| Arc::ptr_eq(other, record)) {
            records.swap_remove(at);
        }
        drop(records);
        order_for_model();
        if self.waiting.load(Ordering::SeqCst) > 0 {
            // Whoever has looked at the count but does not sleep yet has the gate.
            drop(lock(&self.gate));
            self.returned.notify_all();
        }
    }
}

/// Loom takes sequentially consistent operations for acquire and release ones, but knows fences.
fn order_for_model() {
    if cfg!(loom) {
        fence(Ordering::SeqCst);
    }
}

/// The leases of one holder, at most one a mapping; dropping it returns them.
///
/// # Invariants
///
/// What `first` and `newest` point to is in the record, which keeps it until this is dropped.
pub(crate) struct LeaseSet {
    view: Arc<View>,
    /// Made with the first lease: a guard that lends nothing costs nothing.
    record: OnceLock<Arc<Record>>,
    /// The mapping leased first (a queue's rings lie there) and the one leased last: further slices of
    /// these need no look-up.
    first: AtomicPtr<Mapping>,
    newest: AtomicPtr<Mapping>,
}

impl LeaseSet {
    pub(crate) fn new(view: Arc<View>) -> Self {
        LeaseSet {
            view,
            record: OnceLock::new(),
            first: AtomicPtr::new(ptr::null_mut()),
            newest: AtomicPtr::new(ptr::null_mut()),
        }
    }

    pub(crate) fn view(&self) -> &Arc<View> {
        &self.view
    }

    /// Leases the mapping that contains `iova`; returns it and how many of `len` bytes, at least
    /// one, lie in it.
    ///
    /// A mapping that is leased already is not looked up again, also while it is being unmapped:
    /// the unmap waits for this holder anyway, and a request that has begun can end.
    pub(crate) fn lease(
        &self,
        iova: u64,
        len: usize,
        access: Permissions,
    ) -> Result<(&Mapping, usize)> {
        let range = IovaRange::new(iova, len as u64)?;
        let needed = needed_for(access);
        let known = [&self.newest, &self.first].into_iter().find_map(|slot| {
            // SAFETY: null, or by the invariant alive as long as `self`.
            let mapping = unsafe { slot.load(Ordering::Acquire).as_ref() }?;
            (mapping.range.contains(iova) && mapping.prot.allow(needed)).then_some(mapping)
        });
        let mapping = match known {
            Some(mapping) => mapping,
            None => {
                let space = &self.view.space;
                let shared = space.grace.enter_shared(|inside| {
                    let (mapping, _) = space.first_chunk(inside, iova, len, access)?;
                    Ok::<_, crate::Error>(self.take(mapping))
                })?;
                // SAFETY: `take` has put it into the record, see the invariant.
                unsafe { &*Arc::as_ptr(&shared) }
            }
        };
        let end = mapping.range.last.min(range.last);
        Ok((mapping, (end - iova) as usize + 1))
    }

    /// Leases a mapping that a running access has found.
    pub(crate) fn take(&self, mapping: &Mapping) -> Arc<Mapping> {
        let record = self
            .record
            .get_or_init(|| self.view.space.leases.enrol(&self.view));
        let mut held = lock(&record.held);
        let known = held.iter().find(|other| ptr::eq(&***other, mapping));
        let shared = match known {
            Some(known) => known.clone(),
            None => {
                mapping.leases.fetch_add(1, Ordering::Relaxed);
                let shared = Table::share(mapping);
                held.push(shared.clone());
                shared
            }
        };
        let raw = Arc::as_ptr(&shared).cast_mut();
        if held.len() == 1 {
            self.first.store(raw, Ordering::Release);
        }
        self.newest.store(raw, Ordering::Release);
        shared
    }

    fn len(&self) -> usize {
        self.record
            .get()
            .map_or(0, |record| lock(&record.held).len())
    }
}

impl Drop for LeaseSet {
    fn drop(&mut self) {
        if let Some(record) = self.record.get() {
            self.view.space.leases.give_back(record);
        }
    }
}

impl fmt::Debug for LeaseSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeaseSet")
            .field("view", &self.view)
            .field("mappings", &self.len())
            .finish()
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whoever has for somebody else what an address space has: a listener that has each mapping mapped on
//! another side as well, in an IOMMU or a virtual machine.
//!
//! # Invariants
//!
//! What the other side was given and has not given back has its memory: that is kept when the space has
//! released it, and leaked where nothing else is left to do.

#![allow(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::mem::ManuallyDrop;

use checked_sync::{lock, Mutex};
use iommu_type1::{Backing, Listener, MappingInfo};

/// The other side.
pub(crate) trait Target: Send {
    /// Maps all of it, or nothing.
    ///
    /// # Safety
    ///
    /// Until [`unmap`](Target::unmap) of it succeeds the memory is there, and whoever accesses it does so as
    /// memory that others change.
    unsafe fn map(&mut self, mapping: &MappingInfo) -> io::Result<()>;

    /// Unmaps what was mapped by one call. When that succeeds the other side does not use the memory any more.
    fn unmap(&mut self, iova: u64, size: u64) -> io::Result<()>;
}

pub(crate) struct Follower<T: Target> {
    state: Mutex<State<T>>,
}

struct State<T: Target> {
    target: T,
    /// By address; none overlaps another.
    held: BTreeMap<u64, Held>,
    /// Those of them that the space has unmapped: while the target is asked to, and when it has refused.
    leaving: BTreeSet<u64>,
}

struct Held {
    size: u64,
    memory: ManuallyDrop<Backing>,
}

impl<T: Target> Follower<T> {
    pub(crate) fn new(target: T) -> Self {
        Follower {
            state: Mutex::new(State {
                target,
                held: BTreeMap::new(),
                leaving: BTreeSet::new(),
            }),
        }
    }

    /// What the target has refused to unmap: addresses and sizes, ascending.
    pub(crate) fn stuck(&self) -> Vec<(u64, u64)> {
        let state = lock(&self.state);
        let stuck = state.leaving.iter();
        stuck.map(|iova| (*iova, state.held[iova].size)).collect()
    }

    /// The target, while nothing is mapped or unmapped.
    #[cfg(feature = "kvm")]
    pub(crate) fn with_target<R>(&self, call: impl FnOnce(&mut T) -> R) -> R {
        call(&mut lock(&self.state).target)
    }
}

impl<T: Target> State<T> {
    /// Takes a mapping away, and returns its memory, which the caller drops without the lock.
    fn release(&mut self, iova: u64) -> io::Result<Option<Backing>> {
        let Some(held) = self.held.get(&iova) else {
            return Ok(None);
        };
        self.leaving.insert(iova);
        self.target.unmap(iova, held.size)?;
        self.leaving.remove(&iova);
        let held = self.held.remove(&iova);
        Ok(held.map(|held| ManuallyDrop::into_inner(held.memory)))
    }

    /// The last of what is stuck in a range.
    fn find_stuck(&self, iova: u64, last: u64) -> Option<(u64, u64)> {
        let first = *self.leaving.range(..=last).next_back()?;
        let size = self.held.get(&first)?.size;
        (first + (size - 1) >= iova).then_some((first, size))
    }
}

impl<T: Target> Listener for Follower<T> {
    fn map(&self, mapping: &MappingInfo) -> io::Result<()> {
        let last = mapping.iova + (mapping.size - 1);
        let mut released = Vec::new();
        let mut state = lock(&self.state);
        // What is stuck is asked for again when its addresses are wanted.
        while let Some((iova, size)) = state.find_stuck(mapping.iova, last) {
            let memory = state.release(iova).map_err(|error| {
                let what = format!("{size:#x} bytes at {iova:#x} are still mapped: {error}");
                io::Error::new(io::ErrorKind::ResourceBusy, what)
            })?;
            released.extend(memory);
        }
        // Should the call panic, nobody knows what is mapped: then the memory stays.
        let memory = ManuallyDrop::new(mapping.backing.clone());
        // SAFETY: `memory` keeps it until it is unmapped (invariant of this module); memory of a backing is
        // accessed as guest memory is: by volatile slices, never by references.
        let mapped = unsafe { state.target.map(mapping) };
        if let Err(error) = mapped {
            released.push(ManuallyDrop::into_inner(memory));
            drop(state);
            return Err(error);
        }
        let held = Held {
            size: mapping.size,
            memory,
        };
        state.held.insert(mapping.iova, held);
        drop(state);
        Ok(())
    }

    fn unmap(&self, iova: u64, size: u64) {
        let released = lock(&self.state).release(iova);
        if let Err(error) = released {
            log::error!(
                "{size:#x} bytes at {iova:#x} stay mapped, and their memory is kept: {error}"
            );
        }
    }
}

impl<T: Target> Drop for Follower<T> {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        let left: Vec<u64> = state.held.keys().copied().collect();
        for iova in left {
            if let Err(error) = state.release(iova) {
                log::error!("the memory mapped at {iova:#x} is leaked: {error}");
            }
        }
    }
}

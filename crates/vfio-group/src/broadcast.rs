// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A value of a group, and those who are told when it changes: what
//! `Group::set_kvm` is made of.
//!
//! A listener runs with no lock held, so it may set, register, unregister and drop what it likes. Whoever
//! sets a value tells every listener; who finds one busy leaves it to the thread that is telling it, which
//! looks again when its call returns. Nobody waits for a listener, so nobody can deadlock on one.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use checked_sync::{lock, Mutex};

type Call<T> = Arc<dyn Fn(Option<&T>) + Send + Sync>;

pub(crate) struct Broadcast<T> {
    state: Mutex<State<T>>,
}

/// # Invariants
///
/// While a listener is not `busy` and its `told` is not `version`, some thread is about to call `tell` for it.
struct State<T> {
    current: Option<T>,
    /// Counts the values there were.
    version: u64,
    listeners: BTreeMap<u64, Listener<T>>,
    next_id: u64,
}

struct Listener<T> {
    call: Call<T>,
    /// Version of the value it was last called with.
    told: u64,
    busy: bool,
}

impl<T: Clone> Broadcast<T> {
    pub(crate) fn new() -> Self {
        Broadcast {
            state: Mutex::new(State {
                current: None,
                version: 1,
                listeners: BTreeMap::new(),
                next_id: 0,
            }),
        }
    }

    pub(crate) fn current(&self) -> Option<T> {
        lock(&self.state).current.clone()
    }

    /// Sets the value and tells every listener.
    pub(crate) fn set(&self, value: Option<T>) {
        let (before, listeners) = {
            let mut state = lock(&self.state);
            state.version += 1;
            let before = std::mem::replace(&mut state.current, value);
            let listeners: Vec<u64> = state.listeners.keys().copied().collect();
            (before, listeners)
        };
        // Without the lock: it may be the last reference to something that calls back.
        drop(before);
        for id in listeners {
            self.tell(id);
        }
    }

    /// Registers a listener, and tells it the value there is, if any. Returns what `remove` wants.
    pub(crate) fn add(&self, call: Call<T>) -> u64 {
        let id = {
            let mut state = lock(&self.state);
            let id = state.next_id;
            state.next_id += 1;
            let told = match state.current {
                Some(_) => state.version - 1,
                None => state.version,
            };
            let busy = false;
            state.listeners.insert(id, Listener { call, told, busy });
            id
        };
        self.tell(id);
        id
    }

    /// No call begins after this returns.
    pub(crate) fn remove(&self, id: u64) {
        let removed = lock(&self.state).listeners.remove(&id);
        // Without the lock, as any code of the caller's.
        drop(removed);
    }

    /// Calls a listener until it knows the newest value, unless somebody does so already.
    fn tell(&self, id: u64) {
        while let Some((call, value)) = self.begin(id) {
            let _turn = Turn {
                broadcast: self,
                id,
            };
            call(value.as_ref());
        }
    }

    fn begin(&self, id: u64) -> Option<(Call<T>, Option<T>)> {
        let mut state = lock(&self.state);
        let version = state.version;
        let listener = state.listeners.get_mut(&id)?;
        if listener.busy || listener.told == version {
            return None;
        }
        listener.busy = true;
        listener.told = version;
        let call = listener.call.clone();
        Some((call, state.current.clone()))
    }
}

impl<T> fmt::Debug for Broadcast<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = lock(&self.state);
        f.debug_struct("Broadcast")
            .field("set", &state.current.is_some())
            .field("listeners", &state.listeners.len())
            .finish()
    }
}

/// A listener runs; also a panic ends that.
struct Turn<'a, T> {
    broadcast: &'a Broadcast<T>,
    id: u64,
}

impl<T> Drop for Turn<'_, T> {
    fn drop(&mut self) {
        let mut state = lock(&self.broadcast.state);
        if let Some(listener) = state.listeners.get_mut(&self.id) {
            listener.busy = false;
        }
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The mappings of a space, ordered by address.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use vm_memory::Permissions;

use crate::mapping::Mapping;
use crate::range::IovaRange;
use crate::{Error, Result};

/// Whether a mapping can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Accesses, leases and pins succeed.
    Live,
    /// An unmap is telling and waiting; nothing new succeeds.
    Revoking,
    /// An unmap has given up at its deadline; nothing new succeeds until it is retried.
    Revoked,
}

#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) mapping: Arc<Mapping>,
    pub(crate) state: State,
}

/// # Invariants
///
/// Entries are keyed by the first address of their mapping and do not overlap.
#[derive(Debug, Default)]
pub(crate) struct Table {
    entries: BTreeMap<u64, Entry>,
}

impl Table {
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The entry whose mapping contains `iova`.
    pub(crate) fn find(&self, iova: u64) -> Option<&Entry> {
        let (_, entry) = self.entries.range(..=iova).next_back()?;
        entry.mapping.range.contains(iova).then_some(entry)
    }

    /// The first entry that shares an address with `range`.
    pub(crate) fn first_overlap(&self, range: IovaRange) -> Option<&Entry> {
        self.find(range.first)
            .or_else(|| Some(self.entries.range(range.first..=range.last).next()?.1))
    }

    pub(crate) fn insert(&mut self, mapping: Mapping) {
        let entry = Entry {
            mapping: Arc::new(mapping),
            state: State::Live,
        };
        self.entries.insert(entry.mapping.range.first, entry);
    }

    pub(crate) fn remove(&mut self, first: u64) -> Option<Arc<Mapping>> {
        self.entries.remove(&first).map(|entry| entry.mapping)
    }

    /// Every entry that begins in `range`.
    pub(crate) fn in_range_mut(&mut self, range: IovaRange) -> impl Iterator<Item = &mut Entry> {
        self.entries
            .range_mut(range.first..=range.last)
            .map(|(_, entry)| entry)
    }

    /// A mapping that has bytes both inside and outside of `range`.
    pub(crate) fn cut_by(&self, range: IovaRange) -> Option<&Mapping> {
        [range.first, range.last]
            .into_iter()
            .filter_map(|iova| self.find(iova))
            .map(|entry| &*entry.mapping)
            .find(|mapping| mapping.range.first < range.first || range.last < mapping.range.last)
    }

    /// Visits the mappings that `len` bytes from `iova` touch, in order, as
    /// `(mapping, address, bytes of it, bytes before it)`.
    ///
    /// A chunk is the rest of a mapping, never a page. The first address that cannot be accessed
    /// ends the walk with an error that says how many bytes came before.
    pub(crate) fn walk<B>(
        &self,
        iova: u64,
        len: usize,
        access: Permissions,
        mut visit: impl FnMut(&Arc<Mapping>, u64, usize, usize) -> ControlFlow<B>,
    ) -> Result<Option<B>> {
        if len == 0 {
            return Ok(None);
        }
        let range = IovaRange::new(iova, len as u64)?;
        let mut at = range.first;
        let mut completed = 0;
        loop {
            let mapping = self.usable(at, access, completed)?;
            let end = mapping.range.last.min(range.last);
            let n = (end - at) as usize + 1;
            if let ControlFlow::Break(value) = visit(mapping, at, n, completed) {
                return Ok(Some(value));
            }
            if end == range.last {
                return Ok(None);
            }
            completed += n;
            at = end + 1;
        }
    }

    fn usable(&self, iova: u64, access: Permissions, completed: usize) -> Result<&Arc<Mapping>> {
        let Some(Entry { mapping, state }) = self.find(iova) else {
            return Err(Error::NotMapped { iova, completed });
        };
        if *state != State::Live {
            return Err(Error::Revoked { iova, completed });
        }
        if !mapping.permits(access) {
            return Err(Error::Permission {
                iova,
                access,
                allowed: mapping.prot,
                completed,
            });
        }
        Ok(mapping)
    }
}

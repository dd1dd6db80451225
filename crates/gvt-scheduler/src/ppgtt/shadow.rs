// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The shadow of the guest's page tables: each table as it was last read, and the pins it needs.

use std::collections::{BTreeMap, BTreeSet};

use vm_memory::GuestAddress;

use crate::error::{Error, Result};
use crate::memory;
use crate::ppgtt::device::SharedMap;
use crate::ppgtt::entry::{Entry, Leaf, TableKey, TableKind, TABLE_ENTRIES};
use crate::ppgtt::leaf::LeafPins;
use crate::ppgtt::root::{PageTableRoot, RootTables};
use crate::regs::PAGE_MASK;

pub(super) const ENTRY_SIZE: u64 = 8;

/// All page tables of a vGPU.
///
/// # Invariants
/// - `tables` holds exactly the tables that `roots` reach through shadowed entries; `users` of each is
///   the number of times that roots and entries point to it.
/// - Each shadowed entry that maps memory counts once in `leaves`.
/// - `failed` has entries of `tables` only, and their shadow is not present.
#[derive(Debug)]
pub(crate) struct Ppgtt<G> {
    tables: BTreeMap<TableKey, Table>,
    roots: BTreeSet<RootTables>,
    /// Guest addresses of the entries that were written since they were read.
    pub(super) written: BTreeSet<u64>,
    /// Guest addresses of the entries that could not be shadowed when they were read again.
    failed: BTreeMap<TableKey, BTreeSet<u64>>,
    pub(super) leaves: LeafPins<G>,
    limit: usize,
}

#[derive(Debug)]
struct Table {
    users: u64,
    entries: Box<[u64; TABLE_ENTRIES]>,
}

/// What a root reaches and cannot be used as it is.
#[derive(Debug, Default)]
pub(super) struct Unsettled {
    /// Guest addresses of entries that failed.
    pub(super) entries: BTreeSet<u64>,
    /// Leaves whose pages were taken away.
    pub(super) leaves: BTreeSet<Leaf>,
}

impl<G> Ppgtt<G> {
    /// No tables yet, and never more than `limit` tables and roots. Pages are pinned for a device that
    /// reaches them by `map`.
    pub(crate) fn new(limit: usize, map: SharedMap<G>) -> Self {
        Self {
            tables: BTreeMap::new(),
            roots: BTreeSet::new(),
            written: BTreeSet::new(),
            failed: BTreeMap::new(),
            leaves: LeafPins::new(map),
            limit,
        }
    }

    /// Number of shadowed tables.
    pub(crate) fn tables(&self) -> usize {
        self.tables.len()
    }

    /// Number of pinned leaves.
    pub(crate) fn pinned_leaves(&self) -> usize {
        self.leaves.len()
    }

    /// The guest wrote `len` bytes at `gpa`: entries of shadowed tables there are read again later.
    pub(crate) fn written(&mut self, gpa: GuestAddress, len: u64) {
        let entries = self.entries(gpa, len);
        self.written.extend(entries);
    }

    /// The guest wrote parts of entries: they are not present until they are read again, later.
    pub(crate) fn drop_written(&mut self, gpa: GuestAddress, len: u64) {
        let entries = self.entries(gpa, len);
        for gpa in &entries {
            let index = ((gpa & PAGE_MASK) / ENTRY_SIZE) as usize;
            for kind in TableKind::ALL {
                let gpa = gpa & !PAGE_MASK;
                // What is dropped for one kind may be the table of another.
                let old = self.replace(&TableKey { gpa, kind }, index, 0);
                self.release(kind, old);
            }
        }
        self.written.extend(entries);
    }

    /// Guest addresses of the entries of shadowed tables in `len` bytes at `gpa`.
    fn entries(&self, gpa: GuestAddress, len: u64) -> BTreeSet<u64> {
        let mut entries = BTreeSet::new();
        let Some(last) = len.checked_sub(1).map(|len| gpa.0.saturating_add(len)) else {
            return entries;
        };
        let from = TableKey {
            gpa: gpa.0 & !PAGE_MASK,
            kind: TableKind::Pml4,
        };
        let to = TableKey {
            gpa: last,
            kind: TableKind::Pt64K,
        };
        for (key, _) in self.tables.range(from..=to) {
            let first_entry = gpa.0.max(key.gpa) & PAGE_MASK & !(ENTRY_SIZE - 1);
            let last_byte = last.min(key.gpa | PAGE_MASK) & PAGE_MASK;
            entries.extend(
                (first_entry..=last_byte)
                    .step_by(ENTRY_SIZE as usize)
                    .map(|offset| key.gpa | offset),
            );
        }
        entries
    }

    /// Drops a root with all that only it needs.
    pub(crate) fn forget(&mut self, root: PageTableRoot) {
        let tables = root.tables();
        if self.roots.remove(&tables) {
            self.release_tables(tables.into_iter().flatten());
        }
    }

    /// Drops the pins of leaves in `size` bytes from `iova`.
    pub(crate) fn unpin(&mut self, iova: u64, size: u64) {
        if let Some(len) = size.checked_sub(1) {
            self.leaves
                .unpin(iova >> 12, iova.saturating_add(len) >> 12);
        }
    }

    /// Walks the shadow; no access to guest memory.
    pub(crate) fn translate(&self, root: PageTableRoot, gma: u64) -> Option<GuestAddress> {
        self.walk(root, gma).map(|leaf| leaf.translate(gma))
    }

    /// The device's address of the page behind `gma`, while that is pinned.
    pub(crate) fn device_address(&self, root: PageTableRoot, gma: u64) -> Option<u64> {
        let leaf = self.walk(root, gma)?;
        self.leaves
            .address(leaf, leaf.translate(gma).0 - (leaf.gfn << 12))
    }

    /// The guest frame that the device reaches at `address`.
    pub(crate) fn frame_at(&self, address: u64) -> Option<u64> {
        self.leaves.frame_at(address)
    }

    fn walk(&self, root: PageTableRoot, gma: u64) -> Option<Leaf> {
        let mut key = root.table_of(gma)?;
        loop {
            let table = self.tables.get(&key)?;
            let entry = *table.entries.get(key.kind.index(gma))?;
            match key.kind.decode(entry).ok()? {
                Entry::NotPresent => return None,
                Entry::Table(child) => key = child,
                Entry::Leaf(leaf) => return Some(leaf),
            }
        }
    }

    pub(super) fn knows(&self, root: &RootTables) -> bool {
        self.roots.contains(root)
    }

    pub(super) fn has_table(&self, key: &TableKey) -> bool {
        self.tables.contains_key(key)
    }

    /// Keeps a root; each of its tables has been acquired for it.
    pub(super) fn add_root(&mut self, root: RootTables) {
        self.roots.insert(root);
    }

    /// Whether there is room for one more table or root.
    pub(super) fn check_room(&self) -> Result<()> {
        if self.tables.len() + self.roots.len() < self.limit {
            Ok(())
        } else {
            Err(Error::TooManyTables { limit: self.limit })
        }
    }

    /// One more points to `key`; whether that is a shadowed table.
    pub(super) fn share_table(&mut self, key: &TableKey) -> bool {
        let table = self.tables.get_mut(key);
        table.map(|table| table.users += 1).is_some()
    }

    /// A table that has one user and no entry that is present.
    pub(super) fn add_table(&mut self, key: TableKey) -> Result<()> {
        let entries = memory::zeroed()?;
        self.tables.insert(key, Table { users: 1, entries });
        Ok(())
    }

    /// Sets an entry for what was acquired for it, and gives back what it was; `value` if there is no such
    /// table.
    pub(super) fn replace(&mut self, key: &TableKey, index: usize, value: u64) -> u64 {
        self.tables
            .get_mut(key)
            .and_then(|table| table.entries.get_mut(index))
            .map_or(value, |entry| std::mem::replace(entry, value))
    }

    /// Whether the entry at `gpa` could be shadowed when it was read last.
    pub(super) fn set_failed(&mut self, key: &TableKey, gpa: u64, failed: bool) {
        if failed {
            self.failed.entry(*key).or_default().insert(gpa);
        } else if let Some(entries) = self.failed.get_mut(key) {
            entries.remove(&gpa);
            if entries.is_empty() {
                self.failed.remove(key);
            }
        }
    }

    /// What `root` reaches of the entries that failed and of the leaves that lost their pages.
    pub(super) fn unsettled(&self, root: &RootTables) -> Result<Unsettled> {
        let mut found = Unsettled::default();
        if self.failed.is_empty() && !self.leaves.any_lost() {
            return Ok(found);
        }
        let mut seen = BTreeSet::new();
        let mut next: Vec<TableKey> = Vec::new();
        memory::reserve(&mut next, root.len())?;
        next.extend(root.iter().flatten());
        while let Some(key) = next.pop() {
            let Some(table) = self.tables.get(&key).filter(|_| seen.insert(key)) else {
                continue;
            };
            found
                .entries
                .extend(self.failed.get(&key).into_iter().flatten());
            for entry in table.entries.iter() {
                match key.kind.decode(*entry) {
                    Ok(Entry::Table(child)) => memory::push(&mut next, child)?,
                    Ok(Entry::Leaf(leaf)) => found.leaves.extend(self.leaves.lost(leaf)),
                    Ok(Entry::NotPresent) | Err(_) => {}
                }
            }
        }
        Ok(found)
    }

    /// Gives up what an entry points to.
    pub(super) fn release(&mut self, kind: TableKind, entry: u64) {
        match kind.decode(entry) {
            Ok(Entry::Table(key)) => self.release_table(key),
            Ok(Entry::Leaf(leaf)) => self.leaves.release(leaf),
            // What cannot be decoded was never acquired.
            Ok(Entry::NotPresent) | Err(_) => {}
        }
    }

    pub(super) fn release_tables(&mut self, keys: impl IntoIterator<Item = TableKey>) {
        for key in keys {
            self.release_table(key);
        }
    }

    fn release_table(&mut self, key: TableKey) {
        let Some(table) = self.tables.get_mut(&key) else {
            return;
        };
        table.users -= 1;
        if table.users == 0 {
            self.failed.remove(&key);
            if let Some(table) = self.tables.remove(&key) {
                for entry in table.entries.iter() {
                    self.release(key.kind, *entry);
                }
            }
        }
    }
}

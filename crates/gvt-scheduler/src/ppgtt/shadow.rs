// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The shadow of the guest's page tables: each table as it was last read, and the pins it needs.

use std::collections::{BTreeMap, BTreeSet};

use page_pin::PinPages;
use vm_memory::GuestAddress;

use crate::error::Result;
use crate::memory::{DmaMemory, Port};
use crate::observe::{AccessKind, Observer};
use crate::ppgtt::entry::{Entry, TableKey, TableKind, TABLE_ENTRIES};
use crate::ppgtt::leaf::LeafPins;
use crate::ppgtt::root::PageTableRoot;
use crate::regs::PAGE_MASK;

const ENTRY_SIZE: u64 = 8;

/// All page tables of a vGPU.
///
/// # Invariants
/// - `tables` holds exactly the tables that `roots` reach through shadowed entries; `users` of each is
///   the number of roots and entries that point to it.
/// - Each shadowed entry that maps memory counts once in `leaves`.
#[derive(Debug)]
pub(crate) struct Ppgtt<G> {
    tables: BTreeMap<TableKey, Table>,
    roots: BTreeSet<TableKey>,
    /// Guest addresses of the entries that were written since they were read.
    written: BTreeSet<u64>,
    leaves: LeafPins<G>,
}

#[derive(Debug)]
struct Table {
    users: u64,
    entries: Box<[u64; TABLE_ENTRIES]>,
}

impl<G> Default for Ppgtt<G> {
    fn default() -> Self {
        Self {
            tables: BTreeMap::new(),
            roots: BTreeSet::new(),
            written: BTreeSet::new(),
            leaves: LeafPins::default(),
        }
    }
}

/// What shadowing needs of the vGPU: its guest memory and where it pins.
pub(crate) struct Source<'a, 'b, M, O, P> {
    pub(crate) port: &'a mut Port<'b, M, O>,
    pub(crate) pins: &'a P,
}

impl<G> Ppgtt<G> {
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
        let Some(last) = len.checked_sub(1).map(|len| gpa.0.saturating_add(len)) else {
            return;
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
            let entries = (first_entry..=last_byte)
                .step_by(ENTRY_SIZE as usize)
                .map(|offset| key.gpa | offset);
            self.written.extend(entries);
        }
    }

    /// Reads the entries that were written, in ascending order. The shadow of an entry that fails is
    /// not present, and it stays among those to be read.
    pub(crate) fn update<M, O, P>(&mut self, source: &mut Source<'_, '_, M, O, P>) -> Result<()>
    where
        M: DmaMemory,
        O: Observer,
        P: PinPages<Pinned = G>,
    {
        while let Some(&gpa) = self.written.first() {
            self.update_entry(source, gpa)?;
            self.written.remove(&gpa);
        }
        Ok(())
    }

    /// Shadows the tables of a root that is not known yet.
    pub(crate) fn know<M, O, P>(
        &mut self,
        source: &mut Source<'_, '_, M, O, P>,
        root: PageTableRoot,
    ) -> Result<()>
    where
        M: DmaMemory,
        O: Observer,
        P: PinPages<Pinned = G>,
    {
        for key in root.tables() {
            if !self.roots.contains(&key) {
                self.acquire_table(source, key)?;
                self.roots.insert(key);
            }
        }
        Ok(())
    }

    /// Drops a root with all that only it needs.
    pub(crate) fn forget(&mut self, root: PageTableRoot) {
        for key in root.tables() {
            if self.roots.remove(&key) {
                self.release_table(key);
            }
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
        let mut key = root.table_of(gma)?;
        loop {
            let table = self.tables.get(&key)?;
            let entry = *table.entries.get(key.kind.index(gma))?;
            match key.kind.decode(entry).ok()? {
                Entry::NotPresent => return None,
                Entry::Table(child) => key = child,
                Entry::Leaf(leaf) => return Some(leaf.translate(gma)),
            }
        }
    }

    fn update_entry<M, O, P>(
        &mut self,
        source: &mut Source<'_, '_, M, O, P>,
        gpa: u64,
    ) -> Result<()>
    where
        M: DmaMemory,
        O: Observer,
        P: PinPages<Pinned = G>,
    {
        let (table, offset) = (gpa & !PAGE_MASK, gpa & PAGE_MASK);
        let index = (offset / ENTRY_SIZE) as usize;
        let mut value = None;
        for kind in TableKind::ALL {
            let key = TableKey { gpa: table, kind };
            if !self.tables.contains_key(&key) || !key.uses(offset) {
                continue;
            }
            let read = match value {
                Some(value) => Ok(value),
                None => source.read_entry(gpa),
            };
            let acquired = read.and_then(|entry| {
                value = Some(entry);
                self.acquire(source, kind, entry).map(|()| entry)
            });
            let old = self.replace(key, index, *acquired.as_ref().unwrap_or(&0));
            self.release(kind, old);
            acquired?;
        }
        Ok(())
    }

    fn replace(&mut self, key: TableKey, index: usize, value: u64) -> u64 {
        self.tables
            .get_mut(&key)
            .and_then(|table| table.entries.get_mut(index))
            .map_or(value, |entry| std::mem::replace(entry, value))
    }

    /// Takes what an entry points to: the table, shadowed if it is not yet, or the pin.
    fn acquire<M, O, P>(
        &mut self,
        source: &mut Source<'_, '_, M, O, P>,
        kind: TableKind,
        entry: u64,
    ) -> Result<()>
    where
        M: DmaMemory,
        O: Observer,
        P: PinPages<Pinned = G>,
    {
        match kind.decode(entry)? {
            Entry::NotPresent => Ok(()),
            Entry::Table(key) => self.acquire_table(source, key),
            Entry::Leaf(leaf) => self.leaves.acquire(source.pins, leaf),
        }
    }

    fn acquire_table<M, O, P>(
        &mut self,
        source: &mut Source<'_, '_, M, O, P>,
        key: TableKey,
    ) -> Result<()>
    where
        M: DmaMemory,
        O: Observer,
        P: PinPages<Pinned = G>,
    {
        if let Some(table) = self.tables.get_mut(&key) {
            table.users += 1;
            return Ok(());
        }
        let mut entries = Box::new([0; TABLE_ENTRIES]);
        // A child is of a lower kind, so the recursion ends whatever the guest points where.
        for (index, slot) in entries.iter_mut().enumerate().step_by(key.kind.stride()) {
            let gpa = key.gpa + index as u64 * ENTRY_SIZE;
            let acquired = source
                .read_entry(gpa)
                .and_then(|entry| self.acquire(source, key.kind, entry).map(|()| entry));
            match acquired {
                Ok(entry) => *slot = entry,
                Err(error) => {
                    self.release_entries(key.kind, &entries);
                    return Err(error);
                }
            }
        }
        self.tables.insert(key, Table { users: 1, entries });
        Ok(())
    }

    fn release(&mut self, kind: TableKind, entry: u64) {
        match kind.decode(entry) {
            Ok(Entry::Table(key)) => self.release_table(key),
            Ok(Entry::Leaf(leaf)) => self.leaves.release(leaf),
            // What cannot be decoded was never acquired.
            Ok(Entry::NotPresent) | Err(_) => {}
        }
    }

    fn release_table(&mut self, key: TableKey) {
        let Some(table) = self.tables.get_mut(&key) else {
            return;
        };
        table.users -= 1;
        if table.users == 0 {
            if let Some(table) = self.tables.remove(&key) {
                self.release_entries(key.kind, &table.entries);
            }
        }
    }

    fn release_entries(&mut self, kind: TableKind, entries: &[u64; TABLE_ENTRIES]) {
        for entry in entries {
            self.release(kind, *entry);
        }
    }
}

impl TableKind {
    const ALL: [TableKind; 5] = [
        TableKind::Pml4,
        TableKind::Pdp,
        TableKind::Pd,
        TableKind::Pt,
        TableKind::Pt64K,
    ];
}

impl TableKey {
    /// Whether the table uses the entry at this offset in its page.
    fn uses(&self, offset: u64) -> bool {
        (offset / ENTRY_SIZE) as usize % self.kind.stride() == 0
    }
}

impl<M: DmaMemory, O: Observer, P> Source<'_, '_, M, O, P> {
    fn read_entry(&mut self, gpa: u64) -> Result<u64> {
        self.port.read_u64(AccessKind::PageTable, GuestAddress(gpa))
    }
}

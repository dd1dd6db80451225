// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What brings the shadow up to date when a workload is created: reads of tables, and pins.

use std::collections::BTreeMap;

use page_pin::PinPages;
use vm_memory::GuestAddress;

use crate::error::{Error, Result};
use crate::guest_dma::{GuestDma, Port};
use crate::observe::{AccessKind, Observer};
use crate::ppgtt::entry::{Entry, TableKey, TableKind, TABLE_ENTRIES};
use crate::ppgtt::root::{PageTableRoot, RootTables};
use crate::ppgtt::shadow::{Ppgtt, ENTRY_SIZE};
use crate::regs::PAGE_MASK;

/// Changes a shadow, by what guest memory has and as far as pages can be pinned.
pub(crate) struct Update<'a, 'b, M, O, P: PinPages> {
    pub(crate) shadow: &'a mut Ppgtt<P::Pinned>,
    pub(crate) port: &'a mut Port<'b, M, O>,
    pub(crate) pins: &'a P,
}

impl<M: GuestDma, O: Observer, P: PinPages> Update<'_, '_, M, O, P> {
    /// Makes the shadow what a workload with this root needs: reads the entries that were written, in
    /// ascending order, and the tables of a root that is not known yet.
    ///
    /// An entry that fails is not present. It is an error of the workloads whose root reaches it, each
    /// of which tries it again, and of no others.
    pub(crate) fn run(&mut self, root: PageTableRoot) -> Result<()> {
        let root = root.tables();
        let mut errors = self.read_written();
        self.know(root)?;
        loop {
            let unsettled = self.shadow.unsettled(&root)?;
            if unsettled.entries.is_empty() && unsettled.leaves.is_empty() {
                return Ok(());
            }
            for leaf in unsettled.leaves {
                self.shadow.leaves.pin_again(self.pins, leaf)?;
            }
            for gpa in unsettled.entries {
                match errors.remove(&gpa) {
                    Some(error) => return Err(error),
                    None => self.update_entry(gpa)?,
                }
            }
        }
    }

    /// The guest's write of `len` bytes at `gpa` was trapped: an entry that was written whole is read again
    /// now, one of which a part was written is not present until it is read with the next workload.
    pub(crate) fn trapped(&mut self, gpa: GuestAddress, len: u64) -> Result<()> {
        if len == ENTRY_SIZE && gpa.0 % ENTRY_SIZE == 0 {
            self.shadow.written.remove(&gpa.0);
            return self.update_entry(gpa.0);
        }
        self.shadow.drop_written(gpa, len);
        Ok(())
    }

    /// Reads the entries that were written; gives those that failed.
    fn read_written(&mut self) -> BTreeMap<u64, Error> {
        let mut errors = BTreeMap::new();
        while let Some(gpa) = self.shadow.written.pop_first() {
            if let Err(error) = self.update_entry(gpa) {
                log::debug!("page table entry at {gpa:#x} is not shadowed: {error}");
                errors.insert(gpa, error);
            }
        }
        errors
    }

    /// Shadows the tables of a root that is not known yet, all of them or none.
    fn know(&mut self, root: RootTables) -> Result<()> {
        if self.shadow.knows(&root) {
            return Ok(());
        }
        let tables = || root.iter().flatten().copied();
        for (done, key) in tables().enumerate() {
            if let Err(error) = self.acquire_table(key) {
                self.shadow.release_tables(tables().take(done));
                return Err(error);
            }
        }
        if let Err(error) = self.shadow.check_room() {
            self.shadow.release_tables(tables());
            return Err(error);
        }
        self.shadow.add_root(root);
        Ok(())
    }

    /// Reads an entry again for each of the tables that the page is in use as.
    fn update_entry(&mut self, gpa: u64) -> Result<()> {
        let (page, offset) = (gpa & !PAGE_MASK, gpa & PAGE_MASK);
        let index = (offset / ENTRY_SIZE) as usize;
        let mut result = Ok(());
        let mut read = None;
        for kind in TableKind::ALL {
            let key = TableKey { gpa: page, kind };
            // What is done for one kind may drop the table of another.
            if index % kind.stride() != 0 || !self.shadow.has_table(&key) {
                continue;
            }
            let value = *read.get_or_insert_with(|| match self.read_entry(gpa) {
                Ok(entry) => Some(entry),
                Err(error) => {
                    result = Err(error);
                    None
                }
            });
            let acquired = value.filter(|entry| match self.acquire(kind, *entry) {
                Ok(()) => true,
                Err(error) => {
                    result = Err(error);
                    false
                }
            });
            let old = self.shadow.replace(&key, index, acquired.unwrap_or(0));
            self.shadow.set_failed(&key, gpa, acquired.is_none());
            self.shadow.release(kind, old);
        }
        result
    }

    /// Takes what an entry points to: the table, shadowed if it is not yet, or the pin.
    fn acquire(&mut self, kind: TableKind, entry: u64) -> Result<()> {
        match kind.decode(entry)? {
            Entry::NotPresent => Ok(()),
            Entry::Table(key) => self.acquire_table(key),
            Entry::Leaf(leaf) => self.shadow.leaves.acquire(self.pins, leaf),
        }
    }

    fn acquire_table(&mut self, key: TableKey) -> Result<()> {
        if self.shadow.share_table(&key) {
            return Ok(());
        }
        self.shadow.check_room()?;
        self.shadow.add_table(key)?;
        // A child is of a lower kind, so the recursion ends whatever the guest points where.
        for index in (0..TABLE_ENTRIES).step_by(key.kind.stride()) {
            let acquired = self
                .read_entry(key.gpa + index as u64 * ENTRY_SIZE)
                .and_then(|entry| self.acquire(key.kind, entry).map(|()| entry));
            match acquired {
                Ok(entry) => self.shadow.replace(&key, index, entry),
                Err(error) => {
                    self.shadow.release_tables([key]);
                    return Err(error);
                }
            };
        }
        Ok(())
    }

    fn read_entry(&mut self, gpa: u64) -> Result<u64> {
        self.port.read_u64(AccessKind::PageTable, GuestAddress(gpa))
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What was mapped where, and a copy of it that is kept up by dirty pages alone, as a migration has it.

use std::sync::{Arc, Mutex};

use iommu_type1::{page_size, DirtyPages};

use crate::memory::{Contents, Memory, PLACES};

/// Pages of the mappings, which lie one behind the other: what is in `SLOTS[n]` comes and goes as a whole.
pub const SLOTS: [usize; 4] = [1, 1, 2, 1];

/// All of them together.
pub const PAGES: u64 = 5;

/// Address of a page.
pub fn page(number: u64) -> u64 {
    number * page_size()
}

/// Address and size of the mappings of a slot.
pub fn range(slot: usize) -> (u64, u64) {
    let before: usize = SLOTS[..slot].iter().sum();
    (page(before as u64), page(SLOTS[slot] as u64))
}

fn slot_of(iova: u64) -> usize {
    let is_in = |slot: &usize| (range(*slot).0..range(*slot).0 + range(*slot).1).contains(&iova);
    (0..SLOTS.len()).find(is_in).unwrap()
}

/// One mapping, while it lives and afterwards.
struct Entry {
    memory: Arc<Memory>,
    copy: Vec<Contents>,
    /// Nobody has taken its last marks: the copy lacks what was written since.
    incomplete: bool,
}

#[derive(Default)]
struct Slot {
    entries: Vec<Entry>,
    /// How often a page was said to be dirty.
    taken: u64,
    /// What is pinned is always dirty.
    pinned: bool,
}

/// No lock of it is held while another thread goes on.
#[derive(Default)]
pub struct Ledger {
    slots: [Mutex<Slot>; SLOTS.len()],
}

impl Ledger {
    /// About to be mapped.
    pub fn map(&self, slot: usize) -> Arc<Memory> {
        let memory = Arc::new(Memory::new(SLOTS[slot]));
        let entry = Entry {
            memory: memory.clone(),
            copy: vec![[0; PLACES]; SLOTS[slot]],
            incomplete: true,
        };
        self.slots[slot].lock().unwrap().entries.push(entry);
        memory
    }

    /// Some page is about to be pinned.
    pub fn pin(&self, iova: u64) {
        self.slots[slot_of(iova)].lock().unwrap().pinned = true;
    }

    /// An unmap has returned, which took the marks if `dirty` says so.
    pub fn unmapped(&self, slot: usize, dirty: Option<&DirtyPages>) {
        let memory = self.newest(slot);
        memory.gone();
        if let Some(dirty) = dirty {
            self.copy(dirty);
            self.complete(slot);
        }
    }

    /// These pages were written since they were last taken.
    pub fn copy(&self, dirty: &DirtyPages) {
        for iova in dirty.iter() {
            let number = slot_of(iova);
            let index = ((iova - range(number).0) / page_size()) as usize;
            let mut slot = self.slots[number].lock().unwrap();
            slot.taken += 1;
            // The marks may be of the mapping before, whose memory is as it was then.
            for entry in &mut slot.entries {
                entry.copy[index] = entry.memory.contents(index);
            }
        }
    }

    /// The marks of the newest mapping were all taken, and nobody writes to it any more.
    pub fn complete(&self, slot: usize) {
        let mut slot = self.slots[slot].lock().unwrap();
        slot.entries.last_mut().unwrap().incomplete = false;
    }

    fn newest(&self, slot: usize) -> Arc<Memory> {
        let slot = self.slots[slot].lock().unwrap();
        slot.entries.last().unwrap().memory.clone()
    }

    /// When everything has ended: no mark was lost, and none was taken twice.
    pub fn check_marks(&self) {
        for slot in &self.slots {
            let slot = slot.lock().unwrap();
            for entry in slot.entries.iter().filter(|entry| !entry.incomplete) {
                for (index, copy) in entry.copy.iter().enumerate() {
                    let contents = entry.memory.contents(index);
                    assert_eq!(*copy, contents, "a write that was never taken");
                }
            }
            let marks: u64 = slot.entries.iter().map(|entry| entry.memory.marks()).sum();
            let taken = slot.taken;
            assert!(
                slot.pinned || taken <= marks,
                "{taken} dirty pages, {marks} writes"
            );
        }
    }

    /// When everything has ended: nobody has any of the memory.
    pub fn check_released(&self) {
        for slot in &self.slots {
            for entry in &slot.lock().unwrap().entries {
                entry.memory.assert_released();
            }
        }
    }
}

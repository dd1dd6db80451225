// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The shadow of page tables follows the guest's, by the reads it should take and no others.

#[path = "../common/mod.rs"]
mod common;
mod failures;
mod fresh_walk;
mod lifetimes;
mod reads;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use common::{Context, Guest, Trace};
use gvt_scheduler::{
    ring_context, AccessKind, AddressingMode, ContextDescriptor, EngineId, Error, PageTableRoot,
    VgpuConfig,
};
use page_pin::PinPages;
use vm_memory::{Bytes, GuestAddress, Permissions};

const PRESENT: u64 = 1;
const PSE: u64 = 1 << 7;
const IPS: u64 = 1 << 11;
const ENGINE: EngineId = EngineId::Bcs;

/// A frame that cannot be pinned.
const UNPINNABLE: u64 = 0x3333;

/// Live pins, by what was asked for.
#[derive(Clone, Debug, Default)]
struct Pins(
    Arc<Mutex<BTreeMap<(u64, usize), usize>>>,
    Arc<Mutex<Option<u64>>>,
);

impl Pins {
    /// From now on one more frame cannot be pinned.
    fn refuse(&self, gfn: Option<u64>) {
        *self.1.lock().unwrap() = gfn;
    }
}

struct Pinned(Pins, (u64, usize));

#[derive(Debug, thiserror::Error)]
#[error("not pinnable")]
struct NotPinnable;

impl PinPages for Pins {
    type Pinned = Pinned;
    type Error = NotPinnable;

    fn pin_pages(
        &self,
        iova: u64,
        npages: usize,
        prot: Permissions,
    ) -> Result<Pinned, NotPinnable> {
        assert_eq!(prot, Permissions::ReadWrite);
        let gfn = iova >> 12;
        let refused = self.1.lock().unwrap().unwrap_or(UNPINNABLE);
        let frames = gfn..gfn + npages as u64;
        if frames.contains(&UNPINNABLE) || frames.contains(&refused) {
            return Err(NotPinnable);
        }
        *self.0.lock().unwrap().entry((gfn, npages)).or_default() += 1;
        Ok(Pinned(self.clone(), (gfn, npages)))
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let mut pins = self.0 .0.lock().unwrap();
        let count = pins.get_mut(&self.1).expect("was pinned");
        *count -= 1;
        if *count == 0 {
            pins.remove(&self.1);
        }
    }
}

struct Tables {
    guest: Guest<Pins, Trace>,
    pins: Pins,
    context: Context,
}

impl Tables {
    fn new() -> Self {
        Self::with(VgpuConfig::default())
    }

    fn with(config: VgpuConfig) -> Self {
        let pins = Pins::default();
        let mut guest = Guest::with(config, pins.clone(), Trace::default());
        let context = guest.context(ENGINE, 0x40, 1);
        Self {
            guest,
            pins,
            context,
        }
    }

    fn set(&self, table: u64, index: u64, value: u64) -> GuestAddress {
        let gpa = GuestAddress((table << 12) | (index * 8));
        self.guest.memory.write_obj(value, gpa).unwrap();
        gpa
    }

    /// A write of the guest that the caller was told of.
    fn write(&mut self, table: u64, index: u64, value: u64) {
        let gpa = self.set(table, index, value);
        self.guest.vgpu.page_table_written(gpa, 8);
    }

    fn set_root(&self, root: PageTableRoot) {
        let pdps = match root {
            PageTableRoot::FourLevel { pml4 } => [pml4, 0, 0, 0],
            PageTableRoot::ThreeLevel { pdps } => pdps,
        };
        for (offset, pdp) in (ring_context::PDP3_UDW..)
            .step_by(16)
            .zip(pdps.into_iter().rev())
        {
            self.guest.set(&self.context, offset, (pdp >> 32) as u32);
            self.guest.set(&self.context, offset + 8, pdp as u32);
        }
    }

    fn submit(&mut self, root: PageTableRoot) -> Result<(), Error> {
        self.set_root(root);
        let mode = match root {
            PageTableRoot::FourLevel { .. } => AddressingMode::Legacy64,
            PageTableRoot::ThreeLevel { .. } => AddressingMode::Legacy32,
        };
        let descriptor = ContextDescriptor::new(self.context.lrca, self.context.id, mode);
        common::submit(&mut self.guest.vgpu, ENGINE, &[descriptor])?;
        self.guest.run(ENGINE);
        Ok(())
    }

    /// Addresses of the entries read since the last call.
    fn reads(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.guest.vgpu.observer_mut().accesses)
            .into_iter()
            .map(|(_, access)| access)
            .filter(|access| access.kind == AccessKind::PageTable)
            .inspect(|access| assert_eq!((access.len, access.write), (8, false)))
            .map(|access| access.gpa.0)
            .collect()
    }

    fn pinned(&self) -> Vec<(u64, usize)> {
        self.pins.0.lock().unwrap().keys().copied().collect()
    }
}

fn four_level(frame: u64) -> PageTableRoot {
    PageTableRoot::FourLevel { pml4: frame << 12 }
}

fn to(frame: u64) -> u64 {
    frame << 12 | PRESENT | 2
}

/// One table of each level; the last one maps frame 0x900 at index 3.
fn four_tables() -> Tables {
    let tables = Tables::new();
    tables.set(0x200, 0, to(0x201));
    tables.set(0x201, 0, to(0x202));
    tables.set(0x202, 0, to(0x203));
    tables.set(0x203, 3, to(0x900));
    tables
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The protocols of this crate under every interleaving, on the production code:
//! `RUSTFLAGS="--cfg loom" cargo test -p iommu-type1 --release --lib`.
//!
//! Each model maps memory that knows when it is gone: as soon as an unmap has returned, its owner
//! writes to it as if it were other memory by now, and loom fails the model for an access that comes
//! later or is not ordered before. Loom's condition variables never time out, so a wake-up that is
//! lost is reported as a deadlock; where a deadline is to pass, the model says when
//! (`checked_sync::clock`).
//!
//! Loom tries another order of a store only against the access before it, of whatever thread: code that loads an
//! atomic just to store to it next hides that store from the loads of others. Production code does without such
//! a load where a model is to see the race.
//!
//! `ci/loom-mutations` breaks the production code in many ways and expects a model to fail for each.

mod batch;
mod deadline;
mod dirty;
mod handle;
mod holder;
pub(crate) mod kernel;
mod listen;
mod map;
mod marks;
mod membarrier;
mod page_word;
mod pinner;
mod reader;
mod replace;
#[cfg(feature = "sigbus")]
mod sigbus;
mod unmap;

use std::sync::Arc;
use std::time::Duration;

use checked_sync::clock;
use loom::cell::UnsafeCell;
use loom::thread::{spawn, JoinHandle};
use vm_memory::{Bytes, MmapRegion, Permissions, VolatileMemory};

use crate::backing::Region;
use crate::mapping::Mapping;
use crate::range::page_size;
use crate::table::Table;
use crate::{Backing, Error, IoAddressSpace, IoAddressSpaceBuilder, UnmapOptions};

/// Three threads that unmap or access: every interleaving with so many preemptions.
const PREEMPTIONS: usize = 4;

/// Stands for memory that its owner uses for something else after the unmap: loom checks that every
/// access is ordered before that, whatever the order they were run in.
#[derive(Clone)]
struct Memory(Arc<UnsafeCell<bool>>);

// SAFETY: loom fails the model when an access to the cell is not ordered with a write to it.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    fn new() -> Self {
        let memory = UnsafeCell::new(false);
        // Who maps it has filled it: an access must be ordered behind that.
        // SAFETY: see `Sync`.
        memory.with_mut(|gone| unsafe { *gone = false });
        Memory(Arc::new(memory))
    }

    fn access(&self) {
        // SAFETY: see `Sync`.
        let gone = self.0.with(|gone| unsafe { *gone });
        assert!(!gone, "an access after the unmap");
    }

    fn gone(&self) {
        // SAFETY: see `Sync`.
        self.0.with_mut(|gone| unsafe { *gone = true });
    }
}

/// A page of memory, and who is told of accesses to it.
struct Watched {
    page: MmapRegion<()>,
    memory: Vec<Memory>,
}

// SAFETY: everything is the wrapped region's, which upholds the same contract.
unsafe impl Region for Watched {
    fn host_address(&self) -> *mut u8 {
        self.page.as_ptr()
    }

    fn size(&self) -> usize {
        self.page.size()
    }

    fn access(&self) -> Permissions {
        Permissions::ReadWrite
    }

    fn tracks(&self) -> bool {
        true
    }

    fn mark_dirty(&self, _offset: usize, _len: usize) {
        // In the middle of the access: it has found the memory.
        kernel::look_out();
        self.memory.iter().for_each(Memory::access);
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }
}

fn watched(memory: &[Memory]) -> Backing {
    Backing::for_model(Watched {
        page: MmapRegion::new(page_size() as usize).unwrap(),
        memory: memory.to_vec(),
    })
}

/// A page of memory that nobody tracks, so that accesses need not look at its mapping. Who is told of
/// nothing looks at the bytes.
#[derive(Clone)]
struct Plain(Arc<MmapRegion<()>>);

/// What the owner of [`Plain`] memory fills it with after the unmap.
const OTHERS: u8 = 0xee;

// SAFETY: everything is the wrapped region's, which upholds the same contract.
unsafe impl Region for Plain {
    fn host_address(&self) -> *mut u8 {
        self.0.as_ptr()
    }

    fn size(&self) -> usize {
        self.0.size()
    }

    fn access(&self) -> Permissions {
        Permissions::ReadWrite
    }

    fn tracks(&self) -> bool {
        false
    }

    fn mark_dirty(&self, _offset: usize, _len: usize) {}

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }
}

impl Plain {
    fn new() -> Self {
        Plain(Arc::new(MmapRegion::new(page_size() as usize).unwrap()))
    }

    fn map(&self, space: &IoAddressSpace, page: u64) {
        let backing = Backing::for_model(self.clone());
        let mapped = space.map(page * page_size(), backing, Permissions::ReadWrite);
        mapped.unwrap();
    }

    /// The byte that models of such memory access.
    fn byte(&self) -> u8 {
        self.0.as_volatile_slice().read_obj(8).unwrap()
    }

    fn gone(&self) {
        self.0.as_volatile_slice().write_obj(OTHERS, 8).unwrap();
    }
}

/// Who has given the page at 0 to the space, and wants it back.
struct Owner {
    memory: Memory,
    /// What comes too late must find the memory, or the model crashes instead of saying so.
    _mapping: Arc<Mapping>,
}

impl Owner {
    fn gone(&self) {
        self.memory.gone();
    }
}

/// A space with a page at 0.
fn space() -> (IoAddressSpace, Owner) {
    space_with(IoAddressSpace::builder())
}

fn space_with(builder: IoAddressSpaceBuilder) -> (IoAddressSpace, Owner) {
    // What is made lazily is made before there are threads, and so orders none of them.
    clock::now();
    let memory = Memory::new();
    let space = builder.build();
    map(&space, 0, &memory).unwrap();
    let inner = &space.view.space;
    let mapping = inner
        .grace
        .enter_shared(|inside| inner.table.find(0, inside).map(Table::share));
    let owner = Owner {
        memory,
        _mapping: mapping.unwrap(),
    };
    (space, owner)
}

fn map(space: &IoAddressSpace, page: u64, memory: &Memory) -> Result<(), Error> {
    let backing = watched(std::slice::from_ref(memory));
    space.map(page * page_size(), backing, Permissions::ReadWrite)
}

/// A write to the first or a later page, which may come too late.
fn write(space: &IoAddressSpace, page: u64) {
    refused(space.write(page * page_size() + 8, &[1]));
}

/// A device model that comes too late is told so, and nothing else.
fn refused(result: Result<(), Error>) {
    if let Err(error) = result {
        assert!(is_refusal(&error), "{error}");
    }
}

fn is_refusal(error: &Error) -> bool {
    matches!(
        error,
        Error::NotMapped { .. }
            | Error::Revoked { .. }
            | Error::Unmapping { .. }
            | Error::VaddrInvalid { .. }
    )
}

/// A deadline that does not pass.
fn patient() -> UnmapOptions {
    UnmapOptions::new().deadline(2 * clock::NEVER)
}

/// Unmaps the page at 0; nobody may touch it from then on.
fn unmap(space: &IoAddressSpace, owner: &Owner) {
    let bytes = space.unmap_with(0, page_size(), patient());
    assert_eq!(bytes.unwrap(), page_size());
    owner.gone();
}

/// A deadline that passes when the model's clock does.
fn soon() -> UnmapOptions {
    UnmapOptions::new().deadline(Duration::from_secs(1))
}

/// A thread that lets the time of `soon` pass at any moment.
fn time_passes() -> JoinHandle<()> {
    spawn(|| clock::pass(1))
}

fn exhaustively(model: impl Fn() + Send + Sync + 'static) {
    loom::model(model);
}

/// For models of three threads and more.
fn bounded(model: impl Fn() + Send + Sync + 'static) {
    bounded_by(PREEMPTIONS, model);
}

/// For those that take too long with [`PREEMPTIONS`].
fn bounded_by(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

fn join<T>(threads: impl IntoIterator<Item = JoinHandle<T>>) {
    threads
        .into_iter()
        .for_each(|thread| drop(thread.join().unwrap()));
}

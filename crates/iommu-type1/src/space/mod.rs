// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The address space: what it is made of and how it is referred to.

mod builder;

use std::any::Any;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use checked_sync::{lock, Mutex};
use page_pin::PinTable;
use vm_memory::Permissions;

use crate::grace::Grace;
use crate::lease::Ledger;
use crate::listen::Listeners;
use crate::mapping::Mapping;
use crate::mapping_set::SetId;
use crate::profile::Rules;
use crate::range::IovaRange;
use crate::stats::Counters;
use crate::table::Table;
use crate::writer::Writer;
use crate::{Backing, PermissionPolicy, Profile, ReaderBarrier, UnmapOptions, UnmapPolicy};

pub use builder::{
    IoAddressSpaceBuilder, DIRTY_LIMIT, DMA_ENTRY_LIMIT, TABLE_LIMIT, UNMAP_DEADLINE,
    UNMAP_REMINDERS,
};

/// An IO address space: mappings from I/O virtual addresses to memory.
///
/// A cheap reference: clones are the same space. It can be shared between threads; accesses
/// directly on it are the convenience path, a [`DmaHandle`](crate::DmaHandle) per user of the
/// memory is the fast one. As a [`GuestAddressSpace`](vm_memory::GuestAddressSpace) it fits
/// wherever rust-vmm takes guest memory.
#[derive(Clone)]
pub struct IoAddressSpace {
    pub(crate) view: Arc<View>,
}

/// A way to refer to a space: who looks, and what is kept alive meanwhile.
pub(crate) struct View {
    pub(crate) space: Arc<Space>,
    pub(crate) name: String,
    /// With what it signs the mappings that are made through it, and which ones it may unmap.
    pub(crate) set: SetId,
    /// Only held, never looked at: its drop is what counts.
    owner: Option<Arc<dyn Any + Send + Sync>>,
}

/// # Invariants
///
/// A lease or a pin is only made by a running access ([`crate::grace::Inside`]) on a mapping that it has found in
/// `table`. So once a mapping was taken out of the table and a grace period has passed, the set of
/// its leases and pins can only shrink.
pub(crate) struct Space {
    pub(crate) table: Table,
    pub(crate) grace: Grace,
    /// Taken before `writer` by whoever takes marks of dirty pages, until it is certain that they need not be
    /// put back: a mapping that is gone could not have them back.
    pub(crate) harvest: Mutex<()>,
    pub(crate) writer: Mutex<Writer>,
    pub(crate) listeners: Mutex<Listeners>,
    /// How many sets of mappings there have been.
    sets: AtomicU64,
    pub(crate) leases: Ledger,
    pub(crate) pins: PinTable,
    pub(crate) counters: Counters,
    pub(crate) page_sizes: u64,
    pub(crate) entry_limit: usize,
    pub(crate) table_limit: usize,
    pub(crate) log_limit: usize,
    pub(crate) unmap: UnmapOptions,
    pub(crate) profile: Profile,
    pub(crate) rules: &'static Rules,
    pub(crate) permissions: PermissionPolicy,
    pub(crate) reminders: u32,
}

impl Space {
    /// A mapping of this space.
    pub(crate) fn mapping(
        &self,
        range: IovaRange,
        prot: Permissions,
        backing: Backing,
        set: SetId,
    ) -> Mapping {
        Mapping::new(range, prot, backing, self.permissions, set)
    }

    /// The unit of mappings in bytes: the smallest size of pages.
    pub(crate) fn unit(&self) -> u64 {
        self.page_sizes & self.page_sizes.wrapping_neg()
    }
}

impl IoAddressSpace {
    /// An empty space with the default limits.
    pub fn new() -> Self {
        IoAddressSpace::builder().build()
    }

    /// The same space under a name, which errors give for leases taken through it.
    pub fn named(&self, name: impl Into<String>) -> Self {
        self.derive(name.into(), self.view.owner.clone())
    }

    /// The same space, keeping `owner` alive, beside whatever this reference keeps alive: so does
    /// every handle, guard, scatter list and pin made from the result.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use iommu_type1::IoAddressSpace;
    ///
    /// let owner = Arc::new("whatever must outlive the users of the memory");
    /// let handle = IoAddressSpace::new().held_by(owner.clone()).handle();
    /// assert_eq!(Arc::strong_count(&owner), 2);
    /// drop(handle);
    /// assert_eq!(Arc::strong_count(&owner), 1);
    /// ```
    pub fn held_by(&self, owner: Arc<dyn Any + Send + Sync>) -> Self {
        let owner = match &self.view.owner {
            Some(before) => Arc::new((before.clone(), owner)),
            None => owner,
        };
        self.derive(self.view.name.clone(), Some(owner))
    }

    /// How many mappings there are, those included whose unmap has not finished.
    pub fn mappings(&self) -> usize {
        lock(&self.view.space.writer).len()
    }

    /// How many mappings there may be.
    pub fn entry_limit(&self) -> usize {
        self.view.space.entry_limit
    }

    /// What becomes of mappings that are still used at the deadline of an unmap that does not say so itself.
    pub fn unmap_policy(&self) -> UnmapPolicy {
        self.view.space.unmap.policy
    }

    /// Whose rules it follows.
    pub fn profile(&self) -> Profile {
        self.view.space.profile
    }

    /// How accesses are kept apart from unmaps.
    pub fn reader_barrier(&self) -> ReaderBarrier {
        self.view.space.grace.barrier()
    }

    /// The same space, for a set of mappings.
    pub(crate) fn signing(&self) -> Self {
        let number = self.view.space.sets.fetch_add(1, Ordering::Relaxed);
        IoAddressSpace {
            view: Arc::new(View {
                space: self.view.space.clone(),
                name: self.view.name.clone(),
                set: SetId::new(number + 1),
                owner: self.view.owner.clone(),
            }),
        }
    }

    fn derive(&self, name: String, owner: Option<Arc<dyn Any + Send + Sync>>) -> Self {
        IoAddressSpace {
            view: Arc::new(View {
                space: self.view.space.clone(),
                name,
                set: self.view.set,
                owner,
            }),
        }
    }
}

impl Default for IoAddressSpace {
    fn default() -> Self {
        IoAddressSpace::new()
    }
}

impl fmt::Debug for IoAddressSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.view.fmt(f)
    }
}

impl fmt::Debug for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoAddressSpace")
            .field("name", &self.name)
            .field("mappings", &lock(&self.space.writer).len())
            .field("held", &self.owner.is_some())
            .finish()
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The limits and rules of a space, and how one is made with them.

use std::sync::atomic::AtomicU64;
use std::sync::Arc;
use std::time::Duration;

use checked_sync::{Mutex, CHECKED};
use page_pin::{PinOptions, PinTable};

use super::{IoAddressSpace, Space, View};
use crate::grace::Grace;
use crate::lease::Ledger;
use crate::listen::Listeners;
use crate::mapping_set::SetId;
use crate::membarrier;
use crate::range::page_size;
use crate::stats::Counters;
use crate::table::Table;
use crate::writer::Writer;
use crate::{IovaRanges, PermissionPolicy, Profile, ReaderBarrier, UnmapOptions, UnmapPolicy};

/// How many mappings a space may have unless told otherwise: the kernel's `dma_entry_limit`, which
/// keeps a guest from exhausting the host's memory with them (CVE-2019-3882).
pub const DMA_ENTRY_LIMIT: usize = 65535;

/// Memory the nodes of the table may take unless told otherwise. A guest that maps two pages in each
/// of 15 000 places far from each other gets there; dense mappings take 16 bytes each.
pub const TABLE_LIMIT: usize = 128 << 20;

/// Memory the marks of dirty pages may take unless told otherwise: enough for 4 TiB of mapped pages. A
/// guest that maps the same memory again and again would have no bound else.
pub const DIRTY_LIMIT: usize = 128 << 20;

/// How long an unmap waits for holders unless told otherwise: below the 5 s after which QEMU gives
/// up on a vfio-user server.
pub const UNMAP_DEADLINE: Duration = Duration::from_secs(1);

/// How often an unmap tells holders of pins again, over the time until its deadline, unless told otherwise:
/// with the first notice as often as the kernel does before it gives up.
pub const UNMAP_REMINDERS: u32 = 9;

/// Limits of an [`IoAddressSpace`].
///
/// ```
/// use std::time::Duration;
/// use iommu_type1::{IoAddressSpace, UnmapPolicy};
///
/// let space = IoAddressSpace::builder()
///     .entry_limit(1024)
///     .unmap_deadline(Duration::from_millis(100))
///     .unmap_policy(UnmapPolicy::Restore)
///     .build();
/// assert_eq!(space.entry_limit(), 1024);
/// ```
#[derive(Clone, Debug)]
#[must_use]
pub struct IoAddressSpaceBuilder {
    page_sizes: u64,
    ranges: IovaRanges,
    entry_limit: usize,
    table_limit: usize,
    log_limit: usize,
    unmap: UnmapOptions,
    barrier: ReaderBarrier,
    profile: Profile,
    permissions: Option<PermissionPolicy>,
    reminders: u32,
    pins: PinOptions,
}

impl IoAddressSpace {
    /// An empty space with limits of one's own.
    pub fn builder() -> IoAddressSpaceBuilder {
        IoAddressSpaceBuilder {
            page_sizes: u64::MAX,
            ranges: IovaRanges::default(),
            entry_limit: DMA_ENTRY_LIMIT,
            table_limit: TABLE_LIMIT,
            log_limit: DIRTY_LIMIT,
            unmap: UnmapOptions::new(),
            barrier: ReaderBarrier::default(),
            profile: Profile::default(),
            permissions: None,
            // In a model time passes once.
            reminders: if CHECKED { 0 } else { UNMAP_REMINDERS },
            pins: PinOptions::new(),
        }
    }
}

impl IoAddressSpaceBuilder {
    /// The sizes of pages, a bit each; all by default. The lowest is the unit of mappings. Sizes below the
    /// host page are left out; the host page is taken where nothing is left or one of them was there, as the
    /// kernel does.
    ///
    /// ```
    /// use iommu_type1::{Backing, IoAddressSpace};
    /// use vm_memory::Permissions::ReadWrite;
    ///
    /// let space = IoAddressSpace::builder().page_sizes(1 << 21 | 1 << 30).build();
    /// let error = space.map(0x1000, Backing::anonymous(0x1000)?, ReadWrite).unwrap_err();
    /// assert_eq!(error.errno(), libc::EINVAL);
    /// # Ok::<(), iommu_type1::Error>(())
    /// ```
    pub fn page_sizes(mut self, sizes: u64) -> Self {
        self.page_sizes = sizes;
        self
    }

    /// The addresses that may be mapped; all by default.
    pub fn iova_ranges(mut self, ranges: IovaRanges) -> Self {
        self.ranges = ranges;
        self
    }

    /// Most mappings at a time; [`DMA_ENTRY_LIMIT`] by default.
    pub fn entry_limit(mut self, limit: usize) -> Self {
        self.entry_limit = limit;
        self
    }

    /// Most bytes that the nodes of the table take; [`TABLE_LIMIT`] by default.
    pub fn table_limit(mut self, bytes: usize) -> Self {
        self.table_limit = bytes;
        self
    }

    /// Most bytes that the marks of dirty pages take, a bit a mapped page; [`DIRTY_LIMIT`] by default.
    pub fn dirty_limit(mut self, bytes: usize) -> Self {
        self.log_limit = bytes;
        self
    }

    /// How long an unmap waits for holders; [`UNMAP_DEADLINE`] by default.
    pub fn unmap_deadline(mut self, deadline: Duration) -> Self {
        self.unmap = self.unmap.deadline(deadline);
        self
    }

    /// What becomes of a mapping whose holders do not let go in time;
    /// [`UnmapPolicy::Revoked`] by default.
    pub fn unmap_policy(mut self, policy: UnmapPolicy) -> Self {
        self.unmap = self.unmap.policy(policy);
        self
    }

    /// How often an unmap tells holders of pins again; [`UNMAP_REMINDERS`] by default.
    pub fn unmap_reminders(mut self, times: u32) -> Self {
        self.reminders = times;
        self
    }

    /// How pins are counted and limited.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use iommu_type1::{IoAddressSpace, PinOptions};
    ///
    /// let options = PinOptions::new().max_pages(32).exact_unpin(true);
    /// let space = IoAddressSpace::builder().pin_options(options).build();
    /// assert_eq!(space.max_pin_pages(), 32);
    /// ```
    pub fn pin_options(mut self, options: PinOptions) -> Self {
        self.pins = options;
        self
    }

    /// How accesses are kept apart from unmaps; [`ReaderBarrier::Fence`] by default. Where the kernel
    /// refuses what it needs, the space does with that;
    /// [`reader_barrier`](IoAddressSpace::reader_barrier) says which it is.
    ///
    /// ```
    /// use iommu_type1::{IoAddressSpace, ReaderBarrier};
    ///
    /// let space = IoAddressSpace::builder()
    ///     .reader_barrier(ReaderBarrier::Membarrier)
    ///     .build();
    /// println!("accesses are short with {:?}", space.reader_barrier());
    /// ```
    pub fn reader_barrier(mut self, barrier: ReaderBarrier) -> Self {
        self.barrier = barrier;
        self
    }

    /// Whose rules the space follows; [`Profile::Type1v2`] by default.
    pub fn profile(mut self, profile: Profile) -> Self {
        self.profile = profile;
        self
    }

    /// What a mapping has to permit for a write; what the profile says by default, whichever of the two
    /// is called first.
    ///
    /// ```
    /// use iommu_type1::{Backing, IoAddressSpace, PermissionPolicy};
    /// use vm_memory::Permissions::Write;
    ///
    /// let type1 = IoAddressSpace::builder();
    /// let strict = type1.clone().permission_policy(PermissionPolicy::Strict);
    /// for (builder, is_writable) in [(type1, false), (strict, true)] {
    ///     let space = builder.build();
    ///     space.map(0, Backing::anonymous(0x1000)?, Write)?;
    ///     assert_eq!(space.write(0, &[1]).is_ok(), is_writable);
    ///     assert!(space.read(0, &mut [0]).is_err());
    /// }
    /// # Ok::<(), iommu_type1::Error>(())
    /// ```
    pub fn permission_policy(mut self, policy: PermissionPolicy) -> Self {
        self.permissions = Some(policy);
        self
    }

    /// Most entries, bytes of the table, and bytes of marks.
    pub(crate) fn limits(&self) -> [usize; 3] {
        [self.entry_limit, self.table_limit, self.log_limit]
    }

    pub(crate) fn with_limits(self, [entries, table, log]: [usize; 3]) -> Self {
        self.entry_limit(entries)
            .table_limit(table)
            .dirty_limit(log)
    }

    /// The space.
    pub fn build(self) -> IoAddressSpace {
        let grace = Grace::new(membarrier::granted(self.barrier));
        let rules = self.profile.rules();
        IoAddressSpace {
            view: Arc::new(View {
                space: Arc::new(Space {
                    table: Table::new(),
                    leases: Ledger::new(&grace),
                    grace,
                    harvest: Mutex::new(()),
                    writer: Mutex::new(Writer::new(self.ranges)),
                    listeners: Mutex::new(Listeners::default()),
                    sets: AtomicU64::new(0),
                    pins: PinTable::with_options(page_size(), self.pins),
                    counters: Counters::default(),
                    page_sizes: from_host_page(self.page_sizes),
                    entry_limit: self.entry_limit,
                    table_limit: self.table_limit,
                    log_limit: self.log_limit,
                    unmap: self.unmap,
                    profile: self.profile,
                    rules,
                    permissions: self.permissions.unwrap_or(rules.permissions),
                    reminders: self.reminders,
                }),
                name: String::from("unnamed"),
                set: SetId::NONE,
                owner: None,
            }),
        }
    }
}

/// Sizes of pages that the host page can serve, at least one.
fn from_host_page(sizes: u64) -> u64 {
    let host = page_size();
    let smaller = host - 1;
    if sizes & smaller != 0 || sizes & !smaller == 0 {
        return sizes & !smaller | host;
    }
    sizes
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How a vGPU is made.

use crate::context::CopyMode;
use crate::ggtt::GmWindows;
use crate::guest_dma::ErrorMode;
use crate::regs::Generation;

/// How a vGPU is made.
///
/// ```
/// use gvt_scheduler::{CopyMode, VgpuConfig};
///
/// let page_by_page = VgpuConfig { copy_mode: CopyMode::PerPage, ..VgpuConfig::default() };
/// assert_eq!(page_by_page.ggtt_entries, 0x10_0000);
/// assert!(page_by_page.skip_unchanged);
/// ```
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct VgpuConfig {
    /// The generation of the device; decides how large contexts are.
    pub generation: Generation,
    /// How context pages are put together to calls.
    pub copy_mode: CopyMode,
    /// Whether the pages of a context are not read again when it runs twice in a row.
    pub skip_unchanged: bool,
    /// What becomes of accesses that guest memory refuses.
    pub errors: ErrorMode,
    /// Entries of the GGTT, each of which maps 4 KiB.
    pub ggtt_entries: u32,
    /// The parts of the graphics memory that are the vGPU's; `None` when all of it is.
    pub windows: Option<GmWindows>,
    /// Workloads that may be in the queue of an engine, [`MAX_QUEUED`](Self::MAX_QUEUED) by default; a submission beyond
    /// is `EBUSY`.
    pub max_queued: usize,
    /// Page tables and roots that may be shadowed, [`MAX_PAGE_TABLES`](Self::MAX_PAGE_TABLES) by default; one beyond is
    /// `ENOMEM`. Pins come on top, of some 200 bytes for a page: there are as many as guest memory has pages that can be
    /// pinned.
    pub max_page_tables: usize,
}

impl VgpuConfig {
    /// The two slots of the hardware hold four workloads, and a driver waits for events before it submits more; this
    /// leaves room for a caller that is late.
    pub const MAX_QUEUED: usize = 64;

    /// A table takes 4 KiB, so that these are 64 MiB and map 32 GiB in small pages. A submission whose tables are all new
    /// reads, and pins by, 512 entries of each.
    pub const MAX_PAGE_TABLES: usize = 16_384;
}

impl Default for VgpuConfig {
    fn default() -> Self {
        Self {
            generation: Generation::default(),
            copy_mode: CopyMode::default(),
            skip_unchanged: true,
            errors: ErrorMode::default(),
            ggtt_entries: 0x10_0000,
            windows: None,
            max_queued: Self::MAX_QUEUED,
            max_page_tables: Self::MAX_PAGE_TABLES,
        }
    }
}

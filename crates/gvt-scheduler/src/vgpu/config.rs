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
    /// Workloads that may be in the queue of an engine; a submission beyond is `EBUSY`. The two slots
    /// of the hardware hold four, and a driver waits for events before it submits more; 64 leaves room
    /// for a caller that is late.
    pub max_queued: usize,
    /// Page tables and roots that may be shadowed; one beyond is `ENOMEM`. A table takes 4 KiB, so
    /// that 16384 of them are 64 MiB and map 32 GiB in small pages. Pins come on top, of some 200 bytes
    /// for a page: there are as many as guest memory has pages that can be pinned.
    pub max_page_tables: usize,
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
            max_queued: 64,
            max_page_tables: 16384,
        }
    }
}

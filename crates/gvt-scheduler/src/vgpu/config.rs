// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How a vGPU is made.

use crate::context::CopyMode;
use crate::ggtt::GmWindows;
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
    /// Entries of the GGTT, each of which maps 4 KiB.
    pub ggtt_entries: u32,
    /// The parts of the graphics memory that are the vGPU's; `None` when all of it is.
    pub windows: Option<GmWindows>,
}

impl Default for VgpuConfig {
    fn default() -> Self {
        Self {
            generation: Generation::default(),
            copy_mode: CopyMode::default(),
            skip_unchanged: true,
            ggtt_entries: 0x10_0000,
            windows: None,
        }
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The host's copy of a context, on which the engine works.

use std::fmt;

use crate::regs::{ring_context, PAGE_SIZE};

/// A context's page 1 and pages `2..n` in host memory.
///
/// Of page 1 the fields a guest may set (context control, time stamp and, on the render engine, the
/// workaround batches) and everything behind the ring context come from the guest; the other fields
/// of the ring context are the host's and stay zero. There is one image an engine; a context that
/// asks for restore inhibit finds the pages of its predecessor in it and must not use them.
///
/// ```
/// use gvt_scheduler::ShadowImage;
///
/// let mut image = ShadowImage::new(22);
/// assert_eq!(image.pages().len(), 20 * 4096);
/// image.set_ctx_ctrl(0x0001_0001);
/// assert!(image.restore_inhibit());
/// ```
#[derive(Clone)]
pub struct ShadowImage {
    page1: Box<[u8; PAGE_SIZE]>,
    pages: Vec<u8>,
}

impl ShadowImage {
    /// A zeroed image of an object of `n` pages, of which `2..n` are the engine context.
    pub fn new(n: usize) -> Self {
        Self {
            page1: Box::new([0; PAGE_SIZE]),
            pages: vec![0; n.saturating_sub(2).saturating_mul(PAGE_SIZE)],
        }
    }

    /// Zeroes all of it.
    pub(crate) fn clear(&mut self) {
        self.page1.fill(0);
        self.pages.fill(0);
    }

    /// Page 1: the ring context and the beginning of the engine context.
    pub fn page1(&self) -> &[u8; PAGE_SIZE] {
        &self.page1
    }

    /// Page 1, to be changed.
    pub fn page1_mut(&mut self) -> &mut [u8; PAGE_SIZE] {
        &mut self.page1
    }

    /// The part of page 1 behind the ring context.
    pub fn page1_rest(&self) -> &[u8] {
        &self.page1[ring_context::SIZE..]
    }

    /// The part of page 1 behind the ring context, to be changed.
    pub fn page1_rest_mut(&mut self) -> &mut [u8] {
        &mut self.page1[ring_context::SIZE..]
    }

    /// Pages `2..n` without a gap.
    pub fn pages(&self) -> &[u8] {
        &self.pages
    }

    /// Pages `2..n` without a gap, to be changed.
    pub fn pages_mut(&mut self) -> &mut [u8] {
        &mut self.pages
    }

    /// The context control field, a masked register.
    pub fn ctx_ctrl(&self) -> u32 {
        self.dword(ring_context::CTX_CTRL)
    }

    /// Sets the context control field.
    pub fn set_ctx_ctrl(&mut self, value: u32) {
        self.set_dword(ring_context::CTX_CTRL, value);
    }

    /// Whether the engine must begin with its power-on state instead of the image.
    pub fn restore_inhibit(&self) -> bool {
        self.ctx_ctrl() & ring_context::RESTORE_INHIBIT != 0
    }

    /// The time the context has run, in ticks of the engine.
    pub fn ctx_timestamp(&self) -> u32 {
        self.dword(ring_context::TIMESTAMP)
    }

    /// Sets the time the context has run.
    pub fn set_ctx_timestamp(&mut self, value: u32) {
        self.set_dword(ring_context::TIMESTAMP, value);
    }

    /// `offset` is inside the page, by four bytes at least.
    pub(crate) fn set_dword(&mut self, offset: usize, value: u32) {
        self.page1[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn dword(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.page1[offset..offset + 4]);
        u32::from_le_bytes(bytes)
    }
}

impl fmt::Debug for ShadowImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShadowImage")
            .field("ctx_ctrl", &format_args!("{:#x}", self.ctx_ctrl()))
            .field("ctx_timestamp", &self.ctx_timestamp())
            .field("pages", &(self.pages.len() / PAGE_SIZE))
            .finish_non_exhaustive()
    }
}

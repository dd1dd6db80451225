// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A page of a mapping in one word.

use std::ptr;

use vm_memory::VolatileSlice;

use super::need::{Need, PLAIN};
use super::InlineSlice;
use crate::dirty::InlineMarks;
use crate::range::page_shift;

/// The host address of a page and what may be done with it, in one word; null where nothing is mapped.
///
/// Host pages are aligned, which leaves the bits of [`Need`] free.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PageWord(pub(super) *mut ());

impl PageWord {
    pub(crate) const NONE: PageWord = PageWord(ptr::null_mut());

    pub(crate) fn from_raw(raw: *mut ()) -> Self {
        PageWord(raw)
    }

    pub(crate) fn into_raw(self) -> *mut () {
        self.0
    }

    /// `len` bytes from `iova`, one at least, if they lie in this page and may be accessed as `need`
    /// says without a look at the mapping.
    ///
    /// # Safety
    ///
    /// The word was found at the page of `iova` by an access that runs for all of the lifetime.
    #[inline]
    pub(crate) unsafe fn slice<'a>(
        self,
        iova: u64,
        len: usize,
        need: Need,
    ) -> Option<InlineSlice<'a>> {
        let page_mask = (1_usize << page_shift()) - 1;
        let offset = iova as usize & page_mask;
        let bits = if need.writes() {
            need.0 | PLAIN
        } else {
            need.0
        };
        let fits = len.wrapping_sub(1) <= page_mask - offset;
        if !fits || self.0.addr() & bits != bits {
            return None;
        }
        let memory = self.0.map_addr(|addr| addr & !page_mask | offset).cast();
        // SAFETY: the page belongs to a mapping, which lives while the access runs.
        Some(unsafe { VolatileSlice::with_bitmap(memory, len, InlineMarks::NONE, None) })
    }
}

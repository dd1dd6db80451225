// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory for nodes that are about to come.

use std::alloc::{alloc, dealloc, handle_alloc_error};
use std::ptr;

use super::node::{layout, Raw};

/// How many nodes something takes.
#[derive(Clone, Copy, Default)]
pub(super) struct Needed {
    /// Of level 0.
    leaves: usize,
    others: usize,
}

impl Needed {
    pub(super) fn one(level: u32) -> Self {
        Needed {
            leaves: usize::from(level == 0),
            others: usize::from(level > 0),
        }
    }

    pub(super) fn and(self, more: Needed) -> Self {
        Needed {
            leaves: self.leaves + more.leaves,
            others: self.others + more.others,
        }
    }
}

/// Memory for nodes, taken before anything is changed that could not be finished without it.
///
/// # Invariants
///
/// Each list is of blocks with the layout of its kind of node, which nobody else has; in the first word of each
/// stands the next.
pub(super) struct Spares {
    leaves: *mut Raw,
    others: *mut Raw,
}

impl Spares {
    /// # Errors
    ///
    /// The bytes that there is no memory for.
    pub(super) fn new(needed: Needed) -> Result<Self, usize> {
        let mut spares = Spares {
            leaves: ptr::null_mut(),
            others: ptr::null_mut(),
        };
        for (is_leaf, count) in [(true, needed.leaves), (false, needed.others)] {
            for _ in 0..count {
                spares.add(is_leaf)?;
            }
        }
        Ok(spares)
    }

    fn list(&mut self, is_leaf: bool) -> &mut *mut Raw {
        if is_leaf {
            &mut self.leaves
        } else {
            &mut self.others
        }
    }

    fn add(&mut self, is_leaf: bool) -> Result<(), usize> {
        let layout = layout(is_leaf);
        // SAFETY: a node has a size.
        let block = unsafe { alloc(layout) }.cast::<Raw>();
        if block.is_null() {
            return Err(layout.size());
        }
        let list = self.list(is_leaf);
        // SAFETY: the block has room for a word, and nobody else has it.
        unsafe { block.write(list.cast()) };
        *list = block;
        Ok(())
    }

    /// Memory for a node. There is some, as it was counted before.
    pub(super) fn take(&mut self, is_leaf: bool) -> *mut u8 {
        if self.list(is_leaf).is_null() && self.add(is_leaf).is_err() {
            handle_alloc_error(layout(is_leaf));
        }
        let list = self.list(is_leaf);
        let block = *list;
        // SAFETY: by the invariant.
        *list = unsafe { block.read() }.cast();
        block.cast()
    }

    /// Whether there were exactly as many as needed.
    pub(super) fn are_used_up(&self) -> bool {
        self.leaves.is_null() && self.others.is_null()
    }
}

impl Drop for Spares {
    fn drop(&mut self) {
        for is_leaf in [true, false] {
            while !self.list(is_leaf).is_null() {
                let block = self.take(is_leaf);
                // SAFETY: made with this layout, by the invariant.
                unsafe { dealloc(block, layout(is_leaf)) };
            }
        }
    }
}

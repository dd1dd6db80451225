// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory of mappings that have none.

use std::ptr;

use vm_memory::Permissions;

use crate::backing::Region;

/// The memory of mappings that have none.
pub(super) struct Nowhere;

// SAFETY: there are no bytes that anything could be said of.
unsafe impl Region for Nowhere {
    fn host_address(&self) -> *mut u8 {
        ptr::null_mut()
    }

    fn size(&self) -> usize {
        0
    }

    fn access(&self) -> Permissions {
        Permissions::No
    }

    fn tracks(&self) -> bool {
        false
    }

    fn mark_dirty(&self, _offset: usize, _len: usize) {}

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }
}

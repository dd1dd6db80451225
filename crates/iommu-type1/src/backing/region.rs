// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory regions of any bitmap type behind one face.

use std::any::TypeId;

use vm_memory::bitmap::Bitmap;
use vm_memory::{FileOffset, MmapRegion, Permissions};

/// Memory mapped into this process.
///
/// # Safety
///
/// `size()` bytes are mapped at `host_address()` for as long as the value lives, both never change,
/// and what `access()` allows can be done with every one of them.
pub(crate) unsafe trait Region: Send + Sync {
    fn host_address(&self) -> *mut u8;
    fn size(&self) -> usize;
    fn access(&self) -> Permissions;
    /// Whether anybody keeps what `mark_dirty` says.
    fn tracks(&self) -> bool;
    fn mark_dirty(&self, offset: usize, len: usize);
    fn dirty_at(&self, offset: usize) -> bool;
    /// Where in which file it begins, if it is of a file.
    fn file_offset(&self) -> Option<&FileOffset> {
        None
    }
    /// Offset of the first byte that is known to be gone.
    fn fault_offset(&self) -> Option<usize> {
        None
    }
    /// Whether somebody looks out for bytes that are gone.
    #[cfg(feature = "sigbus")]
    fn is_guarded(&self) -> bool {
        false
    }
}

// SAFETY: an `MmapRegion` maps `size` bytes at its address until it is dropped; its constructors
// check that (and `build_raw`'s caller promises it).
unsafe impl<B: Bitmap + Send + Sync + 'static> Region for MmapRegion<B> {
    fn host_address(&self) -> *mut u8 {
        self.as_ptr()
    }

    fn size(&self) -> usize {
        self.size()
    }

    fn access(&self) -> Permissions {
        from_prot(self.prot())
    }

    fn tracks(&self) -> bool {
        TypeId::of::<B>() != TypeId::of::<()>()
    }

    fn mark_dirty(&self, offset: usize, len: usize) {
        self.bitmap().mark_dirty(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.bitmap().dirty_at(offset)
    }

    fn file_offset(&self) -> Option<&FileOffset> {
        self.file_offset()
    }
}

#[cfg(test)]
// SAFETY: no bytes are claimed.
unsafe impl Region for () {
    fn host_address(&self) -> *mut u8 {
        std::ptr::NonNull::dangling().as_ptr()
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

pub(crate) fn to_prot(access: Permissions) -> i32 {
    let read = if access.allow(Permissions::Read) {
        libc::PROT_READ
    } else {
        libc::PROT_NONE
    };
    let write = if access.allow(Permissions::Write) {
        libc::PROT_WRITE
    } else {
        libc::PROT_NONE
    };
    read | write
}

fn from_prot(prot: i32) -> Permissions {
    let read = if prot & libc::PROT_READ != 0 {
        Permissions::Read
    } else {
        Permissions::No
    };
    let write = if prot & libc::PROT_WRITE != 0 {
        Permissions::Write
    } else {
        Permissions::No
    };
    read | write
}

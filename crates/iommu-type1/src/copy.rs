// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Copies between memory and a buffer: what vm-memory's volatile slices do, without a call in between,
//! which for short ones is a tenth of an access.
//!
//! Up to a word vm-memory copies by aligned volatile accesses, so that what a guest and a device share
//! (an index of a ring) is never seen in halves; that is left to it. More is a plain copy there too.

use std::ptr;

use vm_memory::bitmap::Bitmap;

use crate::mapping::InlineSlice;

/// Bytes that vm-memory copies with more care.
const WORD: usize = size_of::<usize>();

/// Fills `buf`, as far as the slice goes.
#[inline]
pub(crate) fn read(slice: &InlineSlice<'_>, buf: &mut [u8]) {
    let len = buf.len().min(slice.len());
    if len <= WORD {
        slice.copy_to(buf);
        return;
    }
    let memory = slice.ptr_guard();
    // SAFETY: both have `len` bytes; memory behind a slice is never part of a buffer.
    unsafe { copy_shared_bytes(memory.as_ptr(), buf.as_mut_ptr(), len) };
}

/// Writes `buf`, as far as the slice goes, and marks what was written.
#[inline]
pub(crate) fn write(slice: &InlineSlice<'_>, buf: &[u8]) {
    let len = buf.len().min(slice.len());
    if len <= WORD {
        slice.copy_from(buf);
        return;
    }
    let memory = slice.ptr_guard_mut();
    // SAFETY: as in `read`.
    unsafe { copy_shared_bytes(buf.as_ptr(), memory.as_ptr(), len) };
    slice.bitmap().mark_dirty(0, len);
}

/// The plain copy. As in vm-memory's own, whoever shares the memory may change it meanwhile: any bytes are
/// valid bytes. `ci/tsan` knows these races by the name of this function.
///
/// # Safety
///
/// Both have `len` bytes, and are not parts of each other.
#[inline]
unsafe fn copy_shared_bytes(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: by the contract of this function.
    unsafe { ptr::copy_nonoverlapping(from, to, len) };
}

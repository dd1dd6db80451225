// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Host memory that begins at a page.

use std::ops::{Deref, DerefMut};

use crate::regs::PAGE_SIZE;

/// Whole pages, aligned as those of a guest are: copies between the two are at their fastest then,
/// wherever the allocator has room.
pub(super) struct PageBuffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl PageBuffer {
    /// `pages` pages of zeros.
    pub(super) fn zeroed(pages: usize) -> Self {
        let len = pages.saturating_mul(PAGE_SIZE);
        let memory = vec![0; len.saturating_add(PAGE_SIZE - 1)];
        // What cannot be aligned is as good from anywhere.
        let start = memory.as_ptr().align_offset(PAGE_SIZE);
        PageBuffer {
            start: start.min(PAGE_SIZE - 1),
            memory,
            len,
        }
    }
}

impl Deref for PageBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }
}

impl DerefMut for PageBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

impl Clone for PageBuffer {
    fn clone(&self) -> Self {
        let mut clone = PageBuffer::zeroed(self.len / PAGE_SIZE);
        clone.copy_from_slice(self);
        clone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_aligned_also_in_a_clone() {
        for pages in [0, 1, 20] {
            let mut buffer = PageBuffer::zeroed(pages);
            assert_eq!(buffer.len(), pages * PAGE_SIZE);
            buffer.fill(7);
            let clone = buffer.clone();
            assert!(*clone == *buffer);
            for buffer in [&buffer, &clone] {
                assert_eq!(buffer.as_ptr().align_offset(PAGE_SIZE), 0);
            }
        }
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Nodes that nobody can find any more.

use std::mem::ManuallyDrop;
use std::ptr;

use super::node::Node;

/// What a removal has made unreachable. Accesses that are running may still see it: it must be kept
/// until a grace period has passed.
///
/// # Invariants
///
/// A list of nodes in which each knows the next, and `last` is the last, if there are any. They are not boxes: a
/// box would claim that nobody else reads the node.
pub(crate) struct Unlinked {
    first: *mut Node,
    last: *mut Node,
    bytes: usize,
}

// SAFETY: unlinked nodes belong to whoever has them; only running accesses still read their words.
unsafe impl Send for Unlinked {}

impl Default for Unlinked {
    fn default() -> Self {
        Unlinked {
            first: ptr::null_mut(),
            last: ptr::null_mut(),
            bytes: 0,
        }
    }
}

impl Unlinked {
    pub(crate) fn append(&mut self, other: Unlinked) {
        let other = ManuallyDrop::new(other);
        if other.first.is_null() {
            return;
        }
        if self.first.is_null() {
            self.first = other.first;
        } else {
            // SAFETY: by the invariant, and only who has the list looks at `next`.
            unsafe { &*self.last }.next.set(other.first);
        }
        self.last = other.last;
        self.bytes += other.bytes;
    }

    pub(super) fn push(&mut self, node: *mut Node) {
        // SAFETY: the caller has just unlinked it: it is allocated, and in no other list.
        let bytes = unsafe { &*node }.bytes();
        self.append(Unlinked {
            first: node,
            last: node,
            bytes,
        });
    }

    /// Memory of it.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Unlinked {
    fn drop(&mut self) {
        let mut node = self.first;
        while !node.is_null() {
            // SAFETY: by the invariant.
            let next = unsafe { &*node }.next.get();
            // SAFETY: a removal took the only word of it away, and by the contract of this type no
            // access that saw it runs any more.
            unsafe { Node::free(node) };
            node = next;
        }
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who wants to see the accesses to guest memory, and a counter of them.

use std::fmt;

use vm_memory::GuestAddress;

/// What an access to guest memory is for.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum AccessKind {
    /// A dword of the ring context, read.
    ContextDword,
    /// Ring or indirect context batch, read.
    Ring,
    /// The part of a context's page 1 that follows the ring context.
    Page1,
    /// Pages of the engine context.
    ContextPage,
    /// An entry of a page table, read.
    PageTable,
    /// What tells the guest that something happened: dwords of the ring context and status events.
    Completion,
    /// What the engine reads and writes when it executes commands.
    Engine,
}

impl AccessKind {
    /// Every kind.
    pub const ALL: [AccessKind; 7] = [
        AccessKind::ContextDword,
        AccessKind::Ring,
        AccessKind::Page1,
        AccessKind::ContextPage,
        AccessKind::PageTable,
        AccessKind::Completion,
        AccessKind::Engine,
    ];

    /// The name of the kind, in snake case.
    pub const fn name(self) -> &'static str {
        match self {
            AccessKind::ContextDword => "context_dword",
            AccessKind::Ring => "ring",
            AccessKind::Page1 => "page1",
            AccessKind::ContextPage => "context_page",
            AccessKind::PageTable => "page_table",
            AccessKind::Completion => "completion",
            AccessKind::Engine => "engine",
        }
    }
}

impl fmt::Display for AccessKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One access to guest memory, which is one call of [`vm_memory::Bytes`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Access {
    /// What it is for.
    pub kind: AccessKind,
    /// Whether guest memory is written.
    pub write: bool,
    /// First byte.
    pub gpa: GuestAddress,
    /// Length in bytes.
    pub len: usize,
}

/// A part of a workload's life.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Step {
    /// The ring context and the page tables are read.
    Create,
    /// Ring and indirect context batch are copied.
    Scan,
    /// The context is copied into the shadow image.
    Populate,
    /// The execlist is scheduled in.
    Prepare,
    /// The engine executes it.
    Execute,
    /// The shadow image is written back and the execlist scheduled out.
    Complete,
}

/// Sees every access to guest memory before it is made, and the steps they belong to.
///
/// Both methods do nothing unless they are implemented; `()` observes nothing and costs nothing.
///
/// ```
/// use gvt_scheduler::{Access, Observer};
///
/// #[derive(Default)]
/// struct Trace(Vec<Access>);
///
/// impl Observer for Trace {
///     fn access(&mut self, access: &Access) {
///         self.0.push(*access);
///     }
/// }
/// ```
pub trait Observer {
    /// An access is about to be made.
    fn access(&mut self, access: &Access) {
        let _ = access;
    }

    /// The workload with this submission number enters a step.
    fn step(&mut self, sequence: u64, step: Step) {
        let _ = (sequence, step);
    }
}

impl Observer for () {}

impl<O: Observer + ?Sized> Observer for &mut O {
    fn access(&mut self, access: &Access) {
        (**self).access(access);
    }

    fn step(&mut self, sequence: u64, step: Step) {
        (**self).step(sequence, step);
    }
}

/// Accesses of one kind.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Counts {
    /// Calls that read.
    pub reads: u64,
    /// Bytes they read.
    pub read_bytes: u64,
    /// Calls that wrote.
    pub writes: u64,
    /// Bytes they wrote.
    pub written_bytes: u64,
}

impl Counts {
    fn add(&mut self, other: &Counts) {
        self.reads = self.reads.saturating_add(other.reads);
        self.read_bytes = self.read_bytes.saturating_add(other.read_bytes);
        self.writes = self.writes.saturating_add(other.writes);
        self.written_bytes = self.written_bytes.saturating_add(other.written_bytes);
    }
}

/// An observer that counts.
///
/// ```
/// use gvt_scheduler::{Access, AccessCounts, AccessKind, Observer};
/// use vm_memory::GuestAddress;
///
/// let mut counts = AccessCounts::default();
/// counts.access(&Access { kind: AccessKind::Ring, write: false, gpa: GuestAddress(0), len: 160 });
/// assert_eq!(counts.get(AccessKind::Ring).reads, 1);
/// assert_eq!(counts.total().read_bytes, 160);
/// ```
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct AccessCounts {
    counts: [Counts; AccessKind::ALL.len()],
}

impl AccessCounts {
    /// Accesses of one kind.
    pub fn get(&self, kind: AccessKind) -> Counts {
        self.counts[kind as usize]
    }

    /// Accesses of all kinds.
    pub fn total(&self) -> Counts {
        let mut total = Counts::default();
        self.counts.iter().for_each(|counts| total.add(counts));
        total
    }

    /// Adds what another counter saw.
    pub fn merge(&mut self, other: &AccessCounts) {
        for (counts, more) in self.counts.iter_mut().zip(&other.counts) {
            counts.add(more);
        }
    }
}

impl Observer for AccessCounts {
    fn access(&mut self, access: &Access) {
        let bytes = access.len as u64;
        let one = if access.write {
            Counts {
                writes: 1,
                written_bytes: bytes,
                ..Counts::default()
            }
        } else {
            Counts {
                reads: 1,
                read_bytes: bytes,
                ..Counts::default()
            }
        };
        self.counts[access.kind as usize].add(&one);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(kind: AccessKind, write: bool, len: usize) -> Access {
        Access {
            kind,
            write,
            gpa: GuestAddress(0x1000),
            len,
        }
    }

    #[test]
    fn kinds_are_counted_apart_and_add_up() {
        let mut counts = AccessCounts::default();
        for (i, kind) in AccessKind::ALL.into_iter().enumerate() {
            counts.access(&access(kind, false, i));
            counts.access(&access(kind, true, 10 * i));
            assert_eq!(counts.get(kind).read_bytes, i as u64);
            assert_eq!(counts.get(kind).written_bytes, 10 * i as u64);
        }
        assert_eq!(counts.total().reads, 7);
        assert_eq!(counts.total().writes, 7);
        assert_eq!(counts.total().read_bytes, 21);
        let mut twice = counts;
        twice.merge(&counts);
        assert_eq!(twice.total().written_bytes, 420);
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Limits and rules of a table.

use std::sync::atomic::AtomicI32;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use checked_sync::LONGEST;
use iommu_type1::{IoAddressSpace, DMA_ENTRY_LIMIT};

use super::{DmaTable, Inner};
use crate::file_memory::Files;
use crate::message_dma::MessageDma;
use crate::{Result, FILE_BYTES_LIMIT};

/// How long an unmap waits for those who touch the range unless told otherwise: QEMU takes the server for dead
/// after 5 s.
pub const UNMAP_DEADLINE: Duration = Duration::from_secs(3);

/// How long an access to memory without a file waits for the client unless told otherwise.
pub const MESSAGE_DEADLINE: Duration = Duration::from_secs(5);

/// Limits and rules of a [`DmaTable`].
///
/// ```
/// use std::time::Duration;
/// use vfio_user_dma::DmaTable;
///
/// let table = DmaTable::builder().entry_limit(1).unmap_deadline(Duration::from_secs(1)).build()?;
/// table.map(3, 0, 0, 0x1000, None)?;
/// assert_eq!(table.map(3, 0, 0x1000, 0x1000, None).unwrap_err().errno(), libc::ENOSPC);
/// # Ok::<(), vfio_user_dma::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct DmaTableBuilder {
    pub(super) entry_limit: usize,
    pub(super) unmap_deadline: Duration,
    pub(super) message_deadline: Duration,
    pub(super) strict_unmap: bool,
    pub(super) require_seals: bool,
    pub(super) guard_files: bool,
    pub(super) file_bytes_limit: u64,
}

impl DmaTableBuilder {
    pub(super) fn new() -> Self {
        DmaTableBuilder {
            entry_limit: DMA_ENTRY_LIMIT,
            unmap_deadline: UNMAP_DEADLINE,
            message_deadline: MESSAGE_DEADLINE,
            strict_unmap: false,
            require_seals: false,
            guard_files: false,
            file_bytes_limit: FILE_BYTES_LIMIT,
        }
    }

    /// Most mappings, [`DMA_ENTRY_LIMIT`] unless told otherwise.
    pub fn entry_limit(mut self, limit: usize) -> Self {
        self.entry_limit = limit;
        self
    }

    /// Most bytes of the files behind mappings, each of which counts as a whole, [`FILE_BYTES_LIMIT`] unless told
    /// otherwise.
    pub fn file_bytes_limit(mut self, bytes: u64) -> Self {
        self.file_bytes_limit = bytes;
        self
    }

    /// How long an unmap waits for those who touch the range, [`UNMAP_DEADLINE`] unless told otherwise.
    pub fn unmap_deadline(mut self, deadline: Duration) -> Self {
        self.unmap_deadline = deadline;
        self
    }

    /// How long an access to memory without a file waits for the client, [`MESSAGE_DEADLINE`] unless told
    /// otherwise.
    pub fn message_deadline(mut self, deadline: Duration) -> Self {
        self.message_deadline = deadline.min(LONGEST);
        self
    }

    /// Whether an unmap must be of exactly one mapping, as the text of the protocol has it. Otherwise the rule
    /// of type1 v2 holds: everything that is wholly inside goes, and nothing may be cut.
    pub fn strict_unmap(mut self, strict: bool) -> Self {
        self.strict_unmap = strict;
        self
    }

    /// Whether files must be sealed against shrinking (`F_SEAL_SHRINK`, as QEMU seals its memfds). A client that
    /// shrinks a file that is not kills this process with SIGBUS at the next access, unless files are guarded (feature
    /// `sigbus`).
    pub fn require_seals(mut self, require: bool) -> Self {
        self.require_seals = require;
        self
    }

    /// Whether an access ends with an error (EFAULT) where a client has shrunk a file that is not sealed, and not
    /// this process. It installs a handler of SIGBUS; see [`Backing::guarded`](iommu_type1::Backing::guarded).
    #[cfg(feature = "sigbus")]
    pub fn guard_files(mut self, guard: bool) -> Self {
        self.guard_files = guard;
        self
    }

    /// Makes the table.
    ///
    /// # Errors
    ///
    /// [`Error::Io`](crate::Error::Io): no eventfd could be made.
    pub fn build(self) -> Result<DmaTable> {
        Ok(DmaTable(Arc::new(Inner {
            space: IoAddressSpace::builder()
                .entry_limit(self.entry_limit)
                .unmap_deadline(self.unmap_deadline)
                .build(),
            turn: Mutex::new(Files::new(self.file_bytes_limit, self.guard_files)),
            entries: Mutex::default(),
            messages: MessageDma::new(self.message_deadline)?,
            client: AtomicI32::new(0),
            config: self,
        })))
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Accesses in the order in which they were made.

use std::fmt;
use std::io::{self, Write};
use std::time::Duration;

use vm_memory::GuestAddress;

use crate::guest_dma::GuestDma;
use crate::observe::Step;
use crate::trace::{format, TraceError, MAX_ACCESS_BYTES};

/// One access to guest memory, as it is kept in a trace.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct TracedAccess {
    /// When, on the recorder's clock; kept in nanoseconds.
    pub time: Duration,
    /// Number of the vGPU.
    pub vgpu: u16,
    /// The step of the workload that it belongs to.
    pub step: Step,
    /// Whether guest memory was written.
    pub write: bool,
    /// First byte.
    pub iova: u64,
    /// Length in bytes.
    pub len: u32,
}

impl TracedAccess {
    /// Whether both are the same but for the time.
    pub fn is_same_access(&self, other: &TracedAccess) -> bool {
        let timeless = |access: &TracedAccess| TracedAccess {
            time: Duration::ZERO,
            ..*access
        };
        timeless(self) == timeless(other)
    }

    /// Whether a trace may have it.
    pub(super) fn is_possible(&self) -> bool {
        let last = u64::from(self.len).saturating_sub(1);
        self.len <= MAX_ACCESS_BYTES && self.iova.checked_add(last).is_some()
    }
}

impl fmt::Display for TracedAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "vGPU {} {:?} {} {:#x} {}",
            self.vgpu,
            self.step,
            if self.write { 'W' } else { 'R' },
            self.iova,
            self.len
        )
    }
}

/// Accesses in the order in which they were made, of one vGPU or several.
///
/// As bytes it is a header of 24 bytes and 24 bytes an access; docs/replay.md of the workspace has the
/// table.
///
/// ```
/// use std::time::Duration;
/// use gvt_scheduler::trace::{AccessTrace, TracedAccess};
/// use gvt_scheduler::Step;
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
///
/// let mut trace = AccessTrace::default();
/// trace.push(TracedAccess {
///     time: Duration::from_micros(3),
///     vgpu: 0,
///     step: Step::Populate,
///     write: false,
///     iova: 0x1000,
///     len: 4096,
/// })?;
/// let mut bytes = Vec::new();
/// trace.write_to(&mut bytes)?;
/// assert_eq!(AccessTrace::from_bytes(&bytes)?, trace);
///
/// // Any memory will do that is large enough.
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x2000)])?;
/// assert_eq!(trace.drive(&memory)?.read_bytes, 4096);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct AccessTrace {
    accesses: Vec<TracedAccess>,
}

/// What was done again.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Driven {
    /// Reads.
    pub reads: u64,
    /// Bytes that were read.
    pub read_bytes: u64,
    /// Writes.
    pub writes: u64,
    /// Bytes that were written.
    pub written_bytes: u64,
}

impl AccessTrace {
    /// Reads a trace. It takes as much memory as the bytes do.
    ///
    /// # Errors
    ///
    /// What is wrong with it, all EINVAL; [`TraceError::NoMemory`] (ENOMEM).
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TraceError> {
        let accesses = format::parse(bytes)?;
        Ok(AccessTrace { accesses })
    }

    /// Writes it as bytes.
    ///
    /// # Errors
    ///
    /// What `to` says.
    pub fn write_to(&self, to: impl Write) -> io::Result<()> {
        format::write(&self.accesses, to)
    }

    /// Puts an access behind the others.
    ///
    /// # Errors
    ///
    /// [`TraceError::TooMany`] and [`TraceError::Range`] (EINVAL): what could not be read again; [`TraceError::NoMemory`]
    /// (ENOMEM).
    pub fn push(&mut self, access: TracedAccess) -> Result<(), TraceError> {
        let index = self.accesses.len();
        if index >= format::MAX_ACCESSES {
            let accesses = index as u64 + 1;
            return Err(TraceError::TooMany { accesses });
        }
        if !access.is_possible() {
            let TracedAccess { iova, len, .. } = access;
            return Err(TraceError::Range { index, iova, len });
        }
        format::reserve(&mut self.accesses, 1)?;
        self.accesses.push(access);
        Ok(())
    }

    /// The accesses.
    pub fn accesses(&self) -> &[TracedAccess] {
        &self.accesses
    }

    /// The number of the first access that is another one in `other`, or that only one of the two has;
    /// `None` where they are the same. When they were made does not count.
    pub fn first_difference(&self, other: &AccessTrace) -> Option<usize> {
        let both = self.accesses.iter().zip(&other.accesses);
        let different = |(one, other): (&TracedAccess, &TracedAccess)| !one.is_same_access(other);
        let (own, others) = (self.accesses.len(), other.accesses.len());
        let shorter = (own != others).then_some(own.min(others));
        both.into_iter().position(different).or(shorter)
    }

    /// Makes the accesses again, as fast as they can be made. What is written is of no meaning: a trace
    /// does not have the bytes.
    ///
    /// # Errors
    ///
    /// [`TraceError::Access`] (EFAULT) with the first that fails; those before are done. [`TraceError::NoMemory`] (ENOMEM).
    pub fn drive<M: GuestDma>(&self, memory: &M) -> Result<Driven, TraceError> {
        let longest = self.accesses.iter().map(|access| access.len).max();
        let longest = longest.unwrap_or(0) as usize;
        let mut buffer = Vec::new();
        format::reserve(&mut buffer, longest)?;
        buffer.resize(longest, 0);
        let mut driven = Driven::default();
        for (index, access) in self.accesses.iter().enumerate() {
            let TracedAccess { iova, len, .. } = *access;
            let buffer = &mut buffer[..len as usize];
            let done = if access.write {
                driven.writes += 1;
                driven.written_bytes += u64::from(len);
                memory.write_slice(buffer, GuestAddress(iova))
            } else {
                driven.reads += 1;
                driven.read_bytes += u64::from(len);
                memory.read_slice(buffer, GuestAddress(iova))
            };
            done.map_err(|source| TraceError::Access {
                index,
                iova,
                len,
                source: source.into(),
            })?;
        }
        Ok(driven)
    }
}

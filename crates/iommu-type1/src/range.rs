// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Ranges of I/O virtual addresses, inclusive at their end so that the last page of the 64-bit
//! space is one like any other.

use std::sync::OnceLock;

use crate::{Error, Result};

/// The host page size in bytes: the unit of mappings and pins.
pub fn page_size() -> u64 {
    static PAGE_SIZE: OnceLock<u64> = OnceLock::new();
    *PAGE_SIZE.get_or_init(|| {
        // SAFETY: sysconf has no preconditions.
        let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        u64::try_from(size).unwrap_or(4096)
    })
}

/// Bits of an address inside a page.
#[inline]
pub(crate) fn page_shift() -> u32 {
    // Where the architecture has one page size only, look-ups need not load it.
    if cfg!(target_arch = "x86_64") {
        12
    } else {
        page_size().trailing_zeros()
    }
}

/// A non-empty range `first..=last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct IovaRange {
    pub(crate) first: u64,
    pub(crate) last: u64,
}

impl IovaRange {
    pub(crate) const ALL: IovaRange = IovaRange {
        first: 0,
        last: u64::MAX,
    };

    /// `size` bytes from `iova`.
    pub(crate) fn new(iova: u64, size: u64) -> Result<Self> {
        let Some(length) = size.checked_sub(1) else {
            return Err(Error::Empty { iova });
        };
        match iova.checked_add(length) {
            Some(last) => Ok(IovaRange { first: iova, last }),
            None => Err(Error::Overflow { iova, size }),
        }
    }

    /// Bytes in the range; only [`IovaRange::ALL`] has one more than this can say.
    pub(crate) fn size(&self) -> u64 {
        (self.last - self.first).saturating_add(1)
    }

    pub(crate) fn contains_all(&self, other: IovaRange) -> bool {
        self.first <= other.first && other.last <= self.last
    }

    pub(crate) fn overlaps(&self, other: IovaRange) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// The part of it in a range that it overlaps.
    pub(crate) fn clamp(&self, to: IovaRange) -> IovaRange {
        IovaRange {
            first: self.first.max(to.first),
            last: self.last.min(to.last),
        }
    }

    #[inline]
    pub(crate) fn contains(&self, iova: u64) -> bool {
        self.first <= iova && iova <= self.last
    }
}

/// The same addresses as ascending ranges that do not touch each other.
pub(crate) fn union(mut ranges: Vec<IovaRange>) -> Vec<IovaRange> {
    ranges.sort_unstable_by_key(|range| range.first);
    ranges.dedup_by(|next, range| {
        let touches = range.last == u64::MAX || next.first <= range.last + 1;
        if touches {
            range.last = range.last.max(next.last);
        }
        touches
    });
    ranges
}

/// Those of ascending ranges that are apart which share an address with another.
pub(crate) fn all_met(ranges: &[IovaRange], other: IovaRange) -> &[IovaRange] {
    let first = ranges.partition_point(|range| range.last < other.first);
    let met = &ranges[first..];
    &met[..met.partition_point(|range| range.first <= other.last)]
}

/// The first of them.
pub(crate) fn first_met(ranges: &[IovaRange], other: IovaRange) -> Option<IovaRange> {
    all_met(ranges, other).first().copied()
}

/// Refuses a value that is not a multiple of the unit.
pub(crate) fn check_aligned(what: &'static str, value: u64, unit: u64) -> Result<()> {
    if value % unit == 0 {
        Ok(())
    } else {
        Err(Error::Misaligned { what, value, unit })
    }
}

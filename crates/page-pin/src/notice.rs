// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who is told of an unmap, and how.

/// Called before a range of I/O virtual addresses is unmapped: the kernel's `dma_unmap` op.
///
/// The receiver should drop its pins in the range before it returns; whoever unmaps waits for them
/// with a deadline, and may call this again for the same range while it still has some. It is called
/// with no lock of this crate held, on the unmapping thread.
///
/// An owner that is moved or detached is told of everything: `size` bytes from 0 with `u64::MAX` for
/// the size.
pub trait UnmapNotice: Send + Sync {
    /// `size` bytes from `iova` are about to be unmapped.
    fn dma_unmap(&self, iova: u64, size: u64);
}

impl<F: Fn(u64, u64) + Send + Sync> UnmapNotice for F {
    fn dma_unmap(&self, iova: u64, size: u64) {
        self(iova, size)
    }
}

/// Which unmaps an access is told of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Interest {
    /// Only ranges in which the access itself holds a pin.
    #[default]
    Holder,
    /// Also every range that overlaps `iova..=last`, pinned or not: for a model that caches
    /// translations of its own window.
    Within {
        /// First address of the window.
        iova: u64,
        /// Last address of the window, inclusive.
        last: u64,
    },
    /// Every unmap.
    All,
}

impl Interest {
    /// Whether the range `iova..=last` interests by its place alone.
    pub(crate) fn covers(&self, iova: u64, last: u64) -> bool {
        match *self {
            Interest::Holder => false,
            Interest::Within {
                iova: from,
                last: to,
            } => iova <= to && from <= last,
            Interest::All => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_is_inclusive_at_both_ends() {
        let window = Interest::Within { iova: 10, last: 20 };
        assert!(window.covers(20, 30));
        assert!(window.covers(0, 10));
        assert!(window.covers(15, 15));
        assert!(!window.covers(21, 30));
        assert!(!window.covers(0, 9));
        assert!(Interest::All.covers(0, 0));
        assert!(!Interest::Holder.covers(0, u64::MAX));
    }
}

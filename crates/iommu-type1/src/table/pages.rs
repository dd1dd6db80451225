// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Ranges of pages.

use crate::range::{page_shift, IovaRange};

/// Pages `first..=last`.
#[derive(Clone, Copy)]
pub(super) struct Pages {
    pub(super) first: u64,
    pub(super) last: u64,
}

impl Pages {
    pub(super) fn of(range: IovaRange) -> Self {
        Pages {
            first: range.first >> page_shift(),
            last: range.last >> page_shift(),
        }
    }

    pub(super) const ALL: Pages = Pages {
        first: 0,
        last: u64::MAX,
    };

    pub(super) fn clamp(self, to: Pages) -> Pages {
        Pages {
            first: self.first.max(to.first),
            last: self.last.min(to.last),
        }
    }

    pub(super) fn overlaps(self, other: Pages) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    pub(super) fn contains(self, other: Pages) -> bool {
        self.first <= other.first && other.last <= self.last
    }
}

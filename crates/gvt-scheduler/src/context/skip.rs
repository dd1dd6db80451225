// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! When the pages of a context need not be read again.

use vm_memory::GuestAddress;

/// Which context an engine's shadow image holds, if that is still what the guest has.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SkipRecord {
    held: Option<(u32, GuestAddress)>,
}

impl SkipRecord {
    pub(crate) fn holds(&self, lrca: u32, ring_context: GuestAddress) -> bool {
        self.held == Some((lrca, ring_context))
    }

    pub(crate) fn hold(&mut self, lrca: u32, ring_context: GuestAddress) {
        self.held = Some((lrca, ring_context));
    }

    pub(crate) fn forget(&mut self) {
        self.held = None;
    }

    /// The guest has written the GGTT entry `index`: a context of `pages` pages that it maps may be
    /// another one now. The kernel looks at the entry of the LRCA only.
    pub(crate) fn ggtt_written(&mut self, index: u32, pages: usize) {
        let maps_page = |lrca: u32| {
            index
                .checked_sub(lrca)
                .is_some_and(|page| (page as usize) < pages)
        };
        if self.held.is_some_and(|(lrca, _)| maps_page(lrca)) {
            self.forget();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GPA: GuestAddress = GuestAddress(0x5000);

    fn held() -> SkipRecord {
        let mut record = SkipRecord::default();
        record.hold(10, GPA);
        record
    }

    #[test]
    fn only_the_same_context_at_the_same_address_is_held() {
        assert!(held().holds(10, GPA));
        assert!(!held().holds(11, GPA));
        assert!(!held().holds(10, GuestAddress(0x6000)));
        assert!(!SkipRecord::default().holds(0, GuestAddress(0)));
    }

    #[test]
    fn a_write_to_an_entry_of_the_context_ends_it() {
        for (index, kept) in [(9, true), (10, false), (31, false), (32, true)] {
            let mut record = held();
            record.ggtt_written(index, 22);
            assert_eq!(record.holds(10, GPA), kept, "entry {index}");
        }
    }
}

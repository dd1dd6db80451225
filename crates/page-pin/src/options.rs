// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a table can be told when it is made.

use std::sync::Arc;

use crate::Account;

/// The kernel takes one page of entries of this size a call; it also bounds the time under the lock.
const ENTRY_BYTES: u64 = 8;

/// How many pins there may be at a time unless told otherwise, a page and owner each: 16 GiB of 4 KiB pages pinned by
/// one. They take about 300 MB then, which a guest could have a device spend.
pub const PIN_LIMIT: usize = 1 << 22;

/// Limits and rules of a [`PinTable`](crate::PinTable).
///
/// ```
/// use page_pin::{PinOptions, PinTable};
///
/// let table = PinTable::with_options(4096, PinOptions::new().max_pages(16));
/// assert_eq!(table.max_pages(), 16);
/// ```
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct PinOptions {
    pub(crate) account: Option<Arc<dyn Account>>,
    max_pages: Option<usize>,
    pin_limit: Option<usize>,
    pub(crate) exact_unpin: bool,
}

impl PinOptions {
    /// No account, as many pages a call as the kernel takes, and unpins page by page.
    pub fn new() -> Self {
        PinOptions::default()
    }

    /// Who counts the pinned pages.
    pub fn account(mut self, account: Arc<dyn Account>) -> Self {
        self.account = Some(account);
        self
    }

    /// The most pages one call may pin or unpin. Otherwise as many addresses as fit in a page: 512 of
    /// 4 KiB (`VFIO_PIN_PAGES_MAX_ENTRIES`).
    pub fn max_pages(mut self, pages: usize) -> Self {
        self.max_pages = Some(pages);
        self
    }

    /// Most pins at a time, a page and owner each, however often the owner has pinned that page; [`PIN_LIMIT`] unless
    /// told otherwise.
    pub fn pin_limit(mut self, pins: usize) -> Self {
        self.pin_limit = Some(pins);
        self
    }

    /// Whether an unpin has to name exactly the pages of one pin, as iommufd asks; each page of a list
    /// is a pin of its own there. Otherwise any kept page can be unpinned, as with VFIO.
    ///
    /// The ranges have to be remembered then: the limit of pins is one of them, too, of those that an owner has
    /// kept once each.
    pub fn exact_unpin(mut self, exact: bool) -> Self {
        self.exact_unpin = exact;
        self
    }

    pub(crate) fn pin_limit_of(&self) -> usize {
        self.pin_limit.unwrap_or(PIN_LIMIT)
    }

    pub(crate) fn max_pages_of(&self, page_size: u64) -> usize {
        self.max_pages
            .unwrap_or((page_size / ENTRY_BYTES).max(1) as usize)
    }
}

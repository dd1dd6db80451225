// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who pays for pinned pages.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

/// A page that becomes pinned, or is pinned no longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PinnedPage {
    /// Its I/O virtual address.
    pub iova: u64,
    /// Where it lies in this process, if whoever pinned it said so ([`Access::pin_at`](crate::Access::pin_at)).
    pub host: Option<usize>,
}

/// Why pages were not charged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Which of the pages could not be charged.
    pub index: usize,
    /// The errno of the failure, ENOMEM for a limit.
    pub errno: i32,
}

/// Counts pinned pages against some limit.
///
/// A table charges a page when its first pin is made, whoever makes it, and uncharges it when its last
/// one goes. So a page costs once for each I/O virtual address at which it is pinned, as the
/// kernel charges by mapping and address; an account that wants to count host pages looks at
/// [`PinnedPage::host`].
///
/// Both calls run under the table's lock: pages are uncharged before anybody who waits for them goes
/// on, and no pin comes between. They must not call the table or anything of it, nor an IO address space that keeps its pins
/// in it, nor panic.
///
/// ```
/// use std::sync::Arc;
/// use page_pin::{Account, Interest, PinOptions, PinTable, PinnedPage, Refusal};
///
/// #[derive(Debug)]
/// struct LowPagesOnly;
/// impl Account for LowPagesOnly {
///     fn charge(&self, pages: &[PinnedPage]) -> Result<(), Refusal> {
///         match pages.iter().position(|page| page.iova >= 1 << 32) {
///             Some(index) => Err(Refusal { index, errno: libc::ENOMEM }),
///             None => Ok(()),
///         }
///     }
///     fn uncharge(&self, _: &[PinnedPage]) {}
/// }
///
/// let options = PinOptions::new().account(Arc::new(LowPagesOnly));
/// let access = PinTable::with_options(4096, options).register("a", Interest::Holder, Arc::new(|_, _| ()));
/// assert_eq!(access.pin(1 << 32, 1).unwrap_err().errno(), libc::ENOMEM);
/// ```
pub trait Account: fmt::Debug + Send + Sync {
    /// Charges all of the pages, one at least and different ones, or none.
    ///
    /// # Errors
    ///
    /// Which page cannot be charged, and why.
    fn charge(&self, pages: &[PinnedPage]) -> std::result::Result<(), Refusal>;

    /// Gives back what was charged for these pages, one at least.
    fn uncharge(&self, pages: &[PinnedPage]);
}

/// Counts nothing and refuses nothing: for code that takes any account. A table without an account
/// does the same in less time.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoAccount;

impl Account for NoAccount {
    fn charge(&self, _: &[PinnedPage]) -> std::result::Result<(), Refusal> {
        Ok(())
    }

    fn uncharge(&self, _: &[PinnedPage]) {}
}

/// A number of pages that may be pinned at a time; clones share it, and so do all tables that are
/// given one of them.
///
/// ```
/// use std::sync::Arc;
/// use page_pin::{Interest, PinOptions, PinTable, Quota};
///
/// let quota = Quota::new(2);
/// let [one, two] = [0, 1].map(|_| {
///     let options = PinOptions::new().account(Arc::new(quota.clone()));
///     PinTable::with_options(4096, options).register("vm", Interest::Holder, Arc::new(|_, _| ()))
/// });
/// let pin = one.pin(0, 2)?;
/// assert_eq!(two.pin(0, 1).unwrap_err().errno(), libc::ENOMEM);
/// drop(pin);
/// assert_eq!(quota.charged(), 0);
/// # Ok::<(), page_pin::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Quota {
    limit: u64,
    charged: Arc<AtomicU64>,
}

impl Quota {
    /// At most `pages` pages, of whatever size the tables have.
    pub fn new(pages: u64) -> Self {
        Quota {
            limit: pages,
            charged: Arc::default(),
        }
    }

    /// How many pages are charged now.
    pub fn charged(&self) -> u64 {
        self.charged.load(Ordering::Relaxed)
    }

    /// How many there may be.
    pub fn limit(&self) -> u64 {
        self.limit
    }
}

impl Account for Quota {
    fn charge(&self, pages: &[PinnedPage]) -> std::result::Result<(), Refusal> {
        // One step: of two that race for the last page one gets it, and the limit is never exceeded.
        let more = |charged: u64| {
            let sum = charged.checked_add(pages.len() as u64)?;
            (sum <= self.limit).then_some(sum)
        };
        let charged = &self.charged;
        match charged.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more) {
            Ok(_) => Ok(()),
            Err(charged) => Err(Refusal {
                index: self.limit.saturating_sub(charged) as usize,
                errno: libc::ENOMEM,
            }),
        }
    }

    fn uncharge(&self, pages: &[PinnedPage]) {
        self.charged
            .fetch_sub(pages.len() as u64, Ordering::Relaxed);
    }
}

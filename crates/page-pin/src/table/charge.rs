// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pages that an account is charged for, and what is given back to it.

use super::state::{keys, State};
use super::Shared;
use crate::pages::{reserved, PageRange, Pages};
use crate::{Account, Error, PinnedPage, Result};

impl Shared {
    /// Charges the account, if there is one, for those of the pages that nobody has pinned yet.
    #[inline]
    pub(super) fn charge(
        &self,
        state: &mut State,
        pages: &Pages,
        host: &mut dyn FnMut(u64) -> Option<usize>,
    ) -> Result<()> {
        let Some(account) = &self.options.account else {
            return Ok(());
        };
        let counted = pages.counted()?;
        let mut fresh = reserved(counted.len())?;
        for (page, _) in counted {
            if !state.charged.contains_key(&page) {
                let iova = page * self.page_size;
                let host = host(iova);
                fresh.push(PinnedPage { iova, host });
            }
        }
        if fresh.is_empty() {
            return Ok(());
        }
        account.charge(&fresh).map_err(|refusal| Error::Account {
            // Whoever wrote the account may say anything.
            iova: fresh.get(refusal.index).unwrap_or(&fresh[0]).iova,
            errno: refusal.errno,
        })?;
        let charged = fresh
            .iter()
            .map(|page| (self.page_of(page.iova), page.host));
        state.charged.extend(charged);
        Ok(())
    }

    /// Gives back what was charged for those of the pages that nobody has pinned any more.
    #[inline]
    pub(super) fn uncharge(&self, state: &mut State, pages: impl Iterator<Item = u64>) {
        let Some(account) = &self.options.account else {
            return;
        };
        let mut gone = Gone::of(&**account);
        for page in pages {
            if !state.is_pinned(PageRange::only(page)) {
                if let Some(host) = state.charged.remove(&page) {
                    let iova = page * self.page_size;
                    gone.add(PinnedPage { iova, host });
                }
            }
        }
    }

    /// Gives back what was charged for any page that nobody has pinned any more.
    pub(super) fn uncharge_unpinned(&self, state: &mut State) {
        let Some(account) = &self.options.account else {
            return;
        };
        let mut gone = Gone::of(&**account);
        let State { pins, charged, .. } = state;
        charged.retain(|page, host| {
            let is_pinned = pins.range(keys(PageRange::only(*page))).next().is_some();
            if !is_pinned {
                let (iova, host) = (page * self.page_size, *host);
                gone.add(PinnedPage { iova, host });
            }
            is_pinned
        });
    }
}

/// Pages that are given back to an account, some at a time: who unpins must not need memory for that.
struct Gone<'a> {
    account: &'a dyn Account,
    pages: [PinnedPage; GIVEN_BACK],
    len: usize,
}

/// Pages that are given back in one call: few enough to stand on the stack, enough for what an account does once a call.
const GIVEN_BACK: usize = 32;

impl<'a> Gone<'a> {
    fn of(account: &'a dyn Account) -> Self {
        let none = PinnedPage {
            iova: 0,
            host: None,
        };
        Gone {
            account,
            pages: [none; GIVEN_BACK],
            len: 0,
        }
    }

    fn add(&mut self, page: PinnedPage) {
        self.pages[self.len] = page;
        self.len += 1;
        if self.len == GIVEN_BACK {
            self.give_back();
        }
    }

    fn give_back(&mut self) {
        if self.len > 0 {
            self.account.uncharge(&self.pages[..self.len]);
            self.len = 0;
        }
    }
}

impl Drop for Gone<'_> {
    fn drop(&mut self) {
        self.give_back();
    }
}

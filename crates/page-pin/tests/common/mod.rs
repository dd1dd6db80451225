// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An account that looks at whoever uses it.

use std::collections::BTreeSet;
use std::sync::Mutex;

use page_pin::{Account, PinnedPage, Refusal};

/// Keeps the pages that are charged, and refuses those it is told to.
#[derive(Debug, Default)]
pub struct Watching {
    pub charged: Mutex<BTreeSet<u64>>,
    pub refused: Mutex<BTreeSet<u64>>,
}

impl Account for Watching {
    fn charge(&self, pages: &[PinnedPage]) -> Result<(), Refusal> {
        let refused = self.refused.lock().unwrap();
        let index = pages.iter().position(|page| refused.contains(&page.iova));
        if let Some(index) = index {
            let errno = libc::ENOMEM;
            return Err(Refusal { index, errno });
        }
        let mut charged = self.charged.lock().unwrap();
        for page in pages {
            assert!(charged.insert(page.iova), "charged twice");
        }
        Ok(())
    }

    fn uncharge(&self, pages: &[PinnedPage]) {
        assert!(!pages.is_empty(), "nothing is given back");
        let mut charged = self.charged.lock().unwrap();
        for page in pages {
            assert!(charged.remove(&page.iova), "never charged");
        }
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a batch has gathered until it ends.

use iommu_type1::Change;

use crate::{memory, Error, Result};

/// Most changes of a batch: an update is one for each region of the memory table that it touches.
pub const BATCH_LIMIT: usize = 65_536;

/// The messages between the beginning and the end of a batch, as far as they were right.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    changes: Vec<Change>,
    refused: usize,
}

impl Batch {
    /// Adds what a message comes to. One that is refused spoils the batch, which nothing is kept of then.
    pub(crate) fn add(&mut self, changes: Result<Vec<Change>>) -> Result<()> {
        let changes = match changes {
            Ok(more) if self.changes.len() + more.len() > BATCH_LIMIT => {
                Err(Error::BatchLimit { limit: BATCH_LIMIT })
            }
            changes => changes,
        };
        let kept = changes.and_then(|changes| match self.refused {
            0 => memory::extend(&mut self.changes, changes.into_iter()),
            _ => Ok(()),
        });
        if kept.is_err() {
            self.spoil();
        }
        kept
    }

    pub(crate) fn spoil(&mut self) {
        self.refused = self.refused.saturating_add(1);
        self.changes = Vec::new();
    }

    /// All of it, if nothing was refused.
    pub(crate) fn end(self) -> Result<Vec<Change>> {
        match self.refused {
            0 => Ok(self.changes),
            refused => Err(Error::BatchSpoiled { refused }),
        }
    }
}

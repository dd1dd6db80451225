// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pins of memory of both kinds.
//!
//! Memory with a file is pinned in the address space, and an unmap waits for it. Memory without one has no
//! pages in this process that could stay: a pin of it says that it was mapped and permitted, and holds nothing.

use std::fmt;
use std::sync::Arc;

use iommu_type1::{page_size, Interest, PinPages, PinnedPages, Pinner, UnmapNotice};
use vm_memory::Permissions;

use crate::{DmaTable, Error, Result};

/// An owner of pins in a [`DmaTable`], from [`DmaTable::pins`].
///
/// ```
/// use std::sync::Arc;
/// use iommu_type1::{Interest, PinPages};
/// use vfio_user_dma::DmaTable;
/// use vm_memory::Permissions::ReadWrite;
///
/// let table = DmaTable::new()?;
/// table.map(3, 0, 0x1000, 0x2000, None)?;
/// let pins = table.pins("vgpu", Interest::Holder, Arc::new(|_iova, _size| ()));
/// let pinned = pins.pin_pages(0x1000, 2, ReadWrite)?;
/// // Memory that only the client has: an unmap does not wait for it.
/// assert!(!pinned.is_held());
/// assert!(pins.pin_pages(0x2000, 2, ReadWrite).is_err());
/// # Ok::<(), vfio_user_dma::Error>(())
/// ```
#[derive(Clone)]
pub struct TablePins {
    table: DmaTable,
    pinner: Pinner,
}

/// Pinned pages; dropping it unpins them.
#[must_use = "dropping it unpins the pages"]
#[derive(Debug)]
pub struct TablePin(Option<PinnedPages>);

impl TablePin {
    /// Whether pages of a file are pinned, for which an unmap waits; not where only the client has the memory.
    pub fn is_held(&self) -> bool {
        self.0.is_some()
    }

    /// The pages of a file, with their host addresses.
    pub fn pages(&self) -> Option<&PinnedPages> {
        self.0.as_ref()
    }
}

impl DmaTable {
    /// Registers an owner of pins under a name that appears in errors. Its notice is called before memory with a
    /// file is unmapped in which it has pins, on the thread that serves the socket: it should drop them there
    /// and then, and not wait for memory without a file.
    pub fn pins(&self, name: &str, interest: Interest, notice: Arc<dyn UnmapNotice>) -> TablePins {
        TablePins {
            table: self.clone(),
            pinner: self.space().pinner(name, interest, notice),
        }
    }
}

impl PinPages for TablePins {
    type Pinned = TablePin;
    type Error = Error;

    /// Pins pages that all came with files, or that all did not.
    fn pin_pages(&self, iova: u64, npages: usize, prot: Permissions) -> Result<TablePin> {
        match self.pinner.pin_pages(iova, npages, prot) {
            Ok(pinned) => Ok(TablePin(Some(pinned))),
            Err(error @ iommu_type1::Error::NotMapped { .. }) => {
                let size = (npages as u64).saturating_mul(page_size());
                let permitted = self.table.client_has(iova, size, prot);
                permitted.then_some(TablePin(None)).ok_or(error.into())
            }
            Err(error) => Err(error.into()),
        }
    }
}

impl fmt::Debug for TablePins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TablePins")
            .field("table", &self.table)
            .finish_non_exhaustive()
    }
}

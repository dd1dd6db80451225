// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where the page tables of a context begin.

use crate::descriptor::AddressingMode;
use crate::error::{Error, Result};
use crate::ppgtt::entry::{TableKey, TableKind};

/// What the registers PDP0 to PDP3 point to.
pub(super) type RootTables = [Option<TableKey>; 4];

/// The root of a context's page tables: what its PDP registers hold.
///
/// ```
/// use gvt_scheduler::{AddressingMode, PageTableRoot};
///
/// let root = PageTableRoot::new(AddressingMode::Legacy64, [0x5000, 0, 0, 0]).unwrap();
/// assert_eq!(root, PageTableRoot::FourLevel { pml4: 0x5000 });
/// assert!(PageTableRoot::new(AddressingMode::Advanced, [0; 4]).is_err());
/// ```
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum PageTableRoot {
    /// 32-bit addresses, which bits 31:30 spread over four page directories.
    ThreeLevel {
        /// The registers PDP0 to PDP3; one that is zero has no directory.
        pdps: [u64; 4],
    },
    /// 48-bit addresses.
    FourLevel {
        /// The register PDP0, which points to the PML4; zero for no tables at all.
        pml4: u64,
    },
}

impl PageTableRoot {
    /// The root that the registers PDP0 to PDP3 describe.
    ///
    /// # Errors
    ///
    /// [`Error::AddressingMode`] (EINVAL): other than the legacy modes.
    pub fn new(mode: AddressingMode, pdps: [u64; 4]) -> Result<Self> {
        match mode {
            AddressingMode::Legacy32 => Ok(PageTableRoot::ThreeLevel { pdps }),
            AddressingMode::Legacy64 => Ok(PageTableRoot::FourLevel { pml4: pdps[0] }),
            AddressingMode::Advanced | AddressingMode::AdvancedAccessDirty => {
                Err(Error::AddressingMode { mode })
            }
        }
    }

    /// The uppermost tables in memory, at most four; the same one may stand more than once. The guest
    /// sets no present bit in the registers.
    pub(super) fn tables(self) -> RootTables {
        let (kind, registers) = match self {
            PageTableRoot::ThreeLevel { pdps } => (TableKind::Pd, pdps),
            PageTableRoot::FourLevel { pml4 } => (TableKind::Pml4, [pml4, 0, 0, 0]),
        };
        registers.map(|register| (register != 0).then(|| TableKey::new(kind, register)))
    }

    /// The uppermost table that translates `gma`.
    pub(super) fn table_of(self, gma: u64) -> Option<TableKey> {
        let (kind, register) = match self {
            PageTableRoot::ThreeLevel { pdps } => {
                let directory = usize::try_from(gma >> 30).ok()?;
                (TableKind::Pd, *pdps.get(directory)?)
            }
            PageTableRoot::FourLevel { pml4 } if gma >> 48 == 0 => (TableKind::Pml4, pml4),
            PageTableRoot::FourLevel { .. } => return None,
        };
        (register != 0).then(|| TableKey::new(kind, register))
    }
}

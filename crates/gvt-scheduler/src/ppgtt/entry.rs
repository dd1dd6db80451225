// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a page table entry says, by the kind of table it stands in.

use vm_memory::GuestAddress;

use crate::error::{Error, Result};

pub(super) const TABLE_ENTRIES: usize = 512;

const PRESENT: u64 = 1 << 0;
/// Page size bit: the entry of a directory maps memory instead of a table.
const PSE: u64 = 1 << 7;
/// Intermediate page size: the table of this directory entry has pages of 64 KiB.
const IPS: u64 = 1 << 11;

/// The kinds of page tables. A child is always of a kind that stands further down.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(super) enum TableKind {
    Pml4,
    Pdp,
    Pd,
    /// Table of 4 KiB pages.
    Pt,
    /// Table of 64 KiB pages: only every sixteenth entry is used.
    Pt64K,
}

/// An entry, decoded.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Entry {
    NotPresent,
    Table(TableKey),
    Leaf(Leaf),
}

/// A guest's page table: the same page may be in use as tables of several kinds.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(super) struct TableKey {
    pub(super) gpa: u64,
    pub(super) kind: TableKind,
}

/// Guest memory that an entry maps: 1, 16 or 512 frames of 4 KiB.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct Leaf {
    pub(super) gfn: u64,
    pub(super) pages: usize,
}

impl TableKind {
    pub(super) const ALL: [TableKind; 5] = [
        TableKind::Pml4,
        TableKind::Pdp,
        TableKind::Pd,
        TableKind::Pt,
        TableKind::Pt64K,
    ];

    /// Every how many entries one is used.
    pub(super) const fn stride(self) -> usize {
        match self {
            TableKind::Pt64K => 16,
            _ => 1,
        }
    }

    /// Lowest bit of the address that selects an entry.
    const fn shift(self) -> u32 {
        match self {
            TableKind::Pml4 => 39,
            TableKind::Pdp => 30,
            TableKind::Pd => 21,
            TableKind::Pt | TableKind::Pt64K => 12,
        }
    }

    /// The entry that translates `gma`.
    pub(super) const fn index(self, gma: u64) -> usize {
        let index = (gma >> self.shift()) as usize % TABLE_ENTRIES;
        index - index % self.stride()
    }

    pub(super) fn decode(self, entry: u64) -> Result<Entry> {
        if entry & PRESENT == 0 {
            return Ok(Entry::NotPresent);
        }
        Ok(match self {
            TableKind::Pml4 => table(TableKind::Pdp, entry),
            TableKind::Pdp if entry & PSE != 0 => return Err(Error::HugePage { entry }),
            TableKind::Pdp => table(TableKind::Pd, entry),
            TableKind::Pd if entry & PSE != 0 => leaf(512, entry),
            TableKind::Pd if entry & IPS != 0 => table(TableKind::Pt64K, entry),
            TableKind::Pd => table(TableKind::Pt, entry),
            TableKind::Pt => leaf(1, entry),
            TableKind::Pt64K => leaf(16, entry),
        })
    }
}

impl TableKey {
    /// The table an entry (or a root register) points to.
    pub(super) fn new(kind: TableKind, entry: u64) -> Self {
        Self {
            gpa: frame(entry) << 12,
            kind,
        }
    }
}

impl Leaf {
    /// Before and behind all others.
    pub(super) const LEAST: Leaf = Leaf { gfn: 0, pages: 0 };
    pub(super) const GREATEST: Leaf = Leaf {
        gfn: u64::MAX,
        pages: usize::MAX,
    };

    pub(super) fn translate(self, gma: u64) -> GuestAddress {
        let offset = gma & ((self.pages as u64) << 12).wrapping_sub(1);
        GuestAddress(self.gfn << 12 | offset)
    }
}

fn table(kind: TableKind, entry: u64) -> Entry {
    Entry::Table(TableKey::new(kind, entry))
}

fn leaf(pages: usize, entry: u64) -> Entry {
    Entry::Leaf(Leaf {
        gfn: frame(entry) & !(pages as u64 - 1),
        pages,
    })
}

/// Bits 45:12.
fn frame(entry: u64) -> u64 {
    entry >> 12 & ((1 << 34) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_what_its_table_makes_of_it() {
        let all = !(PSE | IPS);
        let address = 0x3fff_ffff_f000;
        for (kind, child) in [
            (TableKind::Pml4, TableKind::Pdp),
            (TableKind::Pdp, TableKind::Pd),
            (TableKind::Pd, TableKind::Pt),
        ] {
            let key = TableKey {
                gpa: address,
                kind: child,
            };
            assert_eq!(kind.decode(all).unwrap(), Entry::Table(key));
            assert_eq!(kind.decode(all & !PRESENT).unwrap(), Entry::NotPresent);
        }
        assert!(matches!(
            TableKind::Pd.decode(0x5000 | IPS | PRESENT).unwrap(),
            Entry::Table(TableKey {
                gpa: 0x5000,
                kind: TableKind::Pt64K
            })
        ));
    }

    #[test]
    fn leaves_are_aligned_to_their_size() {
        let cases = [
            (TableKind::Pt, 1),
            (TableKind::Pt64K, 16),
            (TableKind::Pd, 512),
        ];
        for (kind, pages) in cases {
            let Entry::Leaf(leaf) = kind.decode(u64::MAX).unwrap() else {
                panic!("no leaf in {kind:?}");
            };
            assert_eq!(leaf.pages, pages);
            assert_eq!(leaf.gfn, (1 << 34) - pages as u64);
        }
    }

    #[test]
    fn huge_pages_are_refused() {
        let error = TableKind::Pdp.decode(PRESENT | PSE).unwrap_err();
        assert_eq!(error.errno(), libc::EINVAL);
        assert_eq!(TableKind::Pdp.decode(PSE).unwrap(), Entry::NotPresent);
    }

    #[test]
    fn sixty_four_kib_tables_use_every_sixteenth_entry() {
        assert_eq!(TableKind::Pt.index(0x1f_f000), 511);
        assert_eq!(TableKind::Pt64K.index(0x1f_f000), 496);
    }
}

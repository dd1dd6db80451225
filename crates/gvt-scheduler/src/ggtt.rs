// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The global graphics translation table of a vGPU, as an array of this process.

use std::collections::BTreeMap;
use std::fmt;

use vm_memory::GuestAddress;

use crate::error::{Error, Result};
use crate::regs::{PAGE_MASK, PAGE_SHIFT};

/// Bits 45:12 of an entry: the guest page.
const ADDRESS_MASK: u64 = ((1 << 46) - 1) & !PAGE_MASK;
const PRESENT: u64 = 1 << 0;

/// Which half of an entry a four-byte write goes to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum HalfEntry {
    /// Bits 31:0.
    Low,
    /// Bits 63:32.
    High,
}

/// A range of graphics memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct GmWindow {
    /// First graphics address.
    pub base: u64,
    /// Size in bytes.
    pub size: u64,
}

impl GmWindow {
    fn contains(&self, first: u64, last: u64) -> bool {
        first >= self.base
            && last
                .checked_sub(self.base)
                .is_some_and(|end| end < self.size)
    }
}

/// The two parts of the graphics memory that belong to a vGPU.
///
/// ```
/// use gvt_scheduler::{Ggtt, GmWindow, GmWindows};
///
/// let mut ggtt = Ggtt::with_windows(
///     0x1000,
///     GmWindows {
///         aperture: GmWindow { base: 0x1_0000, size: 0x1_0000 },
///         hidden: GmWindow { base: 0x80_0000, size: 0x1_0000 },
///     },
/// );
/// ggtt.write_entry(0x10, 0x5000 | 1).unwrap();
/// ggtt.write_entry(0x20, 0x6000 | 1).unwrap();
/// assert!(ggtt.translate(0x1_0000).is_some());
/// assert!(ggtt.translate(0x2_0000).is_none());
/// ```
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct GmWindows {
    /// The low part, which the guest sees through the aperture BAR.
    pub aperture: GmWindow,
    /// The high part, which only the device reaches.
    pub hidden: GmWindow,
}

/// The GGTT as the guest has written it. Translating through it costs no access to guest memory.
///
/// ```
/// use gvt_scheduler::Ggtt;
/// use vm_memory::GuestAddress;
///
/// let mut ggtt = Ggtt::new(0x10_0000);
/// ggtt.write_entry(3, 0x7_2000 | 1).unwrap();
/// assert_eq!(ggtt.translate(0x3abc), Some(GuestAddress(0x7_2abc)));
/// assert_eq!(ggtt.translate(0x4000), None);
/// ```
#[derive(Clone)]
pub struct Ggtt {
    entries: Vec<u64>,
    windows: Option<GmWindows>,
    /// Halves whose other half has not come yet.
    parked: BTreeMap<u32, (HalfEntry, u32)>,
}

impl Ggtt {
    /// A table of `entries` entries, none present; all of its graphics memory belongs to the vGPU.
    pub fn new(entries: u32) -> Self {
        Self {
            entries: vec![0; entries as usize],
            windows: None,
            parked: BTreeMap::new(),
        }
    }

    /// A table of `entries` entries in which only the addresses inside `windows` are the vGPU's.
    pub fn with_windows(entries: u32, windows: GmWindows) -> Self {
        Self {
            windows: Some(windows),
            ..Self::new(entries)
        }
    }

    /// Number of entries.
    pub fn entries(&self) -> u32 {
        self.entries.len() as u32
    }

    /// The guest's entry, if the table has it.
    pub fn entry(&self, index: u32) -> Option<u64> {
        self.entries.get(index as usize).copied()
    }

    /// Writes a whole entry. A half that was parked for it is dropped.
    ///
    /// # Errors
    ///
    /// [`Error::GgttIndex`] (EINVAL): there is no such entry.
    pub fn write_entry(&mut self, index: u32, value: u64) -> Result<()> {
        *self.entry_mut(index)? = value;
        self.parked.remove(&index);
        Ok(())
    }

    /// Writes half of an entry: it is parked, and the entry keeps its value, until the other half
    /// comes. A second write of the same half replaces the first.
    ///
    /// # Errors
    ///
    /// As [`write_entry`](Self::write_entry).
    pub fn write_half(&mut self, index: u32, half: HalfEntry, value: u32) -> Result<()> {
        self.entry_mut(index)?;
        let (low, high) = match (self.parked.get(&index), half) {
            (Some(&(HalfEntry::Low, low)), HalfEntry::High) => (low, value),
            (Some(&(HalfEntry::High, high)), HalfEntry::Low) => (value, high),
            _ => {
                self.parked.insert(index, (half, value));
                return Ok(());
            }
        };
        self.write_entry(index, u64::from(high) << 32 | u64::from(low))
    }

    /// No entry is present any more.
    pub(crate) fn clear(&mut self) {
        self.entries.fill(0);
        self.parked.clear();
    }

    /// The guest physical address behind a graphics address, if it is the vGPU's and present.
    pub fn translate(&self, gma: u64) -> Option<GuestAddress> {
        if !self.owns(gma, 1) {
            return None;
        }
        let index = usize::try_from(gma >> PAGE_SHIFT).ok()?;
        let entry = *self.entries.get(index)?;
        (entry & PRESENT != 0).then_some(GuestAddress(entry & ADDRESS_MASK | gma & PAGE_MASK))
    }

    /// Whether `len` bytes from `gma` lie in one part of the vGPU's graphics memory.
    pub fn owns(&self, gma: u64, len: u64) -> bool {
        let Some(last) = gma.checked_add(len.saturating_sub(1)) else {
            return false;
        };
        match &self.windows {
            None => last >> PAGE_SHIFT < self.entries.len() as u64,
            Some(windows) => {
                windows.aperture.contains(gma, last) || windows.hidden.contains(gma, last)
            }
        }
    }

    fn entry_mut(&mut self, index: u32) -> Result<&mut u64> {
        let entries = self.entries();
        self.entries
            .get_mut(index as usize)
            .ok_or(Error::GgttIndex { index, entries })
    }
}

impl fmt::Debug for Ggtt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ggtt")
            .field("entries", &self.entries.len())
            .field("windows", &self.windows)
            .field("parked", &self.parked)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_changes_when_its_second_half_comes() {
        let mut ggtt = Ggtt::new(8);
        ggtt.write_entry(2, 0x1000 | 1).unwrap();
        ggtt.write_half(2, HalfEntry::High, 0x12).unwrap();
        assert_eq!(ggtt.translate(0x2000), Some(GuestAddress(0x1000)));
        ggtt.write_half(2, HalfEntry::Low, 0x9000 | 1).unwrap();
        assert_eq!(ggtt.translate(0x2004), Some(GuestAddress(0x12_0000_9004)));
    }

    #[test]
    fn halves_join_in_either_order_and_the_last_write_of_one_counts() {
        let mut ggtt = Ggtt::new(8);
        ggtt.write_half(2, HalfEntry::Low, 1).unwrap();
        ggtt.write_half(2, HalfEntry::Low, 0x3001).unwrap();
        ggtt.write_half(3, HalfEntry::High, 7).unwrap();
        assert_eq!(ggtt.entry(2), Some(0));
        ggtt.write_half(2, HalfEntry::High, 5).unwrap();
        assert_eq!(ggtt.entry(2), Some(0x5_0000_3001));
        assert_eq!(ggtt.entry(3), Some(0));
    }

    #[test]
    fn a_whole_write_drops_the_parked_half() {
        let mut ggtt = Ggtt::new(8);
        ggtt.write_half(2, HalfEntry::Low, 0x3001).unwrap();
        ggtt.write_entry(2, 0x4001).unwrap();
        ggtt.write_half(2, HalfEntry::High, 5).unwrap();
        assert_eq!(ggtt.entry(2), Some(0x4001));
    }

    #[test]
    fn the_address_is_bits_45_to_12() {
        let mut ggtt = Ggtt::new(8);
        ggtt.write_entry(0, u64::MAX).unwrap();
        assert_eq!(ggtt.translate(0), Some(GuestAddress(0x3fff_ffff_f000)));
        ggtt.write_entry(0, u64::MAX - 1).unwrap();
        assert_eq!(ggtt.translate(0), None);
    }

    #[test]
    fn nothing_is_beyond_the_end() {
        let mut ggtt = Ggtt::new(8);
        assert!(ggtt.write_entry(8, 1).is_err());
        assert!(ggtt.write_half(u32::MAX, HalfEntry::Low, 1).is_err());
        assert_eq!(ggtt.translate(0x8000), None);
        assert_eq!(ggtt.translate(u64::MAX), None);
        assert!(ggtt.owns(0x7000, 0x1000));
        assert!(!ggtt.owns(0x7000, 0x1001));
        assert!(!ggtt.owns(u64::MAX, 2));
    }

    #[test]
    fn a_range_may_not_leave_its_window() {
        let ggtt = Ggtt::with_windows(
            0x100,
            GmWindows {
                aperture: GmWindow {
                    base: 0x1000,
                    size: 0x2000,
                },
                hidden: GmWindow {
                    base: 0x3000,
                    size: 0x1000,
                },
            },
        );
        assert!(ggtt.owns(0x1000, 0x2000));
        assert!(!ggtt.owns(0x2000, 0x2000));
        assert!(ggtt.owns(0x3fff, 1));
        assert!(!ggtt.owns(0xfff, 1));
    }
}

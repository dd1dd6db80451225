// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which addresses may be mapped: what the hardware of a device reaches, less what it has reserved.

use std::ops::{ControlFlow, RangeInclusive};

use checked_sync::lock;

use crate::profile::Rules;
use crate::range::IovaRange;
use crate::space::Space;
use crate::writer::Writer;
use crate::{Error, IoAddressSpace, Result};

/// The addresses of a space that may be mapped: those of the allowed ranges, or all where none is given,
/// without the reserved ranges.
///
/// A mapping lies inside one allowed range, as in the kernel; ranges that touch are not one. With
/// [`Profile::Iommufd`](crate::Profile::Iommufd) the allowed ranges are only for mappings that may be anywhere, and
/// the reserved ones for all.
///
/// ```
/// use iommu_type1::{Backing, IoAddressSpace, IovaRanges};
/// use vm_memory::Permissions::ReadWrite;
///
/// // 48 bits, without the window of interrupt messages.
/// let ranges = IovaRanges::new(&[0..=0xffff_ffff_ffff], &[])?;
/// assert!(IovaRanges::new(&[0..=0xffff], &[0x8000..=0x8fff]).is_err());
/// let space = IoAddressSpace::builder().iova_ranges(ranges).build();
/// let error = space.map(1 << 48, Backing::anonymous(0x1000)?, ReadWrite).unwrap_err();
/// assert_eq!(error.errno(), libc::EINVAL);
///
/// space.set_iova_ranges(IovaRanges::new(&[], &[0xfee0_0000..=0xfeef_ffff])?)?;
/// space.map(1 << 48, Backing::anonymous(0x1000)?, ReadWrite)?;
/// # Ok::<(), iommu_type1::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IovaRanges {
    /// Ascending, not overlapping; where there is none, everything.
    allowed: Vec<IovaRange>,
    /// Ascending, not overlapping, and none shares an address with those above.
    reserved: Vec<IovaRange>,
}

impl IovaRanges {
    /// Allowed ranges, none of them for everything, and reserved ones, in any order.
    ///
    /// # Errors
    ///
    /// [`Error::EmptyRange`] (EINVAL): a range that does not end behind its start.
    /// [`Error::RangesOverlap`] (EINVAL): two allowed, or two reserved ranges overlap.
    /// [`Error::RangeInUse`] (EADDRINUSE): an allowed range has reserved addresses.
    pub fn new(
        allowed: &[RangeInclusive<u64>],
        reserved: &[RangeInclusive<u64>],
    ) -> Result<IovaRanges> {
        let ranges = IovaRanges {
            allowed: apart(allowed)?,
            reserved: apart(reserved)?,
        };
        for allowed in &ranges.allowed {
            if let Some(reserved) = find_overlap(&ranges.reserved, *allowed) {
                return Err(in_use(*allowed, reserved));
            }
        }
        Ok(ranges)
    }

    /// The ranges that may be mapped, ascending; none where everything may be.
    pub fn usable(&self) -> Vec<RangeInclusive<u64>> {
        if *self == IovaRanges::default() {
            return Vec::new();
        }
        let usable = self.usable_ranges().into_iter();
        usable.map(|range| range.first..=range.last).collect()
    }

    /// As [`usable`](IovaRanges::usable), and the whole space where everything is.
    pub(crate) fn usable_ranges(&self) -> Vec<IovaRange> {
        if self.allowed.is_empty() {
            self.around_reserved()
        } else {
            self.allowed.clone()
        }
    }

    /// What lies between the reserved ranges.
    fn around_reserved(&self) -> Vec<IovaRange> {
        let mut usable = Vec::new();
        let mut next = Some(0);
        for reserved in &self.reserved {
            if let Some(first) = next.filter(|first| *first < reserved.first) {
                usable.push(IovaRange {
                    first,
                    last: reserved.first - 1,
                });
            }
            next = reserved.last.checked_add(1);
        }
        if let Some(first) = next {
            usable.push(IovaRange {
                first,
                last: u64::MAX,
            });
        }
        usable
    }

    /// Whether a mapping of `range` may be.
    fn allow(&self, range: IovaRange) -> bool {
        let holder = self.allowed.partition_point(|one| one.last < range.first);
        let is_allowed = self.allowed.is_empty()
            || self
                .allowed
                .get(holder)
                .is_some_and(|one| one.contains_all(range));
        is_allowed && find_overlap(&self.reserved, range).is_none()
    }

    /// Whether a mapping of `range` may be if somebody asks for these addresses.
    fn allow_given(&self, range: IovaRange, rules: &Rules) -> bool {
        if rules.allowed_when_found {
            return find_overlap(&self.reserved, range).is_none();
        }
        self.allow(range)
    }

    /// Whether addresses for a mapping may be looked for in all of `range`.
    pub(crate) fn may_be_found(&self, range: IovaRange) -> bool {
        self.allow(range)
    }

    /// Refuses a range that may not be mapped.
    pub(crate) fn check(&self, range: IovaRange, rules: &Rules) -> Result<()> {
        if self.allow_given(range, rules) {
            return Ok(());
        }
        Err(Error::OutsideRanges {
            iova: range.first,
            size: range.size(),
        })
    }
}

/// In ascending order, if each is a range and none overlaps another.
fn apart(ranges: &[RangeInclusive<u64>]) -> Result<Vec<IovaRange>> {
    let checked = ranges.iter().map(|range| {
        let (first, last) = (*range.start(), *range.end());
        if first < last {
            Ok(IovaRange { first, last })
        } else {
            Err(Error::EmptyRange { first, last })
        }
    });
    let mut ranges = checked.collect::<Result<Vec<_>>>()?;
    ranges.sort_unstable_by_key(|range| range.first);
    let met = ranges.windows(2).find(|pair| pair[0].overlaps(pair[1]));
    if let Some(pair) = met {
        return Err(Error::RangesOverlap {
            first: pair[0].first,
            last: pair[0].last,
            other: pair[1].first,
        });
    }
    Ok(ranges)
}

fn find_overlap(ranges: &[IovaRange], range: IovaRange) -> Option<IovaRange> {
    let first = ranges.partition_point(|one| one.last < range.first);
    ranges.get(first).copied().filter(|one| one.overlaps(range))
}

fn in_use(range: IovaRange, by: IovaRange) -> Error {
    Error::RangeInUse {
        first: range.first,
        last: range.last,
        other: by.first,
        other_last: by.last,
    }
}

impl IoAddressSpace {
    /// The addresses that may be mapped.
    pub fn iova_ranges(&self) -> IovaRanges {
        lock(&self.view.space.writer).ranges.clone()
    }

    /// Changes which addresses may be mapped, all at once: a map sees the old ranges or the new ones.
    ///
    /// # Errors
    ///
    /// [`Error::RangeInUse`] (EADDRINUSE): a mapping, also one whose unmap has not finished, would lie outside
    /// of them. Nothing is changed then.
    pub fn set_iova_ranges(&self, ranges: IovaRanges) -> Result<()> {
        let space = &*self.view.space;
        let mut writer = lock(&space.writer);
        if let Some(mapped) = outside(&writer, space, &ranges) {
            // What is in its way: a reserved range, or that nothing around it is allowed.
            let by = find_overlap(&ranges.reserved, mapped).unwrap_or(mapped);
            return Err(in_use(mapped, by));
        }
        writer.ranges = ranges;
        writer.gaps = None;
        Ok(())
    }
}

/// A mapping that ranges do not allow.
fn outside(writer: &Writer, space: &Space, ranges: &IovaRanges) -> Option<IovaRange> {
    let live = space.table.visit(IovaRange::ALL, |mapping| {
        if ranges.allow_given(mapping.range, space.rules) {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(mapping.range)
        }
    });
    live.or_else(|| {
        let mut leaving = writer.leaving_inside(IovaRange::ALL);
        let outside =
            leaving.find(|leaving| !ranges.allow_given(leaving.mapping.range, space.rules));
        outside.map(|leaving| leaving.mapping.range)
    })
}

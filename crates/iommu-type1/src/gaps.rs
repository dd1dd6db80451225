// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where nothing is mapped: addresses for mappings that may be anywhere.
//!
//! What is free is only noted down once somebody asks for addresses, and it is no more than a hint: what is
//! found is looked up, and what turns out to be mapped is crossed out. So those who map where they like need
//! not know of it.
//!
//! # Costs
//!
//! The first look is at all mappings. After it, a place is found in logarithmic time, as long as there is one
//! that is large enough whatever its alignment; each mapping that was made elsewhere meanwhile is met once. Where
//! everything is too small, or too small for the alignment, all gaps and once more all mappings are looked at.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::slice;
use std::sync::Arc;

use vm_memory::Permissions;

use crate::check::Request;
use crate::map::{check_backing, check_entries, check_memory};
use crate::range::IovaRange;
use crate::space::Space;
use crate::writer::Writer;
use crate::{Backing, Error, IoAddressSpace, IovaRanges, Result};

/// The largest alignment that is of use: a page that hardware maps as one.
const LARGEST_ALIGNMENT: u64 = 2 << 20;

/// Gaps that are tried before one is taken that fits whatever the alignment.
const TRIES: usize = 16;

impl IoAddressSpace {
    /// Maps the whole of `backing` where there is room, and returns the address: never 0, inside the ranges that
    /// may be mapped ([`IovaRanges`]), and aligned as the host address is, up to what covers the size and
    /// up to 2 MiB.
    ///
    /// ```
    /// use iommu_type1::{Backing, IoAddressSpace};
    /// use vm_memory::Permissions::ReadWrite;
    ///
    /// let space = IoAddressSpace::new();
    /// let iova = space.map_anywhere(Backing::anonymous(0x4000)?, ReadWrite)?;
    /// space.write(iova + 0x3fff, &[1])?;
    /// # Ok::<(), iommu_type1::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`map`](IoAddressSpace::map), and [`Error::NoRoom`] (ENOSPC) where no gap is large enough.
    pub fn map_anywhere(&self, backing: Backing, prot: Permissions) -> Result<u64> {
        let space = &*self.view.space;
        let anywhere = Request::to_map(0, &backing, prot).check(space, space.rules.map)?;
        let alignment = alignment(space, &backing);
        let mut writer = space.turn(anywhere)?;
        check_entries(&writer, space, 1)?;
        check_memory(&writer, space, [anywhere])?;
        let range = find(&mut writer, space, anywhere.last, alignment)?;
        check_backing(space, range, &backing, prot)?;
        let mapping = Arc::new(space.mapping(range, prot, backing, self.view.set));
        let (mut writer, agreed) = writer.ask(&[], slice::from_ref(&mapping), |writer| {
            writer.ranges.check(range, space.rules)?;
            check_memory(writer, space, [range])
        });
        agreed?;
        if let Err(error) = writer.publish(&space.table, mapping.clone()) {
            drop(writer.report(slice::from_ref(&mapping), &[]));
            return Err(error);
        }
        writer.maps += 1;
        Ok(range.first)
    }
}

fn alignment(space: &Space, backing: &Backing) -> u64 {
    let host = backing.host_address().addr() as u64;
    let covering = (backing.len() as u64).checked_next_power_of_two();
    let of_host = host & host.wrapping_neg();
    covering
        .unwrap_or(LARGEST_ALIGNMENT)
        .min(of_host)
        .min(LARGEST_ALIGNMENT)
        .max(space.unit())
}

/// A free range of one byte more than `length` with an aligned start.
fn find(writer: &mut Writer, space: &Space, length: u64, alignment: u64) -> Result<IovaRange> {
    let known = writer.gaps.take();
    let was_known = known.is_some();
    let mut gaps = known.unwrap_or_else(|| Gaps::of(writer, space));
    let mut found = gaps.find(writer, space, length, alignment);
    if found.is_none() && was_known {
        gaps = Gaps::of(writer, space);
        found = gaps.find(writer, space, length, alignment);
    }
    writer.gaps = Some(gaps);
    found.ok_or(Error::NoRoom {
        size: length.saturating_add(1),
        alignment,
    })
}

/// Ranges that are free, or were when they were noted down.
///
/// # Invariants
///
/// They do not overlap, lie inside the ranges that may be mapped, and both sets have the same.
#[derive(Default)]
pub(crate) struct Gaps {
    /// The last address by the first.
    by_address: BTreeMap<u64, u64>,
    /// One byte less than the size, and the first address.
    by_size: BTreeSet<(u64, u64)>,
}

impl Gaps {
    fn of(writer: &Writer, space: &Space) -> Self {
        let mut gaps = Gaps::default();
        let unit = space.unit();
        for usable in writer.ranges.usable_ranges() {
            // Whole pages of it, and not the one at 0.
            let first = usable.first.max(1).checked_next_multiple_of(unit);
            let end = match usable.last.checked_add(1) {
                Some(end) => (end / unit * unit).checked_sub(1),
                None => Some(u64::MAX),
            };
            let (Some(first), Some(last)) = (first, end) else {
                continue;
            };
            if first <= last {
                gaps.insert(IovaRange { first, last });
            }
        }
        space.table.visit(IovaRange::ALL, |mapping| {
            gaps.cross_out(mapping.range);
            ControlFlow::<()>::Continue(())
        });
        for leaving in writer.leaving_inside(IovaRange::ALL) {
            gaps.cross_out(leaving.mapping.range);
        }
        gaps
    }

    /// Notes down what is free now.
    pub(crate) fn freed(&mut self, range: IovaRange, ranges: &IovaRanges) {
        if range.first == 0 || !ranges.may_be_found(range) {
            // Rarely, and then the rest of a larger mapping is not worth it.
            return;
        }
        self.cross_out(range);
        let mut merged = range;
        let before = self.by_address.range(..range.first).next_back();
        if let Some((first, last)) = before.map(|(first, last)| (*first, *last)) {
            let with = IovaRange { first, ..merged };
            if last == range.first - 1 && ranges.may_be_found(with) {
                self.remove(first);
                merged = with;
            }
        }
        if let Some(next) = range.last.checked_add(1) {
            if let Some(last) = self.by_address.get(&next).copied() {
                let with = IovaRange { last, ..merged };
                if ranges.may_be_found(with) {
                    self.remove(next);
                    merged = with;
                }
            }
        }
        self.insert(merged);
    }

    fn find(
        &mut self,
        writer: &Writer,
        space: &Space,
        length: u64,
        alignment: u64,
    ) -> Option<IovaRange> {
        loop {
            let range = self.fitting(length, alignment)?;
            let live = space
                .table
                .visit(range, |mapping| ControlFlow::Break(mapping.range));
            let leaving = writer.leaving_in(range);
            let mapped = live.or_else(|| leaving.map(|leaving| leaving.mapping.range));
            self.cross_out(mapped.unwrap_or(range));
            if mapped.is_none() {
                return Some(range);
            }
        }
    }

    /// The smallest gap that is large enough, or nearly.
    fn fitting(&self, length: u64, alignment: u64) -> Option<IovaRange> {
        let fit = |(size, first): &(u64, u64)| {
            let last = first + size;
            let first: u64 = first.checked_next_multiple_of(alignment)?;
            let is_enough = first <= last && last - first >= length;
            is_enough.then(|| IovaRange {
                first,
                last: first + length,
            })
        };
        let large_enough = self.by_size.range((length, 0)..);
        let certain = length.saturating_add(alignment - 1);
        let certainly = self.by_size.range((certain, 0)..);
        let few = large_enough.clone().take(TRIES).find_map(fit);
        few.or_else(|| certainly.clone().find_map(fit))
            .or_else(|| large_enough.clone().find_map(fit))
    }

    /// Forgets what of a range is noted down.
    fn cross_out(&mut self, range: IovaRange) {
        loop {
            let below = self.by_address.range(..=range.last).next_back();
            let met = below.filter(|(_, last)| **last >= range.first);
            let Some((first, last)) = met.map(|(first, last)| (*first, *last)) else {
                return;
            };
            self.remove(first);
            if first < range.first {
                let last = range.first - 1;
                self.insert(IovaRange { first, last });
            }
            if last > range.last {
                let first = range.last + 1;
                self.insert(IovaRange { first, last });
            }
        }
    }

    fn insert(&mut self, gap: IovaRange) {
        self.by_address.insert(gap.first, gap.last);
        self.by_size.insert((gap.last - gap.first, gap.first));
    }

    fn remove(&mut self, first: u64) {
        if let Some(last) = self.by_address.remove(&first) {
            self.by_size.remove(&(last - first, first));
        }
    }
}

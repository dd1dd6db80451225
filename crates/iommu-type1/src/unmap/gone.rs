// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is gone of mappings that were replaced: addresses where nothing has come in their place. Pins there are
//! theirs, and of nothing else that is removed.

use std::ops::ControlFlow;

use page_pin::PinTable;

use super::Replaced;
use crate::mapping::Mapping;
use crate::memory;
use crate::range::{all_met, union, IovaRange};
use crate::replace::outside;
use crate::space::Space;
use crate::table::Table;
use crate::writer::Writer;
use crate::Result;

/// The mappings that were replaced and had addresses of any of the ranges, with what is gone of them there; what is gone of
/// several with one of them, as pins are known by their address.
pub(crate) fn meet_replaced(
    writer: &Writer,
    space: &Space,
    ranges: &[IovaRange],
    is_meant: impl Fn(&Mapping) -> bool,
) -> Result<Vec<Replaced>> {
    if writer.replaced.is_empty() {
        return Ok(Vec::new());
    }
    let ranges = union(memory::collect(ranges.iter().copied())?);
    let replaced = writer.replaced_in(&ranges);
    let meant = replaced.filter(|mapping| is_meant(mapping)).cloned();
    let mut met = memory::collect(meant.map(Replaced::of))?;
    met.sort_unstable_by_key(|replaced| replaced.mapping.range.first);
    // The first address behind those that were looked at: each is once, however many have had it.
    let mut next = Some(0);
    for replaced in &mut met {
        let IovaRange { first, last } = replaced.mapping.range;
        let Some(first) = next.map(|next| first.max(next)).filter(|at| *at <= last) else {
            continue;
        };
        next = last.checked_add(1);
        let rest = IovaRange { first, last };
        for range in all_met(&ranges, rest) {
            // Allocates only for what is gone: what was cut before would stay cut.
            let note = |gap| match memory::push(&mut replaced.gone, gap) {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => ControlFlow::Break(error),
            };
            let failed = visit_free(writer, &space.table, range.clamp(rest), note);
            failed.map_or(Ok(()), Err)?;
        }
    }
    Ok(met)
}

/// Whether anything is pinned of what is gone of a mapping, whoever has unmapped it. Pins that were left to a pinner refer
/// to no mapping: without one they would not be waited for.
pub(crate) fn is_pinned_where_gone(
    writer: &Writer,
    table: &Table,
    pins: &PinTable,
    mapping: &Mapping,
) -> bool {
    let is_pinned = |range: IovaRange| pins.is_pinned(range.first, range.size());
    let pinned = |gap| match is_pinned(gap) {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    };
    is_pinned(mapping.range) && visit_free(writer, table, mapping.range, pinned).is_some()
}

/// Visits the parts of a range where nothing is, in the table or leaving, in order.
fn visit_free<B>(
    writer: &Writer,
    table: &Table,
    range: IovaRange,
    mut visit: impl FnMut(IovaRange) -> ControlFlow<B>,
) -> Option<B> {
    let mut visit_unmapped = |gap: IovaRange| {
        let mut rest = Some(gap);
        for leaving in writer.all_leaving_in(gap) {
            let taken = leaving.mapping.range;
            let [below, behind] = rest.map_or([None, None], |rest| outside(rest, taken));
            below.map_or(ControlFlow::Continue(()), &mut visit)?;
            rest = behind;
        }
        rest.map_or(ControlFlow::Continue(()), &mut visit)
    };
    // The first address that was not looked at yet.
    let mut next = Some(range.first);
    let found = table.visit(range, |mapping| {
        let first = next.filter(|first| *first < mapping.range.first);
        next = mapping.range.last.checked_add(1);
        let last = mapping.range.first.wrapping_sub(1);
        first.map_or(ControlFlow::Continue(()), |first| {
            visit_unmapped(IovaRange { first, last })
        })
    });
    found.or_else(|| {
        let first = next.filter(|first| *first <= range.last)?;
        let last = range.last;
        visit_unmapped(IovaRange { first, last }).break_value()
    })
}

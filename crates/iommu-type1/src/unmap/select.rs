// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which mappings an unmap means, and what must not be among them.

use std::ops::ControlFlow;
use std::sync::Arc;

use super::Cuts;
use crate::map::unmapping;
use crate::mapping::Mapping;
use crate::mapping_set::SetId;
use crate::memory;
use crate::profile::Cut;
use crate::range::IovaRange;
use crate::replace;
use crate::space::Space;
use crate::table::{Table, Unlinked};
use crate::writer::Writer;
use crate::{Error, Result};

/// Adds the mappings of the table that go with these ranges, in which nothing else is being removed.
pub(super) fn select(
    writer: &mut Writer,
    space: &Space,
    ranges: &[IovaRange],
    found: &mut Vec<Arc<Mapping>>,
    unlinked: &mut Unlinked,
    cuts: &mut Cuts,
) -> Result<()> {
    for range in ranges {
        let before = found.len();
        match space.rules.cut {
            Cut::Refuse => inside(writer, space, *range, found)?,
            Cut::Whole => beginning(writer, space, *range, found)?,
            Cut::Split => {
                replace::cut(writer, space, *range, unlinked, cuts)?;
                inside(writer, space, *range, found)?;
            }
        }
        check_idle(writer, *range)?;
        let must_have_some = space.rules.needs_something && *range != IovaRange::ALL;
        if must_have_some && found.len() == before && writer.leaving_in(*range).is_none() {
            return Err(Error::NothingMapped {
                iova: range.first,
                size: range.size(),
            });
        }
    }
    if space.rules.cut == Cut::Split {
        // A later range may have cut what an earlier one had found.
        found.clear();
        for range in ranges {
            inside(writer, space, *range, found)?;
        }
    }
    Ok(())
}

/// The mappings of the table that begin inside a range; none where one that begins before it ends in it.
pub(crate) fn beginning(
    writer: &Writer,
    space: &Space,
    range: IovaRange,
    found: &mut Vec<Arc<Mapping>>,
) -> Result<()> {
    if let Some(leaving) = writer.leaving_in(range) {
        if leaving.mapping.range.first < range.first && leaving.state.is_busy() {
            return Err(unmapping(range, leaving));
        }
    }
    if stops(writer, space, range) {
        return Ok(());
    }
    share_all(space, range, found)
}

/// Adds all mappings of the table that share an address with a range.
pub(crate) fn share_all(
    space: &Space,
    range: IovaRange,
    found: &mut Vec<Arc<Mapping>>,
) -> Result<()> {
    let share = |mapping: &Mapping| memory::push(found, Table::share(mapping));
    space.table.try_visit(range, share)
}

/// Whether nothing of a range may be unmapped, as the first mapping in it begins before it.
pub(crate) fn stops(writer: &Writer, space: &Space, range: IovaRange) -> bool {
    if space.rules.cut != Cut::Whole {
        return false;
    }
    let begins_before = |mapped: IovaRange| mapped.first < range.first;
    let leaving = writer
        .leaving_in(range)
        .map(|leaving| leaving.mapping.range);
    let live = space
        .table
        .visit(range, |mapping| ControlFlow::Break(mapping.range));
    leaving.is_some_and(begins_before) || live.is_some_and(begins_before)
}

/// The mappings of the table inside a range; refuses one that has a part of a mapping, of the table or
/// leaving.
pub(crate) fn inside(
    writer: &Writer,
    space: &Space,
    range: IovaRange,
    found: &mut Vec<Arc<Mapping>>,
) -> Result<()> {
    let live = space.table.visit(range, |mapping| {
        if !range.contains_all(mapping.range) {
            return ControlFlow::Break(Ok(mapping.range));
        }
        match memory::push(found, Table::share(mapping)) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => ControlFlow::Break(Err(error)),
        }
    });
    match live.transpose()?.or_else(|| writer.leaving_cut_by(range)) {
        Some(mapped) => Err(Error::Bisect {
            iova: range.first,
            size: range.size(),
            mapped: mapped.first,
            mapped_size: mapped.size(),
            errno: space.rules.cut_errno,
        }),
        None => Ok(()),
    }
}

/// Refuses a set a range in which there is something that was not made through it.
pub(crate) fn check_owned(
    writer: &Writer,
    space: &Space,
    range: IovaRange,
    set: SetId,
) -> Result<()> {
    if set == SetId::NONE {
        return Ok(());
    }
    let live = space
        .table
        .visit(range, |mapping| match mapping.set == set {
            true => ControlFlow::Continue(()),
            false => ControlFlow::Break(mapping.range),
        });
    let mut leaving = writer.all_leaving_in(range);
    let other = live.or_else(|| {
        let other = leaving.find(|leaving| leaving.mapping.set != set)?;
        Some(other.mapping.range)
    });
    other.map_or(Ok(()), |mapped| {
        Err(Error::NotOwned {
            iova: range.first,
            size: range.size(),
            mapped: mapped.first,
            mapped_size: mapped.size(),
        })
    })
}

/// Refuses a range of which another unmap is under way; everything means whatever there is to take.
fn check_idle(writer: &Writer, range: IovaRange) -> Result<()> {
    match writer.revoking_in(range) {
        Some(leaving) if range != IovaRange::ALL => Err(unmapping(range, leaving)),
        _ => Ok(()),
    }
}

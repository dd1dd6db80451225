// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The beginning of an unmap: what it means leaves the table, under the writer's lock.

use std::sync::Arc;

use super::select::{check_owned, select, stops};
use super::{check_outside, meet_replaced, Cuts, Revocation, UnmapOptions};
use crate::dirty::check_tracking;
use crate::mapping::Mapping;
use crate::mapping_set::SetId;
use crate::memory;
use crate::range::IovaRange;
use crate::space::Space;
use crate::table::{Table, Unlinked};
use crate::Result;

impl<'a> Revocation<'a> {
    /// Has what there is in some ranges be revoked by one that has nothing yet.
    pub(super) fn begin(&mut self, ranges: &[IovaRange], set: SetId, marked: bool) -> Result<()> {
        let space = self.space;
        let Some(first) = ranges.first() else {
            return Ok(());
        };
        check_outside(space, *first)?;
        let mut writer = space.turn(*first)?;
        for range in ranges {
            check_owned(&writer, space, *range, set)?;
        }
        if marked {
            check_tracking(&writer, *first)?;
        }
        let mut unlinked = Unlinked::default();
        let mut mappings = Vec::new();
        let mut cuts = Cuts::default();
        let selected = select(
            &mut writer,
            space,
            ranges,
            &mut mappings,
            &mut unlinked,
            &mut cuts,
        );
        let mut retried = 0;
        let cut = cuts.before.len();
        let ready = selected.and_then(|()| {
            if ranges.len() > 1 {
                // Ranges may overlap.
                mappings.sort_unstable_by_key(|mapping| mapping.range.first);
                mappings.dedup_by(|one, other| Arc::ptr_eq(one, other));
            }
            if writer.is_heard {
                memory::extend(&mut cuts.before, mappings.iter().cloned())?;
            }
            let replaced = meet_replaced(&writer, space, ranges, |_| true)?;
            retried = ranges.iter().map(|range| writer.may_retry(*range)).sum();
            memory::reserve(&mut mappings, retried)?;
            writer.reserve_leaving(mappings.len())?;
            Ok(replaced)
        });
        let replaced = match ready {
            Ok(replaced) => replaced,
            Err(error) => {
                // Something may have been cut before.
                writer.late.append(unlinked);
                cuts.before.truncate(cut);
                cuts.tell(writer);
                return Err(error);
            }
        };
        writer.revoke(&space.table, &mappings, &mut unlinked);
        if retried > 0 {
            for range in ranges {
                if !stops(&writer, space, *range) {
                    writer.retry(*range, &mut mappings);
                }
            }
        }
        if !mappings.is_empty() || !replaced.is_empty() {
            // There will be a grace period; what is late can use it too.
            unlinked.append(std::mem::take(&mut writer.late));
        }
        cuts.tell(writer);
        self.mappings = mappings;
        self.unlinked = unlinked;
        self.replaced = replaced;
        Ok(())
    }

    /// Of whatever was made through a set.
    pub(crate) fn of_set(space: &'a Space, set: SetId, options: UnmapOptions) -> Result<Self> {
        check_outside(space, IovaRange::ALL)?;
        let mut turn = space.turn(IovaRange::ALL)?;
        let mut mappings = Vec::new();
        space.table.try_visit(IovaRange::ALL, |mapping| {
            if mapping.set == set {
                memory::push(&mut mappings, Table::share(mapping))?;
            }
            Ok(())
        })?;
        let leaving = turn.leaving_inside(IovaRange::ALL);
        let left = leaving.filter(|leaving| leaving.mapping.set == set);
        let left = memory::collect(left.map(|leaving| leaving.mapping.range))?;
        let is_of_set = |mapping: &Mapping| mapping.set == set;
        let replaced = meet_replaced(&turn, space, &[IovaRange::ALL], is_of_set)?;
        let revoked = match turn.is_heard {
            true => memory::collect(mappings.iter().cloned())?,
            false => Vec::new(),
        };
        memory::reserve(&mut mappings, left.len())?;
        turn.reserve_leaving(mappings.len())?;
        let mut unlinked = Unlinked::default();
        turn.revoke(&space.table, &mappings, &mut unlinked);
        let mut turn = turn.report(&revoked, &[]);
        drop(revoked);
        for range in left {
            turn.retry(range, &mut mappings);
        }
        drop(turn);
        let mut revocation = Revocation::new(space, options);
        revocation.mappings = mappings;
        revocation.unlinked = unlinked;
        revocation.replaced = replaced;
        Ok(revocation)
    }
}

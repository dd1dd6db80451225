// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Adding mappings: the checks of `VFIO_IOMMU_MAP_DMA`, in its order.

use std::ops::ControlFlow;
use std::slice;
use std::sync::Arc;

#[cfg(feature = "uapi")]
use checked_sync::lock;
use vm_memory::Permissions;

use crate::change::{change, Piece};
use crate::check::Request;
use crate::dirty::check_pages;
use crate::mapping::log_bytes;
use crate::memory;
use crate::profile::Overlapping;
use crate::range::IovaRange;
use crate::space::Space;
use crate::unmap::take_back;
use crate::writer::{Leaving, Writer};
use crate::{Backing, Error, IoAddressSpace, Result};

impl IoAddressSpace {
    /// Maps the whole of `backing` at `iova`, for accesses that `prot` permits.
    ///
    /// The mapping is visible to every user of the space when this returns. The last page of the
    /// 64-bit space can be mapped like any other.
    ///
    /// # Errors
    ///
    /// In this order, as Linux 6.18 and later check:
    /// [`Error::Empty`] (EINVAL), [`Error::Overflow`] or [`Error::HostOverflow`] (EOVERFLOW),
    /// [`Error::NoPermissions`] (EINVAL), [`Error::Misaligned`] (address, size or host address; EINVAL),
    /// [`Error::Overlap`] (EEXIST) or [`Error::Unmapping`] (EBUSY) where the mapping in the way is being
    /// unmapped, [`Error::EntryLimit`], [`Error::TableLimit`] or, while dirty pages are tracked,
    /// [`Error::DirtyMapping`] (EINVAL) and [`Error::DirtyLimit`] (ENOSPC), [`Error::OutsideRanges`] (EINVAL),
    /// [`Error::BackingProtection`] (EFAULT), [`Error::NoMemory`] (ENOMEM). Nothing is mapped then.
    ///
    /// Other [profiles](crate::Profile) check in other orders. By the rules of
    /// [`Profile::Iommufd`](crate::Profile::Iommufd) there is [`Error::FileProtection`] (EPERM) of files. With [`Profile::Iotlb`](crate::Profile::Iotlb)
    /// what is in the way is no error but replaced, as [`replace`](IoAddressSpace::replace) does it, and
    /// parts of it outside of the range stay; then there may also be what `replace` says.
    pub fn map(&self, iova: u64, backing: Backing, prot: Permissions) -> Result<()> {
        let request = Request::to_map(iova, &backing, prot);
        let range = request.check(&self.view.space, self.view.space.rules.map)?;
        self.map_checked(range, backing, prot)
    }

    /// As [`map`](IoAddressSpace::map) of `size` bytes that are somewhere: `resolve` finds the memory when
    /// nothing else is wrong, and nothing is mapped if it fails.
    ///
    /// It runs without a lock, as it may be the caller's code and slow. So what was checked before is
    /// checked again after it: if somebody has mapped there meanwhile, that mapping came first.
    #[cfg(feature = "uapi")]
    pub(crate) fn map_resolved(
        &self,
        iova: u64,
        size: u64,
        host: u64,
        prot: Permissions,
        resolve: impl FnOnce() -> Result<Backing>,
    ) -> Result<()> {
        let request = Request {
            iova,
            size,
            host,
            prot,
        };
        let range = request.check(&self.view.space, self.view.space.rules.map)?;
        check_room(&lock(&self.view.space.writer), &self.view.space, range)?;
        request.look(&self.view.space, self.view.space.rules.map_late)?;
        let backing = resolve()?;
        if backing.len() as u64 != size {
            return Err(Error::BackingRange {
                offset: 0,
                len: size,
                size: backing.len() as u64,
            });
        }
        self.map_checked(range, backing, prot)
    }

    /// Maps a range that is right in itself.
    fn map_checked(&self, range: IovaRange, backing: Backing, prot: Permissions) -> Result<()> {
        let space = &*self.view.space;
        if space.rules.overlapping == Overlapping::Replace {
            let memory = Some((backing, prot));
            return change(
                space,
                vec![Piece { range, memory }],
                self.view.set,
                space.unmap,
            );
        }
        let turn = space.turn(range)?;
        check_room(&turn, space, range)?;
        check_backing(space, range, &backing, prot)?;
        let mapping = Arc::new(space.mapping(range, prot, backing, self.view.set));
        let new = slice::from_ref(&mapping);
        let (mut turn, agreed) = turn.ask(&[], new, |writer| check_room(writer, space, range));
        agreed?;
        if let Err(error) = turn.publish(&space.table, mapping.clone()) {
            drop(turn.report(new, &[]));
            return Err(error);
        }
        turn.maps += 1;
        Ok(())
    }

    /// Maps several backings, each at an address and for accesses as its permissions say: all of them
    /// or none, checked together, with no map or unmap of somebody else in between. An access that
    /// finds one of them finds all before it.
    ///
    /// # Errors
    ///
    /// As [`map`](IoAddressSpace::map), first what is wrong with any of them alone, then
    /// [`Error::Overlap`] where they overlap each other, then the rest. Nothing is mapped then. (Where a
    /// limit of memory is met on the way, what was mapped before is unmapped again: accesses may have seen
    /// it, and where somebody has leased or pinned it and does not let go in time, its addresses stay
    /// revoked.)
    ///
    /// With [`Profile::Iotlb`](crate::Profile::Iotlb) what is in the way is replaced, and of several that overlap
    /// the last counts, as [`change`](IoAddressSpace::change) does it.
    pub fn map_batch(
        &self,
        mappings: impl IntoIterator<Item = (u64, Backing, Permissions)>,
    ) -> Result<()> {
        let space = &*self.view.space;
        let checked = mappings.into_iter().map(|(iova, backing, prot)| {
            let range = Request::to_map(iova, &backing, prot).check(space, space.rules.map)?;
            Ok((range, backing, prot))
        });
        let mappings = memory::try_collect(checked)?;
        if space.rules.overlapping == Overlapping::Replace {
            let pieces = mappings.into_iter().map(|(range, backing, prot)| Piece {
                range,
                memory: Some((backing, prot)),
            });
            return change(space, memory::collect(pieces)?, self.view.set, space.unmap);
        }
        let Some((first, ..)) = mappings.first() else {
            return Ok(());
        };
        let turn = space.turn(*first)?;
        check_apart(memory::collect(mappings.iter().map(|(range, ..)| *range))?)?;
        if space.rules.ranges_first {
            for (range, ..) in &mappings {
                turn.ranges.check(*range, space.rules)?;
            }
        }
        for (range, ..) in &mappings {
            check_free(&turn, space, *range)?;
        }
        check_entries(&turn, space, mappings.len())?;
        for (range, backing, prot) in &mappings {
            turn.ranges.check(*range, space.rules)?;
            check_backing(space, *range, backing, *prot)?;
        }
        let mappings = mappings.into_iter().map(|(range, backing, prot)| {
            Arc::new(space.mapping(range, prot, backing, self.view.set))
        });
        let mappings = memory::collect(mappings)?;
        let (mut turn, agreed) = turn.ask(&[], &mappings, |writer| {
            let mut ranges = mappings.iter().map(|mapping| mapping.range);
            ranges.try_for_each(|range| writer.ranges.check(range, space.rules))
        });
        agreed?;
        // If they cannot all stay. Those who were asked have let others unmap, which may give such room back.
        if let Err(error) = turn.reserve_leaving(mappings.len()) {
            drop(turn.report(&mappings, &[]));
            return Err(error);
        }
        for (published, mapping) in mappings.iter().enumerate() {
            let result = check_memory(&turn, space, [mapping.range])
                .and_then(|()| turn.publish(&space.table, mapping.clone()));
            if let Err(full) = result {
                if let Err(error) = take_back(space, turn, mappings, published) {
                    log::warn!("what a batch has mapped before it failed: {error}");
                }
                return Err(full);
            }
            turn.maps += 1;
        }
        Ok(())
    }
}

/// Refuses a range that cannot be mapped now, in the kernel's order.
pub(crate) fn check_room(writer: &Writer, space: &Space, range: IovaRange) -> Result<()> {
    if space.rules.overlapping == Overlapping::Replace {
        // What there has to be room for depends on what is replaced.
        return writer.ranges.check(range, space.rules);
    }
    if space.rules.ranges_first {
        writer.ranges.check(range, space.rules)?;
    }
    check_free(writer, space, range)?;
    check_entries(writer, space, 1)?;
    writer.ranges.check(range, space.rules)?;
    check_memory(writer, space, [range])
}

/// Refuses a range of which something is mapped, or leaves.
fn check_free(writer: &Writer, space: &Space, range: IovaRange) -> Result<()> {
    if let Some(leaving) = writer.leaving_in(range) {
        check_not_unmapping(writer, range)?;
        return Err(overlap(range, leaving.mapping.range));
    }
    let in_the_way = space
        .table
        .visit(range, |mapping| ControlFlow::Break(mapping.range));
    in_the_way.map_or(Ok(()), |mapped| Err(overlap(range, mapped)))
}

/// Refuses a range of which something is being unmapped.
pub(crate) fn check_not_unmapping(writer: &Writer, range: IovaRange) -> Result<()> {
    let mut leaving = writer.all_leaving_in(range);
    if let Some(leaving) = leaving.find(|leaving| !leaving.state.is_vaddr()) {
        return Err(unmapping(range, leaving));
    }
    Ok(())
}

pub(crate) fn unmapping(range: IovaRange, leaving: &Leaving) -> Error {
    let mapped = leaving.mapping.range;
    Error::Unmapping {
        iova: range.first,
        size: range.size(),
        mapped: mapped.first,
        mapped_size: mapped.size(),
    }
}

/// Refuses ranges of which two overlap.
pub(crate) fn check_apart(mut ranges: Vec<IovaRange>) -> Result<()> {
    ranges.sort_unstable_by_key(|range| range.first);
    let met = ranges.windows(2).find(|pair| pair[1].first <= pair[0].last);
    met.map_or(Ok(()), |pair| Err(overlap(pair[1], pair[0])))
}

fn overlap(range: IovaRange, mapped: IovaRange) -> Error {
    Error::Overlap {
        iova: range.first,
        size: range.size(),
        mapped: mapped.first,
        mapped_size: mapped.size(),
    }
}

pub(crate) fn check_entries(writer: &Writer, space: &Space, more: usize) -> Result<()> {
    let limit = space.entry_limit;
    if writer.len().saturating_add(more) > limit {
        return Err(Error::EntryLimit { limit });
    }
    Ok(())
}

/// Refuses ranges for which there is no room in the table or, while dirty pages are tracked, for their
/// marks.
pub(crate) fn check_memory(
    writer: &Writer,
    space: &Space,
    ranges: impl IntoIterator<Item = IovaRange>,
) -> Result<()> {
    let (bytes, limit) = (writer.table_bytes, space.table_limit);
    if bytes >= limit {
        return Err(Error::TableLimit { bytes, limit });
    }
    if writer.tracking {
        let mut more = 0;
        for range in ranges {
            check_pages(range)?;
            more += log_bytes(range);
        }
        check_log_bytes(writer.log_bytes + more, space.log_limit)?;
    }
    Ok(())
}

/// Refuses a mapping for more than the memory behind it allows, or of memory that is not right in itself.
pub(crate) fn check_backing(
    space: &Space,
    range: IovaRange,
    backing: &Backing,
    prot: Permissions,
) -> Result<()> {
    Request::to_map(range.first, backing, prot).look(space, space.rules.map_late)?;
    let (iova, asked, allowed) = (range.first, prot, backing.access());
    if allowed.allow(asked) {
        return Ok(());
    }
    if space.rules.looks_at_files && backing.file_offset().is_some() {
        return Err(Error::FileProtection {
            iova,
            asked,
            allowed,
        });
    }
    Err(Error::BackingProtection {
        iova,
        asked,
        allowed,
    })
}

pub(crate) fn check_log_bytes(bytes: usize, limit: usize) -> Result<()> {
    if bytes > limit {
        return Err(Error::DirtyLimit { bytes, limit });
    }
    Ok(())
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::cell::Cell;

    use vm_memory::Permissions::{No, ReadWrite};

    use super::*;
    use crate::range::page_size;

    fn nowhere() -> Result<Backing> {
        Err(Error::NoRegion(0))
    }

    #[test]
    fn memory_is_looked_for_when_nothing_else_is_wrong() {
        let p = page_size();
        let space = IoAddressSpace::builder().entry_limit(2).build();
        space
            .map(p, Backing::anonymous(p as usize).unwrap(), ReadWrite)
            .unwrap();
        let top = 0_u64.wrapping_sub(p);
        for (iova, size, host, prot, errno) in [
            (top, 0, top, No, libc::EINVAL),
            (top, 2 * p, 0, No, libc::EOVERFLOW),
            (0, 2 * p, top, No, libc::EOVERFLOW),
            (1, p, 0, No, libc::EINVAL),
            (1, p, 0, ReadWrite, libc::EINVAL),
            (p, p + 1, 0, ReadWrite, libc::EINVAL),
            (p, p, 1, ReadWrite, libc::EINVAL),
            (0, 2 * p, 0, ReadWrite, libc::EEXIST),
        ] {
            let asked = Cell::new(false);
            let result = space.map_resolved(iova, size, host, prot, || {
                asked.set(true);
                nowhere()
            });
            assert_eq!(result.unwrap_err().errno(), errno);
            assert!(!asked.get());
        }

        let failed = space.map_resolved(0, p, 0, ReadWrite, nowhere);
        assert!(matches!(failed, Err(Error::NoRegion(0))));
        let short = || Backing::anonymous(p as usize);
        let failed = space.map_resolved(2 * p, 2 * p, 0, ReadWrite, short);
        assert_eq!(failed.unwrap_err().errno(), libc::EFAULT);
        assert_eq!(space.mappings(), 1);

        space.map_resolved(0, p, 0, ReadWrite, short).unwrap();
        space.write(p - 1, &[1, 2]).unwrap();
        let full = space.map_resolved(2 * p, p, 0, ReadWrite, nowhere);
        assert_eq!(full.unwrap_err().errno(), libc::ENOSPC);
    }

    #[test]
    fn who_maps_while_the_memory_is_looked_for_came_first() {
        let p = page_size();
        let space = IoAddressSpace::new();
        let page = || Backing::anonymous(p as usize);
        let late = space.map_resolved(0, p, 0, ReadWrite, || {
            space.map(0, page()?, ReadWrite)?;
            space.write(0, &[7])?;
            page()
        });
        assert_eq!(late.unwrap_err().errno(), libc::EEXIST);
        let mut byte = [0];
        space.read(0, &mut byte).unwrap();
        assert_eq!(byte, [7]);
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Adding mappings: the checks of `VFIO_IOMMU_MAP_DMA`, in its order.

use std::ops::ControlFlow;
use std::sync::Arc;

use vm_memory::Permissions;

use crate::mapping::Mapping;
use crate::range::{check_aligned, IovaRange};
use crate::space::Space;
use crate::sync::lock;
use crate::unmap::take_back;
use crate::writer::Writer;
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
    /// [`Error::Empty`] (EINVAL), [`Error::Overflow`] (EOVERFLOW), [`Error::NoPermissions`]
    /// (EINVAL), [`Error::Misaligned`] (address, size or host address; EINVAL),
    /// [`Error::BackingProtection`] (EFAULT), [`Error::Overlap`] (EEXIST) or [`Error::Unmapping`]
    /// (EBUSY) where the mapping in the way is being unmapped, [`Error::EntryLimit`],
    /// [`Error::TableLimit`] or, while dirty pages are tracked, [`Error::DirtyLimit`] (ENOSPC).
    pub fn map(&self, iova: u64, backing: Backing, prot: Permissions) -> Result<()> {
        let mapping = checked(iova, backing, prot)?;
        let space = &*self.view.space;
        let mut writer = lock(&space.writer);
        check_free(&writer, space, mapping.range)?;
        check_entries(&writer, space, 1)?;
        check_table(&writer, space)?;
        check_log(&writer, space, &mapping)?;
        writer.publish(&space.table, Arc::new(mapping));
        space.counters.maps.add(1);
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
    pub fn map_batch(
        &self,
        mappings: impl IntoIterator<Item = (u64, Backing, Permissions)>,
    ) -> Result<()> {
        let mappings = mappings.into_iter();
        let checked = mappings.map(|(iova, backing, prot)| checked(iova, backing, prot));
        let mappings = checked.collect::<Result<Vec<_>>>()?;
        let space = &*self.view.space;
        let mut writer = lock(&space.writer);
        check_apart(&mappings)?;
        for mapping in &mappings {
            check_free(&writer, space, mapping.range)?;
        }
        check_entries(&writer, space, mappings.len())?;
        let mut published = Vec::with_capacity(mappings.len());
        for mapping in mappings {
            let room =
                check_table(&writer, space).and_then(|()| check_log(&writer, space, &mapping));
            if let Err(full) = room {
                if let Err(error) = take_back(space, writer, published) {
                    log::warn!("what a batch has mapped before it failed: {error}");
                }
                return Err(full);
            }
            let mapping = Arc::new(mapping);
            published.push(mapping.clone());
            writer.publish(&space.table, mapping);
            space.counters.maps.add(1);
        }
        Ok(())
    }
}

/// Refuses a range of which something is mapped, or leaves.
fn check_free(writer: &Writer, space: &Space, range: IovaRange) -> Result<()> {
    let (iova, size) = (range.first, range.size());
    if let Some(leaving) = writer.leaving_in(range) {
        let mapped = leaving.mapping.range;
        return Err(Error::Unmapping {
            iova,
            size,
            mapped: mapped.first,
            mapped_size: mapped.size(),
        });
    }
    let in_the_way = space
        .table
        .visit(range, |mapping| ControlFlow::Break(mapping.range));
    in_the_way.map_or(Ok(()), |mapped| Err(overlap(range, mapped)))
}

/// Refuses mappings of which two overlap.
fn check_apart(mappings: &[Mapping]) -> Result<()> {
    let mut ranges: Vec<_> = mappings.iter().map(|mapping| mapping.range).collect();
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

fn check_entries(writer: &Writer, space: &Space, more: usize) -> Result<()> {
    let limit = space.entry_limit;
    if writer.len().saturating_add(more) > limit {
        return Err(Error::EntryLimit { limit });
    }
    Ok(())
}

fn check_table(writer: &Writer, space: &Space) -> Result<()> {
    let (bytes, limit) = (writer.table_bytes, space.table_limit);
    if bytes >= limit {
        return Err(Error::TableLimit { bytes, limit });
    }
    Ok(())
}

/// A mapping that is right in itself, whatever else is mapped.
fn checked(iova: u64, backing: Backing, prot: Permissions) -> Result<Mapping> {
    let size = backing.len() as u64;
    let range = IovaRange::new(iova, size)?;
    if prot == Permissions::No {
        return Err(Error::NoPermissions { iova });
    }
    check_aligned("address", iova)?;
    check_aligned("size", size)?;
    check_aligned("host address", backing.host_address() as u64)?;
    if !backing.access().allow(prot) {
        return Err(Error::BackingProtection {
            iova,
            asked: prot,
            allowed: backing.access(),
        });
    }
    Ok(Mapping::new(range, prot, backing))
}

/// Refuses a mapping whose dirty pages there is no room for, while they are tracked.
fn check_log(writer: &Writer, space: &Space, mapping: &Mapping) -> Result<()> {
    if writer.tracking {
        check_log_bytes(writer.log_bytes + mapping.log_bytes(), space.log_limit)?;
    }
    Ok(())
}

pub(crate) fn check_log_bytes(bytes: usize, limit: usize) -> Result<()> {
    if bytes > limit {
        return Err(Error::DirtyLimit { bytes, limit });
    }
    Ok(())
}

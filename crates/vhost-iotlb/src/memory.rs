// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Lists whose length a front end decides: where there is no memory for them that is an error.

use iommu_type1::Error as SpaceError;

use crate::Result;

/// An allocation of so many values failed.
pub(crate) fn no_memory<T>(values: usize) -> SpaceError {
    let bytes = values.saturating_mul(size_of::<T>());
    SpaceError::NoMemory { bytes }
}

/// Appends values, all or none.
pub(crate) fn extend<T>(list: &mut Vec<T>, values: impl ExactSizeIterator<Item = T>) -> Result<()> {
    let room = list.try_reserve(values.len());
    room.map_err(|_| no_memory::<T>(list.len() + values.len()))?;
    list.extend(values);
    Ok(())
}

pub(crate) fn collect<T>(values: impl ExactSizeIterator<Item = T>) -> Result<Vec<T>> {
    let mut list = Vec::new();
    extend(&mut list, values)?;
    Ok(list)
}

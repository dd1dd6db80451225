// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Lists whose length somebody else decides: where there is no memory for them that is an error, and not the
//! end of the process.

use crate::{Error, Result};

/// An allocation of so many values failed.
pub(crate) fn no_memory<T>(values: usize) -> Error {
    let bytes = values.saturating_mul(size_of::<T>());
    Error::NoMemory { bytes }
}

/// Makes room for so many values more.
#[inline]
pub(crate) fn reserve<T>(list: &mut Vec<T>, more: usize) -> Result<()> {
    let reserved = list.try_reserve(more);
    reserved.map_err(|_| no_memory::<T>(list.len().saturating_add(more)))
}

#[inline]
pub(crate) fn push<T>(list: &mut Vec<T>, value: T) -> Result<()> {
    reserve(list, 1)?;
    list.push(value);
    Ok(())
}

pub(crate) fn extend<T>(list: &mut Vec<T>, values: impl IntoIterator<Item = T>) -> Result<()> {
    let values = values.into_iter();
    reserve(list, values.size_hint().0)?;
    for value in values {
        push(list, value)?;
    }
    Ok(())
}

pub(crate) fn collect<T>(values: impl IntoIterator<Item = T>) -> Result<Vec<T>> {
    let mut list = Vec::new();
    extend(&mut list, values)?;
    Ok(list)
}

/// As [`collect`], up to the first error.
pub(crate) fn try_collect<T>(values: impl IntoIterator<Item = Result<T>>) -> Result<Vec<T>> {
    let values = values.into_iter();
    let mut list = Vec::new();
    reserve(&mut list, values.size_hint().0)?;
    for value in values {
        push(&mut list, value?)?;
    }
    Ok(list)
}

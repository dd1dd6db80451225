// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a guest decides the length or the number of: where there is no memory for it that is an error, and not the
//! end of the process.

use crate::error::{Error, Result};

/// An allocation of so many values failed.
pub(crate) fn no_memory<T>(values: usize) -> Error {
    let bytes = values.saturating_mul(size_of::<T>());
    Error::NoMemory { bytes }
}

/// Makes room for so many values more.
pub(crate) fn reserve<T>(list: &mut Vec<T>, more: usize) -> Result<()> {
    let reserved = list.try_reserve(more);
    reserved.map_err(|_| no_memory::<T>(list.len().saturating_add(more)))
}

pub(crate) fn push<T>(list: &mut Vec<T>, value: T) -> Result<()> {
    reserve(list, 1)?;
    list.push(value);
    Ok(())
}

pub(crate) fn copy(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut copy = Vec::new();
    reserve(&mut copy, bytes.len())?;
    copy.extend_from_slice(bytes);
    Ok(copy)
}

/// So many bytes more, all 0.
pub(crate) fn grow(bytes: &mut Vec<u8>, more: usize) -> Result<()> {
    reserve(bytes, more)?;
    bytes.resize(bytes.len() + more, 0);
    Ok(())
}

/// A table of so many entries, all 0.
pub(crate) fn zeroed<const N: usize>() -> Result<Box<[u64; N]>> {
    let mut entries = Vec::new();
    let reserved = entries.try_reserve_exact(N);
    reserved.map_err(|_| no_memory::<u64>(N))?;
    entries.resize(N, 0);
    entries.try_into().map_err(|_| no_memory::<u64>(N))
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The space that is tested, and its answers as the model has them.

use std::sync::atomic::Ordering;
use std::time::Duration;

use iommu_type1::{
    page_size, Backing, CompareExchange, DmaHandle, Error, IoAddressSpace, ReaderBarrier,
    ScatterList,
};
use vm_memory::{GuestAddress, GuestMemoryError, GuestMemoryMmap, Permissions};

use crate::model::LIMIT;
use crate::ops::NewMapping;

/// The space that is tested, and one user of it.
pub struct Real {
    pub space: IoAddressSpace,
    pub handle: DmaHandle,
    pub held: Vec<ScatterList>,
}

impl Real {
    pub fn new(barrier: ReaderBarrier) -> Self {
        let space = IoAddressSpace::builder()
            .entry_limit(LIMIT)
            .unmap_deadline(Duration::ZERO)
            .reader_barrier(barrier)
            .build();
        Real {
            handle: space.handle(),
            space,
            held: Vec::new(),
        }
    }

    pub fn exchange(
        &self,
        at: u64,
        current: &[u8],
        new: u64,
    ) -> Result<(bool, Vec<u8>), (i32, usize)> {
        let new = &new.to_ne_bytes()[..current.len()];
        match current.len() {
            1 => self.exchange_as(at, current, new, u8::from_ne_bytes, u8::to_ne_bytes),
            2 => self.exchange_as(at, current, new, u16::from_ne_bytes, u16::to_ne_bytes),
            4 => self.exchange_as(at, current, new, u32::from_ne_bytes, u32::to_ne_bytes),
            _ => self.exchange_as(at, current, new, u64::from_ne_bytes, u64::to_ne_bytes),
        }
    }

    fn exchange_as<T: CompareExchange, const N: usize>(
        &self,
        at: u64,
        current: &[u8],
        new: &[u8],
        from: impl Fn([u8; N]) -> T,
        to: impl Fn(T) -> [u8; N],
    ) -> Result<(bool, Vec<u8>), (i32, usize)> {
        let (current, new) = [current, new]
            .map(|bytes| from(bytes.try_into().unwrap()))
            .into();
        let found =
            self.handle
                .compare_exchange(at, current, new, Ordering::AcqRel, Ordering::Acquire);
        match found {
            Ok(Ok(before)) => Ok((true, to(before).to_vec())),
            Ok(Err(before)) => Ok((false, to(before).to_vec())),
            Err(error) => Err((error.errno(), error.completed())),
        }
    }
}

pub fn outcome(result: Result<(), Error>) -> Result<(), (i32, usize)> {
    result.map_err(|error| (error.errno(), error.completed()))
}

/// Removed and left.
pub fn unmapped(result: Result<u64, Error>) -> Result<(u64, u64), i32> {
    match result {
        Ok(bytes) => Ok((bytes, 0)),
        Err(Error::Deadline { unmapped, left, .. }) => Ok((unmapped, left)),
        Err(error) => Err(error.errno()),
    }
}

/// Of a guard, which does what can be done.
pub fn partial(result: Result<usize, GuestMemoryError>) -> Result<usize, i32> {
    result.map_err(|error| match error {
        GuestMemoryError::IOError(error) => {
            let ours = error.get_ref().unwrap().downcast_ref::<Error>();
            ours.unwrap().errno()
        }
        other => panic!("{other}"),
    })
}

/// A new mapping with its memory.
pub fn with_memory((iova, size, prot): NewMapping) -> (u64, Backing, Permissions) {
    // No memory can be made of nothing: cut a page to nothing through a region.
    let backing = match size {
        0 => nothing(),
        _ => Backing::anonymous(size as usize).unwrap(),
    };
    (iova, backing, prot)
}

/// A backing of no bytes.
fn nothing() -> Backing {
    let memory =
        GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), page_size() as usize)]).unwrap();
    Backing::from_guest_memory(&memory, GuestAddress(0), 0).unwrap()
}

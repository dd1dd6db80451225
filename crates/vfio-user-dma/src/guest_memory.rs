// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! vm-memory's trait for memory of both kinds: whatever takes guest memory takes a handle of the table.
//!
//! Memory with a file is accessed as by a handle of the address space, atomics included. Memory without one
//! is copied by messages, so an atomic there is as good as a copy of its size, and a stream goes through a
//! buffer.

use std::sync::atomic::Ordering;

use vm_memory::{
    AtomicAccess, Bytes, GuestAddress, Permissions, ReadVolatile, VolatileSlice, WriteVolatile,
};

use crate::{AccessError, Error, Result, TableHandle};

/// Bytes of a stream that are moved at a time.
const BUFFER: usize = 1 << 16;

/// What was done before an error counts as success with fewer bytes, as in vm-memory.
fn partial(result: Result<usize>) -> Result<usize> {
    match result {
        Err(error) if error.completed() > 0 => Ok(error.completed()),
        result => result,
    }
}

/// An error behind the bytes that were done before it.
fn behind(done: usize) -> impl FnOnce(Error) -> Error {
    move |error| match error {
        Error::Access {
            iova,
            completed,
            cause,
        } => Error::Access {
            iova,
            completed: done + completed,
            cause,
        },
        error => error,
    }
}

/// An error of bytes that were to be handed on, and were not: as many are done as before.
fn in_vain(done: usize) -> impl FnOnce(Error) -> Error {
    move |error| match error {
        Error::Access { iova, cause, .. } => Error::Access {
            iova,
            completed: done,
            cause,
        },
        error => error,
    }
}

/// Only where nothing is in the space may the client have it.
fn is_not_mapped(error: &iommu_type1::Error) -> bool {
    matches!(error, iommu_type1::Error::NotMapped { .. })
}

fn stream(completed: usize) -> impl FnOnce(vm_memory::VolatileMemoryError) -> Error {
    move |error| Error::Stream {
        completed,
        source: match error {
            vm_memory::VolatileMemoryError::IOError(error) => error,
            other => std::io::Error::other(other),
        },
    }
}

impl TableHandle {
    /// How many of `len` bytes from `iova` on, one at least, can be written by now.
    fn writable(&self, iova: u64, len: usize) -> Result<usize> {
        let mut there = 0;
        loop {
            let at = iova.wrapping_add(there as u64);
            let space = self.space().space();
            let Err(error) = space.scatter(at, len - there, Permissions::Write) else {
                return Ok(len);
            };
            there += error.completed();
            let at = iova.wrapping_add(there as u64);
            let cause = match self.table().client_room(at, len - there) {
                Some(0) => AccessError::Permission,
                Some(room) => {
                    there += room;
                    if there == len {
                        return Ok(len);
                    }
                    continue;
                }
                None => error.into(),
            };
            return match there {
                0 => Err(Error::Access {
                    iova,
                    completed: 0,
                    cause,
                }),
                there => Ok(there),
            };
        }
    }

    /// Moves `count` bytes in pieces until `step` moves fewer than it was asked for; says how many.
    fn pieces(
        &self,
        addr: GuestAddress,
        count: usize,
        mut step: impl FnMut(u64, &mut [u8], usize) -> Result<usize>,
    ) -> Result<usize> {
        let mut buffer = Vec::new();
        let len = count.min(BUFFER);
        let room = buffer.try_reserve_exact(len);
        room.map_err(|_| Error::Access {
            iova: addr.0,
            completed: 0,
            cause: AccessError::NoMemory(len),
        })?;
        buffer.resize(len, 0);
        let mut done = 0;
        while done < count {
            let len = buffer.len().min(count - done);
            let iova = addr.0.wrapping_add(done as u64);
            let moved = step(iova, &mut buffer[..len], done)?;
            done += moved;
            if moved < len {
                break;
            }
        }
        Ok(done)
    }
}

impl Bytes<GuestAddress> for TableHandle {
    type E = Error;

    fn write(&self, buf: &[u8], addr: GuestAddress) -> Result<usize> {
        partial(self.write(addr.0, buf).map(|()| buf.len()))
    }

    fn read(&self, buf: &mut [u8], addr: GuestAddress) -> Result<usize> {
        let len = buf.len();
        partial(self.read(addr.0, buf).map(|()| len))
    }

    fn write_slice(&self, buf: &[u8], addr: GuestAddress) -> Result<()> {
        self.write(addr.0, buf)
    }

    fn read_slice(&self, buf: &mut [u8], addr: GuestAddress) -> Result<()> {
        self.read(addr.0, buf)
    }

    fn read_volatile_from<F>(&self, addr: GuestAddress, src: &mut F, count: usize) -> Result<usize>
    where
        F: ReadVolatile,
    {
        let mut is_lost = false;
        let moved = self.pieces(addr, count, |iova, buffer, done| {
            // No more is taken than there is room for.
            let room = self.writable(iova, buffer.len()).map_err(behind(done))?;
            let buffer = &mut buffer[..room];
            let mut slice = VolatileSlice::from(&mut *buffer);
            let len = src.read_volatile(&mut slice).map_err(stream(done))?;
            let written = self.write(iova, &buffer[..len]).map_err(behind(done));
            is_lost = written.is_err();
            written.map(|()| len)
        });
        match is_lost {
            // What was taken, and could not be written then, does not go without a word.
            true => moved,
            false => partial(moved),
        }
    }

    fn read_exact_volatile_from<F>(
        &self,
        addr: GuestAddress,
        src: &mut F,
        count: usize,
    ) -> Result<()>
    where
        F: ReadVolatile,
    {
        let moved = self.pieces(addr, count, |iova, buffer, done| {
            let mut slice = VolatileSlice::from(&mut *buffer);
            src.read_exact_volatile(&mut slice).map_err(stream(done))?;
            self.write(iova, buffer).map_err(behind(done))?;
            Ok(buffer.len())
        });
        moved.map(drop)
    }

    fn write_volatile_to<F>(&self, addr: GuestAddress, dst: &mut F, count: usize) -> Result<usize>
    where
        F: WriteVolatile,
    {
        partial(self.pieces(addr, count, |iova, buffer, done| {
            self.read(iova, buffer).map_err(in_vain(done))?;
            let slice = VolatileSlice::from(&mut *buffer);
            dst.write_volatile(&slice).map_err(stream(done))
        }))
    }

    fn write_all_volatile_to<F>(&self, addr: GuestAddress, dst: &mut F, count: usize) -> Result<()>
    where
        F: WriteVolatile,
    {
        let moved = self.pieces(addr, count, |iova, buffer, done| {
            self.read(iova, buffer).map_err(in_vain(done))?;
            let slice = VolatileSlice::from(&mut *buffer);
            dst.write_all_volatile(&slice).map_err(stream(done))?;
            Ok(buffer.len())
        });
        moved.map(drop)
    }

    fn store<T: AtomicAccess>(&self, val: T, addr: GuestAddress, order: Ordering) -> Result<()> {
        match self.space().store(val, addr, order) {
            Err(error) if is_not_mapped(&error) => self.write(addr.0, val.as_slice()),
            result => result.map_err(|cause| at(addr, cause)),
        }
    }

    fn load<T: AtomicAccess>(&self, addr: GuestAddress, order: Ordering) -> Result<T> {
        match self.space().load(addr, order) {
            Err(error) if is_not_mapped(&error) => {
                let mut value = T::zeroed();
                self.read(addr.0, value.as_mut_slice())?;
                Ok(value)
            }
            result => result.map_err(|cause| at(addr, cause)),
        }
    }
}

fn at(addr: GuestAddress, cause: iommu_type1::Error) -> Error {
    Error::Access {
        iova: addr.0,
        completed: 0,
        cause: AccessError::Space(cause),
    }
}

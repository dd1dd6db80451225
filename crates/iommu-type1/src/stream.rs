// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Streams between memory and a reader or writer of the caller.
//!
//! Foreign code runs in the middle of the access, so no lock is held: the stream leases the
//! mapping it is in. A thread-local remembers that the thread is inside, because an unmap from
//! there would wait for its own lease.

use std::cell::RefCell;
use std::io;
use std::ptr;

use checked_sync::thread_local;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};

use crate::dirty::DirtySlice;
use crate::lease::LeaseSet;
use crate::mapping::Need;
use crate::range::IovaRange;
use crate::space::Space;
use crate::{Error, Result};

thread_local! {
    /// The spaces whose streams this thread is inside of.
    static INSIDE: RefCell<Vec<*const Space>> = const { RefCell::new(Vec::new()) };
}

/// Whether the current thread is inside a stream of `space`.
pub(crate) fn is_inside(space: &Space) -> bool {
    INSIDE.with(|spaces| spaces.borrow().contains(&ptr::from_ref(space)))
}

/// How far a stream came, and why no further if memory was the reason.
pub(crate) struct Moved {
    iova: u64,
    count: usize,
    completed: usize,
    stopped: Option<Error>,
}

impl Moved {
    /// What was moved counts; an error is one of the first byte.
    pub(crate) fn any(self) -> Result<usize> {
        match self.stopped {
            Some(error) if self.completed == 0 => Err(error),
            _ => Ok(self.completed),
        }
    }

    /// All of it, or why not.
    pub(crate) fn exactly(self) -> Result<()> {
        match self.stopped {
            Some(error) => Err(error.after(self.completed)),
            None if self.completed < self.count => Err(Error::Stream {
                iova: self.iova + self.completed as u64,
                completed: self.completed,
                source: io::ErrorKind::UnexpectedEof.into(),
            }),
            None => Ok(()),
        }
    }
}

/// From `src` into memory; fewer bytes than `count` where `src` ends.
pub(crate) fn fill<F: ReadVolatile>(
    leases: &LeaseSet,
    iova: u64,
    src: &mut F,
    count: usize,
) -> Result<Moved> {
    run(leases, iova, count, Need::WRITE, |slice| loop {
        match src.read_volatile(slice) {
            Err(VolatileMemoryError::IOError(e)) if e.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    })
}

/// From memory into `dst`.
pub(crate) fn drain<F: WriteVolatile>(
    leases: &LeaseSet,
    iova: u64,
    dst: &mut F,
    count: usize,
) -> Result<Moved> {
    run(leases, iova, count, Need::READ, |slice| {
        dst.write_all_volatile(slice).map(|()| slice.len())
    })
}

fn run(
    leases: &LeaseSet,
    iova: u64,
    count: usize,
    need: Need,
    mut op: impl FnMut(&mut VolatileSlice<'_, DirtySlice<'_>>) -> vm_memory::VolatileMemoryResult<usize>,
) -> Result<Moved> {
    if count > 0 {
        IovaRange::new(iova, count as u64)?;
    }
    let _inside = Inside::enter(&leases.view().space);
    let mut completed = 0;
    let mut stopped = None;
    while completed < count {
        let at = iova + completed as u64;
        let mapping = match leases.lease(at, need) {
            Ok(mapping) => mapping,
            Err(error) => {
                stopped = Some(error);
                break;
            }
        };
        let there = mapping.bytes_there(at, count - completed);
        if there == 0 {
            stopped = Some(Error::Fault {
                iova: at,
                completed: 0,
            });
            break;
        }
        let mut slice = mapping.slice(at, there);
        let len = slice.len();
        let n = op(&mut slice).map_err(|error| Error::Stream {
            iova: at,
            completed,
            source: into_io(error),
        })?;
        let there = mapping.bytes_there(at, n);
        completed += there;
        if there < n {
            stopped = Some(Error::Fault {
                iova: at + there as u64,
                completed: 0,
            });
            break;
        }
        if n < len {
            break;
        }
    }
    Ok(Moved {
        iova,
        count,
        completed,
        stopped,
    })
}

fn into_io(error: VolatileMemoryError) -> io::Error {
    match error {
        VolatileMemoryError::IOError(error) => error,
        other => io::Error::other(other),
    }
}

struct Inside;

impl Inside {
    fn enter(space: &Space) -> Self {
        INSIDE.with(|spaces| spaces.borrow_mut().push(ptr::from_ref(space)));
        Inside
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.with(|spaces| spaces.borrow_mut().pop());
    }
}

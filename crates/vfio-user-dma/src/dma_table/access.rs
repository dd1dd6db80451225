// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The one face through which the device reads and writes what is mapped, with a file or without.

use std::time::Instant;

use iommu_type1::DmaHandle;
use vm_memory::Permissions;

use super::DmaTable;
use crate::message_dma::Ask;
use crate::{AccessError, Error, Result};

impl DmaTable {
    /// Reads bytes that are mapped in any way.
    ///
    /// # Errors
    ///
    /// [`Error::Access`] says how far it came and why it stopped.
    pub fn read(&self, iova: u64, buf: &mut [u8]) -> Result<()> {
        self.read_by(iova, buf, |iova, buf| self.0.space.read(iova, buf))
    }

    /// Writes bytes that are mapped in any way.
    ///
    /// # Errors
    ///
    /// As [`read`](DmaTable::read).
    pub fn write(&self, iova: u64, buf: &[u8]) -> Result<()> {
        self.write_by(iova, buf, |iova, buf| self.0.space.write(iova, buf))
    }

    /// A handle for one thread of the device: as fast as one of the address space where memory came with a file.
    pub fn handle(&self) -> TableHandle {
        TableHandle {
            table: self.clone(),
            space: self.0.space.handle(),
        }
    }

    fn read_by(
        &self,
        iova: u64,
        buf: &mut [u8],
        read: impl Fn(u64, &mut [u8]) -> iommu_type1::Result<()>,
    ) -> Result<()> {
        let mut progress = Progress::at(iova);
        while let Err(error) = read(progress.iova(), &mut buf[progress.done..]) {
            progress.stopped(error)?;
            let rest = &mut buf[progress.done..];
            let ask = || Ask::Read(rest.len());
            let (answer, len) = progress.ask(self, Permissions::Read, ask)?;
            rest[..len].copy_from_slice(&answer);
            progress.done += len;
        }
        Ok(())
    }

    fn write_by(
        &self,
        iova: u64,
        buf: &[u8],
        write: impl Fn(u64, &[u8]) -> iommu_type1::Result<()>,
    ) -> Result<()> {
        let mut progress = Progress::at(iova);
        while let Err(error) = write(progress.iova(), &buf[progress.done..]) {
            progress.stopped(error)?;
            let rest = &buf[progress.done..];
            let ask = || Ask::Write(rest);
            let (_, len) = progress.ask(self, Permissions::ReadWrite, ask)?;
            progress.done += len;
        }
        Ok(())
    }
}

/// How far an access has come.
struct Progress {
    start: u64,
    done: usize,
    /// Why the space had nothing more, for where the table has nothing either.
    stopped: Option<iommu_type1::Error>,
    deadline: Option<Instant>,
}

impl Progress {
    fn at(start: u64) -> Self {
        Progress {
            start,
            done: 0,
            stopped: None,
            deadline: None,
        }
    }

    /// Past the last byte of the 64-bit space only when nothing is left to do.
    fn iova(&self) -> u64 {
        self.start.wrapping_add(self.done as u64)
    }

    fn error(&self, cause: AccessError) -> Error {
        Error::Access {
            iova: self.iova(),
            completed: self.done,
            cause,
        }
    }

    /// The space came so far. It may go on where it has nothing.
    fn stopped(&mut self, error: iommu_type1::Error) -> Result<()> {
        self.done += error.completed();
        match error {
            iommu_type1::Error::NotMapped { .. } => {
                self.stopped = Some(error);
                Ok(())
            }
            error => Err(self.error(error.into())),
        }
    }

    /// Asks the client for the rest, or as much of it as one message may have.
    fn ask<'a>(
        &mut self,
        table: &DmaTable,
        need: Permissions,
        ask: impl Fn() -> Ask<'a>,
    ) -> Result<(Vec<u8>, usize)> {
        let messages = table.messages();
        let deadline = *self.deadline.get_or_insert_with(|| messages.deadline());
        let iova = self.iova();
        loop {
            let asked = {
                let entries = table.entries();
                match entries.client_range(iova) {
                    // It may have been mapped since the space was asked; then that access came first.
                    None => match self.stopped.take() {
                        Some(error) => Err(error.into()),
                        None => Err(AccessError::Unmapped),
                    },
                    Some((_, prot)) if prot & need != need => Err(AccessError::Permission),
                    Some((last, _)) => messages.ask(iova, ask().up_to(last - iova)),
                }
            };
            let answer =
                asked.and_then(|(ticket, len)| Ok((messages.wait(ticket, deadline)?, len)));
            match answer {
                // The question was only how to ask.
                Ok((_, 0)) => {}
                Ok(answer) => return Ok(answer),
                Err(cause) => return Err(self.error(cause)),
            }
        }
    }
}

/// Reads and writes of one thread of the device through a [`DmaTable`].
///
/// ```
/// use vfio_user_dma::DmaTable;
///
/// let table = DmaTable::new()?;
/// let dma = table.handle();
/// assert_eq!(dma.write(0x1000, &[1, 2, 3]).unwrap_err().errno(), libc::EINVAL);
/// # Ok::<(), vfio_user_dma::Error>(())
/// ```
#[derive(Debug)]
pub struct TableHandle {
    table: DmaTable,
    space: DmaHandle,
}

impl TableHandle {
    /// As [`DmaTable::read`].
    ///
    /// # Errors
    ///
    /// As [`DmaTable::read`].
    pub fn read(&self, iova: u64, buf: &mut [u8]) -> Result<()> {
        let read = |iova, buf: &mut [u8]| self.space.read(iova, buf);
        self.table.read_by(iova, buf, read)
    }

    /// As [`DmaTable::write`].
    ///
    /// # Errors
    ///
    /// As [`DmaTable::read`].
    pub fn write(&self, iova: u64, buf: &[u8]) -> Result<()> {
        let write = |iova, buf: &[u8]| self.space.write(iova, buf);
        self.table.write_by(iova, buf, write)
    }

    pub(crate) fn table(&self) -> &DmaTable {
        &self.table
    }

    /// The handle of the address space: memory that came with files, and nothing else.
    pub fn space(&self) -> &DmaHandle {
        &self.space
    }
}

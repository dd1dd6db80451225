// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The one way to guest memory: an access is observed, is one call, and fails with its address.

use vm_memory::{Bytes, GuestAddress};

use crate::context::FromLastPage;
use crate::error::{Cause, Error, Result};
use crate::observe::{Access, AccessKind, Observer};

/// Guest memory as a vGPU uses it: anything that is `Bytes<GuestAddress>` with a proper error.
///
/// It is implemented for every such type and cannot be implemented otherwise. Each access is one call
/// of `read_slice` or `write_slice`, or of their counterparts for streams where the pages lie the other
/// way round ([`CopyMode::Scattered`](crate::CopyMode::Scattered)).
///
/// ```
/// use gvt_scheduler::GuestDma;
/// use vm_memory::GuestMemoryMmap;
///
/// fn takes_memory<M: GuestDma>() {}
/// takes_memory::<GuestMemoryMmap>();
/// ```
pub trait GuestDma: Bytes<GuestAddress, E: std::error::Error + Send + Sync + 'static> {}

impl<M> GuestDma for M
where
    M: Bytes<GuestAddress> + ?Sized,
    M::E: std::error::Error + Send + Sync + 'static,
{
}

/// What becomes of an access that guest memory refuses.
///
/// ```
/// use gvt_scheduler::{ErrorMode, VgpuConfig};
///
/// let as_the_kernel = VgpuConfig { errors: ErrorMode::Kernel, ..VgpuConfig::default() };
/// assert_eq!(VgpuConfig::default().errors, ErrorMode::Strict);
/// # let _ = as_the_kernel;
/// ```
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum ErrorMode {
    /// It is an error of the workload (`EFAULT`).
    #[default]
    Strict,
    /// It is logged and passed over, as in the kernel: what could not be read is zero, what could not be
    /// written is lost. An entry of a page table is then not present. Addresses without translation
    /// are errors all the same, and so is what an engine cannot reach.
    Kernel,
}

/// Guest memory with the one who watches it.
#[derive(Debug)]
pub(crate) struct Port<'a, M, O> {
    pub(crate) memory: &'a M,
    pub(crate) observer: &'a mut O,
    pub(crate) errors: ErrorMode,
}

impl<'a, M, O> Port<'a, M, O> {
    /// A port on which every access that fails is an error.
    pub(crate) fn strict(memory: &'a M, observer: &'a mut O) -> Self {
        Self {
            memory,
            observer,
            errors: ErrorMode::Strict,
        }
    }
}

impl<M: GuestDma, O: Observer> Port<'_, M, O> {
    pub(crate) fn read(
        &mut self,
        kind: AccessKind,
        gpa: GuestAddress,
        buf: &mut [u8],
    ) -> Result<()> {
        let len = buf.len();
        self.observe(kind, false, gpa, len);
        let read = self.memory.read_slice(buf, gpa);
        self.settle_read(read.map_err(read_error(kind, gpa, len)), buf)
    }

    /// Reads pages that lie the other way round in guest memory.
    pub(crate) fn read_descending(
        &mut self,
        kind: AccessKind,
        gpa: GuestAddress,
        buf: &mut [u8],
    ) -> Result<()> {
        let len = buf.len();
        self.observe(kind, false, gpa, len);
        let mut pages = FromLastPage::new(&mut *buf);
        let read = self.memory.write_all_volatile_to(gpa, &mut pages, len);
        self.settle_read(read.map_err(read_error(kind, gpa, len)), buf)
    }

    pub(crate) fn write(&mut self, kind: AccessKind, gpa: GuestAddress, buf: &[u8]) -> Result<()> {
        let len = buf.len();
        self.observe(kind, true, gpa, len);
        let written = self.memory.write_slice(buf, gpa);
        self.settle(written.map_err(write_error(kind, gpa, len)))
    }

    /// Writes pages that lie the other way round in guest memory.
    pub(crate) fn write_descending(
        &mut self,
        kind: AccessKind,
        gpa: GuestAddress,
        buf: &[u8],
    ) -> Result<()> {
        let len = buf.len();
        self.observe(kind, true, gpa, len);
        let mut pages = FromLastPage::new(buf);
        let written = self.memory.read_exact_volatile_from(gpa, &mut pages, len);
        self.settle(written.map_err(write_error(kind, gpa, len)))
    }

    pub(crate) fn read_u32(&mut self, kind: AccessKind, gpa: GuestAddress) -> Result<u32> {
        let mut bytes = [0; 4];
        self.read(kind, gpa, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    pub(crate) fn read_u64(&mut self, kind: AccessKind, gpa: GuestAddress) -> Result<u64> {
        let mut bytes = [0; 8];
        self.read(kind, gpa, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn settle_read(&self, read: Result<()>, buf: &mut [u8]) -> Result<()> {
        if read.is_err() && self.errors == ErrorMode::Kernel {
            buf.fill(0);
        }
        self.settle(read)
    }

    /// What an access that may have failed is to its workload.
    fn settle(&self, access: Result<()>) -> Result<()> {
        match (self.errors, access) {
            (ErrorMode::Kernel, Err(error)) => {
                log::warn!("passed over: {error}");
                Ok(())
            }
            (_, access) => access,
        }
    }

    fn observe(&mut self, kind: AccessKind, write: bool, gpa: GuestAddress, len: usize) {
        self.observer.access(&Access {
            kind,
            write,
            gpa,
            len,
        });
    }
}

fn read_error<E: Into<Cause>>(
    kind: AccessKind,
    gpa: GuestAddress,
    len: usize,
) -> impl FnOnce(E) -> Error {
    move |source| Error::Read {
        kind,
        gpa: gpa.0,
        len,
        source: source.into(),
    }
}

fn write_error<E: Into<Cause>>(
    kind: AccessKind,
    gpa: GuestAddress,
    len: usize,
) -> impl FnOnce(E) -> Error {
    move |source| Error::Write {
        kind,
        gpa: gpa.0,
        len,
        source: source.into(),
    }
}

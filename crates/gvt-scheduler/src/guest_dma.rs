// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The one way to guest memory: an access is observed, is one call, and fails with its address.

use vm_memory::{Bytes, GuestAddress};

use crate::error::{Error, Result};
use crate::observe::{Access, AccessKind, Observer};

/// Guest memory as a vGPU uses it: anything that is `Bytes<GuestAddress>` with a proper error.
///
/// It is implemented for every such type and cannot be implemented otherwise. Each access is one call
/// of `read_slice` or `write_slice`.
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

/// Guest memory with the one who watches it.
#[derive(Debug)]
pub(crate) struct Port<'a, M, O> {
    pub(crate) memory: &'a M,
    pub(crate) observer: &'a mut O,
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
        self.memory
            .read_slice(buf, gpa)
            .map_err(|source| Error::Read {
                kind,
                gpa: gpa.0,
                len,
                source: source.into(),
            })
    }

    pub(crate) fn write(&mut self, kind: AccessKind, gpa: GuestAddress, buf: &[u8]) -> Result<()> {
        let len = buf.len();
        self.observe(kind, true, gpa, len);
        self.memory
            .write_slice(buf, gpa)
            .map_err(|source| Error::Write {
                kind,
                gpa: gpa.0,
                len,
                source: source.into(),
            })
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

    fn observe(&mut self, kind: AccessKind, write: bool, gpa: GuestAddress, len: usize) {
        self.observer.access(&Access {
            kind,
            write,
            gpa,
            len,
        });
    }
}

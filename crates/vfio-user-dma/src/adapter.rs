// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A [`Backend`] behind the server of the `vfio_user` crate.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_TYPE_MASK,
    VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE,
    VFIO_IRQ_SET_DATA_TYPE_MASK,
};
use vfio_user::{DmaMapFlags, DmaUnmapFlags, ServerBackend};

use crate::{Backend, IrqAction, IrqData, IrqEventfd, SetIrqs};

/// Lets `vfio_user::Server` (0.1.7) serve a [`Backend`].
///
/// What that server cannot do, the adapter cannot either:
///
/// - A client that is not to be trusted can end the process (a short version message underflows, capabilities
///   without a NUL panic), and what it says is allocated.
/// - An error reaches the client without its errno; it is logged here instead.
/// - Memory without a file cannot be read or written (ENOTCONN): there is no DMA_READ or DMA_WRITE.
/// - What is unread of a message that was refused is taken for the next one.
/// - An interrupt of several (`VFIO_IRQ_SET_DATA_BOOL`) cannot be chosen (EINVAL): it does not hand the flags on.
/// - It serves one client and returns; [`Backend::disconnected`] and [`DmaTable::clear`](crate::DmaTable::clear) are the
///   caller's to call then.
/// - Who the client is is not known unless the caller says so
///   ([`DmaTable::set_client`](crate::DmaTable::set_client)), so its private memory is not refused.
///
/// Flags of unmaps are taken as bits: the names that crate gives them are one bit off.
///
/// ```no_run
/// # fn device() -> Box<dyn vfio_user_dma::Backend> { unimplemented!() }
/// # fn run(server: vfio_user::Server) -> Result<(), vfio_user::Error> {
/// let mut device = device();
/// server.run(&mut vfio_user_dma::VfioUserAdapter(&mut *device))
/// # }
/// ```
#[allow(missing_debug_implementations)] // A backend need not have one.
pub struct VfioUserAdapter<'a>(pub &'a mut dyn Backend);

impl ServerBackend for VfioUserAdapter<'_> {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.0.region_read(region, offset, data)
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.region_write(region, offset, data)
    }

    fn dma_map(
        &mut self,
        flags: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> io::Result<()> {
        let fd = fd.map(Into::into);
        logged(self.0.dma().map(flags.bits(), offset, address, size, fd))?;
        self.0.dma_mapped(address, size);
        Ok(())
    }

    fn dma_unmap(&mut self, flags: DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        logged(self.0.dma().unmap(flags.bits(), address, size).map(drop))?;
        match flags.bits() {
            0 => self.0.dma_unmapped(address, size),
            _ => self.0.dma_unmapped(0, u64::MAX),
        }
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        self.0.reset()
    }

    fn set_irqs(
        &mut self,
        index: u32,
        flags: u32,
        start: u32,
        count: u32,
        fds: Vec<File>,
    ) -> io::Result<()> {
        let refused = || io::Error::from_raw_os_error(libc::EINVAL);
        let action = match flags & VFIO_IRQ_SET_ACTION_TYPE_MASK {
            VFIO_IRQ_SET_ACTION_MASK => IrqAction::Mask,
            VFIO_IRQ_SET_ACTION_UNMASK => IrqAction::Unmask,
            VFIO_IRQ_SET_ACTION_TRIGGER => IrqAction::Trigger,
            _ => return Err(refused()),
        };
        let irqs = self.0.irqs().get(index as usize).ok_or_else(refused)?;
        let end = start.checked_add(count).ok_or_else(refused)?;
        if start >= irqs.count || end > irqs.count {
            return Err(refused());
        }
        let data = match flags & VFIO_IRQ_SET_DATA_TYPE_MASK {
            VFIO_IRQ_SET_DATA_NONE => IrqData::None,
            VFIO_IRQ_SET_DATA_EVENTFD if fds.is_empty() || fds.len() == count as usize => {
                let fds = fds
                    .into_iter()
                    .map(|fd| IrqEventfd::try_from(OwnedFd::from(fd)));
                IrqData::Eventfd(fds.collect::<io::Result<_>>()?)
            }
            _ => return Err(refused()),
        };
        self.0.set_irqs(SetIrqs {
            index,
            start,
            count,
            action,
            data,
        })
    }
}

fn logged(result: crate::Result<()>) -> io::Result<()> {
    result.map_err(|error| {
        log::warn!("{error}");
        error.into()
    })
}

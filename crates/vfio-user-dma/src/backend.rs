// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a device implements to be served.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_IRQ_INFO_EVENTFD,
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
};

use crate::{DmaTable, IrqEventfd};

/// A region of a device: a BAR, its configuration space.
#[derive(Clone, Debug, Default)]
pub struct Region {
    /// `VFIO_REGION_INFO_FLAG_READ`, `_WRITE` of vfio-bindings; `_MMAP` comes by itself where there is a file.
    pub flags: u32,
    /// Bytes; 0 for one that the device does not have.
    pub size: u64,
    /// The file that the client may map it from.
    pub mmap: Option<RegionFile>,
}

/// The file behind a region.
#[derive(Clone, Debug)]
pub struct RegionFile {
    /// The file.
    pub fd: Arc<OwnedFd>,
    /// Where the region begins in it.
    pub offset: u64,
    /// Offset and size of the parts that may be mapped; none for all of it.
    pub areas: Vec<(u64, u64)>,
}

impl Region {
    /// One that is read and written by messages.
    pub fn new(size: u64) -> Self {
        Region {
            flags: VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE,
            size,
            mmap: None,
        }
    }
}

/// A kind of interrupts of a device: INTx, MSI, MSI-X.
///
/// ```
/// use vfio_user_dma::Irqs;
///
/// // A device with 32 vectors of MSI and without INTx: what `Backend::irqs` returns.
/// let irqs = [Irqs::default(), Irqs::new(32)];
/// assert_eq!(irqs[1], Irqs { flags: 1, count: 32 });
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Irqs {
    /// `VFIO_IRQ_INFO_*`; the constants are those of vfio-bindings.
    pub flags: u32,
    /// How many of it there are.
    pub count: u32,
}

impl Irqs {
    /// So many that are signalled by eventfds and cannot be masked: `VFIO_IRQ_INFO_EVENTFD` alone.
    pub const fn new(count: u32) -> Self {
        Irqs {
            flags: VFIO_IRQ_INFO_EVENTFD,
            count,
        }
    }
}

/// What a client wants of interrupts: `VFIO_DEVICE_SET_IRQS`, checked as the kernel checks it.
#[derive(Debug)]
pub struct SetIrqs {
    /// Which kind.
    pub index: u32,
    /// The first of it.
    pub start: u32,
    /// How many; 0 with [`IrqData::None`] and [`IrqAction::Trigger`] turns all of the kind off.
    pub count: u32,
    /// What is to happen.
    pub action: IrqAction,
    /// How each of them is concerned.
    pub data: IrqData,
}

/// What is to happen with interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqAction {
    /// `VFIO_IRQ_SET_ACTION_MASK`
    Mask,
    /// `VFIO_IRQ_SET_ACTION_UNMASK`
    Unmask,
    /// `VFIO_IRQ_SET_ACTION_TRIGGER`
    Trigger,
}

/// Which of the interrupts are concerned, and how they are signalled.
#[derive(Debug)]
pub enum IrqData {
    /// All.
    None,
    /// Those that are `true`.
    Bool(Vec<bool>),
    /// Each by its eventfd; none at all takes them away.
    Eventfd(Vec<IrqEventfd>),
}

/// A device that a [`Server`](crate::Server) serves. All calls come from the thread that serves it.
///
/// Errors travel to the client as their errno, or the one that their kind stands for
/// ([`errno_of`](iommu_type1::errno_of)). [`Error`](crate::Error) has one.
pub trait Backend {
    /// Where the device does its DMA. Threads of the device take [handles](DmaTable::handle) of it.
    fn dma(&self) -> &DmaTable;

    /// `VFIO_DEVICE_FLAGS_*`.
    fn flags(&self) -> u32 {
        VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET
    }

    /// Its regions by index: of a PCI device 0 to 5 are the BARs, 6 is the ROM, 7 the configuration space, without which
    /// a guest sees no device.
    fn regions(&self) -> &[Region];

    /// Its kinds of interrupts by index: of a PCI device 0 is INTx, 1 MSI, 2 MSI-X, 3 errors, 4 that it is asked for.
    fn irqs(&self) -> &[Irqs];

    /// Reads a region. The range is inside of it, and it may be read.
    ///
    /// # Errors
    ///
    /// What the client is told.
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Writes a region. The range is inside of it, and it may be written.
    ///
    /// # Errors
    ///
    /// What the client is told.
    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Changes how interrupts are signalled.
    ///
    /// # Errors
    ///
    /// What the client is told.
    fn set_irqs(&mut self, set: SetIrqs) -> io::Result<()>;

    /// Resets the device.
    ///
    /// # Errors
    ///
    /// What the client is told.
    fn reset(&mut self) -> io::Result<()>;

    /// The client has mapped a range.
    fn dma_mapped(&mut self, address: u64, size: u64) {
        let _ = (address, size);
    }

    /// The client has unmapped what was in a range: everything in it where that is 0 and `u64::MAX`. Who must be
    /// told before takes [pins](DmaTable::pins).
    fn dma_unmapped(&mut self, address: u64, size: u64) {
        let _ = (address, size);
    }

    /// The client has gone. Its mappings go when this returns, so what holds memory of them should let go, and
    /// eventfds have nobody at the other end any more.
    fn disconnected(&mut self) {}
}

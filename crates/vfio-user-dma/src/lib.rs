// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A vfio-user device server that a hostile client cannot hurt, and the DMA table behind it.
//!
//! # What for
//!
//! A vfio-user client (QEMU's `vfio-user-pci`) sees a PCI device that another process implements. It tells that
//! process over a Unix socket which memory the device may use, and what the guest reads and writes of its
//! regions. This crate is the other end: implement [`Backend`], and a [`Server`] serves it.
//!
//! # How it works
//!
//! - [`Server`] reads messages without ever blocking, each to its end whatever it says, so no message is
//!   taken for a part of another. Nothing is allocated by what a client says before that is checked, errors are
//!   answered with their errno, and a client that stops in the middle is cut off after a while.
//! - [`DmaTable`] keeps what the client has mapped. Memory that comes with a file is in an
//!   [`IoAddressSpace`](iommu_type1::IoAddressSpace), with all that this offers: handles, slices, virtqueues, pins.
//! - Memory that comes without one stays with the client: the table reads and writes it by messages, behind
//!   the same [`DmaTable::read`] and [`DmaTable::write`]. Only threads of the device can do that, not the thread that
//!   serves the socket.
//!
//! # Example
//!
//! The table by itself, as a client of QEMU's kind drives it:
//!
//! ```
//! use std::fs::File;
//! use std::os::fd::{FromRawFd, OwnedFd};
//! use vfio_user_dma::DmaTable;
//!
//! // SAFETY: the name ends with a NUL; the descriptor is new.
//! let memory = unsafe { File::from_raw_fd(libc::memfd_create(c"guest".as_ptr(), 0)) };
//! memory.set_len(0x1_0000)?;
//!
//! let table = DmaTable::new()?;
//! table.map(3, 0x1000, 0x8000_0000, 0x2000, Some(OwnedFd::from(memory)))?;
//! let dma = table.handle();
//! dma.write(0x8000_0ffe, b"DMA!")?;
//! let mut bytes = [0; 4];
//! dma.read(0x8000_0ffe, &mut bytes)?;
//! assert_eq!(&bytes, b"DMA!");
//! assert_eq!(table.unmap(0, 0x8000_0000, 0x2000)?, 0x2000);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A whole device, `examples/vfio_user_device.rs`:
//!
//! ```no_run
#![doc = include_str!("../examples/vfio_user_device.rs")]
//! ```
//!
//! # Gotchas
//!
//! - An unmap is answered when nobody touches the range any more. It waits for leases and pins up to a deadline
//!   ([`UNMAP_DEADLINE`]), and nothing else is served meanwhile: a device that holds memory must let go of it without
//!   waiting for memory that has no file.
//! - A client can shrink a file after it is mapped, and the next access kills this process, unless that is refused
//!   ([`DmaTableBuilder::require_seals`]) or survived (`DmaTableBuilder::guard_files`, with the feature `sigbus`).
//! - Memory that the client has mapped privately (`share=off`) is refused where that can be told: its mappings must be
//!   visible in `/proc`, and where client and server are one process, those of the server count too.
//! - QEMU lays DMA_READ and DMA_WRITE out in a way of its own. Which way a client has is found out with one
//!   question before the first access.
//! - The default limit of 65 535 mappings is the kernel's.
//!
//! # Features
//!
//! All off by default.
//!
//! - `sigbus`: `DmaTableBuilder::guard_files`, accesses that survive files which get shorter.
//! - `vfio_user`: `VfioUserAdapter`, a [`Backend`] behind the server of the crate `vfio_user`.

// Says of what is behind a feature that it is.
#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(not(target_os = "linux"))]
compile_error!("vfio-user-dma is built for Linux only");

#[cfg(feature = "vfio_user")]
mod adapter;
mod backend;
mod capabilities;
mod connection;
mod dma_table;
mod error;
mod event;
mod file_memory;
mod guest_memory;
mod irq_eventfd;
mod message_dma;
mod pins;
mod server;
mod session;
mod sharing;
mod socket;
pub mod wire;

#[cfg(feature = "vfio_user")]
pub use adapter::VfioUserAdapter;
pub use backend::{Backend, IrqAction, IrqData, Irqs, Region, RegionFile, SetIrqs};
pub use capabilities::{Capabilities, MAX_DATA_XFER_SIZE};
pub use dma_table::{DmaTable, DmaTableBuilder, TableHandle, MESSAGE_DEADLINE, UNMAP_DEADLINE};
pub use error::{AccessError, Error, Result};
pub use file_memory::FILE_BYTES_LIMIT;
pub use irq_eventfd::IrqEventfd;
pub use message_dma::REQUEST_LIMIT;
pub use pins::{TablePin, TablePins};
pub use server::{End, Server, Stopper, IO_DEADLINE};

/// Examples of the README are tested as those here are.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

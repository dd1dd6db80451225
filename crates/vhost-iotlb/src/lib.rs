// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device IOTLB of a vhost back end: its messages, the memory table, and misses that are waited for.
//!
//! # What for
//!
//! A virtio device behind a vIOMMU gives I/O virtual addresses to its queues. A back end in another process (or in
//! the VMM's own) knows those that the front end has told it: by *updates*, and it forgets them by *invalidations*. What
//! it does not know it asks for, a *miss*, and an update answers. This crate applies these messages to an
//! [`IoAddressSpace`](iommu_type1::IoAddressSpace) with the rules of an IOTLB, and waits for misses.
//!
//! # How it works
//!
//! - [`MemTable`] is what the front end says of its memory (`SET_MEM_TABLE`): the addresses in a message are those of
//!   the *front end*, and the table turns them into memory of this process.
//! - [`VhostIotlb::apply`] takes one message, [`apply_bytes`](VhostIotlb::apply_bytes) as it comes from a socket. An update replaces what it overlaps, an invalidation splits, and what
//!   stands between the beginning and the end of a batch comes at once or not at all. An invalidation that succeeds
//!   means that nobody uses the memory any more: it waits for requests that do, up to the deadline of the space.
//! - Devices use the [space](VhostIotlb::space): its handles, its guards for virtio queues. An access that finds
//!   nothing fails at once. [`VhostIotlb::resolve`] has a range translated before, [`VhostIotlb::retry`] tries
//!   again after: both report what is missing to a [`MissSink`] and wait for the answer, with a deadline.
//! - [`message`] has the bytes of a message, of which every field may be anything.
//!
//! # Example
//!
//! ```
//! use std::io;
//! use std::sync::mpsc::{channel, Sender};
//! use std::thread;
//! use std::time::Duration;
//!
//! use iommu_type1::Backing;
//! use vhost::{VhostAccess, VhostIotlbMsg, VhostIotlbType};
//! use vhost_iotlb::{MemRegion, MemTable, MissSink, VhostIotlb};
//!
//! /// Sends misses to the front end.
//! struct Frontend(Sender<VhostIotlbMsg>);
//!
//! impl MissSink for Frontend {
//!     fn miss(&self, miss: &VhostIotlbMsg) -> io::Result<()> {
//!         self.0.send(*miss).map_err(|_| io::ErrorKind::BrokenPipe.into())
//!     }
//! }
//!
//! let (sender, misses) = channel();
//! let iotlb = VhostIotlb::new(Frontend(sender)).miss_deadline(Duration::from_secs(30));
//! // The front end has this memory at 0x7f00_0000_0000.
//! let memory = MemRegion::new(0x7f00_0000_0000, Backing::anonymous(0x1_0000)?);
//! iotlb.set_mem_table(MemTable::new([memory])?)?;
//!
//! // The thread that reads the socket.
//! let device = iotlb.clone();
//! let socket = thread::spawn(move || {
//!     let miss = misses.recv().unwrap();
//!     device.apply(&VhostIotlbMsg {
//!         userspace_addr: 0x7f00_0000_3000,
//!         perm: VhostAccess::ReadWrite,
//!         msg_type: VhostIotlbType::Update,
//!         ..miss
//!     })
//! });
//! // The thread of the device.
//! iotlb.write(0x8010, b"DMA!")?;
//! let mut bytes = [0; 4];
//! iotlb.space().read(0x8010, &mut bytes)?;
//! assert_eq!(&bytes, b"DMA!");
//! socket.join().unwrap()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Gotchas
//!
//! - Never wait for a miss while holding a guard, a scatter list or a pin: an invalidation that the front end sends
//!   before its answer waits for them, and both end at their deadlines.
//! - Never call [`VhostIotlb::apply`], [`set_mem_table`](VhostIotlb::set_mem_table) or
//!   [`disconnect`](VhostIotlb::disconnect) from what they call: a notice of a pin, or a listener of the space. They
//!   take turns, and it would wait for its own.
//! - Rings are behind the vIOMMU too, and a queue of virtio-queue answers an error of its memory with *no chain*: resolve
//!   the rings before looking at them.
//! - Pages are those of the host. An invalidation of a part of a page takes the page; an update of a part is refused.
//! - An IOTLB that has no room for more is emptied: it is a cache, and what is needed is missed again.
//! - Who can shrink a file behind the memory table can kill this process (SIGBUS). With the feature `sigbus` of iommu-type1
//!   a region can be made of memory for which that is an error of the access instead: [`MemRegion::new`] with `Backing::guarded`.

#[cfg(not(target_os = "linux"))]
compile_error!("vhost-iotlb is built for Linux only");

mod batch;
mod error;
mod iotlb;
mod mem_table;
mod memory;
pub mod message;
mod miss;

#[cfg(all(test, loom))]
mod model;

pub use batch::BATCH_LIMIT;
pub use error::{Error, Result};
pub use iotlb::VhostIotlb;
pub use mem_table::{MemRegion, MemTable, REGION_LIMIT, TABLE_BYTES_LIMIT};
pub use miss::{Miss, MissSink, MISS_DEADLINE, MISS_LIMIT};

/// Examples of the README are tested as those here are.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

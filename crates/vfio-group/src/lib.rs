// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! VFIO containers, groups, devices and the external user whose lifetime keeps them.
//!
//! # What for
//!
//! In the kernel a device model that does DMA takes one reference on its VFIO group, holds it, and
//! from then on reads, writes and pins guest memory without looking anything up: the reference
//! keeps the group in its container, and with it the container's mappings. This crate has the same
//! objects for device models in user space: it decides who lives how long, and answers with the
//! kernel's errnos. The memory itself is an [`iommu_type1::IoAddressSpace`].
//!
//! # How it works
//!
//! - [`Group`]s of [`Device`]s are attached to a [`Container`] through their [`GroupFile`]; the
//!   container gets its IOMMU when it has a group ([`Container::set_iommu`]), and is then mapped.
//! - Who uses a container through a group is counted ([`Group::container_users`]): the group file
//!   while attached, every [`DeviceFile`], every [`ExternalUser`]. Files may be closed in any order;
//!   whoever is the last detaches the group.
//! - The last group to leave releases the IOMMU: all mappings vanish.
//! - A group may not be viable ([`Group::bind_elsewhere`]), or have no IOMMU ([`GroupType`]), and the
//!   container has the type1 of v1 or v2 ([`IommuType`]).
//! - A [`Device`] can be asked for ([`Device::request_release`]) and taken away under those who use it
//!   ([`Device::unplug`]); its model is told of the virtual machine ([`Group::set_kvm`],
//!   [`Device::on_set_kvm`]).
//! - An [`ExternalUser`] does DMA straight through the address space it holds; everything made from
//!   it (handles, guards, scatter lists, pins) keeps it. It implements page-pin's `PinPages`, and its
//!   [handles](ExternalUser::handle) vm-memory's `Bytes`: the two that `gvt_scheduler::Vgpu` takes.
//!
//! # Example
//!
//! ```
//! use iommu_type1::Backing;
//! use vfio_group::{Container, ExternalUser, Group, IommuType};
//! use vm_memory::{Bytes, GuestAddress, Permissions};
//!
//! // The VMM's side.
//! let group = Group::new(26);
//! let device = group.add_device("vgpu0")?;
//! let container = Container::open();
//! let file = group.open()?;
//! file.set_container(&container)?;
//! container.set_iommu(IommuType::Type1v2)?;
//! container.map(0x10_0000, Backing::anonymous(0x4000)?, Permissions::ReadWrite)?;
//!
//! // The device model's side: one reference, then DMA.
//! let user = ExternalUser::from_device(&device)?;
//! let dma = user.handle();
//! dma.write_obj(0xcafe_u16, GuestAddress(0x10_0ffe))?;
//!
//! // The group cannot leave while the model, or only its handle, is there.
//! drop(user);
//! assert_eq!(file.unset_container().unwrap_err().errno(), libc::EBUSY);
//! drop(dma);
//! file.unset_container()?;
//! # Ok::<(), vfio_group::Error>(())
//! ```
//!
//! # Gotchas
//!
//! - Closing the container's file unmaps nothing while a group is attached, as in the kernel.
//! - [`Group::open`] answers EBUSY while an external user from the last time is held: a leaked one
//!   blocks the group.
//! - [`Container::address_space`] keeps nothing attached; [`ExternalUser::address_space`] does.
//! - Dropping the last user waits for holders of what came from the former, up to the unmap
//!   deadline of the space.
//! - [`Device::unplug`] waits for files, not for external users.
//! - Who calls [`Group::set_kvm`] while a listener runs in another thread does not wait for it.
//! - A notice given to [`ExternalUser::register_notifier`] must not own that user.
//!
//! # Implementation notes
//!
//! The count is one atomic: inc-if-not-zero to become a user, dec-if-positive to go, and a
//! compare-exchange from 1 to 0 to detach, so that exactly one detaches and nobody finds a group
//! attached without users. It is model-checked with loom. No lock of this crate is held while
//! mappings are removed: that may wait, and calls those who want to be told. They may drop users. Nor
//! is one held while a listener to [`Group::set_kvm`] runs; that too is model-checked.
//!
//! # Features
//!
//! All off by default.
//!
//! - `hardware`: `vfio_group::hardware`, the ioctls of the kernel's own containers, groups and devices; and
//!   `Mirror`: what an address space has, mapped for them too.
//! - `vfio-ioctls`: mirrors into `VfioOps` of that crate, and `SpaceOps`: an address space as `VfioOps`.
//! - `kvm`: `MemorySlots`, which are an address space's mappings, and `KvmVfio`, which tells KVM of groups.

// Says of what is behind a feature that it is.
#![cfg_attr(docsrs, feature(doc_cfg))]
// Only what is behind features has any: ioctls, and memory that others are given.
#![deny(unsafe_code)]

#[cfg(not(target_os = "linux"))]
compile_error!("vfio-group models Linux VFIO and is built for Linux only");

mod broadcast;
mod container;
mod device;
mod error;
mod extension;
mod external_user;
#[cfg(any(feature = "hardware", feature = "kvm"))]
mod follower;
mod group;
#[cfg(feature = "hardware")]
pub mod hardware;
mod kvm;
#[cfg(feature = "hardware")]
mod mirror;
mod users;

pub use container::Container;
pub use device::{BoundElsewhere, Device, DeviceFile};
pub use error::{Error, Result};
pub use extension::IommuType;
pub use external_user::ExternalUser;
pub use group::{Group, GroupFile, GroupType};
#[cfg(all(feature = "kvm", feature = "hardware"))]
pub use kvm::KvmUser;
pub use kvm::{Kvm, KvmListener};
#[cfg(feature = "kvm")]
pub use kvm::{
    KvmFile, KvmGroup, KvmVfio, MemorySlot, MemorySlots, SetDeviceAttr, SetMemoryRegion,
};
#[cfg(feature = "hardware")]
pub use mirror::Mirror;
#[cfg(feature = "vfio-ioctls")]
pub use mirror::SpaceOps;

/// Examples of the README are tested as those here are.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

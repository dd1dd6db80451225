// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Read, write and pin I/O virtual addresses on behalf of a device, from user space.
//!
//! Linux gives its own device models four things: a reference on a VFIO group that is taken once
//! and held, `vfio_dma_rw` through the type1 IOMMU map, pinned pages with a notice before they are
//! unmapped, and a GPU scheduler that moves runs of context pages. This workspace gives the same to
//! device models in user space, one crate each; this package re-exports them all:
//!
//! | module | crate | what it is |
//! |---|---|---|
//! | [`pin`] | `page-pin` | who pins which pages, who is told before they go |
//! | [`iommu`] | `iommu-type1` | the IO address space, DMA through it |
//! | [`group`] | `vfio-group` | container, group, device, external user |
//! | [`gvt`] | `gvt-scheduler` | GPU workloads over any guest memory |
//! | `vfio_user` (feature `vfio-user`) | `vfio-user-dma` | a vfio-user device server and its DMA table |
//! | `vhost` (feature `vhost-iotlb`) | `vhost-iotlb` | the device IOTLB of a vhost back end |
//!
//! Besides there are the features `hardware`, `vfio-ioctls` and `kvm` of `vfio-group`, and `iommu` of `iommu-type1`. All are
//! off by default.
//!
//! ```
//! use vfio_dma::group::{Container, ExternalUser, Group, IommuType};
//! use vfio_dma::iommu::Backing;
//! use vm_memory::Permissions;
//!
//! // What the VMM does: a container with guest memory in it, and a group with a device.
//! let group = Group::new(26);
//! let device = group.add_device("vgpu0")?;
//! let (container, file) = (Container::open(), group.open()?);
//! file.set_container(&container)?;
//! container.set_iommu(IommuType::Type1v2)?;
//! container.map(0x10_0000, Backing::anonymous(0x10_0000)?, Permissions::ReadWrite)?;
//!
//! // What the device model does: take the external user once, hold it, and do DMA.
//! let user = ExternalUser::from_device(&device)?;
//! let dma = user.handle();
//! dma.write(0x10_0ffc, &0x1122_3344_5566_7788_u64.to_le_bytes())?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

// Says of what is behind a feature that it is.
#![cfg_attr(docsrs, feature(doc_cfg))]

pub use gvt_scheduler as gvt;
pub use iommu_type1 as iommu;
pub use page_pin as pin;
pub use vfio_group as group;
#[cfg(feature = "vfio-user")]
pub use vfio_user_dma as vfio_user;
#[cfg(feature = "vhost-iotlb")]
pub use vhost_iotlb as vhost;

/// Examples of the README are tested as those here are.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's own page tables (PPGTT), shadowed.

mod device;
mod entry;
mod leaf;
mod root;
mod shadow;
mod update;

pub use device::DeviceMap;
pub(crate) use device::SharedMap;
pub use root::PageTableRoot;
pub(crate) use shadow::Ppgtt;
pub(crate) use update::Update;

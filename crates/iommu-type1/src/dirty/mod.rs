// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Dirty pages by I/O virtual address.

mod log;
mod slice;

pub(crate) use log::DirtyLog;
pub use slice::{Dirty, DirtySlice};

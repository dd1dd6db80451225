// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The execlist port of an engine as the guest sees it.

mod csb;
mod elsp;
mod state;

pub(crate) use csb::ContextStatusBuffer;
pub use csb::CsbEvent;
pub(crate) use elsp::ElspPort;
pub(crate) use state::{Events, ExeclistState};

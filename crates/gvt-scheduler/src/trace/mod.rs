// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What was accessed in guest memory and when: recorded, kept in a file, and done again.

mod access_trace;
mod error;
mod format;
mod recorder;

pub use access_trace::{AccessTrace, Driven, TracedAccess};
pub use error::TraceError;
pub use format::{MAX_ACCESSES, MAX_ACCESS_BYTES, VERSION};
pub use recorder::Recorder;

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory that goes away below a mapping: its file gets shorter while somebody reads or writes it.
//!
//! Whoever touches memory behind the end of its file gets SIGBUS, which ends the process. Who shares memory
//! with somebody hostile cannot prevent that: the other side may shorten its file at any time. With a handler
//! for the signal the access goes on: the handler puts memory of nobody's under the rest of the region and writes
//! down from where on. The access looks there when it has come to its end, and says how far its bytes are good.
//!
//! Without the feature nothing is looked at, and nobody survives.

#[cfg(feature = "sigbus")]
mod guard;
#[cfg(feature = "sigbus")]
mod handler;
#[cfg(feature = "sigbus")]
pub(crate) mod watches;

#[cfg(feature = "sigbus")]
pub(crate) use guard::seen;

/// Whether an access has to look which memory is gone.
#[cfg(not(feature = "sigbus"))]
#[inline(always)]
pub(crate) fn seen() -> bool {
    false
}

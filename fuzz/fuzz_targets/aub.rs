// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Recordings of any content: an error with its offset, or a plan that can be made.

#![no_main]

use gvt_replay::aub::Trace;
use gvt_replay::{Contiguity, Plan};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(trace) = Trace::from_bytes(bytes) {
        let profile = Contiguity::bundled("consecutive").unwrap();
        let _refused = Plan::new(&trace, &profile);
    }
});

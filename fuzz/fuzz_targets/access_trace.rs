// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Traces of accesses of any content: refused, or written as they were read, and done again on a small
//! memory, as far as they fit there.

#![no_main]

use gvt_scheduler::trace::{AccessTrace, TraceError};
use libfuzzer_sys::fuzz_target;
use vm_memory::{GuestAddress, GuestMemoryMmap};

fuzz_target!(|bytes: &[u8]| {
    let trace = match AccessTrace::from_bytes(bytes) {
        Ok(trace) => trace,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    let mut written = Vec::new();
    trace.write_to(&mut written).unwrap();
    assert_eq!(written, bytes);
    assert_eq!(trace.first_difference(&trace), None);
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
    match trace.drive(&memory) {
        Ok(driven) => {
            let accesses = trace.accesses().len() as u64;
            assert_eq!(driven.reads + driven.writes, accesses);
        }
        Err(TraceError::Access { index, .. }) => assert!(index < trace.accesses().len()),
        Err(error) => panic!("{error}"),
    }
});

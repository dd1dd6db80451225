// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Maps, unmaps, accesses, leases, pins and dirty pages on every profile against its naive model: what the test of
//! the same name draws at random, drawn by the fuzzer.

#![no_main]

use libfuzzer_sys::fuzz_target;
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

#[path = "../../crates/iommu-type1/tests/profiles_model/suite/mod.rs"]
mod suite;

fuzz_target!(|bytes: &[u8]| {
    // Numbers are the input's bytes, and zeros behind them.
    let rng = TestRng::from_seed(RngAlgorithm::PassThrough, bytes);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let Ok(case) = suite::case(200).new_tree(&mut runner) else {
        return;
    };
    suite::run(case.current()).unwrap();
});

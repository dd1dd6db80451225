// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Maps, unmaps, accesses, leases, pins and dirty pages on every profile against its naive model: what the test of
//! the same name draws at random, drawn by the fuzzer. Four bytes of the input are the seed of a step each, so
//! steps can be changed, left out and put in.

#![no_main]

use libfuzzer_sys::fuzz_target;
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

#[path = "../../crates/iommu-type1/tests/profiles_model/suite/mod.rs"]
mod suite;

/// As many steps as a case has at the most.
const STEPS: usize = 200;

fn drawn<S: Strategy>(strategy: &S, bytes: &[u8]) -> S::Value {
    let mut seed = [0; 32];
    seed[..bytes.len()].copy_from_slice(bytes);
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    strategy.new_tree(&mut runner).unwrap().current()
}

fuzz_target!(|bytes: &[u8]| {
    let mut seeds = bytes.chunks_exact(4);
    let space = drawn(&suite::space(), seeds.next().unwrap_or_default());
    let step = suite::one_step();
    let steps = seeds.take(STEPS).map(|seed| drawn(&step, seed)).collect();
    suite::run(suite::Case { space, steps }).unwrap();
});

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A chain of descriptors popped and read: ring accesses, translation of each buffer, the copy.

use benches::chain::Device;
use benches::harness::Bench;
use benches::world::{Memory, World};

fn main() {
    Bench::run("virtqueue", |bench| {
        let memory = Memory::new();
        for mappings in [1, 1024] {
            let world = World::new(mappings, &memory);
            for len in [64, 512, 2048] {
                let case = format!("8 x {len} B");
                let section = format!("mappings: {mappings}");
                let candidates = Device::ALL.map(|device| device.reading(&world, len));
                bench.compare(&section, &case, candidates.into());
            }
        }
    });
}

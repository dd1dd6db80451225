// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The examples that end by themselves do so well, and say what they should.

#[path = "../crates/page-pin/tests/common/deadline.rs"]
mod deadline;
mod example;

use std::process::Command;

use deadline::output;

#[track_caller]
fn says(name: &str, expected: &str) {
    let output = output(Command::new(example::example(name)));
    let said = String::from_utf8(output.stdout).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {errors}", output.status);
    assert!(said.contains(expected), "{said}");
}

#[test]
fn a_mediated_device_lets_go_of_pins_and_then_of_its_group() {
    says(
        "mediated_device",
        "pages pinned: 1\n2 interrupts\n0x80000 bytes unmapped\ngroup 26 cannot leave its container",
    );
}

#[test]
fn a_range_in_two_places_has_no_one_address() {
    says("cloud_hypervisor", "0x40001ffc is not in one place");
}

#[test]
fn iommu_memory_refuses_what_is_not_mapped_for_writes() {
    says(
        "iommu_adapter",
        "0x80001000 is mapped for Read, the access needs Write",
    );
}

#[test]
fn a_vhost_back_end_gets_its_request() {
    says("vhost_iotlb", "request: hello, device");
}

#[test]
fn a_queue_is_answered_beside_an_unmap() {
    says("virtio_queue", "desserts (0x2000 bytes unmapped");
}

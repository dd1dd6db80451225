// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The server and the client of the vfio_user crate, with a device of ours.

#![cfg(feature = "vfio_user")]

mod common;

use std::os::fd::AsRawFd;

use common::deadline::{ended, must_end};
use common::{memfd, Device, PAGE};
use vfio_user_dma::{DmaTable, VfioUserAdapter};

#[test]
fn a_device_behind_the_other_server() {
    let path = std::env::temp_dir().join(format!("vfio-user-adapter-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let irqs = vec![vfio_user::IrqInfo {
        index: 0,
        flags: 1,
        count: 1,
    }];
    let region = vfio_user::ServerRegion {
        region_info: vfio_bindings::bindings::vfio::vfio_region_info {
            argsz: 32,
            flags: 3,
            size: 0x1000,
            ..Default::default()
        },
        sparse_areas: Vec::new(),
        mmap_fd: None,
    };
    let server = vfio_user::Server::new(&path, true, irqs, vec![region]).unwrap();
    let table = DmaTable::new().unwrap();
    let mut device = Device::new(table.clone());
    let seen = device.seen.clone();
    let thread = std::thread::spawn(move || server.run(&mut VfioUserAdapter(&mut device)));

    must_end("the other client", move || {
        let mut client = vfio_user::Client::new(&path).unwrap();
        client.region_write(0, 8, &[1, 2, 3, 4]).unwrap();
        let mut bytes = [0; 4];
        client.region_read(0, 8, &mut bytes).unwrap();
        assert_eq!(bytes, [1, 2, 3, 4]);
        let memory = memfd(2);
        client
            .dma_map(PAGE, 0x8000, PAGE, memory.as_raw_fd())
            .unwrap();
        table.read(0x8000, &mut bytes).unwrap();
        assert_eq!(bytes, [1, 0, 0, 0]);
        client.dma_unmap(0x8000, PAGE).unwrap();
        assert_eq!(table.mappings(), 0);
        client
            .set_irqs(0, 4 | 32, 0, 1, &[common::eventfd().as_raw_fd()])
            .unwrap();
        client.reset().unwrap();
        client.shutdown().unwrap();
    });
    ended("the server ends with its client", thread).unwrap();
    let seen = seen.lock().unwrap();
    assert!(
        seen[0].starts_with("Trigger 0 0+1 Eventfd([IrqEventfd"),
        "{}",
        seen[0]
    );
    assert_eq!(seen[1], "reset");
}

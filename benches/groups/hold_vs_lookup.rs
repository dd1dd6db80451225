// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Taking the external user of a group for each access against holding it.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};

use benches::compare::{Candidate, Series};
use benches::harness::Bench;
use benches::parallel::in_two_threads;
use iommu_type1::Backing;
use vfio_group::{Container, Device, ExternalUser, Group, GroupFile, IommuType};
use vm_memory::Permissions;

/// Groups that a device model's host knows.
const GROUPS: u32 = 16;

/// Devices by their group's id, as those who do not hold an external user find them.
struct Host {
    devices: RwLock<HashMap<u32, Device>>,
    _files: Vec<GroupFile>,
}

impl Host {
    fn new() -> vfio_group::Result<Self> {
        let container = Container::open();
        let mut devices = HashMap::new();
        let mut files = Vec::new();
        for id in 0..GROUPS {
            let group = Group::new(id);
            devices.insert(id, group.add_device("vgpu")?);
            let file = group.open()?;
            file.set_container(&container)?;
            files.push(file);
        }
        container.set_iommu(IommuType::Type1v2)?;
        let memory = Backing::anonymous(1 << 20)?;
        container.map(0, memory, Permissions::ReadWrite)?;
        Ok(Host {
            devices: RwLock::new(devices),
            _files: files,
        })
    }

    #[inline(never)]
    fn user(&self, id: u32) -> ExternalUser {
        let devices = self.devices.read().unwrap_or_else(PoisonError::into_inner);
        ExternalUser::from_device(&devices[&id]).expect("attached")
    }
}

#[derive(Clone, Copy)]
enum How {
    Handle,
    Held,
    LookedUp,
}

fn reading(host: &Host, how: How) -> Candidate<'_> {
    let mut buf = [0; 64];
    let user = host.user(7);
    match how {
        How::Handle => {
            let handle = user.handle();
            Candidate::of("held handle", move || {
                handle.read(0x1000, &mut buf).expect("mapped");
            })
        }
        How::Held => Candidate::of("held user", move || {
            user.read(0x1000, &mut buf).expect("mapped");
        }),
        How::LookedUp => Candidate::of("looked up each time", move || {
            host.user(7).read(0x1000, &mut buf).expect("mapped");
        }),
    }
}

fn main() {
    Bench::run("hold_vs_lookup", |bench| {
        let host = Host::new().expect("a group in a container");
        let hows = [How::Handle, How::Held, How::LookedUp];
        let candidates = hows.map(|how| reading(&host, how));
        bench.compare("64 B", "alone", candidates.into());
        if bench.compares() {
            let makers = hows.map(|how| {
                let host = &host;
                move || reading(host, how)
            });
            let pairs = in_two_threads(&makers);
            let together: Vec<Series> = pairs.into_iter().map(|pair| pair.together).collect();
            bench.series("64 B", "2 threads, an operation of either", &together);
        }
    });
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The virtual machine that a group belongs to.

#[cfg(feature = "kvm")]
mod slots;
#[cfg(feature = "kvm")]
mod vfio;

use std::any::Any;
use std::sync::Arc;

use crate::Group;

#[cfg(feature = "kvm")]
pub use slots::{MemorySlot, MemorySlots, SetMemoryRegion};
#[cfg(all(feature = "kvm", feature = "hardware"))]
pub use vfio::KvmUser;
#[cfg(feature = "kvm")]
pub use vfio::{KvmFile, KvmGroup, KvmVfio, SetDeviceAttr};

/// The virtual machine that a group belongs to, as [`Group::set_kvm`] is given it: anything, because only
/// the VMM and its device models know what it is to them. Where it is KVM's file, that goes in as it is
/// (`Arc<OwnedFd>`, `Arc<VmFd>`); listeners get it back with [`Arc::downcast`]. Whoever has a clone
/// keeps it alive.
pub type Kvm = Arc<dyn Any + Send + Sync>;

/// A registered listener; dropping it unregisters. Made by
/// [`Device::on_set_kvm`](crate::Device::on_set_kvm).
#[derive(Debug)]
pub struct KvmListener {
    group: Group,
    id: u64,
}

impl KvmListener {
    pub(crate) fn new(
        group: &Group,
        listener: impl Fn(Option<&Kvm>) + Send + Sync + 'static,
    ) -> Self {
        KvmListener {
            group: group.clone(),
            id: group.broadcast().add(Arc::new(listener)),
        }
    }
}

impl Drop for KvmListener {
    fn drop(&mut self) {
        self.group.broadcast().remove(self.id);
    }
}

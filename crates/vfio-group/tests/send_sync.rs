// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which public types may be sent and shared.

use static_assertions::assert_impl_all;
use vfio_group::{
    BoundElsewhere, Container, Device, DeviceFile, Error, ExternalUser, Group, GroupFile,
    GroupType, IommuType, KvmListener,
};

assert_impl_all!(Container: Send, Sync);
assert_impl_all!(Device: Send, Sync, Clone);
assert_impl_all!(DeviceFile: Send, Sync);
assert_impl_all!(Error: Send, Sync, std::error::Error);
assert_impl_all!(ExternalUser: Send, Sync, Clone, page_pin::PinPages);
assert_impl_all!(std::sync::Arc<ExternalUser>: page_pin::PinPages);
assert_impl_all!(Group: Send, Sync, Clone);
assert_impl_all!(GroupFile: Send, Sync);
assert_impl_all!(IommuType: Send, Sync, Copy);
assert_impl_all!(BoundElsewhere: Send, Sync);
assert_impl_all!(GroupType: Send, Sync, Copy);
assert_impl_all!(KvmListener: Send, Sync);

#[cfg(feature = "hardware")]
assert_impl_all!(vfio_group::Mirror: Send, Sync);
#[cfg(feature = "vfio-ioctls")]
assert_impl_all!(vfio_group::SpaceOps<vm_memory::GuestMemoryMmap>: Send, Sync);

#[cfg(feature = "kvm")]
mod kvm {
    use super::assert_impl_all;
    use vfio_group::{KvmFile, KvmGroup, KvmVfio, MemorySlot, MemorySlots};

    assert_impl_all!(MemorySlots: Send, Sync);
    assert_impl_all!(MemorySlot: Send, Sync, Copy);
    assert_impl_all!(KvmVfio: Send, Sync, Clone);
    assert_impl_all!(KvmFile<std::fs::File>: Send, Sync);
    assert_impl_all!(KvmGroup: Send, Sync);
    #[cfg(feature = "hardware")]
    assert_impl_all!(vfio_group::KvmUser: Send, Sync);
}

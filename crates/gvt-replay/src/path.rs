// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a device model holds of its group between two accesses, as a switch: so that what holding it
//! gains can be measured.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock};

use iommu_type1::DmaHandle;
use vfio_group::{Device, ExternalUser};
use vm_memory::{
    AtomicAccess, Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap, ReadVolatile,
    WriteVolatile,
};

/// What a device model holds while it does nothing.
///
/// In the order in which a kernel had it: guest memory by slots (`kvm_read_guest`), nothing
/// (`vfio_dma_rw` by device), the external user of the group (`vfio_dma_rw` by group). The handle of
/// one is ours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Holds {
    /// The memory itself: nothing is translated, and nobody is told of an unmap.
    Slots,
    /// Nothing: the device is looked up and the external user of its group taken for every access.
    Nothing,
    /// An external user.
    User,
    /// The handle of an external user.
    #[default]
    Handle,
}

/// The devices of a host, by their groups.
pub(crate) type Devices = Arc<RwLock<HashMap<u32, Device>>>;

/// A device model's way to guest memory.
#[derive(Debug)]
pub struct Path(Way);

#[derive(Debug)]
enum Way {
    Slots(GuestMemoryMmap),
    LookUp(Devices, u32),
    User(ExternalUser),
    Handle(DmaHandle),
}

/// Why guest memory cannot be accessed.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// As the group says.
    #[error(transparent)]
    Group(#[from] vfio_group::Error),
    /// As guest memory says.
    #[error(transparent)]
    Memory(#[from] GuestMemoryError),
}

impl From<iommu_type1::Error> for PathError {
    fn from(error: iommu_type1::Error) -> Self {
        PathError::Group(error.into())
    }
}

type Result<T> = std::result::Result<T, PathError>;

impl Path {
    /// The way of who holds this much of group `id`, which is that of `user`.
    pub(crate) fn new(
        holds: Holds,
        memory: &GuestMemoryMmap,
        devices: &Devices,
        id: u32,
        user: &ExternalUser,
    ) -> Self {
        Path(match holds {
            Holds::Slots => Way::Slots(memory.clone()),
            Holds::Nothing => Way::LookUp(devices.clone(), id),
            Holds::User => Way::User(user.clone()),
            Holds::Handle => Way::Handle(user.handle()),
        })
    }
}

#[inline(never)]
fn look_up(devices: &Devices, id: u32) -> vfio_group::Result<ExternalUser> {
    let devices = devices.read().unwrap_or_else(PoisonError::into_inner);
    match devices.get(&id) {
        Some(device) => ExternalUser::from_device(device),
        None => Err(vfio_group::Error::NoDevice {
            group: id,
            name: format!("of group {id}"),
        }),
    }
}

/// An access to what is at the end of the way; who holds no handle takes one for it.
macro_rules! access {
    ($path:expr, $memory:ident => $access:expr) => {
        Ok(match &$path.0 {
            Way::Slots($memory) => $access?,
            Way::LookUp(devices, id) => {
                let $memory = &look_up(devices, *id)?.handle();
                $access?
            }
            Way::User(user) => {
                let $memory = &user.handle();
                $access?
            }
            Way::Handle($memory) => $access?,
        })
    };
}

impl Bytes<GuestAddress> for Path {
    type E = PathError;

    // The two that a vGPU uses for nearly everything: a user reads and writes without a handle.
    #[inline]
    fn read_slice(&self, buf: &mut [u8], addr: GuestAddress) -> Result<()> {
        match &self.0 {
            Way::Slots(memory) => memory.read_slice(buf, addr)?,
            Way::LookUp(devices, id) => look_up(devices, *id)?.read(addr.0, buf)?,
            Way::User(user) => user.read(addr.0, buf)?,
            Way::Handle(handle) => handle.read(addr.0, buf)?,
        }
        Ok(())
    }

    #[inline]
    fn write_slice(&self, buf: &[u8], addr: GuestAddress) -> Result<()> {
        match &self.0 {
            Way::Slots(memory) => memory.write_slice(buf, addr)?,
            Way::LookUp(devices, id) => look_up(devices, *id)?.write(addr.0, buf)?,
            Way::User(user) => user.write(addr.0, buf)?,
            Way::Handle(handle) => handle.write(addr.0, buf)?,
        }
        Ok(())
    }

    fn write(&self, buf: &[u8], addr: GuestAddress) -> Result<usize> {
        access!(self, memory => Bytes::write(memory, buf, addr))
    }

    fn read(&self, buf: &mut [u8], addr: GuestAddress) -> Result<usize> {
        access!(self, memory => Bytes::read(memory, buf, addr))
    }

    fn read_volatile_from<F: ReadVolatile>(
        &self,
        addr: GuestAddress,
        src: &mut F,
        count: usize,
    ) -> Result<usize> {
        access!(self, memory => memory.read_volatile_from(addr, src, count))
    }

    fn read_exact_volatile_from<F: ReadVolatile>(
        &self,
        addr: GuestAddress,
        src: &mut F,
        count: usize,
    ) -> Result<()> {
        access!(self, memory => memory.read_exact_volatile_from(addr, src, count))
    }

    fn write_volatile_to<F: WriteVolatile>(
        &self,
        addr: GuestAddress,
        dst: &mut F,
        count: usize,
    ) -> Result<usize> {
        access!(self, memory => memory.write_volatile_to(addr, dst, count))
    }

    fn write_all_volatile_to<F: WriteVolatile>(
        &self,
        addr: GuestAddress,
        dst: &mut F,
        count: usize,
    ) -> Result<()> {
        access!(self, memory => memory.write_all_volatile_to(addr, dst, count))
    }

    fn store<T: AtomicAccess>(&self, val: T, addr: GuestAddress, order: Ordering) -> Result<()> {
        access!(self, memory => memory.store(val, addr, order))
    }

    fn load<T: AtomicAccess>(&self, addr: GuestAddress, order: Ordering) -> Result<T> {
        access!(self, memory => memory.load(addr, order))
    }
}

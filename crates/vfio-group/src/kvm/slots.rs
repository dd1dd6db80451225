// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory slots of a virtual machine, kept as the mappings of an address space are.

#![allow(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use iommu_type1::{IoAddressSpace, Listening, MappingInfo};
use kvm_bindings::{kvm_userspace_memory_region, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY};
use kvm_ioctls::VmFd;
use vm_memory::Permissions;

use crate::follower::{Follower, Target};
use crate::{Error, Result};

/// The one ioctl that memory slots need, `KVM_SET_USER_MEMORY_REGION`: of KVM's `VmFd`, or of whatever a VMM has
/// around it.
pub trait SetMemoryRegion: Send + Sync {
    /// Makes, changes or (with a size of 0) deletes a slot.
    ///
    /// # Safety
    ///
    /// Until the slot is deleted the memory at `userspace_addr` is there, and accessed as memory that others
    /// change.
    ///
    /// # Errors
    ///
    /// What KVM answers; the slot is as it was then.
    unsafe fn set_user_memory_region(&self, region: kvm_userspace_memory_region) -> io::Result<()>;
}

impl SetMemoryRegion for VmFd {
    unsafe fn set_user_memory_region(&self, region: kvm_userspace_memory_region) -> io::Result<()> {
        // SAFETY: the caller's promise. Slots that overlap are refused by KVM.
        let set = unsafe { VmFd::set_user_memory_region(self, region) };
        set.map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }
}

/// What an address space has mapped, as the memory of a virtual machine: an IOVA is a guest physical address, each
/// mapping a slot.
///
/// - A mapping that can only be read is a slot that can only be read (`KVM_MEM_READONLY`): a write of the guest
///   is an exit. One that can only be written is refused with EPERM, as a guest can read every slot.
/// - What KVM refuses, or what no slot is left for (ENOSPC), is not mapped in the space either:
///   [`Refused`](iommu_type1::Error::Refused).
/// - Slots come late: those who are made beside mappings get them all, or none.
/// - Numbers of slots that were deleted are used again, the lowest first.
///
/// Dropping it deletes its slots. If KVM refuses to delete one, its memory and its number are kept, it is listed
/// ([`stuck`](MemorySlots::stuck)) and tried again when its addresses are wanted and in the end; if that is in
/// vain too, the memory is leaked.
///
/// # Gotchas
///
/// - While a mapping is replaced or cut there is no slot: a guest that runs meanwhile and accesses it exits
///   to the VMM, as if that were MMIO. Where that is not wanted, pause its vCPUs.
/// - What the guest writes is known to KVM ([`set_dirty_log`](MemorySlots::set_dirty_log)) and not to the space.
/// - A slot that is deleted takes the log of its dirty pages with it.
///
/// ```
/// # use std::sync::Mutex;
/// # use kvm_bindings::kvm_userspace_memory_region;
/// # #[derive(Default)]
/// # struct Vm(Mutex<Vec<kvm_userspace_memory_region>>);
/// # impl vfio_group::SetMemoryRegion for Vm {
/// #     unsafe fn set_user_memory_region(&self, region: kvm_userspace_memory_region) -> std::io::Result<()> {
/// #         self.0.lock().unwrap().push(region);
/// #         Ok(())
/// #     }
/// # }
/// use std::sync::Arc;
/// use iommu_type1::{Backing, IoAddressSpace};
/// use vfio_group::MemorySlots;
/// use vm_memory::Permissions::{Read, ReadWrite};
///
/// # let vm = Arc::new(Vm::default());
/// let space = IoAddressSpace::new();
/// // `vm` is an Arc<VmFd>.
/// let slots = MemorySlots::new(&space, vm, 0..509)?;
/// space.map(0, Backing::anonymous(0x8_0000)?, ReadWrite)?;
/// space.map(0xf_0000, Backing::anonymous(0x1_0000)?, Read)?;
/// assert_eq!(slots.slots()[1].slot, 1);
/// assert!(slots.slots()[1].is_read_only());
/// # Ok::<(), vfio_group::Error>(())
/// ```
#[must_use = "dropping it deletes the slots"]
pub struct MemorySlots {
    listening: Listening,
    follower: Arc<Follower<Slots>>,
}

/// One slot, as KVM was told of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemorySlot {
    /// Its number, as `KVM_GET_DIRTY_LOG` wants it.
    pub slot: u32,
    /// First guest physical address.
    pub guest_phys_addr: u64,
    /// Bytes.
    pub memory_size: u64,
    /// `KVM_MEM_READONLY`, `KVM_MEM_LOG_DIRTY_PAGES`.
    pub flags: u32,
}

impl MemorySlot {
    /// Whether the guest can only read it.
    pub fn is_read_only(&self) -> bool {
        self.flags & KVM_MEM_READONLY != 0
    }
}

impl MemorySlots {
    /// Gives a virtual machine what a space has, in slots of these numbers, which nobody else uses. How many
    /// there are says `Kvm::get_nr_memslots`.
    ///
    /// # Errors
    ///
    /// [`Error::Iommu`] with [`Refused`](iommu_type1::Error::Refused), as [`IoAddressSpace::listen`].
    pub fn new(
        space: &IoAddressSpace,
        vm: Arc<dyn SetMemoryRegion>,
        numbers: Range<u32>,
    ) -> Result<Self> {
        let follower = Arc::new(Follower::new(Slots {
            vm,
            next: numbers.start,
            end: numbers.end,
            returned: BTreeSet::new(),
            used: BTreeMap::new(),
            logs_dirty: false,
        }));
        Ok(MemorySlots {
            listening: space.listen(follower.clone())?,
            follower,
        })
    }

    /// Has KVM log the pages that the guest writes (`KVM_MEM_LOG_DIRTY_PAGES`), or not any longer: in all slots,
    /// and in those that come. At first it does not.
    ///
    /// # Errors
    ///
    /// [`Error::Hardware`] if KVM refuses that of a slot: all are as they were then, if KVM does not refuse that
    /// too.
    pub fn set_dirty_log(&self, on: bool) -> Result<()> {
        let set = self.follower.with_target(|slots| slots.set_dirty_log(on));
        set.map_err(|source| Error::Hardware {
            operation: "KVM_SET_USER_MEMORY_REGION",
            source,
        })
    }

    /// The slots there are, by address; also those that KVM has refused to delete.
    pub fn slots(&self) -> Vec<MemorySlot> {
        self.follower.with_target(|slots| {
            let used = slots.used.values();
            used.map(|region| MemorySlot {
                slot: region.slot,
                guest_phys_addr: region.guest_phys_addr,
                memory_size: region.memory_size,
                flags: region.flags,
            })
            .collect()
        })
    }

    /// What KVM has refused to delete, so that the guest still reaches its memory: addresses and sizes,
    /// ascending.
    pub fn stuck(&self) -> Vec<(u64, u64)> {
        self.follower.stuck()
    }

    /// Whether KVM has refused what it must not refuse (the parts of a mapping that was cut, what was there
    /// before somebody else refused): then all slots were deleted, and none is made any more.
    pub fn is_lost(&self) -> bool {
        self.listening.is_lost()
    }
}

impl fmt::Debug for MemorySlots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemorySlots")
            .field("listening", &self.listening)
            .field("slots", &self.slots())
            .field("stuck", &self.stuck())
            .finish()
    }
}

struct Slots {
    vm: Arc<dyn SetMemoryRegion>,
    /// Numbers from here to the end were never used.
    next: u32,
    end: u32,
    /// Numbers of slots that were deleted.
    returned: BTreeSet<u32>,
    /// By address.
    used: BTreeMap<u64, kvm_userspace_memory_region>,
    logs_dirty: bool,
}

impl Slots {
    /// A number that no slot has; it stays free until it is used.
    fn find_number(&self) -> Option<u32> {
        let fresh = (self.next < self.end).then_some(self.next);
        self.returned.first().copied().or(fresh)
    }

    fn use_number(&mut self, number: u32) {
        if !self.returned.remove(&number) {
            self.next = number + 1;
        }
    }

    fn set_dirty_log(&mut self, on: bool) -> io::Result<()> {
        let before: Vec<_> = self
            .used
            .iter()
            .map(|(at, region)| (*at, *region))
            .collect();
        for (done, (at, region)) in before.iter().enumerate() {
            let flags = with_dirty_log(region.flags, on);
            let changed = kvm_userspace_memory_region { flags, ..*region };
            if let Err(error) = self.change(*at, changed) {
                for (at, region) in &before[..done] {
                    if let Err(error) = self.change(*at, *region) {
                        log::error!("slot {} cannot be what it was: {error}", region.slot);
                    }
                }
                return Err(error);
            }
        }
        self.logs_dirty = on;
        Ok(())
    }

    fn change(&mut self, at: u64, region: kvm_userspace_memory_region) -> io::Result<()> {
        // SAFETY: a slot in use, of whose region only the flags change.
        unsafe { self.vm.set_user_memory_region(region) }?;
        self.used.insert(at, region);
        Ok(())
    }
}

impl Target for Slots {
    unsafe fn map(&mut self, mapping: &MappingInfo) -> io::Result<()> {
        let (iova, size) = (mapping.iova, mapping.size);
        let flags = match mapping.permissions {
            Permissions::ReadWrite => 0,
            Permissions::Read => KVM_MEM_READONLY,
            other => {
                let why = format!("{size:#x} bytes at {iova:#x} are mapped for {other:?}, but a guest can read all its memory");
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
            }
        };
        let slot = self.find_number().ok_or_else(|| {
            let why = format!("all {} memory slots are in use", self.used.len());
            io::Error::new(io::ErrorKind::StorageFull, why)
        })?;
        let region = kvm_userspace_memory_region {
            slot,
            flags: with_dirty_log(flags, self.logs_dirty),
            guest_phys_addr: iova,
            memory_size: size,
            userspace_addr: mapping.backing.host_address() as u64,
        };
        // SAFETY: the caller keeps the memory, which is used as memory that others change.
        unsafe { self.vm.set_user_memory_region(region) }?;
        self.use_number(slot);
        self.used.insert(iova, region);
        Ok(())
    }

    fn unmap(&mut self, iova: u64, _size: u64) -> io::Result<()> {
        let Some(region) = self.used.get(&iova) else {
            return Ok(());
        };
        let slot = region.slot;
        let deleted = kvm_userspace_memory_region {
            memory_size: 0,
            ..*region
        };
        // SAFETY: a slot that is deleted reaches no memory.
        unsafe { self.vm.set_user_memory_region(deleted) }?;
        self.used.remove(&iova);
        self.returned.insert(slot);
        Ok(())
    }
}

fn with_dirty_log(flags: u32, on: bool) -> u32 {
    if on {
        flags | KVM_MEM_LOG_DIRTY_PAGES
    } else {
        flags & !KVM_MEM_LOG_DIRTY_PAGES
    }
}

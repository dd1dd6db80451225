// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory slots that follow an address space.

#![cfg(all(feature = "kvm", not(loom)))]

#[path = "common/side.rs"]
mod side;

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use iommu_type1::{Error, IoAddressSpace, Profile};
use kvm_bindings::{kvm_userspace_memory_region, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY};
use proptest::prelude::*;
use side::{follow, marked, op, p, Follows, Side};
use vfio_group::{MemorySlots, SetMemoryRegion};
use vm_memory::Permissions::{Read, ReadWrite, Write};

/// KVM as far as memory slots go, with those numbers that may be used.
struct Vm {
    side: Arc<Side>,
    numbers: std::ops::Range<u32>,
    slots: Mutex<BTreeMap<u32, kvm_userspace_memory_region>>,
}

fn vm(numbers: std::ops::Range<u32>) -> Arc<Vm> {
    Arc::new(Vm {
        side: Side::new(),
        numbers,
        slots: Mutex::default(),
    })
}

impl Vm {
    fn slots(self: &Arc<Self>, space: &IoAddressSpace) -> vfio_group::Result<MemorySlots> {
        MemorySlots::new(space, self.clone(), self.numbers.clone())
    }

    /// Numbers and flags, by address.
    fn made(&self) -> Vec<(u32, u32)> {
        let mut slots: Vec<_> = self.slots.lock().unwrap().values().copied().collect();
        slots.sort_by_key(|slot| slot.guest_phys_addr);
        slots.iter().map(|slot| (slot.slot, slot.flags)).collect()
    }
}

impl SetMemoryRegion for Vm {
    unsafe fn set_user_memory_region(&self, region: kvm_userspace_memory_region) -> io::Result<()> {
        let mut slots = self.slots.lock().unwrap();
        if !self.numbers.contains(&region.slot) {
            self.side.wrong(format!("slot {}", region.slot));
        }
        let done = match slots.get(&region.slot).copied() {
            None if region.memory_size == 0 => Err(libc::EINVAL),
            None => {
                let entry = (region.memory_size, region.userspace_addr, region.flags);
                self.side.map(region.guest_phys_addr, entry)
            }
            Some(before) if region.memory_size == 0 => {
                self.side.unmap(before.guest_phys_addr, before.memory_size)
            }
            Some(before) => {
                let but_flags = kvm_userspace_memory_region {
                    flags: before.flags,
                    ..region
                };
                let changed = region.flags ^ before.flags;
                if but_flags != before || changed & !KVM_MEM_LOG_DIRTY_PAGES != 0 {
                    self.side
                        .wrong(format!("{before:?} cannot become {region:?}"));
                }
                self.side.refuses().map_or(Ok(()), Err)
            }
        };
        done.map_err(io::Error::from_raw_os_error)?;
        if region.memory_size == 0 {
            slots.remove(&region.slot);
        } else {
            slots.insert(region.slot, region);
        }
        Ok(())
    }
}

impl Follows for MemorySlots {
    fn stuck(&self) -> Vec<(u64, u64)> {
        self.stuck()
    }

    fn is_lost(&self) -> bool {
        self.is_lost()
    }
}

proptest! {
    #[test]
    fn a_guest_has_what_the_space_has(
        profile in prop::sample::select(vec![Profile::Type1v1, Profile::Type1v2, Profile::Iommufd, Profile::Iotlb]),
        first in 0..3_u32,
        ops in prop::collection::vec(op(), 1..60),
    ) {
        // Fewer slots than mappings.
        let vm = vm(first..first + 6);
        follow(profile, &ops, &vm.side, |space| vm.slots(space));
        prop_assert_eq!(vm.slots.lock().unwrap().len(), 0);
    }
}

#[test]
fn a_slot_is_what_its_mapping_is() {
    let (space, vm) = (IoAddressSpace::new(), vm(3..9));
    let backing = marked(2);
    space.map(p(4), backing.clone(), ReadWrite).unwrap();
    space.map(p(1), marked(1), Read).unwrap();
    let slots = vm.slots(&space).unwrap();
    assert_eq!(vm.made(), [(3, KVM_MEM_READONLY), (4, 0)]);
    let made = vm.slots.lock().unwrap()[&4];
    assert_eq!((made.guest_phys_addr, made.memory_size), (p(4), p(2)));
    assert_eq!(made.userspace_addr, backing.host_address() as u64);
    let listed = slots.slots();
    assert_eq!(listed.len(), 2);
    assert!(listed[0].is_read_only() && !listed[1].is_read_only());
    assert_eq!((listed[1].slot, listed[1].guest_phys_addr), (4, p(4)));
    drop(slots);
    assert_eq!(vm.made(), []);
}

/// A guest can read all its memory.
#[test]
fn what_can_only_be_written_is_refused() {
    let (space, vm) = (IoAddressSpace::new(), vm(0..9));
    let _slots = vm.slots(&space).unwrap();
    let error = space.map(p(1), marked(1), Write).unwrap_err();
    assert_eq!(error.errno(), libc::EPERM, "{error}");
    assert_eq!(vm.made(), []);
}

#[test]
fn numbers_are_used_again_and_run_out() {
    let (space, vm) = (IoAddressSpace::new(), vm(2..5));
    let _slots = vm.slots(&space).unwrap();
    for page in [1, 2, 3] {
        space.map(p(page), marked(1), ReadWrite).unwrap();
    }
    let error = space.map(p(4), marked(1), ReadWrite).unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{error}");
    assert_eq!(error.errno(), libc::ENOSPC);
    assert!(error.to_string().contains("all 3 memory slots"), "{error}");
    space.unmap(p(2), p(1)).unwrap();
    space.map(p(4), marked(1), ReadWrite).unwrap();
    assert_eq!(vm.made(), [(2, 0), (4, 0), (3, 0)]);
}

#[test]
fn a_number_whose_slot_stays_is_not_given_away() {
    let (space, vm) = (IoAddressSpace::new(), vm(0..2));
    let slots = vm.slots(&space).unwrap();
    space.map(p(1), marked(1), ReadWrite).unwrap();
    vm.side.refuse_unmaps(true);
    space.unmap(p(1), p(1)).unwrap();
    assert_eq!(slots.stuck(), [(p(1), p(1))]);
    space.map(p(2), marked(1), ReadWrite).unwrap();
    assert_eq!(vm.made(), [(0, 0), (1, 0)]);
    let full = space.map(p(3), marked(1), ReadWrite).unwrap_err();
    assert_eq!(full.errno(), libc::ENOSPC);
    vm.side.refuse_unmaps(false);
    space.map(p(1), marked(1), Read).unwrap();
    assert_eq!(vm.made(), [(0, KVM_MEM_READONLY), (1, 0)]);
    vm.side.assert_never_wrong();
}

#[test]
fn dirty_pages_are_logged_in_all_slots_or_none() {
    const LOG: u32 = KVM_MEM_LOG_DIRTY_PAGES;
    let (space, vm) = (IoAddressSpace::new(), vm(0..9));
    let slots = vm.slots(&space).unwrap();
    space.map(p(1), marked(1), ReadWrite).unwrap();
    space.map(p(2), marked(1), Read).unwrap();
    slots.set_dirty_log(true).unwrap();
    space.map(p(3), marked(1), ReadWrite).unwrap();
    assert_eq!(vm.made(), [(0, LOG), (1, LOG | KVM_MEM_READONLY), (2, LOG)]);

    vm.side.refuse_in(2);
    assert_eq!(
        slots.set_dirty_log(false).unwrap_err().errno(),
        libc::ENOMEM
    );
    assert_eq!(vm.made(), [(0, LOG), (1, LOG | KVM_MEM_READONLY), (2, LOG)]);
    space.map(p(4), marked(1), ReadWrite).unwrap();
    assert_eq!(slots.slots()[3].flags, LOG, "as before");

    slots.set_dirty_log(false).unwrap();
    assert_eq!(vm.made(), [(0, 0), (1, KVM_MEM_READONLY), (2, 0), (3, 0)]);
    vm.side.assert_never_wrong();
}

#[test]
fn slots_are_shown() {
    let (space, vm) = (IoAddressSpace::new(), vm(7..9));
    let slots = vm.slots(&space).unwrap();
    space.map(p(1), marked(1), ReadWrite).unwrap();
    let shown = format!("{slots:?}");
    assert!(
        shown.contains("slot: 7") && shown.contains("stuck: []"),
        "{shown}"
    );
}

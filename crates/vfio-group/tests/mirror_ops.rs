// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Mirrors into what the crate vfio-ioctls maps with, and a space in the place of that.

#![cfg(all(feature = "vfio-ioctls", not(loom)))]

#[path = "common/deadline.rs"]
mod deadline;
#[path = "common/side.rs"]
mod side;

use std::any::Any;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread;

use deadline::{within, Over, DEADLINE};
use iommu_type1::{Error, IoAddressSpace, Profile};
use proptest::prelude::*;
use side::{follow, marked, op, p, pages, Follows, Side};
use vfio_group::{Mirror, SpaceOps};
use vfio_ioctls::{VfioError, VfioOps};
use vm_memory::Permissions::{Read, ReadWrite, Write};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::errno;

/// What stands for a container.
struct Fake(Arc<Side>);

impl VfioOps for Fake {
    unsafe fn vfio_dma_map(
        &self,
        iova: u64,
        size: usize,
        user_addr: *mut u8,
    ) -> vfio_ioctls::Result<()> {
        let mapped = self.0.map(iova, (size as u64, user_addr as u64, 0));
        mapped.map_err(|errno| VfioError::IommuDmaMap(errno::Error::new(errno)))
    }

    fn vfio_dma_unmap(&self, iova: u64, size: usize) -> vfio_ioctls::Result<()> {
        let unmapped = self.0.unmap(iova, size as u64);
        unmapped.map_err(|errno| VfioError::IommuDmaUnmap(errno::Error::new(errno)))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Follows for Mirror {
    fn stuck(&self) -> Vec<(u64, u64)> {
        self.stuck()
    }

    fn is_lost(&self) -> bool {
        self.is_lost()
    }
}

fn mirror(space: &IoAddressSpace, side: &Arc<Side>) -> vfio_group::Result<Mirror> {
    Mirror::with_ops(space, Arc::new(Fake(side.clone())))
}

proptest! {
    #[test]
    fn devices_have_what_the_space_has(
        profile in prop::sample::select(vec![Profile::Type1v1, Profile::Type1v2, Profile::Iommufd, Profile::Iotlb]),
        ops in prop::collection::vec(op(), 1..60),
    ) {
        let side = Side::new();
        follow(profile, &ops, &side, |space| mirror(space, &side));
    }
}

#[test]
fn a_late_mirror_is_given_what_there_is_and_takes_it_along() {
    let (space, side) = (IoAddressSpace::new(), Side::new());
    space.map(p(5), marked(2), ReadWrite).unwrap();
    space.map(p(1), marked(1), ReadWrite).unwrap();
    let mirror = mirror(&space, &side).unwrap();
    assert_eq!(side.calls(), [("map", 1, 1), ("map", 5, 2)]);
    assert_eq!(side.pages(), pages(&space));
    drop(mirror);
    assert_eq!(side.calls(), [("unmap", 5, 2), ("unmap", 1, 1)]);
    assert_eq!(space.mappings(), 2);
}

/// Half-way.
#[test]
fn a_late_mirror_that_fails_has_nothing() {
    let (space, side) = (IoAddressSpace::new(), Side::new());
    for page in [1, 3, 5] {
        space.map(p(page), marked(1), ReadWrite).unwrap();
    }
    side.refuse_in(2);
    let error = mirror(&space, &side).unwrap_err();
    assert_eq!(error.errno(), libc::ENOMEM, "{error}");
    assert!(side.mapped.lock().unwrap().is_empty());
    space.unmap_all().unwrap();
}

#[test]
fn what_the_hardware_refuses_is_not_mapped_at_all() {
    let (space, side) = (IoAddressSpace::new(), Side::new());
    let _mirror = mirror(&space, &side).unwrap();
    side.refuse_in(1);
    let batch = [1, 2, 3].map(|page| (p(page), marked(1), ReadWrite));
    let error = space.map_batch(batch).unwrap_err();
    assert!(
        matches!(error, Error::Refused { iova, .. } if iova == p(2)),
        "{error}"
    );
    assert_eq!(error.errno(), libc::ENOMEM);
    assert_eq!(space.mappings(), 0);
    assert!(side.mapped.lock().unwrap().is_empty());
}

/// `vfio_dma_map` is for reads and writes.
#[test]
fn permissions_are_never_widened() {
    let (space, side) = (IoAddressSpace::new(), Side::new());
    let late = space.clone();
    let mirror_of_nothing = mirror(&space, &side).unwrap();
    for permissions in [Read, Write] {
        let error = space.map(p(1), marked(1), permissions).unwrap_err();
        assert_eq!(error.errno(), libc::EPERM, "{error}");
        assert!(
            error.to_string().contains(&format!("{permissions:?}")),
            "{error}"
        );
    }
    drop(mirror_of_nothing);
    late.map(p(1), marked(1), Read).unwrap();
    assert_eq!(mirror(&late, &side).unwrap_err().errno(), libc::EPERM);
    assert_eq!(side.calls(), []);
}

#[test]
fn memory_that_the_hardware_keeps_stays_until_it_lets_go() {
    let (space, side) = (IoAddressSpace::new(), Side::new());
    let mirror = mirror(&space, &side).unwrap();
    space.map(p(2), marked(2), ReadWrite).unwrap();
    let had = side.pages();
    side.refuse_unmaps(true);
    assert_eq!(space.unmap(p(2), p(2)).unwrap(), p(2));
    assert_eq!(mirror.stuck(), [(p(2), p(2))]);
    assert_eq!(side.pages(), had, "the memory is there");

    // Beside it, and over a part of it.
    space.map(p(1), marked(1), ReadWrite).unwrap();
    space.map(p(4), marked(1), ReadWrite).unwrap();
    let error = space.map(p(3), marked(1), ReadWrite).unwrap_err();
    assert_eq!(error.errno(), libc::EBUSY, "{error}");
    side.refuse_unmaps(false);
    space.map(p(3), marked(1), ReadWrite).unwrap();
    assert_eq!(mirror.stuck(), []);
    assert_eq!(side.pages(), pages(&space));
    side.assert_never_wrong();
}

#[test]
fn memory_that_the_hardware_never_gives_back_is_leaked() {
    let (space, side) = (IoAddressSpace::new(), Side::new());
    let mirror = mirror(&space, &side).unwrap();
    space.map(p(2), marked(1), ReadWrite).unwrap();
    let had = side.pages();
    side.refuse_unmaps(true);
    drop(mirror);
    drop(space);
    assert_eq!(side.pages(), had, "the memory is there");
}

#[test]
fn a_mirror_in_the_end_asks_again() {
    let (space, side) = (IoAddressSpace::new(), Side::new());
    let mirror = mirror(&space, &side).unwrap();
    space.map(p(2), marked(1), ReadWrite).unwrap();
    side.refuse_unmaps(true);
    space.unmap_all().unwrap();
    side.refuse_unmaps(false);
    drop(mirror);
    assert!(side.mapped.lock().unwrap().is_empty());
}

/// Unmaps nothing, and says why.
struct Answers(Answer);

type Answer = fn() -> vfio_ioctls::Result<()>;

impl VfioOps for Answers {
    unsafe fn vfio_dma_map(&self, _: u64, _: usize, _: *mut u8) -> vfio_ioctls::Result<()> {
        Ok(())
    }

    fn vfio_dma_unmap(&self, _iova: u64, _size: usize) -> vfio_ioctls::Result<()> {
        (self.0)()
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[test]
fn what_the_hardware_has_not_is_not_stuck() {
    fn refused(errno: i32) -> vfio_ioctls::Result<()> {
        Err(VfioError::IommuDmaUnmap(errno::Error::new(errno)))
    }
    let answers: [(Answer, usize); 5] = [
        (|| Err(VfioError::InvalidDmaUnmapSize), 0),
        (|| refused(libc::ENOENT), 0),
        (|| refused(libc::EINVAL), 1),
        (|| Err(VfioError::VfioInvalidType), 1),
        (|| panic!("on purpose"), 1),
    ];
    for (answer, stuck) in answers {
        let space = IoAddressSpace::new();
        let mirror = Mirror::with_ops(&space, Arc::new(Answers(answer))).unwrap();
        space.map(p(1), marked(1), ReadWrite).unwrap();
        space.unmap_all().unwrap();
        assert_eq!(mirror.stuck().len(), stuck);
        // It would ask again, and panic.
        std::mem::forget(mirror);
    }
}

#[test]
fn who_maps_and_unmaps_beside_mirrors_that_come_and_go() {
    let space = IoAddressSpace::builder().unmap_deadline(DEADLINE).build();
    let is_over = AtomicBool::new(false);
    let always = Side::new();
    let kept = mirror(&space, &always).unwrap();
    thread::scope(|scope| {
        let _over = Over(&is_over);
        for worker in 0..2 {
            let (space, is_over) = (&space, &is_over);
            scope.spawn(move || {
                for round in 0.. {
                    if is_over.load(Ordering::Relaxed) {
                        break;
                    }
                    let page = 4 * worker + round % 4;
                    space.map(p(page), marked(1), ReadWrite).unwrap();
                    space.unmap(p(4 * worker), p(4)).unwrap();
                }
            });
        }
        for _ in 0..200 {
            let side = Side::new();
            let mirror = mirror(&space, &side).unwrap();
            within("a mirror has four calls", || side.calls().len() >= 4);
            drop(mirror);
            side.assert_never_wrong();
            assert!(side.mapped.lock().unwrap().is_empty());
        }
    });
    assert_eq!(always.pages(), pages(&space));
    always.assert_never_wrong();
    drop(kept);
    assert!(always.mapped.lock().unwrap().is_empty());
}

fn guest_memory() -> (GuestMemoryMmap, *mut u8) {
    let memory = GuestMemoryMmap::from_ranges(&[
        (GuestAddress(0), p(4) as usize),
        (GuestAddress(p(16)), p(8) as usize),
    ]);
    let memory = memory.unwrap();
    let host = memory.get_host_address(GuestAddress(p(16))).unwrap();
    (memory, host)
}

fn map(ops: &dyn VfioOps, iova: u64, pages: u64, host: *mut u8) -> Result<(), i32> {
    // SAFETY: guest memory, which is accessed as memory that others change.
    let mapped = unsafe { ops.vfio_dma_map(iova, p(pages) as usize, host) };
    mapped.map_err(|error| match error {
        VfioError::IommuDmaMap(errno) => errno.errno(),
        other => panic!("{other}"),
    })
}

fn unmap(ops: &dyn VfioOps, iova: u64, pages: u64) -> Result<(), i32> {
    ops.vfio_dma_unmap(iova, p(pages) as usize)
        .map_err(|error| match error {
            VfioError::IommuDmaUnmap(errno) => errno.errno(),
            VfioError::InvalidDmaUnmapSize => 0,
            other => panic!("{other}"),
        })
}

#[test]
fn a_space_answers_in_the_place_of_a_container() {
    let (memory, host) = guest_memory();
    let space = IoAddressSpace::builder().entry_limit(2).build();
    let ops = SpaceOps::new(space.clone(), memory.clone());
    assert_eq!(map(&ops, p(1), 2, host), Ok(()));
    space.write(p(2), &[7]).unwrap();
    let mut byte = [0];
    vm_memory::Bytes::read_slice(&memory, &mut byte, GuestAddress(p(17))).unwrap();
    assert_eq!(byte, [7], "it is that memory");

    assert_eq!(map(&ops, p(2), 1, host), Err(libc::EEXIST));
    assert_eq!(
        map(&ops, p(4), 9, host),
        Err(libc::EFAULT),
        "beyond the region"
    );
    let elsewhere = std::ptr::without_provenance_mut(p(1) as usize);
    assert_eq!(map(&ops, p(4), 1, elsewhere), Err(libc::EFAULT));
    assert_eq!(map(&ops, p(4) + 1, 1, host), Err(libc::EINVAL));
    assert_eq!(map(&ops, p(4), 1, host), Ok(()));
    assert_eq!(map(&ops, p(5), 1, host), Err(libc::ENOSPC));

    assert_eq!(unmap(&ops, p(1), 1), Err(libc::EINVAL), "a part");
    assert_eq!(unmap(&ops, p(1), 2), Ok(()));
    assert_eq!(unmap(&ops, p(1), 2), Err(0), "another size than that");
    // What is mapped is there when the guest's memory is gone.
    drop(memory);
    space.write(p(4), &[8]).unwrap();
    assert!(ops.as_any().is::<SpaceOps<GuestMemoryMmap>>());
    assert!(ops.mirror().is_none());
}

#[test]
fn a_mirrored_space_is_one_for_both() {
    let (memory, host) = guest_memory();
    let (space, side) = (IoAddressSpace::new(), Side::new());
    let fake = Arc::new(Fake(side.clone()));
    let ops = SpaceOps::mirrored(space.clone(), memory, fake.clone()).unwrap();
    let ops: Arc<dyn VfioOps> = Arc::new(ops);
    // `VfioDevice::new` looks for what it knows.
    let inner = ops.as_any().downcast_ref::<Fake>().unwrap();
    assert!(std::ptr::eq(inner, &*fake));

    assert_eq!(map(&*ops, p(1), 2, host), Ok(()));
    assert_eq!(side.mapped.lock().unwrap()[&p(1)], (p(2), host as u64, 0));
    side.refuse_in(0);
    assert_eq!(map(&*ops, p(4), 1, host), Err(libc::ENOMEM));
    assert_eq!(space.mappings(), 1);

    side.refuse_unmaps(true);
    assert_eq!(unmap(&*ops, p(1), 2), Err(libc::EBUSY), "devices have it");
    side.refuse_unmaps(false);
    assert_eq!(map(&*ops, p(1), 1, host), Ok(()));
    assert_eq!(unmap(&*ops, p(1), 1), Ok(()));
    assert!(side.mapped.lock().unwrap().is_empty());
}

#[test]
fn what_is_stuck_is_shown() {
    let (memory, host) = guest_memory();
    let (space, side) = (IoAddressSpace::new(), Side::new());
    let fake = Arc::new(Fake(side.clone()));
    let ops = SpaceOps::mirrored(space, memory, fake).unwrap();
    assert_eq!(map(&ops, p(1), 2, host), Ok(()));
    side.refuse_unmaps(true);
    assert_eq!(unmap(&ops, p(1), 2), Err(libc::EBUSY));
    let shown = format!("{ops:?}");
    assert!(
        shown.contains(&format!("stuck: [({}, {})]", p(1), p(2))),
        "{shown}"
    );
    side.refuse_unmaps(false);
}

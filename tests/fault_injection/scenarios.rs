// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is done while something fails.

use std::collections::BTreeMap;
use std::ffi::c_ulong;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

use kvm_bindings::kvm_userspace_memory_region;
use page_pin::Quota;
use vfio_dma::group::hardware::HardwareContainer;
use vfio_dma::group::{MemorySlots, Mirror, SetMemoryRegion};
use vfio_dma::iommu::{
    page_size, Backing, Change, Interest, IoAddressSpace, IoAddressSpaceBuilder, MemlockLimit,
    PinOptions, Profile, ReaderBarrier,
};
use vfio_dma::vfio_user::DmaTable;
use vm_memory::FileOffset;
use vm_memory::Permissions::ReadWrite;

use crate::inject::{aside, SET_USER_MEMORY_REGION};

pub const SCENARIOS: &[(&str, fn())] = &[
    ("maps", maps),
    ("barriers", barriers),
    ("batches", batches),
    ("replacements", replacements),
    ("dirty pages", dirty_pages),
    ("memory taken away", vaddr),
    ("pins", pins),
    ("a snapshot", snapshot),
    ("files", files),
    ("hardware and KVM", followers),
    ("a vfio-user client", client),
    ("a vfio-user session", crate::session::session),
    ("an unmap of a vfio-user client", crate::session::unmap),
    ("a batch without room", crate::refused::batch),
    ("holders", crate::refused::holders),
    ("an IOTLB", crate::iotlb::messages),
    ("misses", crate::iotlb::misses),
    ("workloads of a vGPU", crate::gvt::workloads),
    ("registers of a vGPU", crate::gvt::registers),
    ("traces of a vGPU", crate::gvt::traces),
];

/// Mappings of a batch: lists of them take more than a page.
pub const MANY: u64 = 600;

pub fn p(pages: u64) -> u64 {
    pages * page_size()
}

/// What a space has at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// Mappings in the table, and beside it.
    live: u64,
    leaving: u64,
    table_bytes: u64,
    dirty_bytes: u64,
    leases: u64,
}

impl State {
    pub fn of(space: &IoAddressSpace) -> Self {
        let stats = space.stats();
        State {
            live: stats.mappings - stats.leaving,
            leaving: stats.leaving,
            table_bytes: stats.table_bytes,
            dirty_bytes: stats.dirty_bytes,
            leases: stats.leases,
        }
    }
}

/// Whether a space has what it had here when nothing failed, which was the first time.
fn check_as_without_failure(place: &'static str, space: &IoAddressSpace) {
    static FIRST: Mutex<BTreeMap<&str, State>> = Mutex::new(BTreeMap::new());
    let now = State::of(space);
    let first = *FIRST.lock().unwrap().entry(place).or_insert(now);
    assert_eq!(now, first, "{place}");
}

/// Does what may fail once, and succeeds when it is tried again; in between everything is as before.
pub fn step<T, E: std::fmt::Display>(
    space: &IoAddressSpace,
    what: &str,
    mut attempt: impl FnMut() -> Result<T, E>,
) -> T {
    let before = State::of(space);
    attempt().unwrap_or_else(|error| {
        let after = State::of(space);
        assert_eq!(
            after, before,
            "{what} has failed and left something: {error}"
        );
        attempt().unwrap_or_else(|error| panic!("{what} fails once more: {error}"))
    })
}

/// Memory, once there is some.
pub fn memory(pages: u64) -> Backing {
    let one = || Backing::anonymous(p(pages) as usize);
    one().or_else(|_| one()).unwrap()
}

pub fn memfd(pages: u64) -> OwnedFd {
    // SAFETY: the name ends with a 0.
    let fd = unsafe { libc::memfd_create(c"fault".as_ptr(), libc::MFD_CLOEXEC) };
    // SAFETY: just made.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(p(pages)).unwrap();
    file.into()
}

pub fn map(space: &IoAddressSpace, page: u64, pages: u64) {
    let backing = memory(pages);
    step(space, "map", || {
        space.map(p(page), backing.clone(), ReadWrite)
    });
}

/// Whether the first byte of each of these pages can be written, and only of these.
fn check(space: &IoAddressSpace, mapped: &[u64], not_mapped: &[u64]) {
    for page in mapped {
        space.write(p(*page), &[1]).unwrap();
    }
    for page in not_mapped {
        space.write(p(*page), &[1]).unwrap_err();
    }
}

/// Close to each other, far from each other, and large ones that end in the middle of nodes.
fn maps() {
    let space = IoAddressSpace::builder()
        .reader_barrier(ReaderBarrier::Membarrier)
        .build();
    // A slot that goes without barriers, for which an unmap needs the kernel's.
    let handle = space.handle();
    let places = [
        (1, 1),
        (2, 1),
        (511, 2),
        (1 << 20, 1),
        (1 << 30, 700),
        ((1 << 30) - 1, 1),
    ];
    for (page, pages) in places
        .into_iter()
        .chain([(600, 5000), ((1 << 30) + 700, 1)])
    {
        map(&space, page, pages);
    }
    check(
        &space,
        &[1, 2, 511, 512, 600, 5599, 1 << 20],
        &[0, 3, 513, 599, 5600],
    );
    for _ in 0..70_000 {
        drop(handle.read(p(1), &mut [0]));
    }
    let unmapped = space.unmap(p(1), p(2));
    if let Err(error) = unmapped {
        // The kernel has refused its barrier: the mappings stay revoked until that works.
        assert_eq!(error.errno(), libc::EDEADLK, "{error}");
        assert_eq!(space.unmap(p(1), p(2)).unwrap(), p(2));
    }
    let backing = memory(3);
    step(&space, "map anywhere", || {
        space.map_anywhere(backing.clone(), ReadWrite)
    });
    step(&space, "unmap", || space.unmap(p(511), p(2)));
    step(&space, "unmap all", || space.unmap_all());
    assert_eq!(space.stats().table_bytes, 0);
}

/// What needs the kernel's barrier besides an unmap: a harvest, a replacement, memory that is taken away.
fn barriers() {
    let owner = Arc::new(());
    let space = IoAddressSpace::builder()
        .reader_barrier(ReaderBarrier::Membarrier)
        .build();
    let space = space.held_by(owner.clone());
    let handle = space.handle();
    // The slot goes without barriers again.
    let read_on = || (0..70_000).for_each(|_| handle.read(0, &mut [0]).unwrap());
    let is_refused = |errno| [libc::EBUSY, libc::EDEADLK, libc::ENOMEM].contains(&errno);
    map(&space, 0, 1);
    map(&space, 1, 2);
    step(&space, "start", || space.start_dirty_tracking());
    space.write(p(1), &[1]).unwrap();
    read_on();
    let pages = step(&space, "take", || space.take_dirty(0, p(3)));
    assert!(pages.iter().eq([p(1)]));
    read_on();
    let backing = memory(2);
    // Without the barrier the new memory is there, and the old one waits for the unmap.
    if let Err(error) = space.replace(p(1), backing.clone(), ReadWrite) {
        assert!(is_refused(error.errno()), "{error}");
    }
    check(&space, &[0, 1, 2], &[3]);
    read_on();
    let taken = space.invalidate_vaddr(p(1), p(2));
    if let Err(error) = taken {
        assert!(is_refused(error.errno()), "{error}");
        space.invalidate_vaddr(p(1), p(2)).unwrap();
    }
    check(&space, &[0], &[1, 2]);
    step(&space, "give back", || {
        space.resume_vaddr(p(1), p(2), backing.clone())
    });
    check(&space, &[0, 1, 2], &[3]);
    read_on();
    if space.unmap_all().is_err() {
        space.unmap_all().unwrap();
    }
    drop((space, handle));
    assert_eq!(Arc::strong_count(&owner), 1);
}

fn many(space: &IoAddressSpace, backing: &Backing) {
    step(space, "map a batch", || {
        space.map_batch((0..MANY).map(|n| {
            let part = backing.slice(p(n) as usize, p(1) as usize).unwrap();
            (p(3 * n), part, ReadWrite)
        }))
    });
}

fn batches() {
    let space = IoAddressSpace::new();
    let backing = memory(MANY);
    many(&space, &backing);
    check(&space, &[0, 3, 3 * MANY - 3], &[1, 3 * MANY]);
    let ranges: Vec<_> = aside(|| (0..MANY).map(|n| (p(3 * n), p(1))).collect());
    let list = step(&space, "scatter", || space.scatter(0, 1, ReadWrite));
    drop(list);
    step(&space, "unmap a batch", || space.unmap_batch(&ranges));
    assert_eq!(space.stats().table_bytes, 0);
    many(&space, &backing);
    step(&space, "unmap all", || space.unmap_all());
}

fn replacements() {
    let owner = Arc::new(());
    let space = IoAddressSpace::builder().profile(Profile::Iotlb).build();
    let space = space.held_by(owner.clone());
    let backing = memory(2000);
    let part =
        |first: u64, pages: u64| backing.slice(p(first) as usize, p(pages) as usize).unwrap();
    let map = |page, pages| {
        step(&space, "map", || {
            space.map(p(page), part(0, pages), ReadWrite)
        })
    };
    map(0, 2000);
    map(5, 1);
    map(510, 700);
    let by = part(1, 1);
    step(&space, "replace", || {
        space.replace(p(5), by.clone(), ReadWrite)
    });
    check(&space, &[0, 4, 5, 6, 510, 1209, 1210, 1999], &[2000]);
    // Pieces of one mapping, more of them than fit in a page.
    step(&space, "changes", || {
        space.change((0..MANY).map(|n| match n % 2 {
            0 => Change::Unmap {
                iova: p(3 * n),
                size: p(1),
            },
            _ => Change::Map {
                iova: p(3 * n),
                backing: part(n, 2),
                prot: ReadWrite,
            },
        }))
    });
    check(&space, &[1, 2, 3, 4, 1999], &[0, 6, 12]);
    // What was there for a moment has gone when the addresses are unmapped.
    let before = State::of(&space);
    let cut = || space.unmap(p(700), p(300));
    let bytes = cut().unwrap_or_else(|error| {
        assert_eq!(State::of(&space).live, before.live, "{error}");
        check(&space, &[1, 699, 700, 703, 999, 1000, 1999], &[0, 702]);
        cut().unwrap()
    });
    assert_eq!(bytes, p(250));
    check(&space, &[699, 1000], &[700, 703, 999]);
    check_as_without_failure("a cut", &space);
    step(&space, "unmap all", || space.unmap_all());
    assert_eq!((space.stats().table_bytes, space.mappings()), (0, 0));
    drop(space);
    assert_eq!(Arc::strong_count(&owner), 1);
}

/// Marks of so many pages take a page.
const MARKED: u64 = 4096 * 8;

fn dirty_pages() {
    let owner = Arc::new(());
    let quota = Quota::new(8);
    let options = PinOptions::new().account(Arc::new(quota.clone()));
    let space = IoAddressSpace::builder().pin_options(options).build();
    let space = space.held_by(owner.clone());
    map(&space, 0, MARKED);
    map(&space, MARKED, 2);
    step(&space, "start", || space.start_dirty_tracking());
    map(&space, 2 * MARKED, MARKED);
    // As many words of marks as take more than a page.
    for word in 0..MARKED / 64 {
        space.write(p(word * 64), &[1]).unwrap();
    }
    let pages = step(&space, "take", || space.take_dirty(0, p(MARKED)));
    assert_eq!(pages.len() as u64, MARKED / 64);
    for word in 0..MARKED / 64 {
        space.write(p(word * 64), &[1]).unwrap();
    }
    // Pages that are given back while the unmap waits for them.
    let pinned = Arc::new(Mutex::new(None));
    let given_back = pinned.clone();
    let notice = move |_, _| drop(given_back.lock().unwrap().take());
    let pinner = space.pinner("told", Interest::Holder, Arc::new(notice));
    let pages = pinner.pin_pages(p(64), 2, ReadWrite).unwrap();
    *pinned.lock().unwrap() = Some(pages);
    let before = State::of(&space);
    let unmap = || space.unmap_dirty(0, p(MARKED));
    // What is handed over is counted last: then all of it waits to be unmapped again.
    let (bytes, pages) = unmap().unwrap_or_else(|error| {
        let after = State::of(&space);
        let sum = |state: &State| (state.live + state.leaving, state.dirty_bytes, state.leases);
        assert_eq!(sum(&after), sum(&before), "{error}");
        check(&space, &[MARKED, 2 * MARKED], &[]);
        unmap().unwrap()
    });
    assert_eq!(bytes, p(MARKED));
    // One of the two that were pinned is marked by nothing else.
    assert_eq!(pages.len() as u64, MARKED / 64 + 1);
    assert_eq!(quota.charged(), 0);
    check_as_without_failure("an unmap with dirty pages", &space);
    space.stop_dirty_tracking();
    step(&space, "start again", || space.start_dirty_tracking());
    assert!(space
        .take_dirty(p(2 * MARKED), p(MARKED))
        .unwrap_or_default()
        .is_empty());
    drop((space, pinner));
    assert_eq!(Arc::strong_count(&owner), 1);
}

fn vaddr() {
    let space = IoAddressSpace::new();
    step(&space, "start", || space.start_dirty_tracking());
    map(&space, 0, MARKED);
    map(&space, MARKED + 1, 1);
    step(&space, "take away", || space.invalidate_vaddr(0, p(MARKED)));
    let backing = memory(MARKED);
    step(&space, "give back", || {
        space.resume_vaddr(0, p(MARKED), backing.clone())
    });
    check(&space, &[0, MARKED - 1], &[MARKED]);
}

fn pins() {
    let quota = Quota::new(2000);
    for account in [
        Arc::new(quota.clone()) as Arc<dyn page_pin::Account>,
        Arc::new(MemlockLimit),
    ] {
        let options = PinOptions::new().account(account);
        let space = IoAddressSpace::builder().pin_options(options).build();
        let backing = memory(MANY);
        many(&space, &backing);
        let pinner = space.pinner("faulty", Interest::Holder, Arc::new(|_, _| ()));
        // As many as one call may pin; only a few where each of them is locked.
        let pages = if quota.charged() == 0 && space.mappings() > 0 {
            512
        } else {
            4
        };
        let list: Vec<_> = aside(|| (0..pages).map(|n| p(3 * n)).collect());
        let pinned = step(&space, "pin", || pinner.pin_list(&list, ReadWrite));
        assert!(quota.charged() == 0 || quota.charged() == pages);
        pinned.page(0).unwrap();
        drop(pinned);
        assert_eq!(quota.charged(), 0);
        let kept = step(&space, "pin once more", || {
            pinner.pin_list(&list[..4], ReadWrite)
        });
        kept.keep();
        step(&space, "unpin", || pinner.unpin_list(&list[..4]));
        assert_eq!(quota.charged(), 0);
    }
}

fn snapshot() {
    let owner = Arc::new(());
    let space = IoAddressSpace::new().held_by(owner.clone());
    let backing = memory(MANY);
    many(&space, &backing);
    map(&space, 4 * MANY, MARKED);
    step(&space, "start", || space.start_dirty_tracking());
    let (snapshot, _) = step(&space, "snapshot", || space.snapshot());
    let restored = step(&space, "restore", || {
        IoAddressSpaceBuilder::restore(IoAddressSpace::builder(), &snapshot, |place| {
            Backing::anonymous(place.size as usize)
        })
    });
    assert_eq!(restored.mappings(), space.mappings());
    drop((space, restored));
    assert_eq!(Arc::strong_count(&owner), 1);
}

fn files() {
    let space = IoAddressSpace::new();
    let file = File::from(memfd(4));
    let backing = step(&space, "a file", || {
        let place = FileOffset::new(file.try_clone().unwrap(), 0);
        Backing::file(place, p(4) as usize, ReadWrite)
    });
    step(&space, "map", || space.map(0, backing.clone(), ReadWrite));
    check(&space, &[0, 3], &[4]);
    step(&space, "unmap", || space.unmap(0, p(4)));
}

/// Whose calls end at the fake in front of the kernel.
struct Vm(File);

impl SetMemoryRegion for Vm {
    unsafe fn set_user_memory_region(&self, region: kvm_userspace_memory_region) -> io::Result<()> {
        let request = c_ulong::from(SET_USER_MEMORY_REGION);
        // SAFETY: it is answered by this test.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), request, &region) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn followers() {
    let space = IoAddressSpace::new();
    map(&space, 0, 2);
    let null = || File::open("/dev/null").unwrap();
    let container = Arc::new(HardwareContainer::from_file(null()));
    let vm = Arc::new(Vm(null()));
    let mirror = step(&space, "a mirror", || {
        Mirror::new(&space, container.clone())
    });
    let slots = step(&space, "slots", || {
        MemorySlots::new(&space, vm.clone(), 0..700)
    });
    map(&space, 2, 2);
    let backing = memory(MANY);
    step(&space, "map a batch", || {
        let part = |n: u64| backing.slice(p(n) as usize, p(1) as usize).unwrap();
        space.map_batch((0..40).map(|n| (p(10 + 2 * n), part(n), ReadWrite)))
    });
    let by = memory(2);
    step(&space, "replace", || {
        space.replace(0, by.clone(), ReadWrite)
    });
    step(&space, "unmap", || space.unmap(p(2), p(2)));
    // What could not be unmapped is asked for again.
    map(&space, 2, 2);
    assert!(!mirror.is_lost() || !slots.is_lost());
    drop((mirror, slots));
    assert_eq!(
        (Arc::strong_count(&container), Arc::strong_count(&vm)),
        (1, 1)
    );
}

fn client() {
    let table = DmaTable::new().unwrap();
    let space = table.space().clone();
    let file = memfd(4);
    for page in [0, 1, 512] {
        step(&space, "map", || {
            table.map(3, p(1), p(page), p(1), Some(file.try_clone().unwrap()))
        });
    }
    step(&space, "map without a file", || {
        table.map(3, 0, p(600), p(1), None)
    });
    table.write(p(1), &[1]).unwrap();
    step(&space, "unmap", || table.unmap(0, p(1), p(1)));
    step(&space, "clear", || table.clear());
    assert_eq!(table.mappings(), 0);
}

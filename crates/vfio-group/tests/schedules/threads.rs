// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The threads, and what each of them expects at every step.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex as Unscheduled};
use std::time::Duration;

use checked_sync::clock;
use iommu_type1::{page_size, Error, Interest, IoAddressSpace, PinnedPages, Pinner, UnmapOptions};
use shuttle::rand::{thread_rng, Rng};
use shuttle::sync::Mutex;
use shuttle::thread::{spawn, yield_now, JoinHandle};
use vfio_group::{Container, Device, ExternalUser, Group, GroupFile, IommuType};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemory, Permissions, VolatileSlice};

use crate::ledger::{page, range, Ledger, PAGES, SLOTS};
use crate::memory::{offset, OTHERS};

/// What each thread does, so many times.
const ROUNDS: u64 = 3;

/// Places of a page: who writes there.
const DEVICE: usize = 0;
const LEASER: usize = 1;
const PINNER: usize = 2;

/// How it goes, in this schedule.
#[derive(Clone, Copy, Debug)]
struct Plan {
    /// The VMM unmaps everything before it goes; otherwise the last who holds the group does so.
    unmaps_all: bool,
    /// The test holds the group until the threads have ended; otherwise one of them is the last.
    stays: bool,
    /// The time of an unmap runs out.
    impatient: bool,
}

/// A group with a device, and what is known of its memory.
pub struct Machine {
    group: Group,
    device: Device,
    plan: Plan,
    ledger: Ledger,
    /// Whoever wants to know every unmap was told of these.
    told: Unscheduled<BTreeSet<(u64, u64)>>,
    /// The pages that the device has pinned.
    pinned: Unscheduled<Vec<u64>>,
}

impl Machine {
    pub fn start() -> Self {
        let group = Group::new(26);
        let mut random = thread_rng();
        Machine {
            device: group.add_device("vgpu0").unwrap(),
            group,
            plan: Plan {
                unmaps_all: random.gen(),
                stays: random.gen(),
                impatient: random.gen_ratio(1, 4),
            },
            ledger: Ledger::default(),
            told: Unscheduled::default(),
            pinned: Unscheduled::default(),
        }
    }

    pub fn run(self: Arc<Self>) {
        let vmm = Vmm::start(self.clone());
        let test = self.user();
        let mut threads: Vec<JoinHandle<()>> = Vec::new();
        for part in [read_and_write, lease, pin, take_dirty, hold] {
            let (machine, user) = (self.clone(), self.user());
            threads.push(spawn(move || part(&machine, user)));
        }
        threads.push(spawn(move || vmm.run()));
        if self.plan.impatient {
            threads.push(spawn(|| clock::pass(2)));
        }
        let stays = self.plan.stays.then_some(test);
        for thread in threads {
            thread.join().unwrap();
        }
        if let Some(user) = stays {
            self.check_quiet(&user);
        }
        let plan = self.plan;
        assert!(self.pinned.lock().unwrap().is_empty(), "{plan:?}");
        assert_eq!(self.group.container_users(), 0, "{plan:?}");
        self.ledger.check_marks();
        self.ledger.check_released();
        // And begins anew.
        let (file, container) = (self.group.open().unwrap(), Container::open());
        file.set_container(&container).unwrap();
    }

    /// Only the test is left.
    fn check_quiet(&self, user: &ExternalUser) {
        assert_eq!(self.group.container_users(), 1);
        let space = user.address_space();
        let dirty = space.take_dirty(0, page(PAGES)).unwrap();
        self.ledger.copy(&dirty);
        assert!(space.take_dirty(0, page(PAGES)).unwrap().is_empty());
        let mut byte = [0];
        let mut mapped = 0;
        for slot in 0..SLOTS.len() {
            if user.read(range(slot).0, &mut byte).is_ok() {
                self.ledger.complete(slot);
                mapped += 1;
            }
        }
        let stats = space.stats();
        assert_eq!(
            (stats.mappings, stats.leaving, stats.leases),
            (mapped, 0, 0)
        );
    }

    fn user(&self) -> ExternalUser {
        ExternalUser::from_device(&self.device).unwrap()
    }

    /// Whether an access of `iova` succeeded, which may be refused if its mapping comes and goes.
    fn allowed<T>(&self, iova: u64, result: Result<T, Error>) -> Option<T> {
        let error = match result {
            Ok(done) => return Some(done),
            Err(error) => error,
        };
        let is_refusal = matches!(
            error,
            Error::NotMapped { .. } | Error::Revoked { .. } | Error::Unmapping { .. }
        );
        assert!(is_refusal, "{error}");
        let stays = iova < page_size() && !self.plan.unmaps_all;
        assert!(!stays, "gone although it is held: {error}");
        None
    }
}

/// Who maps and unmaps.
struct Vmm {
    machine: Arc<Machine>,
    mapped: [bool; SLOTS.len()],
    space: IoAddressSpace,
    _listener: Pinner,
    _container: Container,
    _file: GroupFile,
}

impl Vmm {
    fn start(machine: Arc<Machine>) -> Self {
        let deadline = match machine.plan.impatient {
            true => Duration::from_secs(1),
            false => 2 * clock::NEVER,
        };
        let file = machine.group.open().unwrap();
        let container = Container::open_with(IoAddressSpace::builder().unmap_deadline(deadline));
        file.set_container(&container).unwrap();
        container.set_iommu(IommuType::Type1v2).unwrap();
        let space = container.address_space().unwrap();
        space.start_dirty_tracking().unwrap();
        let told = Arc::downgrade(&machine);
        let notice = move |iova, size| {
            if let Some(machine) = told.upgrade() {
                machine.told.lock().unwrap().insert((iova, size));
            }
        };
        let mut vmm = Vmm {
            _listener: space.pinner("listener", Interest::All, Arc::new(notice)),
            machine,
            mapped: [false; SLOTS.len()],
            space,
            _container: container,
            _file: file,
        };
        (0..SLOTS.len()).for_each(|slot| vmm.map(slot));
        vmm
    }

    fn run(mut self) {
        for _ in 0..2 * ROUNDS {
            // The first stays.
            let slot = thread_rng().gen_range(1..SLOTS.len());
            if self.mapped[slot] {
                self.unmap(slot);
            } else {
                self.map(slot);
            }
        }
        if self.machine.plan.unmaps_all {
            let mapped = (0..SLOTS.len()).filter(|slot| self.mapped[*slot]);
            self.unmap_all(mapped.collect());
        }
    }

    fn map(&mut self, slot: usize) {
        let memory = self.machine.ledger.map(slot);
        let mapped = self
            .space
            .map(range(slot).0, memory.backing(), Permissions::ReadWrite);
        mapped.unwrap();
        self.mapped[slot] = true;
    }

    fn unmap(&mut self, slot: usize) {
        let (iova, size) = range(slot);
        match thread_rng().gen_range(0..3) {
            0 => {
                let result = self.space.unmap(iova, size);
                self.unmapped(&[slot], result, None);
            }
            1 => {
                let result = self.space.unmap_dirty(iova, size);
                let (result, dirty) = match result {
                    Ok((bytes, dirty)) => (Ok(bytes), Some(dirty)),
                    Err(error) => (Err(error), None),
                };
                self.unmapped(&[slot], result, dirty);
            }
            _ => {
                let others = (1..SLOTS.len()).filter(|other| *other != slot && self.mapped[*other]);
                let slots: Vec<_> = others.take(1).chain([slot]).collect();
                self.unmap_all(slots);
            }
        }
    }

    fn unmap_all(&mut self, slots: Vec<usize>) {
        let ranges: Vec<_> = slots.iter().map(|slot| range(*slot)).collect();
        let result = self.space.unmap_batch(&ranges);
        self.unmapped(&slots, result, None);
    }

    /// What holds as soon as an unmap has returned.
    fn unmapped(
        &mut self,
        slots: &[usize],
        result: Result<u64, Error>,
        dirty: Option<iommu_type1::DirtyPages>,
    ) {
        match result {
            Ok(bytes) => assert_eq!(bytes, slots.iter().map(|slot| range(*slot).1).sum::<u64>()),
            Err(Error::Deadline { .. }) if self.machine.plan.impatient => {
                let patient = UnmapOptions::new().deadline(2 * clock::NEVER);
                for slot in slots {
                    let (iova, size) = range(*slot);
                    self.space.unmap_with(iova, size, patient).unwrap();
                }
            }
            Err(error) => panic!("{error}"),
        }
        for slot in slots {
            let (iova, size) = range(*slot);
            self.machine.ledger.unmapped(*slot, dirty.as_ref());
            self.mapped[*slot] = false;
            let told = self.machine.told.lock().unwrap().remove(&(iova, size));
            assert!(told, "nobody was told of the unmap of {iova:#x}");
            let pinned = self.machine.pinned.lock().unwrap();
            let late = pinned
                .iter()
                .find(|page| (iova..iova + size).contains(page));
            assert_eq!(late, None, "pinned after its unmap");
        }
    }
}

fn any_page() -> u64 {
    thread_rng().gen_range(0..PAGES)
}

fn read_and_write(machine: &Arc<Machine>, user: ExternalUser) {
    let dma = user.handle();
    for value in 1..=2 * ROUNDS {
        let iova = page(any_page()) + offset(DEVICE);
        match thread_rng().gen_range(0..3) {
            0 => {
                let written = dma.write(iova, &value.to_ne_bytes());
                machine.allowed(iova, written);
            }
            1 => {
                let mut word = [0; 8];
                if machine.allowed(iova, dma.read(iova, &mut word)).is_some() {
                    assert_ne!(u64::from_ne_bytes(word), OTHERS, "read after its unmap");
                }
            }
            // Two pages, and mostly two mappings.
            _ => {
                let mut words = vec![0; page_size() as usize + 8];
                // The second may go although the first stays.
                let read = dma.read(iova, &mut words);
                if machine.allowed(iova.max(page_size()), read).is_some() {
                    let last = words.len() - 8;
                    for word in [&words[..8], &words[last..]] {
                        assert_ne!(word, OTHERS.to_ne_bytes(), "read after its unmap");
                    }
                }
            }
        }
    }
}

/// What is lent stays what it is: others have places of their own.
fn use_slice(
    slice: &VolatileSlice<'_, impl vm_memory::bitmap::BitmapSlice>,
    at: usize,
    value: u64,
) {
    slice.write_obj(value, at).unwrap();
    yield_now();
    let read: u64 = slice.read_obj(at).unwrap();
    assert_eq!(read, value, "lent, and used by others");
}

fn lease(machine: &Arc<Machine>, user: ExternalUser) {
    let space = user.address_space();
    for value in 1..=ROUNDS {
        let iova = page(any_page()) + offset(LEASER);
        if thread_rng().gen() {
            let list = space.scatter(iova, 8, Permissions::ReadWrite);
            if let Some(list) = machine.allowed(iova, list) {
                list.iter().for_each(|slice| use_slice(&slice, 0, value));
            }
        } else {
            let guard = space.memory();
            let slices = guard.get_slices(GuestAddress(iova), 8, Permissions::ReadWrite);
            for slice in slices.into_iter().flatten().flatten() {
                use_slice(&slice, 0, value);
            }
        }
    }
}

/// A pinned page, which the VMM must not have back.
struct Pin {
    iova: u64,
    pages: PinnedPages,
    machine: Arc<Machine>,
}

impl Pin {
    fn use_page(&self, value: u64) {
        let slice = self.pages.page(0).unwrap();
        use_slice(&slice, offset(PINNER) as usize, value);
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        // Before the page is released.
        let mut pinned = self.machine.pinned.lock().unwrap();
        let at = pinned.iter().position(|iova| *iova == self.iova).unwrap();
        pinned.swap_remove(at);
    }
}

fn pin(machine: &Arc<Machine>, user: ExternalUser) {
    let cache: Arc<Mutex<Vec<Pin>>> = Arc::default();
    let told = cache.clone();
    let hesitates = !machine.plan.unmaps_all;
    let notice = move |iova, size| {
        // The unmap waits then, until the device is done or the time is up.
        if hesitates && thread_rng().gen() {
            return;
        }
        let is_meant = |pin: &Pin| (iova..iova + size).contains(&pin.iova);
        let mut cached = told.lock().unwrap();
        let (released, kept) = cached.drain(..).partition(is_meant);
        *cached = kept;
        drop(cached);
        drop::<Vec<Pin>>(released);
    };
    user.register_notifier("vgpu0", Interest::Holder, Arc::new(notice))
        .unwrap();
    for value in 1..=ROUNDS {
        let iova = page(any_page());
        machine.ledger.pin(iova);
        // A notice finds in the cache what was pinned.
        let mut cached = cache.lock().unwrap();
        let pages = match user.pin_pages(iova, 1, Permissions::ReadWrite) {
            Err(vfio_group::Error::Iommu(error)) => machine.allowed(iova, Err(error)),
            result => Some(result.unwrap()),
        };
        if let Some(pages) = pages {
            machine.pinned.lock().unwrap().push(iova);
            let pin = Pin {
                iova,
                pages,
                machine: machine.clone(),
            };
            pin.use_page(value);
            if thread_rng().gen() {
                cached.push(pin);
            }
        }
    }
    // Whatever is left goes when the VMM unmaps it, or with the device.
    if !machine.plan.unmaps_all {
        let left = std::mem::take(&mut *cache.lock().unwrap());
        drop(left);
    }
}

fn take_dirty(machine: &Arc<Machine>, user: ExternalUser) {
    for _ in 0..ROUNDS {
        match user.address_space().take_dirty(0, page(PAGES)) {
            Ok(dirty) => machine.ledger.copy(&dirty),
            Err(Error::AccessRuns { .. }) if machine.plan.impatient => {}
            Err(error) => panic!("{error}"),
        }
        yield_now();
    }
}

/// Takes the group and gives it back, never all of it.
fn hold(machine: &Arc<Machine>, mut user: ExternalUser) {
    for _ in 0..ROUNDS {
        let before = std::mem::replace(&mut user, machine.user());
        drop(before);
        assert!(machine.group.container_users() > 0);
        let mut byte = [0];
        let read = user.address_space().read(0, &mut byte);
        machine.allowed(0, read);
    }
}

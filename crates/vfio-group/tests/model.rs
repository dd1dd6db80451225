// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Random histories of several groups and containers against plain bookkeeping: every result and
//! errno, every count, who is attached where, and whether the mappings are still there.

#![cfg(not(loom))]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use iommu_type1::{page_size, Backing, IoAddressSpace};
use proptest::prelude::*;
use proptest::sample::Index;
use vfio_group::{
    BoundElsewhere, Container, Device, DeviceFile, ExternalUser, Group, GroupFile, GroupType,
    IommuType, Kvm, KvmListener,
};
use vm_memory::Permissions;
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

/// The types of the groups.
const TYPES: [GroupType; GROUPS] = [
    GroupType::EmulatedIommu,
    GroupType::EmulatedIommu,
    GroupType::Iommu,
    GroupType::NoIommu,
];
const GROUPS: usize = 4;
const CONTAINERS: usize = 2;
const PAGES: u64 = 3;

#[derive(Clone, Debug)]
enum Op {
    /// With the privilege or without.
    OpenGroup(usize, bool),
    SetPrivileged(usize, bool),
    CloseGroup(usize),
    OpenContainer(usize),
    CloseContainer(usize),
    SetContainer(usize, usize),
    UnsetContainer(usize),
    SetIommu(usize, u32),
    Map(usize, u64),
    Unmap(usize, u64),
    AddDevice(usize),
    RemoveDevice(usize),
    OpenDevice(usize),
    CloseDevice(Index),
    Unplug(usize),
    SetRequestNotifier(usize),
    RequestRelease(usize, u32),
    BindElsewhere(usize),
    UnbindElsewhere(usize),
    SetKvm(usize, Option<u32>),
    Listen(usize),
    Unlisten(Index),
    CheckExtension(usize, u32),
    ExtensionOfUser(Index, u32),
    UserOfGroup(usize),
    UserOfDevice(usize),
    CloneUser(Index),
    DropUser(Index),
}

fn op() -> impl Strategy<Value = Op> {
    let group = || 0..GROUPS;
    let container = || 0..CONTAINERS;
    prop_oneof![
        4 => (group(), prop::bool::weighted(0.8)).prop_map(|(g, p)| Op::OpenGroup(g, p)),
        1 => (group(), prop::bool::weighted(0.7)).prop_map(|(g, p)| Op::SetPrivileged(g, p)),
        2 => group().prop_map(Op::CloseGroup),
        3 => container().prop_map(Op::OpenContainer),
        1 => container().prop_map(Op::CloseContainer),
        5 => (group(), container()).prop_map(|(g, c)| Op::SetContainer(g, c)),
        3 => group().prop_map(Op::UnsetContainer),
        5 => (container(), prop_oneof![9 => Just(3), 2 => Just(1), 3 => Just(8), 1 => 0..12_u32])
            .prop_map(|(c, t)| Op::SetIommu(c, t)),
        4 => (container(), 0..PAGES).prop_map(|(c, page)| Op::Map(c, page)),
        1 => (container(), 0..PAGES).prop_map(|(c, page)| Op::Unmap(c, page)),
        2 => group().prop_map(Op::AddDevice),
        1 => group().prop_map(Op::RemoveDevice),
        4 => group().prop_map(Op::OpenDevice),
        3 => any::<Index>().prop_map(Op::CloseDevice),
        1 => group().prop_map(Op::Unplug),
        1 => group().prop_map(Op::SetRequestNotifier),
        1 => (group(), 0..4_u32).prop_map(|(g, times)| Op::RequestRelease(g, times)),
        1 => group().prop_map(Op::BindElsewhere),
        2 => group().prop_map(Op::UnbindElsewhere),
        2 => (group(), prop::option::of(any::<u32>())).prop_map(|(g, kvm)| Op::SetKvm(g, kvm)),
        2 => group().prop_map(Op::Listen),
        1 => any::<Index>().prop_map(Op::Unlisten),
        1 => (container(), 0..12_u32).prop_map(|(c, n)| Op::CheckExtension(c, n)),
        1 => (any::<Index>(), 0..12_u32).prop_map(|(at, n)| Op::ExtensionOfUser(at, n)),
        4 => group().prop_map(Op::UserOfGroup),
        2 => group().prop_map(Op::UserOfDevice),
        2 => any::<Index>().prop_map(Op::CloneUser),
        5 => any::<Index>().prop_map(Op::DropUser),
    ]
}

/// What an operation answers: bytes for an unmap, otherwise 0; or an errno.
type Answer = Result<u64, i32>;

/// The bookkeeping. Containers have a number each, never used again.
#[derive(Default)]
struct Naive {
    groups: [NaiveGroup; GROUPS],
    open_containers: [Option<usize>; CONTAINERS],
    containers: BTreeMap<usize, NaiveContainer>,
    /// The group of every open device file and of every external user, in order of their making.
    device_files: Vec<usize>,
    users: Vec<usize>,
    /// Of each listener its group, and what it has heard.
    listeners: Vec<(usize, Vec<Option<u32>>)>,
}

#[derive(Clone, Copy, Default)]
struct NaiveGroup {
    is_open: bool,
    privileged: bool,
    has_device: bool,
    leaving: bool,
    bound_elsewhere: bool,
    /// How often the device was asked for since it has a notifier.
    asked: Option<u64>,
    kvm: Option<u32>,
    users: u32,
    container: Option<usize>,
}

/// The IOMMU, where there is one.
type NaiveContainer = Option<NaiveIommu>;

/// Its type, and the pages that are mapped.
struct NaiveIommu {
    iommu_type: u32,
    pages: BTreeSet<u64>,
}

fn no_iommu(g: usize) -> bool {
    TYPES[g] == GroupType::NoIommu
}

impl Naive {
    fn apply(&mut self, op: &Op) -> Option<Answer> {
        Some(match op {
            Op::OpenGroup(g, privileged) => {
                let group = &mut self.groups[*g];
                if no_iommu(*g) && !privileged {
                    return Some(Err(libc::EPERM));
                }
                if group.is_open || group.container.is_some() {
                    return Some(Err(libc::EBUSY));
                }
                group.is_open = true;
                group.privileged = *privileged;
                Ok(0)
            }
            Op::SetPrivileged(g, privileged) => {
                let group = &mut self.groups[*g];
                if !group.is_open {
                    return None;
                }
                group.privileged = *privileged;
                Ok(0)
            }
            Op::CloseGroup(g) => {
                if !std::mem::take(&mut self.groups[*g].is_open) {
                    return None;
                }
                if self.groups[*g].users > 0 {
                    self.put(*g);
                }
                Ok(0)
            }
            Op::OpenContainer(c) => {
                let number = self.containers.len();
                if self.open_containers[*c].is_some() {
                    return None;
                }
                self.open_containers[*c] = Some(number);
                self.containers.insert(number, None);
                Ok(0)
            }
            Op::CloseContainer(c) => {
                self.open_containers[*c].take()?;
                Ok(0)
            }
            Op::SetContainer(g, c) => {
                let number = self.open_containers[*c]?;
                let mixed = self
                    .inside(number)
                    .any(|other| no_iommu(other) != no_iommu(*g));
                let group = &mut self.groups[*g];
                if !group.is_open {
                    return None;
                }
                if group.users > 0 {
                    return Some(Err(libc::EINVAL));
                }
                if no_iommu(*g) && !group.privileged || mixed {
                    return Some(Err(libc::EPERM));
                }
                group.users = 1;
                group.container = Some(number);
                Ok(0)
            }
            Op::UnsetContainer(g) => {
                if !self.groups[*g].is_open {
                    return None;
                }
                match self.groups[*g].users {
                    0 => Err(libc::EINVAL),
                    1 => {
                        self.put(*g);
                        Ok(0)
                    }
                    _ => Err(libc::EBUSY),
                }
            }
            Op::SetIommu(c, iommu_type) => {
                let number = self.open_containers[*c]?;
                let group = self.inside(number).next();
                let iommu = self.containers.get_mut(&number)?;
                let (Some(group), None) = (group, &iommu) else {
                    return Some(Err(libc::EINVAL));
                };
                let offered: &[u32] = if no_iommu(group) { &[8] } else { &[1, 3] };
                if !offered.contains(iommu_type) {
                    return Some(Err(libc::ENODEV));
                }
                *iommu = Some(NaiveIommu {
                    iommu_type: *iommu_type,
                    pages: BTreeSet::new(),
                });
                Ok(0)
            }
            Op::Map(c, page) => match self.containers.get_mut(&self.open_containers[*c]?)? {
                None => Err(libc::EINVAL),
                Some(iommu) if iommu.iommu_type == 8 => Err(libc::ENOTTY),
                Some(iommu) => match iommu.pages.insert(*page) {
                    true => Ok(0),
                    false => Err(libc::EEXIST),
                },
            },
            Op::Unmap(c, page) => match self.containers.get_mut(&self.open_containers[*c]?)? {
                None => Err(libc::EINVAL),
                Some(iommu) if iommu.iommu_type == 8 => Err(libc::ENOTTY),
                Some(iommu) => Ok(u64::from(iommu.pages.remove(page)) * page_size()),
            },
            Op::AddDevice(g) => match std::mem::replace(&mut self.groups[*g].has_device, true) {
                true => Err(libc::EEXIST),
                false => Ok(0),
            },
            Op::RemoveDevice(g) => {
                if !self.groups[*g].has_device {
                    return None;
                }
                if self.device_files.contains(g) {
                    return Some(Err(libc::EBUSY));
                }
                self.device_gone(*g);
                Ok(0)
            }
            Op::Unplug(g) => {
                if !self.groups[*g].has_device {
                    return None;
                }
                self.groups[*g].leaving = true;
                if self.device_files.contains(g) {
                    self.ask(*g, 1);
                    return Some(Err(libc::EBUSY));
                }
                self.device_gone(*g);
                Ok(0)
            }
            Op::SetRequestNotifier(g) => {
                if !self.groups[*g].has_device {
                    return None;
                }
                self.groups[*g].asked = Some(0);
                Ok(0)
            }
            Op::RequestRelease(g, times) => {
                if !self.groups[*g].has_device {
                    return None;
                }
                if !self.device_files.contains(g) {
                    return Some(Ok(0));
                }
                self.ask(*g, u64::from(*times));
                Err(libc::EBUSY)
            }
            Op::BindElsewhere(g) => {
                match std::mem::replace(&mut self.groups[*g].bound_elsewhere, true) {
                    true => Err(libc::EEXIST),
                    false => Ok(0),
                }
            }
            Op::UnbindElsewhere(g) => {
                if !std::mem::take(&mut self.groups[*g].bound_elsewhere) {
                    return None;
                }
                Ok(0)
            }
            Op::SetKvm(g, kvm) => {
                self.groups[*g].kvm = *kvm;
                for (group, heard) in &mut self.listeners {
                    if *group == *g {
                        heard.push(*kvm);
                    }
                }
                Ok(0)
            }
            Op::Listen(g) => {
                if !self.groups[*g].has_device {
                    return None;
                }
                if self.groups[*g].leaving {
                    return Some(Err(libc::ENODEV));
                }
                if self.can_use(*g, true).is_err() {
                    return Some(Err(libc::EINVAL));
                }
                let heard = self.groups[*g].kvm.map(Some);
                self.listeners.push((*g, heard.into_iter().collect()));
                Ok(0)
            }
            Op::Unlisten(at) => {
                take(&mut self.listeners, at)?;
                Ok(0)
            }
            Op::CheckExtension(c, n) => Ok(self.extension(self.open_containers[*c]?, *n)),
            Op::ExtensionOfUser(at, n) => {
                let g = *pick(&self.users, at)?;
                Ok(self.extension(self.groups[g].container?, *n))
            }
            Op::OpenDevice(g) => {
                if !self.groups[*g].is_open {
                    return None;
                }
                if !self.groups[*g].has_device || self.groups[*g].leaving {
                    return Some(Err(libc::ENODEV));
                }
                self.get(*g, false).inspect(|_| self.device_files.push(*g))
            }
            Op::CloseDevice(at) => {
                let g = take(&mut self.device_files, at)?;
                self.put(g);
                if !self.device_files.contains(&g) {
                    self.groups[g].asked = None;
                }
                Ok(0)
            }
            Op::UserOfGroup(g) => {
                if !self.groups[*g].is_open {
                    return None;
                }
                self.get(*g, true).inspect(|_| self.users.push(*g))
            }
            Op::UserOfDevice(g) => {
                if !self.groups[*g].has_device {
                    return None;
                }
                if self.groups[*g].leaving {
                    return Some(Err(libc::ENODEV));
                }
                self.get(*g, true).inspect(|_| self.users.push(*g))
            }
            Op::CloneUser(at) => {
                let g = *pick(&self.users, at)?;
                self.groups[g].users += 1;
                self.users.push(g);
                Ok(0)
            }
            Op::DropUser(at) => {
                let g = take(&mut self.users, at)?;
                self.put(g);
                Ok(0)
            }
        })
    }

    /// One more external user, or device file.
    fn get(&mut self, g: usize, external: bool) -> Answer {
        self.can_use(g, external)?;
        self.groups[g].users += 1;
        Ok(0)
    }

    fn can_use(&self, g: usize, external: bool) -> Answer {
        let group = &self.groups[g];
        let Some(number) = group.container else {
            return Err(libc::EINVAL);
        };
        if external && no_iommu(g) {
            return Err(libc::EPERM);
        }
        if self.containers[&number].is_none() || group.bound_elsewhere {
            return Err(libc::EINVAL);
        }
        if no_iommu(g) && !group.privileged {
            return Err(libc::EPERM);
        }
        Ok(0)
    }

    fn ask(&mut self, g: usize, times: u64) {
        self.groups[g].asked = self.groups[g].asked.map(|asked| asked + times);
    }

    fn device_gone(&mut self, g: usize) {
        let group = &mut self.groups[g];
        (group.has_device, group.leaving, group.asked) = (false, false, None);
    }

    /// The groups in a container.
    fn inside(&self, number: usize) -> impl Iterator<Item = usize> + '_ {
        (0..GROUPS).filter(move |g| self.groups[*g].container == Some(number))
    }

    fn extension(&self, number: usize, extension: u32) -> u64 {
        let set = self.containers[&number].is_some();
        let has = |group_type| self.inside(number).any(|g| TYPES[g] == group_type);
        let numbers: &[u32] = if has(GroupType::NoIommu) {
            &[8]
        } else if !set {
            &[1, 3, 9]
        } else {
            match (has(GroupType::Iommu), has(GroupType::EmulatedIommu)) {
                (true, false) => &[1, 3, 9, 10],
                (true, true) => &[1, 3, 9],
                (false, _) => &[1, 3, 4, 9],
            }
        };
        u64::from(numbers.contains(&extension))
    }

    fn put(&mut self, g: usize) {
        self.groups[g].users -= 1;
        if self.groups[g].users > 0 {
            return;
        }
        let left = self.groups[g].container.take();
        if self.groups.iter().all(|group| group.container != left) {
            if let Some(number) = left {
                self.containers.insert(number, None);
            }
        }
    }

    /// The pages mapped for a group, where it has an IOMMU.
    fn mapped(&self, g: usize) -> Option<&BTreeSet<u64>> {
        let iommu = self.containers.get(&self.groups[g].container?)?.as_ref()?;
        Some(&iommu.pages)
    }
}

/// What a listener has heard.
type Heard = Arc<Mutex<Vec<Option<u32>>>>;

fn number_of(kvm: &Kvm) -> u32 {
    *kvm.clone().downcast().expect("a number, as it was set")
}

/// The real objects, in the same places.
struct Real {
    groups: [Group; GROUPS],
    group_files: [Option<GroupFile>; GROUPS],
    devices: [Option<Device>; GROUPS],
    containers: [Option<Container>; CONTAINERS],
    device_files: Vec<DeviceFile>,
    users: Vec<ExternalUser>,
    bound_elsewhere: [Option<BoundElsewhere>; GROUPS],
    notifiers: [Option<EventFd>; GROUPS],
    listeners: Vec<(KvmListener, Heard)>,
    /// Every address space there was, in order of its making.
    spaces: Vec<IoAddressSpace>,
}

impl Real {
    fn new() -> Self {
        Real {
            groups: std::array::from_fn(|id| Group::with_type(id as u32, TYPES[id])),
            group_files: Default::default(),
            devices: Default::default(),
            containers: Default::default(),
            device_files: Vec::new(),
            users: Vec::new(),
            bound_elsewhere: Default::default(),
            notifiers: Default::default(),
            listeners: Vec::new(),
            spaces: Vec::new(),
        }
    }

    fn apply(&mut self, op: &Op) -> Option<Answer> {
        Some(match op {
            Op::OpenGroup(g, privileged) => {
                let file = match privileged {
                    true => self.groups[*g].open_privileged(),
                    false => self.groups[*g].open(),
                };
                answer(file, |file| self.group_files[*g] = Some(file))
            }
            Op::SetPrivileged(g, privileged) => {
                self.group_files[*g].as_ref()?.set_privileged(*privileged);
                Ok(0)
            }
            Op::CloseGroup(g) => {
                drop(self.group_files[*g].take()?);
                Ok(0)
            }
            Op::OpenContainer(c) => {
                if self.containers[*c].is_some() {
                    return None;
                }
                self.containers[*c] = Some(Container::open());
                Ok(0)
            }
            Op::CloseContainer(c) => {
                drop(self.containers[*c].take()?);
                Ok(0)
            }
            Op::SetContainer(g, c) => {
                let container = self.containers[*c].as_ref()?;
                let file = self.group_files[*g].as_ref()?;
                answer(file.set_container(container), drop)
            }
            Op::UnsetContainer(g) => answer(self.group_files[*g].as_ref()?.unset_container(), drop),
            Op::SetIommu(c, iommu_type) => {
                let container = self.containers[*c].as_ref()?;
                answer(container.set_iommu(IommuType::from(*iommu_type)), |()| {
                    self.spaces.extend(container.address_space().ok())
                })
            }
            Op::Map(c, page) => {
                let backing = Backing::anonymous(page_size() as usize).unwrap();
                let iova = page * page_size();
                let container = self.containers[*c].as_ref()?;
                answer(container.map(iova, backing, Permissions::ReadWrite), drop)
            }
            Op::Unmap(c, page) => self.containers[*c]
                .as_ref()?
                .unmap(page * page_size(), page_size())
                .map_err(|error| error.errno()),
            Op::AddDevice(g) => answer(self.groups[*g].add_device("device"), |device| {
                self.devices[*g] = Some(device)
            }),
            Op::RemoveDevice(g) => {
                let removed = self.devices[*g].as_ref()?.remove();
                answer(removed, |()| self.devices[*g] = None)
            }
            Op::Unplug(g) => {
                let unplugged = self.devices[*g].as_ref()?.unplug(Duration::ZERO);
                answer(unplugged, |()| self.devices[*g] = None)
            }
            Op::SetRequestNotifier(g) => {
                let device = self.devices[*g].as_ref()?;
                let notifier = EventFd::new(EFD_NONBLOCK).unwrap();
                self.notifiers[*g] = Some(notifier.try_clone().unwrap());
                answer(device.set_request_notifier(Some(notifier)), drop)
            }
            Op::RequestRelease(g, times) => {
                let device = self.devices[*g].as_ref()?;
                answer(device.request_release(*times, Duration::ZERO), drop)
            }
            Op::BindElsewhere(g) => answer(self.groups[*g].bind_elsewhere("other"), |bound| {
                self.bound_elsewhere[*g] = Some(bound)
            }),
            Op::UnbindElsewhere(g) => {
                drop(self.bound_elsewhere[*g].take()?);
                Ok(0)
            }
            Op::SetKvm(g, kvm) => {
                self.groups[*g].set_kvm(kvm.map(|number| Arc::new(number) as Kvm));
                Ok(0)
            }
            Op::Listen(g) => {
                let heard = Heard::default();
                let hears = heard.clone();
                let listener = self.devices[*g].as_ref()?.on_set_kvm(move |kvm| {
                    hears.lock().unwrap().push(kvm.map(number_of));
                });
                answer(listener, |listener| self.listeners.push((listener, heard)))
            }
            Op::Unlisten(at) => {
                take(&mut self.listeners, at)?;
                Ok(0)
            }
            Op::CheckExtension(c, n) => {
                Ok(self.containers[*c].as_ref()?.check_extension(*n).into())
            }
            Op::ExtensionOfUser(at, n) => Ok(pick(&self.users, at)?.check_extension(*n).into()),
            Op::OpenDevice(g) => answer(self.group_files[*g].as_ref()?.device("device"), |file| {
                self.device_files.push(file)
            }),
            Op::CloseDevice(at) => {
                take(&mut self.device_files, at)?;
                Ok(0)
            }
            Op::UserOfGroup(g) => {
                let user = ExternalUser::from_group(self.group_files[*g].as_ref()?);
                answer(user, |user| self.users.push(user))
            }
            Op::UserOfDevice(g) => {
                let user = ExternalUser::from_device(self.devices[*g].as_ref()?);
                answer(user, |user| self.users.push(user))
            }
            Op::CloneUser(at) => {
                let clone = pick(&self.users, at)?.clone();
                self.users.push(clone);
                Ok(0)
            }
            Op::DropUser(at) => {
                take(&mut self.users, at)?;
                Ok(0)
            }
        })
    }
}

fn answer<T: Debug>(result: vfio_group::Result<T>, then: impl FnOnce(T)) -> Answer {
    result.map(then).map_err(|error| error.errno())?;
    Ok(0)
}

fn pick<'a, T>(from: &'a [T], at: &Index) -> Option<&'a T> {
    (!from.is_empty()).then(|| at.get(from))
}

fn take<T>(from: &mut Vec<T>, at: &Index) -> Option<T> {
    (!from.is_empty()).then(|| from.remove(at.index(from.len())))
}

fn check(naive: &Naive, real: &Real) -> Result<(), TestCaseError> {
    for (g, expected) in naive.groups.iter().enumerate() {
        prop_assert_eq!(real.groups[g].container_users(), expected.users);
        if let Some(file) = &real.group_files[g] {
            let attached = file.status() & GroupFile::CONTAINER_SET != 0;
            prop_assert_eq!(attached, expected.container.is_some());
            let viable = file.status() & GroupFile::VIABLE != 0;
            prop_assert_eq!(viable, !expected.bound_elsewhere);
        }
        prop_assert_eq!(real.groups[g].kvm().as_ref().map(number_of), expected.kvm);
    }
    for (c, number) in naive.open_containers.iter().enumerate() {
        let Some(container) = &real.containers[c] else {
            prop_assert!(number.is_none());
            continue;
        };
        let expected = number
            .and_then(|number| naive.containers[&number].as_ref())
            .filter(|iommu| iommu.iommu_type != 8)
            .map(|iommu| &iommu.pages);
        let mappings = container.address_space().ok().map(|space| space.mappings());
        prop_assert_eq!(mappings, expected.map(BTreeSet::len));
    }
    for (user, g) in real.users.iter().zip(&naive.users) {
        let mapped = naive.mapped(*g);
        prop_assert!(mapped.is_some(), "a user without an IOMMU");
        for page in 0..PAGES {
            let readable = user.read(page * page_size(), &mut [0]).is_ok();
            prop_assert_eq!(readable, mapped.is_some_and(|pages| pages.contains(&page)));
        }
    }
    prop_assert_eq!(real.listeners.len(), naive.listeners.len());
    for ((_, heard), (_, expected)) in real.listeners.iter().zip(&naive.listeners) {
        prop_assert_eq!(&*heard.lock().unwrap(), expected);
    }
    let mappings: usize = real.spaces.iter().map(|space| space.mappings()).sum();
    let iommus = naive.containers.values().flatten();
    let expected: usize = iommus.map(|iommu| iommu.pages.len()).sum();
    prop_assert_eq!(mappings, expected, "mappings of spaces that were released");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn behaves_as_the_bookkeeping_says(ops in prop::collection::vec(op(), 1..120)) {
        let (mut naive, mut real) = (Naive::default(), Real::new());
        for op in &ops {
            prop_assert_eq!(real.apply(op), naive.apply(op), "{:?}", op);
            check(&naive, &real)?;
            // Reading takes what is counted, so both counts begin anew.
            for (g, group) in naive.groups.iter_mut().enumerate() {
                let expected = group.asked.as_mut().map(std::mem::take).unwrap_or(0);
                let asked = real.notifiers[g].as_ref().and_then(|fd| fd.read().ok());
                prop_assert_eq!(asked.unwrap_or(0), expected, "requests");
            }
        }
    }
}

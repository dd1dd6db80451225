// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Random histories of several groups and containers against plain bookkeeping: every result and
//! errno, every count, who is attached where, and whether the mappings are still there.

#![cfg(not(loom))]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

use iommu_type1::{page_size, Backing, IoAddressSpace};
use proptest::prelude::*;
use proptest::sample::Index;
use vfio_group::{Container, Device, DeviceFile, ExternalUser, Group, GroupFile, IommuType};
use vm_memory::Permissions;

const GROUPS: usize = 3;
const CONTAINERS: usize = 2;
const PAGES: u64 = 3;

#[derive(Clone, Debug)]
enum Op {
    OpenGroup(usize),
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
    UserOfGroup(usize),
    UserOfDevice(usize),
    CloneUser(Index),
    DropUser(Index),
}

fn op() -> impl Strategy<Value = Op> {
    let group = || 0..GROUPS;
    let container = || 0..CONTAINERS;
    prop_oneof![
        3 => group().prop_map(Op::OpenGroup),
        2 => group().prop_map(Op::CloseGroup),
        3 => container().prop_map(Op::OpenContainer),
        1 => container().prop_map(Op::CloseContainer),
        5 => (group(), container()).prop_map(|(g, c)| Op::SetContainer(g, c)),
        3 => group().prop_map(Op::UnsetContainer),
        5 => (container(), prop_oneof![9 => Just(3), 1 => 0..12_u32])
            .prop_map(|(c, t)| Op::SetIommu(c, t)),
        4 => (container(), 0..PAGES).prop_map(|(c, page)| Op::Map(c, page)),
        1 => (container(), 0..PAGES).prop_map(|(c, page)| Op::Unmap(c, page)),
        2 => group().prop_map(Op::AddDevice),
        1 => group().prop_map(Op::RemoveDevice),
        4 => group().prop_map(Op::OpenDevice),
        3 => any::<Index>().prop_map(Op::CloseDevice),
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
}

#[derive(Clone, Copy, Default)]
struct NaiveGroup {
    is_open: bool,
    has_device: bool,
    users: u32,
    container: Option<usize>,
}

/// The mapped pages, where there is an IOMMU.
type NaiveContainer = Option<BTreeSet<u64>>;

impl Naive {
    fn apply(&mut self, op: &Op) -> Option<Answer> {
        Some(match op {
            Op::OpenGroup(g) => {
                let group = &mut self.groups[*g];
                if group.is_open || group.container.is_some() {
                    return Some(Err(libc::EBUSY));
                }
                group.is_open = true;
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
                let group = &mut self.groups[*g];
                if !group.is_open {
                    return None;
                }
                if group.users > 0 {
                    return Some(Err(libc::EINVAL));
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
                let has_group = self.groups.iter().any(|g| g.container == Some(number));
                let iommu = self.containers.get_mut(&number)?;
                if !has_group || iommu.is_some() {
                    return Some(Err(libc::EINVAL));
                }
                if *iommu_type != 3 {
                    return Some(Err(libc::ENODEV));
                }
                *iommu = Some(BTreeSet::new());
                Ok(0)
            }
            Op::Map(c, page) => match self.containers.get_mut(&self.open_containers[*c]?)? {
                None => Err(libc::EINVAL),
                Some(pages) => match pages.insert(*page) {
                    true => Ok(0),
                    false => Err(libc::EEXIST),
                },
            },
            Op::Unmap(c, page) => match self.containers.get_mut(&self.open_containers[*c]?)? {
                None => Err(libc::EINVAL),
                Some(pages) => Ok(u64::from(pages.remove(page)) * page_size()),
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
                self.groups[*g].has_device = false;
                Ok(0)
            }
            Op::OpenDevice(g) => {
                if !self.groups[*g].is_open {
                    return None;
                }
                if !self.groups[*g].has_device {
                    return Some(Err(libc::ENODEV));
                }
                self.get(*g).inspect(|_| self.device_files.push(*g))
            }
            Op::CloseDevice(at) => {
                let g = take(&mut self.device_files, at)?;
                self.put(g);
                Ok(0)
            }
            Op::UserOfGroup(g) => {
                if !self.groups[*g].is_open {
                    return None;
                }
                self.get(*g).inspect(|_| self.users.push(*g))
            }
            Op::UserOfDevice(g) => {
                if !self.groups[*g].has_device {
                    return None;
                }
                self.get(*g).inspect(|_| self.users.push(*g))
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

    fn get(&mut self, g: usize) -> Answer {
        if self.mapped(g).is_none() {
            return Err(libc::EINVAL);
        }
        self.groups[g].users += 1;
        Ok(0)
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
        self.containers.get(&self.groups[g].container?)?.as_ref()
    }
}

/// The real objects, in the same places.
struct Real {
    groups: [Group; GROUPS],
    group_files: [Option<GroupFile>; GROUPS],
    devices: [Option<Device>; GROUPS],
    containers: [Option<Container>; CONTAINERS],
    device_files: Vec<DeviceFile>,
    users: Vec<ExternalUser>,
    /// Every address space there was, in order of its making.
    spaces: Vec<IoAddressSpace>,
}

impl Real {
    fn new() -> Self {
        Real {
            groups: std::array::from_fn(|id| Group::new(id as u32)),
            group_files: Default::default(),
            devices: Default::default(),
            containers: Default::default(),
            device_files: Vec::new(),
            users: Vec::new(),
            spaces: Vec::new(),
        }
    }

    fn apply(&mut self, op: &Op) -> Option<Answer> {
        Some(match op {
            Op::OpenGroup(g) => answer(self.groups[*g].open(), |file| {
                self.group_files[*g] = Some(file)
            }),
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
                    self.spaces.push(container.address_space().unwrap())
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
        }
    }
    for (c, number) in naive.open_containers.iter().enumerate() {
        let Some(container) = &real.containers[c] else {
            prop_assert!(number.is_none());
            continue;
        };
        let expected = number.and_then(|number| naive.containers[&number].as_ref());
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
    let mappings: usize = real.spaces.iter().map(|space| space.mappings()).sum();
    let expected: usize = naive.containers.values().flatten().map(BTreeSet::len).sum();
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
        }
    }
}

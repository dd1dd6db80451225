// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The bookkeeping: what each operation has to answer, and who is where then.

use std::collections::{BTreeMap, BTreeSet};

use iommu_type1::page_size;
use vfio_group::GroupType;

use crate::ops::{pick, take, Answer, Op, CONTAINERS, GROUPS, TYPES};

/// The bookkeeping. Containers have a number each, never used again.
#[derive(Default)]
pub struct Naive {
    pub groups: [NaiveGroup; GROUPS],
    pub open_containers: [Option<usize>; CONTAINERS],
    pub containers: BTreeMap<usize, NaiveContainer>,
    /// The group of every open device file and of every external user, in order of their making.
    pub device_files: Vec<usize>,
    pub users: Vec<usize>,
    /// Of each listener its group, and what it has heard.
    pub listeners: Vec<(usize, Vec<Option<u32>>)>,
}

#[derive(Clone, Copy, Default)]
pub struct NaiveGroup {
    pub is_open: bool,
    pub privileged: bool,
    pub has_device: bool,
    pub leaving: bool,
    pub bound_elsewhere: bool,
    /// How often the device was asked for since it has a notifier.
    pub asked: Option<u64>,
    pub kvm: Option<u32>,
    pub users: u32,
    pub container: Option<usize>,
}

/// The IOMMU, where there is one.
pub type NaiveContainer = Option<NaiveIommu>;

/// Its type, and the pages that are mapped.
pub struct NaiveIommu {
    pub iommu_type: u32,
    pub pages: BTreeSet<u64>,
}

fn no_iommu(g: usize) -> bool {
    TYPES[g] == GroupType::NoIommu
}

impl Naive {
    pub fn apply(&mut self, op: &Op) -> Option<Answer> {
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
    pub fn mapped(&self, g: usize) -> Option<&BTreeSet<u64>> {
        let iommu = self.containers.get(&self.groups[g].container?)?.as_ref()?;
        Some(&iommu.pages)
    }
}

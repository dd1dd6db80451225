// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The groups and containers that are tested.

use std::fmt::Debug;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use iommu_type1::{page_size, Backing, IoAddressSpace};
use vfio_group::{
    BoundElsewhere, Container, Device, DeviceFile, ExternalUser, Group, GroupFile, IommuType, Kvm,
    KvmListener,
};
use vm_memory::Permissions;
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use crate::ops::{pick, take, Answer, Op, CONTAINERS, GROUPS, TYPES};

/// What a listener has heard.
pub type Heard = Arc<Mutex<Vec<Option<u32>>>>;

pub fn number_of(kvm: &Kvm) -> u32 {
    *kvm.clone().downcast().expect("a number, as it was set")
}

/// The real objects, in the same places.
pub struct Real {
    pub groups: [Group; GROUPS],
    pub group_files: [Option<GroupFile>; GROUPS],
    pub devices: [Option<Device>; GROUPS],
    pub containers: [Option<Container>; CONTAINERS],
    pub device_files: Vec<DeviceFile>,
    pub users: Vec<ExternalUser>,
    pub bound_elsewhere: [Option<BoundElsewhere>; GROUPS],
    pub notifiers: [Option<EventFd>; GROUPS],
    pub listeners: Vec<(KvmListener, Heard)>,
    /// Every address space there was, in order of its making.
    pub spaces: Vec<IoAddressSpace>,
}

impl Real {
    pub fn new() -> Self {
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

    pub fn apply(&mut self, op: &Op) -> Option<Answer> {
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

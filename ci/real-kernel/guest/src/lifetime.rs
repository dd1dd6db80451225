// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who lives how long: files of containers, groups and devices, opened, attached, used and closed in any
//! order, on the kernel's and on those of vfio-group.

use std::collections::BTreeMap;

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use vfio_bindings::bindings::vfio::{VFIO_TYPE1v2_IOMMU, VFIO_NOIOMMU_IOMMU, VFIO_TYPE1_IOMMU};

use crate::compare::shrink;
use crate::memory::{PAGE, PRIVATE};
use crate::op::Map;
use crate::vfio::{self, Answer};
use guest_init::Given;

/// Containers there may be at a time.
const CONTAINERS: usize = 2;

/// Device files there may be at a time.
const DEVICES: usize = 3;

const SEQUENCES: u64 = 200;
const STEPS: usize = 40;

/// A type that no driver has.
const NO_TYPE: u32 = 99;

/// Errnos that have to be reached, by what the contract says.
const ERRNOS: [i32; 4] = [libc::EINVAL, libc::EBUSY, libc::ENODEV, libc::EEXIST];

/// One call. What it needs and is not open is EBADF on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    OpenContainer(usize),
    CloseContainer(usize),
    OpenGroup,
    CloseGroup,
    SetContainer(usize),
    UnsetContainer,
    SetIommu(usize, u32),
    OpenDevice(bool),
    CloseDevice,
    Map(usize, u64),
    Extension(usize, u32),
    Status,
}

trait World {
    fn apply(&mut self, step: Step) -> Answer;
}

/// Files of the kernel's.
struct Kernels<'a> {
    given: &'a Given,
    containers: [Option<vfio::Container>; CONTAINERS],
    group: Option<vfio::Group>,
    devices: Vec<vfio::Device>,
}

/// Those of vfio-group.
struct Ours<'a> {
    name: &'a str,
    there: vfio_group::Group,
    containers: [Option<vfio_group::Container>; CONTAINERS],
    group: Option<vfio_group::GroupFile>,
    devices: Vec<vfio_group::DeviceFile>,
}

const MISSING: i32 = libc::EBADF;

impl World for Kernels<'_> {
    fn apply(&mut self, step: Step) -> Answer {
        let container = |slot: usize| self.containers[slot].as_ref().ok_or(MISSING);
        let group = self.group.as_ref().ok_or(MISSING);
        match step {
            Step::OpenContainer(slot) => {
                self.containers[slot] = Some(vfio::Container::open()?);
            }
            Step::CloseContainer(slot) => self.containers[slot] = None,
            Step::OpenGroup => self.group = Some(vfio::Group::open(self.given.group)?),
            Step::CloseGroup => self.group = None,
            Step::SetContainer(slot) => return group?.set_container(container(slot)?),
            Step::UnsetContainer => return group?.unset_container(),
            Step::SetIommu(slot, iommu_type) => return container(slot)?.set_iommu(iommu_type),
            Step::OpenDevice(right) => {
                let name = if right { &self.given.name } else { "nobody" };
                self.devices.push(group?.device(name)?);
            }
            Step::CloseDevice => drop(self.devices.pop()),
            Step::Map(slot, iova) => {
                let (argsz, flags, vaddr, size) = (32, 3, PRIVATE.first, PAGE);
                return container(slot)?.map(&Map {
                    argsz,
                    flags,
                    vaddr,
                    iova,
                    size,
                });
            }
            Step::Extension(slot, extension) => {
                return container(slot)?.check_extension(extension);
            }
            Step::Status => return group?.status(),
        }
        Ok(0)
    }
}

impl Ours<'_> {
    fn try_apply(&mut self, step: Step) -> Result<Answer, vfio_group::Error> {
        let missing = Ok(Err(MISSING));
        match step {
            Step::OpenContainer(slot) => {
                self.containers[slot] = Some(vfio_group::Container::open());
            }
            Step::CloseContainer(slot) => self.containers[slot] = None,
            Step::OpenGroup => self.group = Some(self.there.open()?),
            Step::CloseGroup => self.group = None,
            Step::SetContainer(slot) => match (&self.group, &self.containers[slot]) {
                (Some(group), Some(container)) => group.set_container(container)?,
                _ => return missing,
            },
            Step::SetIommu(slot, iommu_type) => match &self.containers[slot] {
                Some(container) => container.set_iommu(iommu_type.into())?,
                None => return missing,
            },
            Step::Map(slot, iova) => match &self.containers[slot] {
                Some(container) => {
                    let backing = iommu_type1::Backing::anonymous(PAGE as usize)?;
                    container.map(iova, backing, vm_memory::Permissions::ReadWrite)?;
                }
                None => return missing,
            },
            Step::Extension(slot, extension) => match &self.containers[slot] {
                Some(container) => return Ok(Ok(container.check_extension(extension) as i32)),
                None => return missing,
            },
            Step::CloseDevice => drop(self.devices.pop()),
            Step::UnsetContainer | Step::OpenDevice(_) | Step::Status => {
                let Some(group) = &self.group else {
                    return missing;
                };
                match step {
                    Step::UnsetContainer => group.unset_container()?,
                    Step::Status => return Ok(Ok(group.status() as i32)),
                    Step::OpenDevice(true) => self.devices.push(group.device(self.name)?),
                    _ => self.devices.push(group.device("nobody")?),
                }
            }
        }
        Ok(Ok(0))
    }
}

impl World for Ours<'_> {
    fn apply(&mut self, step: Step) -> Answer {
        self.try_apply(step)
            .unwrap_or_else(|error| Err(error.errno()))
    }
}

fn fresh(given: &Given) -> Result<(Kernels<'_>, Ours<'_>), String> {
    let there = vfio_group::Group::with_type(given.group, vfio_group::GroupType::Iommu);
    there
        .add_device(&given.name)
        .map_err(|error| error.to_string())?;
    let kernels = Kernels {
        given,
        containers: [const { None }; CONTAINERS],
        group: None,
        devices: Vec::new(),
    };
    let ours = Ours {
        name: &given.name,
        there,
        containers: [const { None }; CONTAINERS],
        group: None,
        devices: Vec::new(),
    };
    Ok((kernels, ours))
}

/// The first step that differs, with both answers.
fn compare(given: &Given, steps: &[Step]) -> Result<Option<(Step, Answer, Answer)>, String> {
    let (mut kernels, mut ours) = fresh(given)?;
    Ok(steps.iter().find_map(|step| {
        let (kernel, ours) = (kernels.apply(*step), ours.apply(*step));
        (kernel != ours).then_some((*step, kernel, ours))
    }))
}

/// Runs all of it.
pub fn run(given: &Given, seed: u64) -> Result<(), String> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut refusals = BTreeMap::<i32, u32>::new();
    for _ in 0..SEQUENCES {
        let (mut kernels, mut ours) = fresh(given)?;
        let mut steps = Vec::new();
        while steps.len() < STEPS {
            let step = step(&mut rng);
            // Files that would be replaced are closed first, so that both sides close them at the same time.
            let taken = match step {
                Step::OpenContainer(slot) => kernels.containers[slot].is_some(),
                Step::OpenDevice(_) => kernels.devices.len() == DEVICES,
                _ => false,
            };
            if taken {
                continue;
            }
            steps.push(step);
            let (kernel, ours) = (kernels.apply(step), ours.apply(step));
            if let Err(errno) = kernel {
                *refusals.entry(errno).or_default() += 1;
            }
            if kernel != ours {
                drop(kernels);
                return Err(report(given, &steps)?);
            }
        }
    }
    let done = SEQUENCES * STEPS as u64;
    println!("lifetimes: {done} steps, refused alike (errno: times): {refusals:?}");
    let unreached = ERRNOS.iter().find(|errno| !refusals.contains_key(errno));
    unreached.map_or(Ok(()), |errno| {
        Err(format!("lifetimes: errno {errno} was never reached"))
    })
}

fn report(given: &Given, steps: &[Step]) -> Result<String, String> {
    let least = shrink(steps, |steps| matches!(compare(given, steps), Ok(Some(_))));
    let shown = compare(given, &least)?;
    Ok(format!(
        "lifetimes differ after {least:?}: {shown:?} (step, the kernel, ours)"
    ))
}

fn step(rng: &mut SmallRng) -> Step {
    let slot = rng.random_range(0..CONTAINERS);
    let extension = rng.random_range(0..12);
    // The frequent ones build up, the rare ones take down.
    let steps = [
        (8, Step::OpenContainer(slot)),
        (1, Step::CloseContainer(slot)),
        (8, Step::OpenGroup),
        (2, Step::CloseGroup),
        (10, Step::SetContainer(slot)),
        (4, Step::UnsetContainer),
        (10, Step::SetIommu(slot, VFIO_TYPE1v2_IOMMU)),
        (4, Step::SetIommu(slot, VFIO_TYPE1_IOMMU)),
        (1, Step::SetIommu(slot, VFIO_NOIOMMU_IOMMU)),
        (1, Step::SetIommu(slot, NO_TYPE)),
        (3, Step::Extension(slot, extension)),
        (6, Step::OpenDevice(true)),
        (1, Step::OpenDevice(false)),
        (5, Step::CloseDevice),
        (16, Step::Map(slot, rng.random_range(0..2) * PAGE)),
        (3, Step::Status),
    ];
    let (_, step) = steps
        .choose_weighted(rng, |step| step.0)
        .expect("weights that are not all zero");
    *step
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One virtual machine with one vGPU: guest memory, the container it is mapped through, and the
//! device model that holds the device's group for as long as it lives.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::sync::{mpsc, Arc};

use gvt_scheduler::{
    Completion, Engine, EngineId, Observer, SimulatedEngine, Submission, Vgpu, VgpuConfig,
};
use iommu_type1::{Backing, DmaHandle, IoAddressSpace};
use page_pin::Interest;
use vfio_group::{Container, Device, ExternalUser, Group, GroupFile, IommuType};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, Permissions};

use crate::aub::ELSP;
use crate::error::{Error, Result};
use crate::inject::{Fault, Faulty};
use crate::layout::{Slot, SLOTS};
use crate::model::Model;
use crate::path::{Devices, Holds, Path};
use crate::plan::{Action, EngineInfo, Event, Plan};
use crate::verify::{verify, verify_context, Verdict};

/// Guest memory: a memfd for each slot, mapped as a VMM maps it.
#[derive(Debug)]
struct Guest {
    memory: GuestMemoryMmap,
    slots: Vec<(Slot, File)>,
}

impl Guest {
    fn new() -> Result<Self> {
        let mut slots = Vec::new();
        let mut ranges = Vec::new();
        for slot in SLOTS {
            let file = memfd(c"guest-memory", slot.len)
                .map_err(Error::machine("create a file for guest memory"))?;
            let shared = file
                .try_clone()
                .map_err(Error::machine("share the file of guest memory"))?;
            ranges.push((
                GuestAddress(slot.gpa),
                slot.len as usize,
                Some(FileOffset::new(shared, 0)),
            ));
            slots.push((slot, file));
        }
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges)
            .map_err(Error::machine("map guest memory"))?;
        Ok(Guest { memory, slots })
    }
}

/// One virtual machine with one vGPU.
///
/// [`Machine::new`] is what a VMM and its device model do at start-up, in that order.
///
/// ```
/// use gvt_replay::aub::Trace;
/// use gvt_replay::{Contiguity, Machine, Model, Plan};
/// use gvt_scheduler::{AccessCounts, VgpuConfig};
///
/// let trace = Trace::from_bytes(include_bytes!("../data/h264-vcs-skl.aub.xz"))?;
/// let plan = Plan::new(&trace, &Contiguity::bundled("fresh").expect("a bundled profile"))?;
/// let counts = AccessCounts::default();
/// let mut machine = Machine::new(0, &plan, VgpuConfig::default(), None, counts)?;
/// let mut completions = 0;
/// for event in plan.events() {
///     completions += usize::from(machine.play(event)?.is_some());
/// }
/// assert_eq!(completions, 30);
/// assert!(machine.verify(&Model::after(&plan)?, &plan)?.verified());
/// # Ok::<(), gvt_replay::Error>(())
/// ```
#[derive(Debug)]
pub struct Machine<O: Observer> {
    vgpu: Vgpu<Faulty<Path>, ExternalUser, O>,
    /// Ranges that are about to be unmapped, from the notice.
    unmapped: mpsc::Receiver<(u64, u64)>,
    /// The vGPU's external user owns this view of the container's mappings.
    space: IoAddressSpace,
    guest: Guest,
    _device: Device,
    _group_file: GroupFile,
    container: Container,
}

impl<O: Observer> Machine<O> {
    /// Sets up machine number `id`, whose vGPU tells `observer` of each access to guest memory.
    ///
    /// # Errors
    ///
    /// [`Error::Machine`]: it cannot be set up.
    pub fn new(
        id: u32,
        plan: &Plan,
        config: VgpuConfig,
        fault: Option<Fault>,
        observer: O,
    ) -> Result<Self> {
        Machine::holding(Holds::default(), id, plan, config, fault, observer)
    }

    /// The same, with a device model that holds something else than a handle of its group's external
    /// user.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn holding(
        holds: Holds,
        id: u32,
        plan: &Plan,
        config: VgpuConfig,
        fault: Option<Fault>,
        observer: O,
    ) -> Result<Self> {
        let guest = Guest::new()?;

        // The VMM: a group in a container, all of guest memory mapped.
        let container = Container::open();
        let group = Group::new(id);
        let name = format!("vgpu{id}");
        let device = group
            .add_device(&name)
            .map_err(Error::machine("add a device to the group"))?;
        let group_file = group.open().map_err(Error::machine("open the group"))?;
        group_file
            .set_container(&container)
            .map_err(Error::machine("put the group into the container"))?;
        container
            .set_iommu(IommuType::Type1v2)
            .map_err(Error::machine("set the container's IOMMU"))?;
        for (slot, _) in &guest.slots {
            let backing = Backing::from_guest_memory(
                &guest.memory,
                GuestAddress(slot.gpa),
                slot.len as usize,
            )
            .map_err(Error::machine("back a mapping with a memory slot"))?;
            container
                .map(slot.gpa, backing, Permissions::ReadWrite)
                .map_err(Error::machine("map a memory slot"))?;
        }

        // The device model: the external user is taken once and held.
        let user = ExternalUser::from_device(&device)
            .map_err(Error::machine("become an external user of the group"))?;
        let (sender, unmapped) = mpsc::channel();
        let notice = move |iova: u64, size: u64| {
            // Nobody listens any more when the vGPU is gone, and its pins with it.
            let _ = sender.send((iova, size));
        };
        user.register_notifier(&name, Interest::Holder, Arc::new(notice))
            .map_err(Error::machine("register for unmap notices"))?;
        let space = user.address_space().clone();
        let devices = Devices::default();
        if let Ok(mut devices) = devices.write() {
            devices.insert(id, device.clone());
        }
        let path = Path::new(holds, &guest.memory, &devices, id, &user);
        let memory = Faulty::new(path, plan, fault);
        Ok(Machine {
            vgpu: Vgpu::new(memory, user, observer, config),
            unmapped,
            space,
            guest,
            _device: device,
            _group_file: group_file,
            container,
        })
    }

    /// Does what the guest does, and what follows from it. A submission runs to its completion.
    ///
    /// # Errors
    ///
    /// [`Error::Machine`]: the guest cannot write its memory. [`Error::Refused`]: by the vGPU. [`Error::Poll`]: a register has
    /// another value than the recording waits for.
    pub fn play(&mut self, event: &Event) -> Result<Option<Completion>> {
        self.release_unmapped();
        let offset = event.offset;
        match &event.action {
            Action::Write { gpa, data } => self.guest_write(*gpa, data)?,
            Action::GgttEntry { index, value } => self
                .vgpu
                .write_ggtt_entry(*index, *value)
                .map_err(Error::refused(offset))?,
            Action::RegisterWrite { register, value } => {
                self.vgpu
                    .mmio_write(*register, *value)
                    .map_err(Error::refused(offset))?;
            }
            Action::RegisterPoll {
                register,
                mask,
                expected,
            } => {
                let value = self.vgpu.mmio_read(*register);
                if value & mask != *expected {
                    return Err(Error::Poll {
                        offset,
                        register: *register,
                        value,
                        expected: *expected,
                        mask: *mask,
                    });
                }
            }
            Action::Submit { engine, dwords } => {
                self.submit(offset, engine, dwords)?;
                return self.run_all(offset, engine);
            }
        }
        Ok(None)
    }

    /// The guest submits one context, which is queued.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] at `offset`.
    pub fn submit(
        &mut self,
        offset: u64,
        engine: &EngineInfo,
        dwords: &[u32; 4],
    ) -> Result<Option<Submission>> {
        let port = engine.base + ELSP;
        let mut submission = None;
        for dword in dwords {
            submission = self
                .vgpu
                .mmio_write(port, *dword)
                .map_err(Error::refused(offset))?;
        }
        Ok(submission)
    }

    /// Runs the workload at the head of an engine's queue to its end; `None` if there is none.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] at `offset`.
    pub fn run_next(
        &mut self,
        offset: u64,
        engine: EngineId,
        hw: &mut dyn Engine,
    ) -> Result<Option<Completion>> {
        let completion = self.vgpu.run_next(engine, hw);
        completion.map_err(Error::refused(offset))
    }

    /// Lets go of the pages that the VMM is unmapping.
    ///
    /// The notice of an unmap comes on the VMM's thread and cannot touch the vGPU, which this thread
    /// owns: it leaves a message. The unmap waits until its deadline for this thread to read it,
    /// here or in [`play`](Self::play), so the two must not be the same thread.
    pub fn release_unmapped(&mut self) {
        for (iova, size) in self.unmapped.try_iter() {
            self.vgpu.release_pins(iova, size);
        }
    }

    /// A CPU of the guest writes memory. There is no page-track in user space, so the vGPU is told.
    ///
    /// # Errors
    ///
    /// [`Error::Machine`].
    pub fn guest_write(&mut self, gpa: u64, data: &[u8]) -> Result<()> {
        let gpa = GuestAddress(gpa);
        self.guest
            .memory
            .write_slice(data, gpa)
            .map_err(Error::machine("write guest memory"))?;
        self.vgpu.page_table_written(gpa, data.len() as u64);
        Ok(())
    }

    fn run_all(&mut self, offset: u64, engine: &EngineInfo) -> Result<Option<Completion>> {
        let mut last = None;
        if let Some((engine, _)) = EngineId::from_mmio(engine.base) {
            while let Some(completion) =
                self.run_next(offset, engine, &mut SimulatedEngine::without_commands())?
            {
                last = Some(completion);
            }
        }
        Ok(last)
    }

    /// Compares the context pages that `submission` has just written back with the model.
    pub(crate) fn verify_context(
        &self,
        model: &Model,
        plan: &Plan,
        pages: &[u64],
        submission: u64,
    ) -> Result<Verdict> {
        verify_context(&self.guest.slots, model, plan.contexts(), pages, submission)
    }

    /// Compares guest memory with the model.
    ///
    /// # Errors
    ///
    /// [`Error::Machine`]: guest memory cannot be read.
    pub fn verify(&self, model: &Model, plan: &Plan) -> Result<Verdict> {
        verify(&self.guest.slots, model, plan.contexts())
    }

    /// The container that guest memory is mapped through.
    pub fn container(&self) -> &Container {
        &self.container
    }

    /// The vGPU.
    pub fn vgpu(&self) -> &Vgpu<Faulty<Path>, ExternalUser, O> {
        &self.vgpu
    }

    /// The vGPU's observer.
    pub fn observer_mut(&mut self) -> &mut O {
        self.vgpu.observer_mut()
    }

    /// A handle of its own to guest memory, through the held external user.
    pub fn dma(&self) -> DmaHandle {
        self.space.handle()
    }
}

/// An anonymous file in memory.
#[allow(unsafe_code)]
pub(crate) fn memfd(name: &CStr, len: u64) -> io::Result<File> {
    // SAFETY: the name is a C string that outlives the call.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len)?;
    Ok(file)
}

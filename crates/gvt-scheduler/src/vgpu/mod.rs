// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The virtual GPU: takes the guest's register and table writes and runs its workloads.

mod config;
mod engine_state;
mod failsafe;
mod outcome;
mod run;
mod submit;

pub use config::VgpuConfig;
pub use failsafe::FailsafeReason;
pub use outcome::{Completion, Submission};

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use page_pin::PinPages;
use vm_memory::GuestAddress;

use crate::audit::{CommandAuditor, MiAuditor};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::ggtt::{Ggtt, HalfEntry};
use crate::guest_dma::{GuestDma, Port};
use crate::memory;
use crate::observe::Observer;
use crate::ppgtt::{DeviceMap, PageTableRoot, Ppgtt, SharedMap, Update};
use crate::regs::{ring_register, EngineId, REGISTER_SPACE};
use crate::vgpu::engine_state::EngineState;
use crate::workload::Commands;

/// Command buffers that are kept for later workloads. A ring may be 2 MiB long, and a workload needs
/// one only from its scan to its end: the engines rarely have more than some of these at a time.
const SPARE_COMMANDS: usize = 4;

/// A virtual GPU over guest memory `M`, with pages pinned through `P`, watched by `O`.
///
/// The caller drives it: with the guest's writes to registers ([`Vgpu::mmio_write`]), to the GGTT
/// ([`Vgpu::write_ggtt_entry`]) and to page tables ([`Vgpu::page_table_written`]), and with
/// [`Vgpu::run_next`], which runs a queued workload to its end. The crate's front page has an example.
pub struct Vgpu<M, P: PinPages = (), O = ()> {
    memory: M,
    pins: P,
    observer: O,
    config: VgpuConfig,
    ggtt: Ggtt,
    ppgtt: Ppgtt<P::Pinned>,
    device_map: SharedMap<P::Pinned>,
    registers: HashMap<u32, u32>,
    engines: [EngineState; EngineId::ALL.len()],
    next_sequence: u64,
    skips: u64,
    spare: Vec<Commands>,
    auditor: Box<dyn CommandAuditor + Send + Sync>,
    failsafe: Option<FailsafeReason>,
}

impl<M: GuestDma, P: PinPages, O: Observer> Vgpu<M, P, O> {
    /// A vGPU after reset, with an empty GGTT.
    pub fn new(memory: M, pins: P, observer: O, config: VgpuConfig) -> Self {
        let ggtt = match config.windows {
            Some(windows) => Ggtt::with_windows(config.ggtt_entries, windows),
            None => Ggtt::new(config.ggtt_entries),
        };
        let device_map: SharedMap<P::Pinned> = Arc::new(());
        let ppgtt = Ppgtt::new(config.max_page_tables, device_map.clone());
        let engines =
            EngineId::ALL.map(|engine| EngineState::new(engine.context_pages(config.generation)));
        Self {
            memory,
            pins,
            observer,
            config,
            ggtt,
            ppgtt,
            device_map,
            registers: HashMap::new(),
            engines,
            next_sequence: 0,
            skips: 0,
            spare: Vec::new(),
            auditor: Box::new(MiAuditor::new()),
            failsafe: None,
        }
    }

    /// Puts another auditor in the place of the [`MiAuditor`]; `()` lets all commands pass.
    pub fn set_auditor(&mut self, auditor: impl CommandAuditor + Send + Sync + 'static) {
        self.auditor = Box::new(auditor);
    }

    /// Says where the device reaches pages that are pinned. Page tables that are shadowed are dropped with
    /// their pins, and shadowed again when they are used.
    pub fn set_device_map(&mut self, map: impl DeviceMap<P::Pinned> + Send + Sync + 'static) {
        self.device_map = Arc::new(map);
        self.drop_page_tables();
    }

    /// The GGTT, as the guest has written it.
    pub fn ggtt(&self) -> &Ggtt {
        &self.ggtt
    }

    /// The guest writes a whole entry of the GGTT.
    ///
    /// # Errors
    ///
    /// [`Error::GgttIndex`] (EINVAL): there is no such entry.
    pub fn write_ggtt_entry(&mut self, index: u32, value: u64) -> Result<()> {
        self.ggtt.write_entry(index, value)?;
        self.ggtt_written(index);
        Ok(())
    }

    /// The guest writes half of an entry of the GGTT, which takes effect with the other half.
    ///
    /// # Errors
    ///
    /// As [`write_ggtt_entry`](Self::write_ggtt_entry).
    pub fn write_ggtt_half(&mut self, index: u32, half: HalfEntry, value: u32) -> Result<()> {
        self.ggtt.write_half(index, half, value)?;
        self.ggtt_written(index);
        Ok(())
    }

    /// The guest writes a register.
    ///
    /// The fourth dword to a submission port creates and queues the workloads of the submission, all
    /// of them or none. Writes to the read-only status registers are ignored, the pointers of the
    /// context status buffer are written under their mask, every other register is stored, and so is every
    /// one in [failsafe mode](Self::failsafe).
    ///
    /// # Errors
    ///
    /// [`Error::Register`] (EINVAL): `offset` is no multiple of 4, or not below 2 MiB. [`Error::NoMemory`] (ENOMEM). A
    /// submission is refused with
    ///
    /// - EINVAL: [`Error::EmptySubmission`], [`Error::NotPrivileged`], [`Error::AddressingMode`],
    ///   [`Error::RingContextUnmapped`], and of its ring and batches [`Error::NotPageAligned`],
    ///   [`Error::OutsideGraphicsMemory`], [`Error::RingPointer`];
    /// - EBUSY: [`Error::TooManyWorkloads`];
    /// - EFAULT: [`Error::BufferUnmapped`], and unless [`VgpuConfig::errors`] ignores that [`Error::Read`];
    /// - what its page tables ([`page_table_trapped`](Self::page_table_trapped)) and its commands
    ///   ([`Error::Command`]) come to.
    pub fn mmio_write(&mut self, offset: u32, value: u32) -> Result<Option<Submission>> {
        if offset % 4 != 0 || offset >= REGISTER_SPACE {
            return Err(Error::Register { offset });
        }
        let engine = EngineId::from_mmio(offset).filter(|_| self.failsafe.is_none());
        if let Some((engine, register)) = engine {
            let state = &mut self.engines[engine as usize];
            if register == ring_register::ELSP {
                let Some(elements) = state.elsp.write(value) else {
                    return Ok(None);
                };
                let submitted = self.submit(engine, elements);
                if let Err(error) = &submitted {
                    self.check_health(error);
                }
                return submitted.map(Some);
            }
            if register == ring_register::CONTEXT_STATUS_POINTER {
                state.csb.write_pointers(value);
                return Ok(None);
            }
            if state.status_register(register).is_some() {
                return Ok(None);
            }
        }
        self.store(offset, value)?;
        Ok(None)
    }

    /// The guest reads a register: EXECLIST_STATUS, the context status buffer and its pointers, or
    /// what was last written; 0 for a register that never was.
    pub fn mmio_read(&self, offset: u32) -> u32 {
        let status = || {
            let (engine, register) = EngineId::from_mmio(offset)?;
            self.engines[engine as usize].status_register(register)
        };
        // Those of the device are stored in failsafe mode only.
        let stored = self.registers.get(&offset).copied();
        stored.or_else(status).unwrap_or(0)
    }

    /// The guest has written `len` bytes at `gpa`, where page tables may be.
    ///
    /// Entries of tables that are shadowed by now are read again when the next workload is created or runs,
    /// each once however often it was written. Any other write is ignored: a table is read whole when it
    /// becomes known. [`page_table_trapped`](Self::page_table_trapped) is for a caller that traps each write.
    pub fn page_table_written(&mut self, gpa: GuestAddress, len: u64) {
        self.ppgtt.written(gpa, len);
    }

    /// The guest has written `len` bytes at `gpa`, and does not go on before this returns: what the kernel
    /// does where page tables are write-protected.
    ///
    /// A whole entry (eight bytes, aligned) of a table that is shadowed is read again now, by one read. Of
    /// any other write the entries it touches are not present until they are read with the next workload:
    /// the guest writes the other half first. Writes elsewhere are ignored.
    ///
    /// # Errors
    ///
    /// Those of [`page_table_written`](Self::page_table_written)'s later reads, now: the entry cannot be read
    /// (`EFAULT`), maps a page of 1 GiB (`EINVAL`) or one that cannot be pinned (`ENXIO`), or points to more
    /// tables than may be shadowed or than there is memory for (`ENOMEM`). It is not present then, and an error of each workload whose root
    /// reaches it until it is mended.
    pub fn page_table_trapped(&mut self, gpa: GuestAddress, len: u64) -> Result<()> {
        let mut port = Port {
            memory: &self.memory,
            observer: &mut self.observer,
            errors: self.config.errors,
        };
        let mut update = Update {
            shadow: &mut self.ppgtt,
            port: &mut port,
            pins: &self.pins,
        };
        update.trapped(gpa, len)
    }

    /// Runs the workload at the head of an engine's queue to its end; `None` when there is none.
    ///
    /// After an error nothing tells the guest that the workload ended, and the queue of the engine is
    /// empty, as behind a hang: the guest resets the engine ([`Vgpu::reset_engine`]), or the device if the
    /// vGPU is in [failsafe mode](Self::failsafe).
    ///
    /// # Errors
    ///
    /// What its commands and page tables come to, as of [`mmio_write`](Self::mmio_write);
    /// [`Error::ContextPageUnmapped`] and, unless [`VgpuConfig::errors`] ignores these, [`Error::Read`] and
    /// [`Error::Write`] (EFAULT); [`Error::QueueFull`] and [`Error::NotRunning`] (EINVAL): the execlist does not fit;
    /// [`Error::Engine`] (EIO).
    pub fn run_next(
        &mut self,
        engine: EngineId,
        hw: &mut dyn Engine,
    ) -> Result<Option<Completion>> {
        let state = &mut self.engines[engine as usize];
        let Some(mut workload) = state.queue.pop_front() else {
            return Ok(None);
        };
        let completion = self.run(engine, &mut workload, hw);
        if self.spare.len() < SPARE_COMMANDS {
            self.spare.push(workload.commands);
        }
        if let Err(error) = &completion {
            let state = &mut self.engines[engine as usize];
            log::warn!(
                "workload {} on {engine:?} failed, dropping it and {} more: {error}",
                workload.sequence,
                state.queue.len()
            );
            state.skip.forget();
            state.queue.clear();
            self.check_health(error);
        }
        completion.map(Some)
    }

    /// Number of workloads in an engine's queue.
    pub fn queued(&self, engine: EngineId) -> usize {
        self.engines[engine as usize].queue.len()
    }

    /// The guest resets an engine: its queue, submission port, slots and context status buffer.
    pub fn reset_engine(&mut self, engine: EngineId) {
        self.engines[engine as usize].reset();
    }

    /// Drops the pins of pages that page tables map inside `size` bytes from `iova`: what an unmap
    /// notice asks for. The next workload whose tables map them pins them again, or is refused; that
    /// takes no reads of guest memory.
    pub fn release_pins(&mut self, iova: u64, size: u64) {
        self.ppgtt.unpin(iova, size);
    }

    /// The guest gives up the page tables of a context: their shadow and its pins are dropped. Should
    /// they be used again, they are read again.
    pub fn release_page_tables(&mut self, root: PageTableRoot) {
        self.ppgtt.forget(root);
    }

    /// Translates an address of a context through the shadow of its page tables, as it was when the
    /// last workload was created.
    pub fn translate(&self, root: PageTableRoot, gma: u64) -> Option<GuestAddress> {
        self.ppgtt.translate(root, gma)
    }

    /// Where the device reaches what an address of a context maps, while that is pinned: what belongs into
    /// the page tables of a real device.
    pub fn device_address(&self, root: PageTableRoot, gma: u64) -> Option<u64> {
        self.ppgtt.device_address(root, gma)
    }

    /// The guest frame, of 4 KiB, that the device reaches at `address`; `None` if page tables map none there.
    pub fn frame_at_device_address(&self, address: u64) -> Option<u64> {
        self.ppgtt.frame_at(address)
    }

    /// Number of page tables that are shadowed.
    pub fn shadowed_tables(&self) -> usize {
        self.ppgtt.tables()
    }

    /// Number of pages, of 4 KiB or 2 MiB, that are pinned because page tables map them.
    pub fn pinned_leaves(&self) -> usize {
        self.ppgtt.pinned_leaves()
    }

    /// Number of populates whose pages were skipped.
    pub fn skips(&self) -> u64 {
        self.skips
    }

    /// The observer.
    pub fn observer(&self) -> &O {
        &self.observer
    }

    /// The observer, to be changed.
    pub fn observer_mut(&mut self) -> &mut O {
        &mut self.observer
    }

    /// Guest memory.
    pub fn memory(&self) -> &M {
        &self.memory
    }

    /// Where it pins the pages that page tables map.
    pub fn pins(&self) -> &P {
        &self.pins
    }

    /// How the vGPU was made.
    pub fn config(&self) -> &VgpuConfig {
        &self.config
    }

    /// Stores a register, of which there may be as many as `REGISTER_SPACE` has.
    fn store(&mut self, offset: u32, value: u32) -> Result<()> {
        if let Some(stored) = self.registers.get_mut(&offset) {
            *stored = value;
            return Ok(());
        }
        let room = self.registers.try_reserve(1);
        room.map_err(|_| memory::no_memory::<(u32, u32)>(self.registers.len() + 1))?;
        self.registers.insert(offset, value);
        Ok(())
    }

    fn drop_page_tables(&mut self) {
        self.ppgtt = Ppgtt::new(self.config.max_page_tables, self.device_map.clone());
    }

    fn ggtt_written(&mut self, index: u32) {
        for (engine, state) in EngineId::ALL.into_iter().zip(&mut self.engines) {
            let pages = engine.context_pages(self.config.generation);
            state.skip.ggtt_written(index, pages);
        }
    }
}

impl<M, P: PinPages, O> fmt::Debug for Vgpu<M, P, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vgpu")
            .field("config", &self.config)
            .field("next_sequence", &self.next_sequence)
            .field("skips", &self.skips)
            .field("shadowed_tables", &self.ppgtt.tables())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryMmap};

    use super::*;
    use crate::descriptor::{AddressingMode, ContextDescriptor};
    use crate::engine::SimulatedEngine;
    use crate::regs::ring_context;

    #[test]
    fn few_command_buffers_are_kept() {
        let memory: GuestMemoryMmap =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let mut vgpu = Vgpu::new(memory.clone(), (), (), VgpuConfig::default());
        for page in [2, 8, 9] {
            let entry = u64::from(page) << 12 | 1;
            vgpu.write_ggtt_entry(page, entry).unwrap();
        }
        for (field, value) in [(ring_context::TAIL, 160), (ring_context::START, 2 << 12)] {
            let at = GuestAddress(0x9000 + field as u64);
            memory.write_obj::<u32>(value, at).unwrap();
        }
        let context = ContextDescriptor::new(8, 42, AddressingMode::Legacy64);
        let elements = [context, ContextDescriptor::default()];
        let workloads = 4 * SPARE_COMMANDS;
        for _ in 0..workloads {
            vgpu.submit(EngineId::Bcs, elements).unwrap();
        }
        while vgpu.queued(EngineId::Bcs) > 0 {
            let mut hw = SimulatedEngine::new();
            vgpu.run_next(EngineId::Bcs, &mut hw).unwrap();
        }
        assert_eq!(vgpu.spare.len(), SPARE_COMMANDS);
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An engine: a thread with a vGPU of its own, of which it uses one engine.
//!
//! What the guest writes is posted to it, in order, and never waited for. What the guest reads lies in
//! [`Shared`], where the thread leaves it. So neither waits for the other: not the socket for an engine that
//! does DMA, nor an engine that does DMA by messages for more than the socket's answers.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{sync_channel, Receiver, SyncSender, TrySendError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use gvt_scheduler::{
    interrupt_register, ring_register, EngineId, HalfEntry, PageTableRoot, SimulatedEngine, Vgpu,
    VgpuConfig,
};
use vfio_user_dma::{DmaTable, TableHandle};
use vm_memory::GuestAddress;

use crate::counters::{Counters, DmaBytes};
use crate::interrupts::Interrupts;
use crate::pins::Pins;

/// Posts that an engine may be behind; a guest that writes more is told EBUSY.
const BEHIND: usize = 1 << 16;

/// How long a reset waits for what runs: accesses that wait for the client are ended, so others remain.
const RESET_DEADLINE: Duration = Duration::from_secs(3);

/// What the guest did.
#[derive(Clone, Copy, Debug)]
pub enum Post {
    /// It wrote a register of the engine, by its offset in the BAR.
    Register { offset: u32, value: u32 },
    /// It wrote an entry of the GGTT.
    Ggtt { index: u32, value: u64 },
    /// It wrote half of one.
    GgttHalf {
        index: u32,
        half: HalfEntry,
        value: u32,
    },
    /// It wrote page tables.
    PageTableWritten { gpa: u64, len: u64 },
    /// It gave page tables up.
    PageTablesDropped(PageTableRoot),
}

/// How much is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reset {
    /// The engine.
    Engine,
    /// The device, with its GGTT and page tables.
    Device,
}

enum Message {
    Post(Post),
    Unmapped { iova: u64, size: u64 },
    Reset(Reset, SyncSender<EngineId>),
    Stop,
}

/// The device's end of an engine.
#[derive(Debug)]
pub struct Engine {
    id: EngineId,
    shared: Arc<Shared>,
    posts: SyncSender<Message>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    registers: Mutex<Registers>,
    /// A reset waits: nothing more is run.
    resetting: AtomicBool,
    /// It is in the middle of a submission or a workload.
    running: AtomicBool,
    /// An unmap could not be posted: which pins are there is not known.
    pins_unknown: AtomicBool,
}

/// What the guest reads of an engine.
#[derive(Debug, Default)]
struct Registers {
    values: [u32; READ.len()],
    /// Only the guest moves the read pointer, only the device the write pointer.
    csb_pointers: u32,
}

/// Registers that the vGPU changes, without the pointers of the context status buffer.
const READ: [u32; 17] = {
    let mut offsets = [0; 17];
    offsets[0] = ring_register::EXECLIST_STATUS;
    offsets[1] = ring_register::EXECLIST_STATUS + 4;
    offsets[2] = ring_register::TAIL;
    offsets[3] = ring_register::HEAD;
    offsets[4] = ring_register::START;
    let mut csb = 0;
    while csb < 12 {
        offsets[5 + csb] = ring_register::CONTEXT_STATUS_BUFFER + 4 * csb as u32;
        csb += 1;
    }
    offsets
};

/// Those that the guest may write as well.
const WRITTEN: [u32; 3] = [
    ring_register::TAIL,
    ring_register::HEAD,
    ring_register::START,
];

const CSB_WRITE_POINTER: u32 = 0x7;
const CSB_POINTERS: u32 = 0x707;

impl Engine {
    pub fn start(
        id: EngineId,
        table: &DmaTable,
        interrupts: &Arc<Interrupts>,
        counters: &Arc<Counters>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            registers: Mutex::default(),
            resetting: AtomicBool::new(false),
            running: AtomicBool::new(false),
            pins_unknown: AtomicBool::new(false),
        });
        let (posts, inbox) = sync_channel(BEHIND);
        let vgpu = vgpu(id, table, &posts, &shared, counters);
        *shared.lock() = published(id, &vgpu);
        let worker = Worker {
            id,
            vgpu,
            inbox,
            shared: shared.clone(),
            interrupts: interrupts.clone(),
            counters: counters.clone(),
        };
        let thread = thread::Builder::new()
            .name(format!("{id:?}").to_lowercase())
            .spawn(move || worker.run())?;
        Ok(Engine {
            id,
            shared,
            posts,
            thread: Some(thread),
        })
    }

    /// # Errors
    ///
    /// EBUSY: it is too far behind.
    pub fn post(&self, post: Post) -> io::Result<()> {
        if let Post::Register { offset, value } = post {
            self.shared.lock().write(offset & 0xfff, value);
        }
        self.send(Message::Post(post))
            .map_err(|_| io::Error::from_raw_os_error(libc::EBUSY))
    }

    fn send(&self, message: Message) -> Result<(), Message> {
        self.posts.try_send(message).map_err(|error| match error {
            TrySendError::Full(message) | TrySendError::Disconnected(message) => message,
        })
    }

    /// Reads a register of it that it changes itself.
    pub fn read(&self, register: u32) -> Option<u32> {
        self.shared.lock().read(register)
    }

    /// Whether it is in the middle of something.
    pub fn is_running(&self) -> bool {
        self.shared.running.load(Ordering::Relaxed)
    }

    /// Resets engines. When this returns they do no DMA, and nothing of what they did before shows any more.
    ///
    /// # Errors
    ///
    /// ETIMEDOUT: one does not come to an end.
    pub fn reset<'a>(
        engines: impl Iterator<Item = &'a Engine>,
        reset: Reset,
        table: &DmaTable,
    ) -> io::Result<()> {
        let (done, is_done) = sync_channel(EngineId::ALL.len());
        let ask = |engine: &'a Engine| {
            engine.shared.resetting.store(true, Ordering::SeqCst);
            (engine, Some(Message::Reset(reset, done.clone())))
        };
        let mut asked: Vec<_> = engines.map(ask).collect();
        let deadline = Instant::now() + RESET_DEADLINE;
        while !asked.is_empty() {
            // All of them before any is waited for: one that is late keeps no other from its reset.
            for (engine, message) in &mut asked {
                *message = message
                    .take()
                    .and_then(|message| engine.send(message).err());
            }
            if let Ok(id) = is_done.recv_timeout(Duration::from_millis(1)) {
                asked.retain(|(engine, _)| engine.id != id);
                continue;
            }
            // What waits for the client would wait for us.
            table.cancel_messages();
            if Instant::now() >= deadline {
                for (engine, _) in &asked {
                    log::error!("{:?} does not come to an end", engine.id);
                }
                return Err(io::Error::from_raw_os_error(libc::ETIMEDOUT));
            }
        }
        Ok(())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.resetting.store(true, Ordering::SeqCst);
        // Where it is too far behind to be told, it goes with the process.
        if self.send(Message::Stop).is_ok() {
            let _ = self.thread.take().map(JoinHandle::join);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registers {
    fn read(&self, register: u32) -> Option<u32> {
        if register == ring_register::CONTEXT_STATUS_POINTER {
            return Some(self.csb_pointers);
        }
        let index = READ.iter().position(|offset| *offset == register)?;
        Some(self.values[index])
    }

    /// What the guest writes, it reads, though the engine has not come to it.
    fn write(&mut self, register: u32, value: u32) {
        if register == ring_register::CONTEXT_STATUS_POINTER {
            let mask = value >> 16 & CSB_POINTERS;
            self.csb_pointers = self.csb_pointers & !mask | value & mask;
        } else if WRITTEN.contains(&register) {
            if let Some(index) = READ.iter().position(|offset| *offset == register) {
                self.values[index] = value;
            }
        }
    }
}

type EngineVgpu = Vgpu<TableHandle, Pins, DmaBytes>;

struct Worker {
    id: EngineId,
    vgpu: EngineVgpu,
    inbox: Receiver<Message>,
    shared: Arc<Shared>,
    interrupts: Arc<Interrupts>,
    counters: Arc<Counters>,
}

impl Worker {
    fn run(mut self) {
        while let Ok(message) = self.inbox.recv() {
            let mut next = Some(message);
            // What has come meanwhile is taken before the next workload, as hardware takes a submission
            // while it runs another.
            loop {
                match next {
                    Some(Message::Stop) => return,
                    Some(message) => self.take(message),
                    None if !self.run_one() => break,
                    None => {}
                }
                next = self.inbox.try_recv().ok();
            }
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Post(post) => self.take_post(post),
            Message::Unmapped { iova, size } => self.vgpu.release_pins(iova, size),
            Message::Reset(reset, done) => {
                match reset {
                    Reset::Device => self.vgpu.reset(),
                    Reset::Engine => self.vgpu.reset_engine(self.id),
                }
                *self.shared.lock() = published(self.id, &self.vgpu);
                self.shared.resetting.store(false, Ordering::SeqCst);
                let _ = done.send(self.id);
            }
            Message::Stop => {}
        }
    }

    fn take_post(&mut self, post: Post) {
        let result = match post {
            Post::Register { offset, value } => return self.write_register(offset, value),
            Post::Ggtt { index, value } => self.vgpu.write_ggtt_entry(index, value),
            Post::GgttHalf { index, half, value } => self.vgpu.write_ggtt_half(index, half, value),
            Post::PageTableWritten { gpa, len } => {
                self.vgpu.page_table_written(GuestAddress(gpa), len);
                Ok(())
            }
            Post::PageTablesDropped(root) => {
                self.vgpu.release_page_tables(root);
                Ok(())
            }
        };
        if let Err(error) = result {
            log::warn!("{:?}: {error}", self.id);
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        let submits = offset == self.id.mmio_base() + ring_register::ELSP;
        if submits && self.is_resetting() {
            return;
        }
        if self.shared.pins_unknown.swap(false, Ordering::SeqCst) {
            self.vgpu.release_pins(0, u64::MAX);
        }
        self.shared.running.store(submits, Ordering::Relaxed);
        match self.vgpu.mmio_write(offset, value) {
            Ok(None) => {}
            Ok(Some(submission)) => {
                log::debug!("{submission:?}");
                self.counters.submissions.add(1);
            }
            Err(error) => {
                log::warn!("{:?}: {error}", self.id);
                self.counters.errors.add(1);
            }
        }
        self.shared.running.store(false, Ordering::Relaxed);
        self.publish();
    }

    /// Runs a workload, if there is one.
    fn run_one(&mut self) -> bool {
        if self.vgpu.queued(self.id) == 0 || self.is_resetting() {
            return false;
        }
        self.shared.running.store(true, Ordering::Relaxed);
        // Commands are executed, and every byte of the context shows whether it was copied as it should be.
        let mut engine = SimulatedEngine::new().mix_context(true);
        let result = self.vgpu.run_next(self.id, &mut engine);
        self.shared.running.store(false, Ordering::Relaxed);
        self.publish();
        match result {
            Ok(Some(completion)) => {
                log::debug!("{completion:?}");
                self.counters.completions.add(1);
                let mut events = 0;
                if completion.user_interrupts > 0 {
                    events |= interrupt_register::USER;
                }
                if completion.interrupts > 0 {
                    events |= interrupt_register::CONTEXT_SWITCH;
                }
                self.interrupts.raise(self.id, events);
            }
            Ok(None) => {}
            // The vGPU has logged it. To the guest this is a hang.
            Err(_) => self.counters.errors.add(1),
        }
        true
    }

    fn publish(&self) {
        let mut now = published(self.id, &self.vgpu);
        let mut registers = self.shared.lock();
        let read_pointer = registers.csb_pointers & !CSB_WRITE_POINTER;
        now.csb_pointers = now.csb_pointers & CSB_WRITE_POINTER | read_pointer;
        *registers = now;
    }

    fn is_resetting(&self) -> bool {
        self.shared.resetting.load(Ordering::SeqCst)
    }
}

fn vgpu(
    id: EngineId,
    table: &DmaTable,
    posts: &SyncSender<Message>,
    shared: &Arc<Shared>,
    counters: &Arc<Counters>,
) -> EngineVgpu {
    let (posts, shared) = (posts.clone(), shared.clone());
    let pins = Pins::new(table, &format!("{id:?}"), move |iova, size| {
        if posts.try_send(Message::Unmapped { iova, size }).is_err() {
            shared.pins_unknown.store(true, Ordering::SeqCst);
        }
    });
    let bytes = DmaBytes(counters.clone());
    Vgpu::new(table.handle(), pins, bytes, VgpuConfig::default())
}

fn published(id: EngineId, vgpu: &EngineVgpu) -> Registers {
    let read = |register| vgpu.mmio_read(id.mmio_base() + register);
    Registers {
        values: READ.map(read),
        csb_pointers: read(ring_register::CONTEXT_STATUS_POINTER),
    }
}

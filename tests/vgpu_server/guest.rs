// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest, and what its driver does.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use gvt_scheduler::{
    interrupt_register as irq, ring_context, ring_register, AddressingMode, ContextDescriptor,
    CsbEvent, Engine, EngineId, EngineJob, ShadowImage, SimulatedEngine,
};
use vfio_user_dma::wire::{self, command};

use crate::common::deadline::within;
use crate::common::{eventfd, map_body, memfd, Client, Reply, PAGE, READ_WRITE};
use crate::server::Server;

pub const BAR0: u32 = 0;
pub const CONFIG: u32 = 7;
pub const GGTT: u64 = 8 << 20;
pub const INTX: u32 = 0;
pub const MSI: u32 = 1;

/// Where guest memory is for the device, and how much there is.
pub const BASE: u64 = 0x10_0000;
pub const PAGES: u64 = 256;

/// Guest pages of page tables: each the only child of the one before. The last maps page `n` to page [`DATA`] + `n`.
pub const TABLES: u64 = 100;
pub const DATA: u64 = 110;

pub const STORE_DWORD: u32 = 0x1000_0002;
pub const BATCH_END: u32 = 0x0500_0000;
pub const BATCH_START: u32 = 0x1880_0101;
pub const USER_INTERRUPT: u32 = 0x0100_0000;

pub const GDRST: u32 = 0x941c;

/// A guest with its memory in a file, which the device has at [`BASE`].
pub struct Guest {
    pub client: Client,
    pub memory: File,
    pub eventfd: File,
    /// DMA_READ and DMA_WRITE that were answered.
    pub answered: usize,
}

impl Guest {
    pub fn new(server: &Server) -> Self {
        let mut guest = Guest::without_memory(server);
        guest.map(0, PAGES, true);
        guest
    }

    pub fn without_memory(server: &Server) -> Self {
        Guest {
            client: server.connect(),
            memory: memfd(PAGES),
            eventfd: eventfd(),
            answered: 0,
        }
    }

    /// Makes some of its memory known to the device, with the file or without.
    pub fn map(&mut self, page: u64, pages: u64, file: bool) {
        let memory = self.memory.try_clone().unwrap();
        let fds = [memory.as_fd()];
        let at = page * PAGE;
        let body = map_body(READ_WRITE, BASE + at, pages * PAGE, at);
        let fds = if file { &fds[..] } else { &[] };
        assert_eq!(self.call(command::DMA_MAP, &body, fds).errno(), 0);
    }

    pub fn unmap(&mut self, page: u64, pages: u64) -> i32 {
        let mut body = Vec::new();
        wire::DmaUnmap {
            argsz: wire::DmaUnmap::SIZE as u32,
            flags: 0,
            address: BASE + page * PAGE,
            size: pages * PAGE,
        }
        .encode(&mut body);
        self.call(command::DMA_UNMAP, &body, &[]).errno()
    }

    /// Sends a command and receives its reply. What the device wants meanwhile is answered.
    pub fn call(&mut self, command: u16, body: &[u8], fds: &[BorrowedFd<'_>]) -> Reply {
        let id = self.client.send_all(command, 0, body, fds);
        let mut reply = None;
        within("a command has its reply", || {
            let message = self.client.receive();
            if message.header.is_reply() {
                assert_eq!(message.header.message_id, id);
                reply = Some(message);
            } else {
                self.answer(&message);
            }
            reply.is_some()
        });
        reply.unwrap()
    }

    /// Answers a DMA_READ or DMA_WRITE, as a client does that looks at the whole count.
    pub fn answer(&mut self, message: &Reply) {
        let (access, data) = wire::DmaAccess::decode(&message.body).unwrap();
        let Ok(at) = usize::try_from(access.count)
            .map_err(drop)
            .and_then(|len| (len <= 1 << 20).then_some(access.address - BASE).ok_or(()))
        else {
            return self
                .client
                .reply(message, wire::flags::ERROR, libc::EINVAL as u32, &[]);
        };
        let mut body = Vec::new();
        access.encode(&mut body);
        if message.header.command == command::DMA_READ {
            let header = body.len();
            body.resize(header + access.count as usize, 0);
            self.memory.read_exact_at(&mut body[header..], at).unwrap();
        } else {
            self.memory.write_all_at(data, at).unwrap();
        }
        self.client.reply(message, 0, 0, &body);
        self.answered += 1;
    }

    pub fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> i32 {
        let mut body = Vec::new();
        let count = data.len() as u32;
        wire::RegionAccess {
            offset,
            region,
            count,
        }
        .encode(&mut body);
        body.extend_from_slice(data);
        self.call(command::REGION_WRITE, &body, &[]).errno()
    }

    pub fn region_read<const N: usize>(&mut self, region: u32, offset: u64) -> [u8; N] {
        let mut body = Vec::new();
        wire::RegionAccess {
            offset,
            region,
            count: N as u32,
        }
        .encode(&mut body);
        let reply = self.call(command::REGION_READ, &body, &[]);
        assert_eq!(reply.errno(), 0);
        reply.body[wire::RegionAccess::SIZE..].try_into().unwrap()
    }

    pub fn write(&mut self, offset: u32, value: u32) {
        let bytes = value.to_le_bytes();
        assert_eq!(self.region_write(BAR0, offset.into(), &bytes), 0);
    }

    pub fn read(&mut self, offset: u32) -> u32 {
        u32::from_le_bytes(self.region_read(BAR0, offset.into()))
    }

    pub fn config(&mut self, offset: u64) -> u16 {
        u16::from_le_bytes(self.region_read(CONFIG, offset))
    }

    pub fn poke(&self, page: u64, offset: usize, bytes: &[u8]) {
        let at = page * PAGE + offset as u64;
        self.memory.write_all_at(bytes, at).unwrap();
    }

    pub fn peek<const N: usize>(&self, page: u64, offset: usize) -> [u8; N] {
        let mut bytes = [0; N];
        let at = page * PAGE + offset as u64;
        self.memory.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    /// Graphics pages are guest pages of the same number.
    pub fn map_graphics(&mut self, page: u64) {
        let entry = (BASE + page * PAGE) | 1;
        let at = GGTT + 8 * page;
        assert_eq!(self.region_write(BAR0, at, &entry.to_le_bytes()), 0);
    }

    pub fn set_irq(&mut self, index: u32, flags: u32, count: u32, with_fd: bool) -> i32 {
        let mut body = Vec::new();
        wire::IrqSet {
            argsz: wire::IrqSet::SIZE as u32,
            flags,
            index,
            start: 0,
            count,
        }
        .encode(&mut body);
        let eventfd = self.eventfd.try_clone().unwrap();
        let fds = [eventfd.as_fd()];
        let fds = if with_fd { &fds[..] } else { &[] };
        self.call(command::DEVICE_SET_IRQS, &body, fds).errno()
    }

    /// VFIO_IRQ_SET_DATA_EVENTFD and _ACTION_TRIGGER.
    pub fn use_eventfd(&mut self, index: u32) {
        assert_eq!(self.set_irq(index, 0x24, 1, true), 0);
    }

    pub fn unmask(&mut self) {
        assert_eq!(self.set_irq(INTX, 0x11, 1, false), 0);
    }

    /// Waits until the device wants to read or write what the client has for itself.
    pub fn wait_for_question(&self) {
        within("the device asks for memory", || self.poll(10)[0]);
    }

    /// Waits for an interrupt, and says how many there were. What the device wants meanwhile is answered.
    pub fn interrupts(&mut self) -> u64 {
        within("there is an interrupt", || {
            let [asks, interrupts] = self.poll(10);
            if asks && !interrupts {
                let message = self.client.receive();
                self.answer(&message);
            }
            interrupts
        });
        let mut count = [0; 8];
        self.eventfd.read_exact(&mut count).unwrap();
        u64::from_ne_bytes(count)
    }

    /// How many there have been by now.
    pub fn pending(&mut self) -> u64 {
        match self.poll(0) {
            [_, true] => self.interrupts(),
            _ => 0,
        }
    }

    /// Whether there is something of the socket and of the eventfd, by this many milliseconds.
    pub fn poll(&self, timeout: i32) -> [bool; 2] {
        let fds = [self.client.stream.as_raw_fd(), self.eventfd.as_raw_fd()];
        let mut fds = fds.map(|fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        });
        // SAFETY: two structures, which outlive the call.
        assert!(unsafe { libc::poll(fds.as_mut_ptr(), 2, timeout) } >= 0);
        fds.map(|fd| fd.revents != 0)
    }

    pub fn enable_interrupts(&mut self, engine: EngineId) {
        let (bank, shift) = engine.gt_interrupt();
        let register = irq::GT_ISR + bank * irq::GT_STRIDE;
        self.write(register + 4, !(irq::CONTEXT_SWITCH << shift));
        self.write(register + 12, irq::CONTEXT_SWITCH << shift);
        self.write(irq::MASTER_IRQ, irq::MASTER_CONTROL);
    }

    /// What an interrupt handler does.
    pub fn acknowledge(&mut self, engine: EngineId) {
        self.write(irq::MASTER_IRQ, 0);
        assert_eq!(self.read(irq::MASTER_IRQ), engine.master_interrupt());
        let (bank, shift) = engine.gt_interrupt();
        let register = irq::GT_ISR + bank * irq::GT_STRIDE + 8;
        let pending = self.read(register);
        assert_eq!(pending, irq::CONTEXT_SWITCH << shift);
        self.write(register, pending);
        self.write(irq::MASTER_IRQ, irq::MASTER_CONTROL);
    }

    /// Makes a context of `pages` pages from graphics page `lrca` on, with its ring and status page before it.
    pub fn make_context(&mut self, engine: EngineId, lrca: u64, pages: u64) -> ContextDescriptor {
        let (status, ring) = (lrca - 2, lrca - 1);
        for page in status..lrca + pages {
            self.map_graphics(page);
        }
        for page in lrca + 1..lrca + pages {
            let bytes: Vec<_> = (0..PAGE).map(|at| (at * 7 + page) as u8).collect();
            self.poke(page, 0, &bytes);
        }
        let mut fields = [0; ring_context::SIZE];
        for (field, value) in [
            (ring_context::TAIL, 64),
            (ring_context::START, (ring * PAGE) as u32),
        ] {
            fields[field..field + 4].copy_from_slice(&value.to_le_bytes());
        }
        self.poke(lrca + 1, 0, &fields);
        self.write(
            engine.mmio_base() + ring_register::HWS_PGA,
            (status * PAGE) as u32,
        );
        ContextDescriptor::new(lrca as u32, 42, AddressingMode::Legacy64)
    }

    pub fn submit(&mut self, engine: EngineId, context: ContextDescriptor) {
        let context = u64::from(context);
        for dword in [0, 0, (context >> 32) as u32, context as u32] {
            self.write(engine.mmio_base() + ring_register::ELSP, dword);
        }
    }

    /// What the engine must make of a context that lies in memory now.
    pub fn expect(&self, engine: EngineId, lrca: u64, pages: u64, sequence: u64) -> ShadowImage {
        let mut image = ShadowImage::new(pages as usize);
        let page1: [u8; PAGE as usize] = self.peek(lrca + 1, 0);
        image.page1_mut().copy_from_slice(&page1);
        for (page, bytes) in (lrca + 2..).zip(image.pages_mut().chunks_exact_mut(PAGE as usize)) {
            bytes.copy_from_slice(&self.peek::<{ PAGE as usize }>(page, 0));
        }
        let job = EngineJob {
            engine,
            descriptor: ContextDescriptor::default(),
            sequence,
            ring: &[],
            indirect_ctx: &[],
            per_ctx: None,
            batches: &[],
            status_page: 0,
            image: &mut image,
            memory: &mut (),
        };
        let mut engine = SimulatedEngine::new().mix_context(true);
        engine.run(job).unwrap();
        image
    }

    pub fn assert_written_back(&self, lrca: u64, expected: &ShadowImage) {
        let page1: [u8; PAGE as usize] = self.peek(lrca + 1, 0);
        assert!(page1[ring_context::SIZE..] == expected.page1()[ring_context::SIZE..]);
        let timestamp = &page1[ring_context::TIMESTAMP..][..4];
        assert_eq!(timestamp, expected.ctx_timestamp().to_le_bytes());
        assert_eq!(page1[ring_context::HEAD..][..4], 64_u32.to_le_bytes());
        for (page, bytes) in (lrca + 2..).zip(expected.pages().chunks_exact(PAGE as usize)) {
            assert!(
                self.peek::<{ PAGE as usize }>(page, 0) == bytes,
                "page {page}"
            );
        }
    }

    /// The two events of a context that ran alone, in the status page and in registers.
    pub fn assert_told(&mut self, engine: EngineId, lrca: u64) {
        let base = engine.mmio_base();
        let complete = CsbEvent::CONTEXT_COMPLETE | CsbEvent::ACTIVE_TO_IDLE;
        let events = [
            CsbEvent::new(CsbEvent::IDLE_TO_ACTIVE, 0),
            CsbEvent::new(complete, 42),
        ];
        let pointers = self.read(base + ring_register::CONTEXT_STATUS_POINTER);
        let write = pointers & 7;
        assert_eq!(self.peek(lrca - 2, 0x7c), write.to_le_bytes());
        for (event, slot) in events.into_iter().rev().zip(0..) {
            let slot = (write + 6 - slot) % 6;
            let at = 0x40 + 8 * slot as usize;
            assert_eq!(self.peek(lrca - 2, at), u64::from(event).to_le_bytes());
            let register = base + ring_register::CONTEXT_STATUS_BUFFER + 8 * slot;
            assert_eq!(self.read(register), event.reasons());
            assert_eq!(self.read(register + 4), event.context_id());
        }
        assert_eq!(self.read(base + ring_register::EXECLIST_STATUS + 4), 0);
    }
}

impl Guest {
    pub fn dwords(&self, page: u64, dwords: &[u32]) {
        let bytes: Vec<_> = dwords
            .iter()
            .flat_map(|dword| dword.to_le_bytes())
            .collect();
        self.poke(page, 0, &bytes);
    }

    pub fn table_entry(&self, table: u64, index: usize, page: u64) {
        let entry = (BASE + page * PAGE) | 3;
        self.poke(table, 8 * index, &entry.to_le_bytes());
    }

    /// A context whose ring starts a batch in its own address space, which stores a number in page 1 of that.
    pub fn make_batch(&mut self, engine: EngineId, lrca: u64, value: u32) -> ContextDescriptor {
        let pages = match engine {
            EngineId::Rcs => 22,
            _ => 2,
        };
        let context = self.make_context(engine, lrca, pages);
        for table in TABLES..TABLES + 3 {
            self.table_entry(table, 0, table + 1);
        }
        for page in 0..4 {
            self.table_entry(TABLES + 3, page as usize, DATA + page);
        }
        let root = BASE + TABLES * PAGE;
        let pdp0 = ring_context::PDP3_UDW + 6 * ring_context::PDP_STRIDE;
        self.poke(lrca + 1, pdp0, &((root >> 32) as u32).to_le_bytes());
        self.poke(lrca + 1, pdp0 + 8, &(root as u32).to_le_bytes());
        self.dwords(lrca - 1, &[BATCH_START, 0, 0, USER_INTERRUPT]);
        self.dwords(DATA, &[STORE_DWORD, PAGE as u32, 0, value, BATCH_END]);
        context
    }

    pub fn rewind(&self, lrca: u64) {
        self.poke(lrca + 1, ring_context::HEAD, &[0; 4]);
    }

    pub fn stored(&self) -> u32 {
        u32::from_le_bytes(self.peek(DATA + 1, 0))
    }

    /// Both interrupts of a workload, as one.
    pub fn enable_user_interrupts(&mut self, engine: EngineId) {
        let (bank, shift) = engine.gt_interrupt();
        let register = irq::GT_ISR + bank * irq::GT_STRIDE;
        self.write(register + 4, !(irq::USER << shift));
        self.write(register + 12, irq::USER << shift);
        self.write(irq::MASTER_IRQ, irq::MASTER_CONTROL);
    }

    pub fn acknowledge_user_interrupt(&mut self, engine: EngineId) {
        let (bank, shift) = engine.gt_interrupt();
        let register = irq::GT_ISR + bank * irq::GT_STRIDE + 8;
        assert_eq!(self.read(register), irq::USER << shift);
        self.write(irq::MASTER_IRQ, 0);
        self.write(register, irq::USER << shift);
        self.write(irq::MASTER_IRQ, irq::MASTER_CONTROL);
    }

    /// Waits until an engine has done everything it was given: it resets, and lets nothing by.
    pub fn reset_engines(&mut self) {
        self.write(GDRST, 1);
        assert_eq!(self.read(GDRST), 0);
    }
}

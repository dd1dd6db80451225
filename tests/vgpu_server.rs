// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The vgpu-server example as a program, and a client that does what a guest's driver does.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::OnceLock;

use gvt_scheduler::{
    interrupt_register as irq, ring_context, ring_register, AddressingMode, ContextDescriptor,
    CsbEvent, Engine, EngineId, EngineJob, ShadowImage, SimulatedEngine,
};
use vfio_user_dma::wire::{self, command};
use vfio_user_dma::Capabilities;

#[path = "../crates/vfio-user-dma/tests/common/mod.rs"]
mod common;

use common::{eventfd, map_body, memfd, Client, Reply, PAGE, READ_WRITE};

const BAR0: u32 = 0;
const CONFIG: u32 = 7;
const GGTT: u64 = 8 << 20;
const INTX: u32 = 0;
const MSI: u32 = 1;

/// Where guest memory is for the device, and how much there is.
const BASE: u64 = 0x10_0000;
const PAGES: u64 = 256;

/// The example lies beside the tests; with `cargo test --test` it is not built, so it is then built here.
fn example() -> &'static Path {
    static EXAMPLE: OnceLock<PathBuf> = OnceLock::new();
    EXAMPLE.get_or_init(|| {
        let test = std::env::current_exe().unwrap();
        let profile = test.parent().and_then(Path::parent).unwrap();
        let example = profile.join("examples/vgpu-server");
        if !example.exists() {
            let mut build = Command::new(env!("CARGO"));
            build.args(["build", "--example", "vgpu-server", "--target-dir"]);
            build.arg(profile.parent().unwrap());
            if !cfg!(debug_assertions) {
                build.arg("--release");
            }
            assert!(build.status().unwrap().success());
        }
        example
    })
}

/// A server that runs.
struct Server {
    process: Child,
    socket: PathBuf,
    output: BufReader<std::process::ChildStdout>,
}

impl Server {
    fn start(args: &[&str]) -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("vgpu-server-{}-{number}.sock", std::process::id());
        Server::start_at(std::env::temp_dir().join(name), args)
    }

    fn start_at(socket: PathBuf, args: &[&str]) -> Self {
        let mut process = Command::new(example())
            .arg("--socket")
            .arg(&socket)
            .args(args)
            .stdout(Stdio::piped())
            // What is refused is logged there.
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(process.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        assert!(line.contains("listening"), "{line}");
        Server {
            process,
            socket,
            output,
        }
    }

    fn connect(&self) -> Client {
        let mut client = Client::new(UnixStream::connect(&self.socket).unwrap());
        assert_eq!(client.version(Capabilities::default()).errno(), 0);
        client
    }

    /// What it says at its end, by itself.
    fn last_words(mut self) -> String {
        let mut words = String::new();
        self.output.read_to_string(&mut words).unwrap();
        assert!(self.process.wait().unwrap().success());
        words
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// A guest with its memory in a file, which the device has at [`BASE`].
struct Guest {
    client: Client,
    memory: File,
    eventfd: File,
    /// DMA_READ and DMA_WRITE that were answered.
    answered: usize,
}

impl Guest {
    fn new(server: &Server) -> Self {
        let mut guest = Guest::without_memory(server);
        guest.map(0, PAGES, true);
        guest
    }

    fn without_memory(server: &Server) -> Self {
        Guest {
            client: server.connect(),
            memory: memfd(PAGES),
            eventfd: eventfd(),
            answered: 0,
        }
    }

    /// Makes some of its memory known to the device, with the file or without.
    fn map(&mut self, page: u64, pages: u64, file: bool) {
        let memory = self.memory.try_clone().unwrap();
        let fds = [memory.as_fd()];
        let at = page * PAGE;
        let body = map_body(READ_WRITE, BASE + at, pages * PAGE, at);
        let fds = if file { &fds[..] } else { &[] };
        assert_eq!(self.call(command::DMA_MAP, &body, fds).errno(), 0);
    }

    fn unmap(&mut self, page: u64, pages: u64) -> i32 {
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
    fn call(&mut self, command: u16, body: &[u8], fds: &[BorrowedFd<'_>]) -> Reply {
        let id = self.client.send_all(command, 0, body, fds);
        loop {
            let message = self.client.receive();
            if message.header.is_reply() {
                assert_eq!(message.header.message_id, id);
                return message;
            }
            self.answer(&message);
        }
    }

    /// Answers a DMA_READ or DMA_WRITE, as a client does that looks at the whole count.
    fn answer(&mut self, message: &Reply) {
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

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> i32 {
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

    fn region_read<const N: usize>(&mut self, region: u32, offset: u64) -> [u8; N] {
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

    fn write(&mut self, offset: u32, value: u32) {
        let bytes = value.to_le_bytes();
        assert_eq!(self.region_write(BAR0, offset.into(), &bytes), 0);
    }

    fn read(&mut self, offset: u32) -> u32 {
        u32::from_le_bytes(self.region_read(BAR0, offset.into()))
    }

    fn config(&mut self, offset: u64) -> u16 {
        u16::from_le_bytes(self.region_read(CONFIG, offset))
    }

    fn poke(&self, page: u64, offset: usize, bytes: &[u8]) {
        let at = page * PAGE + offset as u64;
        self.memory.write_all_at(bytes, at).unwrap();
    }

    fn peek<const N: usize>(&self, page: u64, offset: usize) -> [u8; N] {
        let mut bytes = [0; N];
        let at = page * PAGE + offset as u64;
        self.memory.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    /// Graphics pages are guest pages of the same number.
    fn map_graphics(&mut self, page: u64) {
        let entry = (BASE + page * PAGE) | 1;
        let at = GGTT + 8 * page;
        assert_eq!(self.region_write(BAR0, at, &entry.to_le_bytes()), 0);
    }

    fn set_irq(&mut self, index: u32, flags: u32, count: u32, with_fd: bool) -> i32 {
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
    fn use_eventfd(&mut self, index: u32) {
        assert_eq!(self.set_irq(index, 0x24, 1, true), 0);
    }

    fn unmask(&mut self) {
        assert_eq!(self.set_irq(INTX, 0x11, 1, false), 0);
    }

    /// Waits for an interrupt, and says how many there were. What the device wants meanwhile is answered.
    fn interrupts(&mut self) -> u64 {
        loop {
            match self.poll(20_000) {
                [_, true] => break,
                [true, false] => {
                    let message = self.client.receive();
                    self.answer(&message);
                }
                [false, false] => panic!("no interrupt"),
            }
        }
        let mut count = [0; 8];
        self.eventfd.read_exact(&mut count).unwrap();
        u64::from_ne_bytes(count)
    }

    /// How many there have been by now.
    fn pending(&mut self) -> u64 {
        match self.poll(0) {
            [_, true] => self.interrupts(),
            _ => 0,
        }
    }

    /// Whether there is something of the socket and of the eventfd, by this many milliseconds.
    fn poll(&self, timeout: i32) -> [bool; 2] {
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

    fn enable_interrupts(&mut self, engine: EngineId) {
        let (bank, shift) = engine.gt_interrupt();
        let register = irq::GT_ISR + bank * irq::GT_STRIDE;
        self.write(register + 4, !(irq::CONTEXT_SWITCH << shift));
        self.write(register + 12, irq::CONTEXT_SWITCH << shift);
        self.write(irq::MASTER_IRQ, irq::MASTER_CONTROL);
    }

    /// What an interrupt handler does.
    fn acknowledge(&mut self, engine: EngineId) {
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
    fn make_context(&mut self, engine: EngineId, lrca: u64, pages: u64) -> ContextDescriptor {
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

    fn submit(&mut self, engine: EngineId, context: ContextDescriptor) {
        let context = u64::from(context);
        for dword in [0, 0, (context >> 32) as u32, context as u32] {
            self.write(engine.mmio_base() + ring_register::ELSP, dword);
        }
    }

    /// What the engine must make of a context that lies in memory now.
    fn expect(&self, engine: EngineId, lrca: u64, pages: u64, sequence: u64) -> ShadowImage {
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

    fn assert_written_back(&self, lrca: u64, expected: &ShadowImage) {
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
    fn assert_told(&mut self, engine: EngineId, lrca: u64) {
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

const ENGINES: [(EngineId, u64); 5] = [
    (EngineId::Rcs, 22),
    (EngineId::Bcs, 2),
    (EngineId::Vcs, 2),
    (EngineId::Vcs2, 2),
    (EngineId::Vecs, 2),
];

#[test]
fn each_engine_runs_a_context_and_sends_a_message() {
    let server = Server::start(&["--once"]);
    let mut guest = Guest::new(&server);
    guest.use_eventfd(MSI);
    for ((engine, pages), lrca) in ENGINES.into_iter().zip((10..).step_by(40)) {
        let context = guest.make_context(engine, lrca, pages);
        guest.enable_interrupts(engine);
        for sequence in 0..3 {
            let expected = guest.expect(engine, lrca, pages, sequence);
            guest.poke(lrca + 1, ring_context::HEAD, &[0; 4]);
            guest.submit(engine, context);
            assert_eq!(guest.interrupts(), 1);
            guest.acknowledge(engine);
            guest.assert_told(engine, lrca);
            guest.assert_written_back(lrca, &expected);
        }
    }
    drop(guest);
    let words = server.last_words();
    assert!(
        words.contains("15 submissions, 15 completions, 0 errors, 1 maps, 0 unmaps"),
        "{words}"
    );
}

#[test]
fn intx_is_a_level_that_stays_until_the_guest_has_handled_it() {
    const COMMAND: u64 = 4;
    const STATUS: u64 = 6;
    const DISABLE: u16 = 1 << 10;
    const ASSERTED: u16 = 1 << 3;
    let server = Server::start(&[]);
    let mut guest = Guest::new(&server);
    let (engine, lrca) = (EngineId::Bcs, 10);
    guest.use_eventfd(INTX);
    let context = guest.make_context(engine, lrca, 2);
    guest.enable_interrupts(engine);
    assert_eq!(guest.config(STATUS) & ASSERTED, 0);
    guest.submit(engine, context);
    assert_eq!(guest.interrupts(), 1);
    assert_eq!(guest.config(STATUS) & ASSERTED, ASSERTED);

    // Unmasked too early it comes again, and once, as it is masked by having come.
    guest.unmask();
    assert_eq!(guest.interrupts(), 1);
    guest.enable_interrupts(engine);
    assert_eq!(guest.pending(), 0);
    // Disabled it does not come, though it is there.
    let command = guest.config(COMMAND);
    let disabled = (command | DISABLE).to_le_bytes();
    assert_eq!(guest.region_write(CONFIG, COMMAND, &disabled), 0);
    guest.unmask();
    assert_eq!(guest.config(STATUS) & ASSERTED, ASSERTED);
    assert_eq!(guest.pending(), 0);
    let enabled = command.to_le_bytes();
    assert_eq!(guest.region_write(CONFIG, COMMAND, &enabled), 0);
    assert_eq!(guest.interrupts(), 1);

    // Handled it is gone, and the next one comes.
    guest.acknowledge(engine);
    assert_eq!(guest.config(STATUS) & ASSERTED, 0);
    guest.unmask();
    assert_eq!(guest.pending(), 0);
    guest.poke(lrca + 1, ring_context::HEAD, &[0; 4]);
    guest.submit(engine, context);
    assert_eq!(guest.interrupts(), 1);
}

/// Guest pages of page tables: each the only child of the one before. The last maps page `n` to page [`DATA`] + `n`.
const TABLES: u64 = 100;
const DATA: u64 = 110;

const STORE_DWORD: u32 = 0x1000_0002;
const BATCH_END: u32 = 0x0500_0000;
const BATCH_START: u32 = 0x1880_0101;
const USER_INTERRUPT: u32 = 0x0100_0000;

impl Guest {
    fn dwords(&self, page: u64, dwords: &[u32]) {
        let bytes: Vec<_> = dwords
            .iter()
            .flat_map(|dword| dword.to_le_bytes())
            .collect();
        self.poke(page, 0, &bytes);
    }

    fn table_entry(&self, table: u64, index: usize, page: u64) {
        let entry = (BASE + page * PAGE) | 3;
        self.poke(table, 8 * index, &entry.to_le_bytes());
    }

    /// A context whose ring starts a batch in its own address space, which stores a number in page 1 of that.
    fn make_batch(&mut self, engine: EngineId, lrca: u64, value: u32) -> ContextDescriptor {
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

    fn rewind(&self, lrca: u64) {
        self.poke(lrca + 1, ring_context::HEAD, &[0; 4]);
    }

    fn stored(&self) -> u32 {
        u32::from_le_bytes(self.peek(DATA + 1, 0))
    }

    /// Both interrupts of a workload, as one.
    fn enable_user_interrupts(&mut self, engine: EngineId) {
        let (bank, shift) = engine.gt_interrupt();
        let register = irq::GT_ISR + bank * irq::GT_STRIDE;
        self.write(register + 4, !(irq::USER << shift));
        self.write(register + 12, irq::USER << shift);
        self.write(irq::MASTER_IRQ, irq::MASTER_CONTROL);
    }

    fn acknowledge_user_interrupt(&mut self, engine: EngineId) {
        let (bank, shift) = engine.gt_interrupt();
        let register = irq::GT_ISR + bank * irq::GT_STRIDE + 8;
        assert_eq!(self.read(register), irq::USER << shift);
        self.write(irq::MASTER_IRQ, 0);
        self.write(register, irq::USER << shift);
        self.write(irq::MASTER_IRQ, irq::MASTER_CONTROL);
    }

    /// Waits until an engine has done everything it was given: it resets, and lets nothing by.
    fn reset_engines(&mut self) {
        self.write(GDRST, 1);
        assert_eq!(self.read(GDRST), 0);
    }
}

const GDRST: u32 = 0x941c;
const ENTRY_WRITTEN: u32 = 0x7_8908;
const DOORBELL: u32 = 0x7_8920;

#[test]
fn a_batch_runs_in_page_tables_that_the_guest_changes() {
    let server = Server::start(&["--once"]);
    let mut guest = Guest::new(&server);
    let (engine, lrca) = (EngineId::Rcs, 10);
    guest.use_eventfd(MSI);
    let context = guest.make_batch(engine, lrca, 0x1111);
    guest.enable_user_interrupts(engine);
    guest.submit(engine, context);
    assert_eq!(guest.interrupts(), 1);
    guest.acknowledge_user_interrupt(engine);
    assert_eq!(guest.stored(), 0x1111);

    // Page 1 is another one now. Who does not say so is not seen.
    guest.table_entry(TABLES + 3, 1, DATA + 9);
    guest.dwords(DATA, &[STORE_DWORD, PAGE as u32, 0, 0x2222, BATCH_END]);
    let entry = BASE + (TABLES + 3) * PAGE + 8;
    guest.write(ENTRY_WRITTEN, entry as u32);
    guest.write(ENTRY_WRITTEN + 4, (entry >> 32) as u32);
    guest.rewind(lrca);
    guest.write(DOORBELL + 4 * engine as u32, 0);
    assert_eq!(guest.interrupts(), 1);
    guest.acknowledge_user_interrupt(engine);
    assert_eq!(guest.stored(), 0x1111);
    assert_eq!(guest.peek(DATA + 9, 0), 0x2222_u32.to_le_bytes());
    drop(guest);
    let words = server.last_words();
    assert!(
        words.contains("2 submissions, 2 completions, 0 errors"),
        "{words}"
    );
}

#[test]
fn pages_that_a_page_table_maps_are_let_go_when_they_are_unmapped() {
    let server = Server::start(&[]);
    let mut guest = Guest::without_memory(&server);
    for page in 0..PAGES {
        guest.map(page, 1, true);
    }
    let (engine, lrca) = (EngineId::Rcs, 10);
    guest.use_eventfd(MSI);
    let context = guest.make_batch(engine, lrca, 0x1111);
    guest.enable_user_interrupts(engine);
    guest.submit(engine, context);
    assert_eq!(guest.interrupts(), 1);
    guest.acknowledge_user_interrupt(engine);

    // It is pinned, and goes at once.
    assert_eq!(guest.unmap(DATA + 1, 1), 0);
    guest.rewind(lrca);
    guest.submit(engine, context);
    guest.reset_engines();
    assert_eq!(guest.pending(), 0);
    // With the page there again the same page tables will do.
    guest.map(DATA + 1, 1, true);
    guest.dwords(DATA, &[STORE_DWORD, PAGE as u32, 0, 0x3333, BATCH_END]);
    guest.rewind(lrca);
    guest.submit(engine, context);
    assert_eq!(guest.interrupts(), 1);
    assert_eq!(guest.stored(), 0x3333);
}

/// The engine waits for the client, and the client for the unmap.
#[test]
fn an_unmap_of_pinned_pages_does_not_wait_for_an_engine_that_waits_for_its_client() {
    let server = Server::start(&[]);
    let mut guest = Guest::without_memory(&server);
    let (engine, lrca) = (EngineId::Bcs, 10);
    guest.map(0, DATA, false);
    guest.map(DATA, 1, true);
    guest.map(DATA + 1, 1, true);
    guest.map(DATA + 2, 2, false);
    guest.use_eventfd(MSI);
    let context = guest.make_batch(engine, lrca, 0x1111);
    guest.enable_user_interrupts(engine);
    guest.submit(engine, context);
    assert_eq!(guest.interrupts(), 1);
    guest.acknowledge_user_interrupt(engine);
    assert_eq!(guest.stored(), 0x1111);

    guest.rewind(lrca);
    guest.submit(engine, context);
    while !guest.poll(20_000)[0] {}
    let question = guest.client.receive();
    assert_eq!(guest.unmap(DATA + 1, 1), 0);
    guest.answer(&question);
    guest.reset_engines();
    assert_eq!(guest.pending(), 0);
}

#[test]
fn memory_without_a_file_is_accessed_by_messages() {
    let server = Server::start(&["--once"]);
    let mut guest = Guest::without_memory(&server);
    guest.map(0, PAGES, false);
    guest.use_eventfd(MSI);
    let (engine, lrca, pages) = (EngineId::Rcs, 10, 22);
    let context = guest.make_context(engine, lrca, pages);
    guest.enable_interrupts(engine);
    let expected = guest.expect(engine, lrca, pages, 0);
    guest.submit(engine, context);
    assert_eq!(guest.interrupts(), 1);
    guest.acknowledge(engine);
    guest.assert_told(engine, lrca);
    guest.assert_written_back(lrca, &expected);
    assert!(guest.answered > 20, "{}", guest.answered);

    let (engine, lrca) = (EngineId::Bcs, 60);
    let context = guest.make_batch(engine, lrca, 0x4444);
    guest.enable_user_interrupts(engine);
    guest.submit(engine, context);
    assert_eq!(guest.interrupts(), 1);
    assert_eq!(guest.stored(), 0x4444);
    drop(guest);
    let words = server.last_words();
    assert!(
        words.contains("2 submissions, 2 completions, 0 errors"),
        "{words}"
    );
}

/// Nothing changes in memory that was unmapped while an engine was at it.
#[test]
fn an_unmap_is_answered_when_no_engine_touches_the_range() {
    let server = Server::start(&["--once"]);
    let mut guest = Guest::without_memory(&server);
    for page in 0..PAGES {
        guest.map(page, 1, true);
    }
    let (engine, lrca, pages) = (EngineId::Rcs, 10, 22);
    let context = guest.make_context(engine, lrca, pages);
    for round in 0..300 {
        let page = lrca + 2 + round % (pages - 2);
        for _ in 0..4 {
            guest.rewind(lrca);
            guest.submit(engine, context);
        }
        assert_eq!(guest.unmap(page, 1), 0);
        let unmapped: [u8; PAGE as usize] = guest.peek(page, 0);
        guest.reset_engines();
        assert!(
            guest.peek::<{ PAGE as usize }>(page, 0) == unmapped,
            "{round}"
        );
        guest.map(page, 1, true);
    }
    // It works as before.
    guest.use_eventfd(MSI);
    guest.enable_interrupts(engine);
    guest.rewind(lrca);
    guest.submit(engine, context);
    assert_eq!(guest.interrupts(), 1);
    drop(guest);
    let words = server.last_words();
    assert!(words.contains(" 300 unmaps ("), "{words}");
    assert!(!words.contains(" 0 completions"), "{words}");
}

#[test]
fn a_reset_ends_what_runs_and_forgets_everything() {
    let server = Server::start(&[]);
    let mut guest = Guest::without_memory(&server);
    // The engine waits for an answer that does not come.
    guest.map(0, PAGES, false);
    guest.use_eventfd(MSI);
    let (engine, lrca, pages) = (EngineId::Rcs, 10, 22);
    let context = guest.make_context(engine, lrca, pages);
    guest.enable_interrupts(engine);
    guest.submit(engine, context);
    while !guest.poll(20_000)[0] {}
    assert_eq!(guest.call(command::DEVICE_RESET, &[], &[]).errno(), 0);
    let base = engine.mmio_base();
    for (register, value) in [
        (base + ring_register::CONTEXT_STATUS_POINTER, 7),
        (base + ring_register::HWS_PGA, 0),
        (irq::MASTER_IRQ, 0),
        (irq::GT_ISR + 4, u32::MAX),
        (irq::GT_ISR + 12, 0),
        (GGTT as u32 + 8 * lrca as u32, 0),
    ] {
        assert_eq!(guest.read(register), value, "{register:#x}");
    }
    // The mappings are the client's, and are still there.
    let context = guest.make_context(engine, lrca, pages);
    guest.enable_interrupts(engine);
    let expected = guest.expect(engine, lrca, pages, 0);
    guest.submit(engine, context);
    assert_eq!(guest.interrupts(), 1);
    guest.acknowledge(engine);
    guest.assert_told(engine, lrca);
    guest.assert_written_back(lrca, &expected);
}

#[test]
fn a_killed_server_is_followed_by_another_and_a_client_by_the_next() {
    let mut server = Server::start(&[]);
    let run = |server: &Server| {
        let mut guest = Guest::new(server);
        let (engine, lrca) = (EngineId::Bcs, 10);
        guest.use_eventfd(MSI);
        let context = guest.make_context(engine, lrca, 2);
        guest.enable_interrupts(engine);
        let expected = guest.expect(engine, lrca, 2, 0);
        guest.submit(engine, context);
        assert_eq!(guest.interrupts(), 1);
        guest.assert_written_back(lrca, &expected);
        guest
    };
    drop(run(&server));
    // It goes in the middle of what it wanted done.
    let mut guest = run(&server);
    guest.write(EngineId::Bcs.mmio_base() + ring_register::ELSP, 0);
    guest.client.send(command::DMA_READ, &[0; 3]);
    drop(guest);
    let mut guest = run(&server);
    server.process.kill().unwrap();
    server.process.wait().unwrap();
    assert!(guest.client.try_receive().is_err());
    let again = Server::start_at(server.socket.clone(), &[]);
    let guest = run(&again);
    // A client keeps it from nothing when it is told to end.
    let pid = again.process.id() as i32;
    // SAFETY: takes no pointers.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0);
    let words = again.last_words();
    assert!(
        words.contains("1 submissions, 1 completions, 0 errors"),
        "{words}"
    );
    assert!(!server.socket.exists());
    drop(guest);
}

#[test]
fn a_guest_whose_memory_is_gone_meets_an_engine_that_hangs() {
    let server = Server::start(&["--once"]);
    let mut guest = Guest::new(&server);
    let (engine, lrca, pages) = (EngineId::Rcs, 10, 22);
    let context = guest.make_context(engine, lrca, pages);
    guest.memory.set_len((lrca + 5) * PAGE).unwrap();
    guest.submit(engine, context);
    // Said when the workload is at its end, whatever that was.
    while guest.read(engine.mmio_base() + ring_register::START) == 0 {}
    drop(guest);
    let words = server.last_words();
    assert!(words.contains(" 0 completions, 1 errors"), "{words}");
}

#[test]
fn a_guest_that_breaks_the_rules_is_served_again_after_a_reset_of_the_device() {
    const SEMAPHORE_WAIT: u32 = 0x0e00_0002;
    let server = Server::start(&["--once"]);
    let mut guest = Guest::new(&server);
    let (engine, lrca) = (EngineId::Bcs, 10);
    guest.use_eventfd(MSI);
    for (command, works) in [(SEMAPHORE_WAIT, false), (0, false), (0, true)] {
        if works {
            assert_eq!(guest.call(command::DEVICE_RESET, &[], &[]).errno(), 0);
        }
        let context = guest.make_context(engine, lrca, 2);
        guest.enable_interrupts(engine);
        guest.dwords(lrca - 1, &[command]);
        guest.submit(engine, context);
        if works {
            assert_eq!(guest.interrupts(), 1);
        } else {
            guest.reset_engines();
            assert_eq!(guest.pending(), 0);
        }
    }
    drop(guest);
    let words = server.last_words();
    assert!(words.contains(" 1 completions"), "{words}");
}

#[test]
fn what_is_no_register_is_refused_or_empty() {
    let server = Server::start(&[]);
    let mut guest = Guest::new(&server);
    for (offset, bytes) in [(0x2234, 2), (0x2235, 4), (GGTT, 1), (GGTT + 2, 4)] {
        let errno = guest.region_write(BAR0, offset, &vec![0xff; bytes]);
        assert_eq!(errno, libc::EINVAL, "{bytes} bytes at {offset:#x}");
    }
    guest.write(0x7f_fffc, 5);
    assert_eq!(guest.read(0x7f_fffc), 0);
    guest.write(0x1f_fffc, 5);
    assert_eq!(guest.read(0x1f_fffc), 5);
    // Half an entry is none.
    guest.write(GGTT as u32 + 8, 0x5001);
    assert_eq!(guest.read(GGTT as u32 + 8), 0);
    guest.write(GGTT as u32 + 12, 1);
    assert_eq!(
        guest.region_read(BAR0, GGTT + 8),
        0x1_0000_5001_u64.to_le_bytes()
    );
    // What identifies it cannot be written, and the BAR tells its size.
    assert_eq!(guest.region_write(CONFIG, 0, &[0; 4]), 0);
    assert_eq!((guest.config(0), guest.config(2)), (0x8086, 0x9ff9));
    assert_eq!(guest.region_write(CONFIG, 0x10, &[0xff; 8]), 0);
    let bar = guest.region_read(CONFIG, 0x10);
    assert_eq!(u64::from_le_bytes(bar), 0xffff_ffff_ff00_0004);
}

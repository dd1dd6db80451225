// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The vgpu-server example as a program, and a client that does what a guest's driver does.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
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

use common::{memfd, Client, PAGE};

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

/// A guest with its memory in a file, mapped at [`BASE`].
struct Guest {
    client: Client,
    memory: File,
    eventfd: File,
}

impl Guest {
    fn new(server: &Server) -> Self {
        let mut client = server.connect();
        let memory = memfd(PAGES);
        assert_eq!(client.map(BASE, PAGES * PAGE, 0, Some(&memory)), 0);
        Guest {
            client,
            memory,
            eventfd: eventfd(),
        }
    }

    fn write(&mut self, offset: u32, value: u32) {
        let bytes = value.to_le_bytes();
        assert_eq!(self.client.region_write(BAR0, offset.into(), &bytes), 0);
    }

    fn read(&mut self, offset: u32) -> u32 {
        let bytes = self.client.region_read(BAR0, offset.into(), 4).unwrap();
        u32::from_le_bytes(bytes.try_into().unwrap())
    }

    fn config(&mut self, offset: u64) -> u16 {
        let bytes = self.client.region_read(CONFIG, offset, 2).unwrap();
        u16::from_le_bytes(bytes.try_into().unwrap())
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
        assert_eq!(self.client.region_write(BAR0, at, &entry.to_le_bytes()), 0);
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
        let fds = [self.eventfd.as_fd()];
        let fds = if with_fd { &fds[..] } else { &[] };
        self.client
            .call_with(command::DEVICE_SET_IRQS, &body, fds)
            .errno()
    }

    /// VFIO_IRQ_SET_DATA_EVENTFD and _ACTION_TRIGGER.
    fn use_eventfd(&mut self, index: u32) {
        assert_eq!(self.set_irq(index, 0x24, 1, true), 0);
    }

    fn unmask(&mut self) {
        assert_eq!(self.set_irq(INTX, 0x11, 1, false), 0);
    }

    /// Waits for an interrupt, and says how many there were.
    fn interrupts(&mut self) -> u64 {
        let mut count = [0; 8];
        self.eventfd.read_exact(&mut count).unwrap();
        u64::from_ne_bytes(count)
    }

    /// How many there have been by now. A message before this has been served.
    fn pending(&mut self) -> u64 {
        // SAFETY: one structure, which outlives the call.
        let ready = unsafe {
            let mut poll = libc::pollfd {
                fd: self.eventfd.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            libc::poll(&mut poll, 1, 0)
        };
        match ready {
            0 => 0,
            _ => self.interrupts(),
        }
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

fn eventfd() -> File {
    // SAFETY: takes no pointers.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: the descriptor is new.
    File::from(unsafe { OwnedFd::from_raw_fd(fd) })
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
    // Disabled it does not come, though it is there.
    let command = guest.config(COMMAND);
    let disabled = (command | DISABLE).to_le_bytes();
    assert_eq!(guest.client.region_write(CONFIG, COMMAND, &disabled), 0);
    guest.unmask();
    assert_eq!(guest.config(STATUS) & ASSERTED, ASSERTED);
    assert_eq!(guest.pending(), 0);
    let enabled = command.to_le_bytes();
    assert_eq!(guest.client.region_write(CONFIG, COMMAND, &enabled), 0);
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

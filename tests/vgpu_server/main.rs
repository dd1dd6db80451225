// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The vgpu-server example as a program, and a client that does what a guest's driver does.

#[path = "../../crates/vfio-user-dma/tests/common/mod.rs"]
mod common;
#[path = "../example/mod.rs"]
mod example;
mod guest;
mod server;

use gvt_scheduler::{interrupt_register as irq, ring_context, ring_register, EngineId};
use vfio_user_dma::wire::command;

use common::deadline::within;
use common::PAGE;
use guest::{
    Guest, BAR0, BASE, BATCH_END, CONFIG, DATA, GGTT, INTX, MSI, PAGES, STORE_DWORD, TABLES,
};
use server::Server;

const ENTRY_WRITTEN: u32 = 0x7_8908;
const DOORBELL: u32 = 0x7_8920;

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

#[test]
fn an_interrupt_that_comes_before_its_eventfd_is_not_lost() {
    let server = Server::start(&[]);
    let mut guest = Guest::new(&server);
    let (engine, lrca) = (EngineId::Bcs, 10);
    let context = guest.make_context(engine, lrca, 2);
    guest.enable_interrupts(engine);
    guest.submit(engine, context);
    within("an interrupt is pending", || {
        guest.read(irq::MASTER_IRQ) != irq::MASTER_CONTROL
    });
    guest.use_eventfd(MSI);
    assert_eq!(guest.interrupts(), 1);
    guest.acknowledge(engine);
    assert_eq!(guest.pending(), 0);
}

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
    guest.wait_for_question();
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
    guest.wait_for_question();
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

/// The first of them waits for its client, and has not taken what was written for too long.
#[test]
fn what_is_for_all_engines_reaches_those_that_are_not_behind() {
    let server = Server::start(&[]);
    let mut guest = Guest::without_memory(&server);
    guest.map(0, DATA, true);
    guest.map(DATA, 4, false);
    guest.use_eventfd(MSI);
    let (engine, lrca) = (EngineId::Bcs, 60);
    let context = guest.make_context(engine, lrca, 2);
    guest.enable_interrupts(engine);
    let state = GGTT + 8 * (lrca + 1);
    assert_eq!(guest.region_write(BAR0, state, &[0; 8]), 0);

    let waits = guest.make_batch(EngineId::Rcs, 10, 0x1111);
    guest.submit(EngineId::Rcs, waits);
    guest.wait_for_question();
    let question = guest.client.receive();
    let registers = u64::from(EngineId::Rcs.mmio_base() + 0x800);
    let mut errnos = (0..300).map(|_| guest.region_write(BAR0, registers, &[0; 1024]));
    assert!(errnos.any(|errno| errno == libc::EBUSY));

    let entry = BASE + (lrca + 1) * PAGE + 1;
    let errno = guest.region_write(BAR0, state, &entry.to_le_bytes());
    assert_eq!(errno, libc::EBUSY);
    guest.submit(engine, context);
    assert_eq!(guest.interrupts(), 1);
    guest.assert_told(engine, lrca);
    guest.answer(&question);
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
    within("a workload ends", || {
        guest.read(engine.mmio_base() + ring_register::START) != 0
    });
    drop(guest);
    let words = server.last_words();
    assert!(words.contains(" 0 completions, 1 errors"), "{words}");
}

#[test]
fn a_guest_that_breaks_the_rules_is_served_again_after_a_reset_of_the_device() {
    const SEMAPHORE_WAIT: u32 = 0x0e00_0002;
    let server = Server::start(&["--once"]);
    let mut guest = Guest::without_memory(&server);
    let (engine, lrca) = (EngineId::Bcs, 10);
    let ring = lrca - 1;
    guest.map(0, ring, true);
    guest.map(ring, 1, false);
    guest.map(lrca, PAGES - lrca, true);
    guest.use_eventfd(MSI);
    for (command, works) in [(SEMAPHORE_WAIT, false), (0, false), (0, true)] {
        if works {
            assert_eq!(guest.call(command::DEVICE_RESET, &[], &[]).errno(), 0);
        }
        let context = guest.make_context(engine, lrca, 2);
        guest.enable_interrupts(engine);
        guest.dwords(ring, &[command]);
        guest.submit(engine, context);
        if command == SEMAPHORE_WAIT {
            // What a reset finds that has not begun is never looked at.
            guest.wait_for_question();
            let question = guest.client.receive();
            guest.answer(&question);
        }
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

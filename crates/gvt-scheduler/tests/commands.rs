// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What an engine is given to execute, and what the ring registers say of it.

mod common;

use common::{Context, Guest, REQUEST, RING_PAGE, RING_PAGES};
use gvt_scheduler::{
    ring_context, ring_register, Engine, EngineFault, EngineId, EngineJob, Executed, VgpuConfig,
};
use vm_memory::{Bytes, GuestAddress};

const RCS: EngineId = EngineId::Rcs;
const LRCA: u32 = 0x40;
const BATCH_PAGE: u32 = 0x100;

/// Keeps the commands of the last job.
#[derive(Default)]
struct Recorder {
    ring: Vec<u8>,
    indirect_ctx: Vec<u8>,
}

impl Engine for Recorder {
    fn run(&mut self, job: EngineJob<'_>) -> Result<Executed, EngineFault> {
        self.ring = job.ring.to_vec();
        self.indirect_ctx = job.indirect_ctx.to_vec();
        Ok(Executed::default())
    }
}

fn noise(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(0x0019_660d).wrapping_add(0x3c6e_f35f);
        (state >> 24) as u8
    };
    std::iter::repeat_with(&mut next).take(len).collect()
}

fn guest() -> (Guest, Context) {
    let mut guest = Guest::new(VgpuConfig::default());
    // Noise is no commands.
    guest.vgpu.set_auditor(());
    let context = guest.context(RCS, LRCA, 1);
    (guest, context)
}

fn record(guest: &mut Guest, context: &Context) -> Recorder {
    let mut recorder = Recorder::default();
    guest.submit(&[*context]).unwrap();
    guest.vgpu.run_next(RCS, &mut recorder).unwrap().unwrap();
    recorder
}

#[test]
fn the_engine_is_given_the_guests_commands() {
    let (mut guest, context) = guest();
    let ring = noise((RING_PAGES << 12) as usize, 1);
    let batch = noise(0x2000, 2);
    // Neither the ring nor the batch is contiguous in guest memory.
    for (page, bytes) in (RING_PAGE..).zip(ring.chunks(4096)) {
        let frame = u64::from(0x180 + 3 * page);
        let at = GuestAddress(frame << 12);
        guest.memory.write_slice(bytes, at).unwrap();
        guest
            .vgpu
            .write_ggtt_entry(page, common::entry(frame))
            .unwrap();
    }
    let at = GuestAddress(u64::from(BATCH_PAGE) << 12);
    guest.memory.write_slice(&batch, at).unwrap();

    let (start, end) = (0x0ff0, 0x2010);
    guest.set(&context, ring_context::HEAD, start);
    guest.set(&context, ring_context::TAIL, end);
    guest.set(&context, ring_context::INDIRECT_CTX, BATCH_PAGE << 12 | 63);
    let recorded = record(&mut guest, &context);
    assert!(recorded.ring == ring[start as usize..end as usize]);
    assert!(recorded.indirect_ctx == batch[..63 * 64]);

    // Around the end of the ring, and without the batch: nothing of the first job is left.
    guest.set(&context, ring_context::HEAD, 0x3f00);
    guest.set(&context, ring_context::TAIL, 0x48);
    guest.set(&context, ring_context::INDIRECT_CTX, 0);
    let recorded = record(&mut guest, &context);
    assert!(recorded.ring == [&ring[0x3f00..], &ring[..0x48]].concat());
    assert!(recorded.indirect_ctx.is_empty());
}

#[test]
fn a_queued_workload_is_given_what_is_in_the_ring_when_its_turn_comes() {
    let (mut guest, context) = guest();
    let request = REQUEST as usize;
    guest.submit(&[context]).unwrap();
    guest.set(&context, ring_context::TAIL, 2 * REQUEST);
    guest.submit(&[context]).unwrap();
    let ring = noise(2 * request, 3);
    let at = GuestAddress(u64::from(RING_PAGE) << 12);
    guest.memory.write_slice(&ring, at).unwrap();
    let mut recorder = Recorder::default();
    guest.vgpu.run_next(RCS, &mut recorder).unwrap().unwrap();
    // The first was copied when it was submitted.
    assert!(recorder.ring == vec![0; request]);
    guest.vgpu.run_next(RCS, &mut recorder).unwrap().unwrap();
    assert!(recorder.ring == ring[request..]);
}

#[test]
fn ring_registers_follow_the_workload() {
    let (mut guest, context) = guest();
    let register = |guest: &Guest, offset| guest.vgpu.mmio_read(RCS.mmio_base() + offset);
    guest.set(&context, ring_context::HEAD, 7 << 21 | 0x40);
    guest.submit(&[context]).unwrap();
    for offset in [
        ring_register::START,
        ring_register::HEAD,
        ring_register::TAIL,
    ] {
        assert_eq!(register(&guest, offset), 0);
    }
    guest.run(RCS);
    assert_eq!(register(&guest, ring_register::START), RING_PAGE << 12);
    assert_eq!(register(&guest, ring_register::TAIL), REQUEST);
    assert_eq!(register(&guest, ring_register::HEAD), 7 << 21 | REQUEST);
    // In memory the head is the tail, without a count.
    assert_eq!(guest.get(&context, ring_context::HEAD), REQUEST);

    guest.set(&context, ring_context::HEAD, 7 << 21 | REQUEST);
    guest.set(&context, ring_context::TAIL, 0x20);
    guest.submit_and_run(&context);
    assert_eq!(register(&guest, ring_register::TAIL), 0x20);
    assert_eq!(register(&guest, ring_register::HEAD), 8 << 21 | 0x20);
}

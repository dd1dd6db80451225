// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a failure leaves behind, and the error number it has in the kernel.

mod common;

use common::{entry, submit, Context, FaultyEngine, Guest};
use gvt_scheduler::{
    ring_context, AddressingMode, ContextDescriptor, EngineId, Error, ErrorMode, FailsafeReason,
    PageTableRoot, SimulatedEngine, VgpuConfig,
};
use vm_memory::{Bytes, GuestAddress};

const RCS: EngineId = EngineId::Rcs;
const LRCA: u32 = 0x40;
/// A guest page outside of guest memory.
const NOWHERE: u64 = 0x10_0000;

fn guest() -> (Guest, Context) {
    let mut guest = Guest::new(VgpuConfig::default());
    let context = guest.context(RCS, LRCA, 1);
    (guest, context)
}

fn refused(guest: &mut Guest, elements: &[ContextDescriptor], errno: i32) -> Error {
    let error = submit(&mut guest.vgpu, RCS, elements).unwrap_err();
    assert_eq!(error.errno(), errno, "{error}");
    assert_eq!(guest.vgpu.queued(RCS), 0, "{error}");
    error
}

/// Runs the queued workload, which fails; nothing is left of it.
fn fails(guest: &mut Guest, errno: i32) -> Error {
    let result = guest
        .vgpu
        .run_next(RCS, &mut SimulatedEngine::without_commands());
    let error = result.unwrap_err();
    assert_eq!(error.errno(), errno, "{error}");
    assert_eq!(guest.vgpu.queued(RCS), 0, "{error}");
    error
}

#[test]
fn submissions_the_hardware_has_no_use_for() {
    let (mut guest, context) = guest();
    let good = context.descriptor();
    let unprivileged = ContextDescriptor::from(u64::from(good) & !(1 << 8));
    let invalid = ContextDescriptor::default();
    let error = refused(&mut guest, &[invalid, good], libc::EINVAL);
    assert!(matches!(error, Error::EmptySubmission { engine: RCS }));
    let error = refused(&mut guest, &[unprivileged], libc::EINVAL);
    assert!(matches!(error, Error::NotPrivileged { element: 0, .. }));
    let error = refused(&mut guest, &[good, unprivileged], libc::EINVAL);
    assert!(matches!(error, Error::NotPrivileged { element: 1, .. }));
    for mode in [
        AddressingMode::Advanced,
        AddressingMode::AdvancedAccessDirty,
    ] {
        let shared = ContextDescriptor::new(LRCA, 1, mode);
        let error = refused(&mut guest, &[shared], libc::EINVAL);
        assert!(matches!(error, Error::AddressingMode { .. }));
    }
    assert_eq!(guest.submit(&[context]).unwrap().sequence, 0);
}

#[test]
fn a_submission_is_queued_whole_or_not_at_all() {
    let (mut guest, context) = guest();
    let unmapped = ContextDescriptor::new(0xfffff, 2, AddressingMode::Legacy64);
    let elements = [context.descriptor(), unmapped];
    let error = refused(&mut guest, &elements, libc::EINVAL);
    assert!(matches!(
        error,
        Error::RingContextUnmapped { lrca: 0xfffff }
    ));
    assert_eq!(guest.submit_and_run(&context).sequence, 0);
}

#[test]
fn structures_outside_the_graphics_memory() {
    for (field, value) in [
        (ring_context::START, 1023 << 12),
        (ring_context::START, 0xffff_f000),
        (ring_context::START, 0x2008),
        (ring_context::HEAD, 0x4000),
        (ring_context::TAIL, 0x4000),
        (ring_context::INDIRECT_CTX, 0xffff_f001),
        (ring_context::INDIRECT_CTX, 0x8041),
        (ring_context::BB_PER_CTX, 0xffff_f001),
    ] {
        let (mut guest, context) = guest();
        guest.set(&context, field, value);
        refused(&mut guest, &[context.descriptor()], libc::EINVAL);
    }
}

#[test]
fn a_ring_page_without_translation() {
    let (mut guest, context) = guest();
    guest.vgpu.write_ggtt_entry(2, 0).unwrap();
    let error = refused(&mut guest, &[context.descriptor()], libc::EFAULT);
    assert!(matches!(error, Error::BufferUnmapped { gma: 0x2000 }));
    assert_eq!(guest.vgpu.failsafe(), Some(FailsafeReason::GuestError));
}

#[test]
fn a_context_page_without_translation() {
    let (mut guest, context) = guest();
    guest.submit(&[context]).unwrap();
    guest.submit(&[context]).unwrap();
    guest.vgpu.write_ggtt_entry(LRCA + 9, 0).unwrap();
    let error = fails(&mut guest, libc::EFAULT);
    assert!(matches!(error, Error::ContextPageUnmapped { page: 9, .. }));
    assert_eq!(guest.vgpu.mmio_read(0x23a0), 7, "no event");
}

#[test]
fn a_context_that_cannot_be_written_back_is_scheduled_out() {
    let (mut guest, context) = guest();
    // With nothing to restore, the missing page is not found before the end.
    guest.set(&context, ring_context::CTX_CTRL, 0x0001_0001);
    guest.vgpu.write_ggtt_entry(LRCA + 9, 0).unwrap();
    guest.submit(&[context]).unwrap();
    let completion = guest.run(RCS);
    assert!(!completion.written_back);
    assert_eq!(completion.write_back.pages, 0);
    assert_eq!(completion.events, 2);
    assert_eq!(guest.get(&context, ring_context::HEAD), 0);
    assert_eq!(guest.get(&context, ring_context::CTX_CTRL), 0x0001_0001);
    assert_eq!(guest.vgpu.mmio_read(0x2034), common::REQUEST);
    let entry = entry(u64::from(LRCA) + 9);
    guest.vgpu.write_ggtt_entry(LRCA + 9, entry).unwrap();
    assert!(guest.submit_and_run(&context).written_back);
}

#[test]
fn a_queue_takes_so_many_workloads() {
    let mut guest = Guest::new(VgpuConfig {
        max_queued: 3,
        ..VgpuConfig::default()
    });
    let one = guest.context(RCS, LRCA, 1);
    let two = guest.context(RCS, LRCA + 32, 2);
    guest.submit(&[one, two]).unwrap();
    guest.take_trace();
    let error = guest.submit(&[one, two]).unwrap_err();
    assert!(matches!(
        error,
        Error::TooManyWorkloads {
            engine: RCS,
            limit: 3
        }
    ));
    assert_eq!(error.errno(), libc::EBUSY);
    assert_eq!(guest.vgpu.queued(RCS), 2);
    assert!(guest.take_trace().is_empty());
    assert_eq!(guest.submit(&[one]).unwrap().sequence, 2);
    assert_eq!(guest.submit(&[one]).unwrap_err().errno(), libc::EBUSY);
    let copy = guest.context(EngineId::Bcs, LRCA + 64, 3);
    guest.submit(&[copy]).unwrap();
    guest.run(RCS);
    guest.submit(&[one]).unwrap();
}

#[test]
fn guest_memory_that_is_gone() {
    let (mut guest, context) = guest();
    guest
        .vgpu
        .write_ggtt_entry(LRCA + 1, entry(NOWHERE))
        .unwrap();
    let error = refused(&mut guest, &[context.descriptor()], libc::EFAULT);
    assert!(matches!(
        error,
        Error::Read {
            gpa: 0x1_0000_0014,
            len: 4,
            ..
        }
    ));
    guest
        .vgpu
        .write_ggtt_entry(LRCA + 1, entry(u64::from(LRCA) + 1))
        .unwrap();
    guest.submit(&[context]).unwrap();
    guest
        .vgpu
        .write_ggtt_entry(LRCA + 9, entry(NOWHERE))
        .unwrap();
    fails(&mut guest, libc::EFAULT);
    assert_eq!(guest.vgpu.failsafe(), None);
}

#[test]
fn a_status_page_that_is_gone() {
    let (mut guest, context) = guest();
    guest.vgpu.write_ggtt_entry(1, entry(NOWHERE)).unwrap();
    guest.submit(&[context]).unwrap();
    let error = fails(&mut guest, libc::EFAULT);
    assert!(matches!(
        error,
        Error::Write {
            gpa: 0x1_0000_0040,
            len: 8,
            ..
        }
    ));
}

#[test]
fn the_kernel_passes_over_what_memory_refuses() {
    let mut guest = Guest::new(VgpuConfig {
        errors: ErrorMode::Kernel,
        ..VgpuConfig::default()
    });
    let context = guest.context(RCS, LRCA, 1);
    let root = PageTableRoot::FourLevel {
        pml4: NOWHERE << 12,
    };
    guest.set_root(&context, NOWHERE << 12);
    let page = |page: u32| GuestAddress(u64::from(LRCA + page) << 12);
    for at in [page(8), page(10)] {
        guest.memory.write_obj(0x55_u8, at).unwrap();
    }
    for page in [1, LRCA + 9] {
        guest.vgpu.write_ggtt_entry(page, entry(NOWHERE)).unwrap();
    }
    let completion = guest.submit_and_run(&context);
    // The pages around the one that is gone are copied both ways.
    assert!(completion.written_back);
    for at in [page(8), page(10)] {
        assert_ne!(guest.memory.read_obj::<u8>(at).unwrap(), 0x55);
    }
    assert_eq!(guest.get(&context, ring_context::HEAD), common::REQUEST);
    // The events are in the registers at least, and the tables map nothing.
    assert_eq!((completion.events, guest.vgpu.mmio_read(0x23a0)), (2, 1));
    assert_eq!(guest.vgpu.shadowed_tables(), 1);
    assert_eq!(guest.vgpu.translate(root, 0), None);
    // What has no translation is an error in the kernel too.
    guest.vgpu.write_ggtt_entry(LRCA + 9, 0).unwrap();
    guest.submit(&[context]).unwrap();
    fails(&mut guest, libc::EFAULT);
}

#[test]
fn an_engine_fault_writes_nothing_back_and_tells_nothing() {
    let (mut guest, context) = guest();
    guest.submit(&[context]).unwrap();
    guest.submit(&[context]).unwrap();
    let context_gpa = u64::from(LRCA) << 12;
    let before = guest.bytes(context_gpa, 22 * 4096);
    let error = guest.vgpu.run_next(RCS, &mut FaultyEngine).unwrap_err();
    assert_eq!(error.errno(), libc::EIO);
    assert_eq!(guest.vgpu.queued(RCS), 0);
    assert!(guest.bytes(context_gpa, 22 * 4096) == before);
    // Only that it became active was told.
    assert_eq!(guest.vgpu.mmio_read(0x23a0), 0);
    let second: u64 = guest.memory.read_obj(GuestAddress(0x1048)).unwrap();
    assert_eq!(second, 0);
}

#[test]
fn a_reset_makes_an_engine_usable_again() {
    let (mut guest, context) = guest();
    guest.submit(&[context]).unwrap();
    guest.vgpu.run_next(RCS, &mut FaultyEngine).unwrap_err();
    guest.vgpu.mmio_write(0x2230, 1).unwrap();
    guest.vgpu.reset_engine(RCS);
    assert_eq!(guest.vgpu.mmio_read(0x2234), 0);
    assert_eq!(guest.submit_and_run(&context).events, 2);
}

#[test]
fn slots_fill_up_when_workloads_fail_before_their_end() {
    let (mut guest, context) = guest();
    let other = guest.context(RCS, LRCA + 32, 2);
    for context in [context, other] {
        guest.submit(&[context]).unwrap();
        guest.vgpu.run_next(RCS, &mut FaultyEngine).unwrap_err();
    }
    assert_eq!(guest.vgpu.mmio_read(0x2234) & 0x4, 0x4);
    guest.submit(&[context]).unwrap();
    let error = fails(&mut guest, libc::EINVAL);
    assert!(matches!(error, Error::QueueFull { engine: RCS }));
}

#[test]
fn engines_do_not_share_their_queues() {
    let (mut guest, context) = guest();
    let copy = guest.context(EngineId::Bcs, LRCA + 32, 2);
    guest.submit(&[copy]).unwrap();
    guest.submit(&[context]).unwrap();
    guest.vgpu.run_next(RCS, &mut FaultyEngine).unwrap_err();
    assert_eq!(guest.vgpu.queued(EngineId::Bcs), 1);
    assert_eq!(guest.run(EngineId::Bcs).sequence, 0);
    assert!(guest
        .vgpu
        .run_next(EngineId::Bcs, &mut SimulatedEngine::without_commands())
        .unwrap()
        .is_none());
}

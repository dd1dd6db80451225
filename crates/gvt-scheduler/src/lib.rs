// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A GVT workload scheduler shim: GPU contexts, page tables and execlists over any guest memory.
//!
//! # What for
//! i915 GVT-g gave a virtual machine a share of an Intel GPU of generation 8 or 9: it took the guest's
//! submissions, copied the context of each into a shadow of the host's, had the GPU execute it and
//! copied the result back. This crate does what lies between the guest's register writes and the GPU,
//! in a user-space process and over any memory that implements [`vm_memory::Bytes`]: a
//! `GuestMemoryMmap`, or an I/O address space that may lose its mappings at any time. It makes the
//! kernel's accesses to guest memory, except those of the command parser, in the kernel's order, and can
//! count them; pages of a context that are adjacent in guest memory are copied by one access.
//!
//! # How it works
//! A [`Vgpu`] is given the guest's writes: to registers, to the GGTT and to page tables. The fourth
//! dword to a submission port (ELSP) creates a workload for each of the two context descriptors:
//!
//! | step | guest memory |
//! |---|---|
//! | create | the ring context is read field by field; written entries of known page tables are read again, tables of a new root are read whole and the pages they map are pinned through [`page_pin::PinPages`] |
//! | scan | the commands between head and tail of the ring and the indirect context batch are copied, and judged by a [`CommandAuditor`], which may read and keep batches in the GGTT |
//! | populate | the context is copied into the [`ShadowImage`]: fields, the rest of page 1, and the other pages in [`Runs`] |
//! | prepare | entries of page tables that were written meanwhile are read again; the execlist is scheduled in; an event goes to the status page |
//! | execute | an [`Engine`] executes the workload on the image; what its commands read and write goes through the GGTT and the shadow of the page tables ([`EngineMemory`]) |
//! | complete | pages, head, context control, time stamp and the rest of page 1 are written back; the execlist is scheduled out with up to two events |
//!
//! Those from populate on are [`Vgpu::run_next`]. The commands are scanned at once if the engine's queue is
//! empty, otherwise when it is the workload's turn. Whose turn it is among several vGPUs is for
//! [`policy`] to say, which the caller asks.
//!
//! # Example
//! A guest with one context on the blitter, made by hand:
//! ```
//! use gvt_scheduler::{
//!     ring_context, ring_register, AddressingMode, ContextDescriptor, CsbEvent, EngineId,
//!     SimulatedEngine, Vgpu, VgpuConfig,
//! };
//! use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)])?;
//! let mut vgpu = Vgpu::new(memory.clone(), (), (), VgpuConfig::default());
//!
//! // Graphics pages 1 (status page), 2 (ring), 8 and 9 (context) are guest pages 1, 2, 8 and 9.
//! for page in [1, 2, 8, 9] {
//!     vgpu.write_ggtt_entry(page, u64::from(page) << 12 | 1)?;
//! }
//! for (field, value) in [(ring_context::TAIL, 160), (ring_context::START, 2 << 12)] {
//!     memory.write_obj::<u32>(value, GuestAddress(0x9000 + field as u64))?;
//! }
//! let engine = EngineId::Bcs;
//! vgpu.mmio_write(engine.mmio_base() + ring_register::HWS_PGA, 1 << 12)?;
//!
//! let context = u64::from(ContextDescriptor::new(8, 42, AddressingMode::Legacy64));
//! for dword in [0, 0, (context >> 32) as u32, context as u32] {
//!     vgpu.mmio_write(engine.mmio_base() + ring_register::ELSP, dword)?;
//! }
//! let completion = vgpu.run_next(engine, &mut SimulatedEngine::new())?.expect("one was queued");
//! assert_eq!(completion.interrupts, 2);
//!
//! // The second event in the context status buffer of the status page.
//! let event: u64 = memory.read_obj(GuestAddress(0x1000 + 0x48))?;
//! let complete = CsbEvent::CONTEXT_COMPLETE | CsbEvent::ACTIVE_TO_IDLE;
//! assert_eq!(CsbEvent::from(event), CsbEvent::new(complete, 42));
//! let head: u32 = memory.read_obj(GuestAddress(0x9000 + ring_context::HEAD as u64))?;
//! assert_eq!(head, 160);
//! # Ok(())
//! # }
//! ```
//!
//! # Engines
//! [`SimulatedEngine`] executes the MI commands with which batches are started, memory is written and the
//! driver is told, and documents what it makes of a context, to the byte. [`RecordingEngine`] keeps what another
//! engine is given. Whatever executes, interrupts that commands ask for are in
//! [`Completion::user_interrupts`], so only a workload that has ended well has any.
//!
//! # Guests that break the rules
//! Commands are judged before an engine gets them, by [`MiAuditor`] unless [`Vgpu::set_auditor`] says
//! otherwise. A guest whose commands are refused, or whose buffers have no translation, is not served any
//! more: the vGPU is in [failsafe mode](Vgpu::failsafe) until the device is [reset](Vgpu::reset).
//!
//! # Gotchas
//! - Nothing traps: a user-space process sees no writes of the guest to its page tables, so the caller
//!   says where it wrote: now and then in one go ([`Vgpu::page_table_written`]), or each write as it is
//!   trapped ([`Vgpu::page_table_trapped`]). A write that goes unsaid, an engine's for one, is not seen until
//!   the root is released and used again.
//! - The pages of a context that runs twice in a row are read once, as in the kernel since 5.8. A
//!   guest that changes them in between without touching the GGTT is not seen;
//!   [`VgpuConfig::skip_unchanged`] turns that off.
//! - Roots of page tables stay known until [`Vgpu::release_page_tables`], those of a refused submission
//!   too. Their shadow takes host memory in proportion: 4 KiB for a table, of which there are at most
//!   [`VgpuConfig::max_page_tables`], and some 200 bytes for a page that is mapped.
//! - A queue takes [`VgpuConfig::max_queued`] workloads: the caller runs what was submitted.
//! - An unmap notice must not wait for the thread that runs a workload: the vGPU is one `&mut` object,
//!   so hand [`Vgpu::release_pins`] to its owner.
//!
//! # Where it differs from the kernel
//! - Accesses that fail are errors (`EFAULT`); the kernel ignores most of them, as does
//!   [`ErrorMode::Kernel`]. They are no reason for failsafe mode.
//! - The last page of a context is always copied. The kernel's loop loses it when it is not adjacent to
//!   the page before; [`CopyMode::UpstreamTail`] does so for comparison.
//! - The command parser's tables of registers and of the commands of the pipelines are left out, and so are
//!   its reads of registers of the context that a command loads (one dword each, generation 9). A batch in
//!   the GGTT is read page by page, once; the kernel reads each command of it, and then the whole. A command that
//!   loads PDPs changes nothing, and they are not written back.
//! - Requests for an interrupt stay in the copied ring: the engine says how many it has executed. The kernel
//!   takes them out, as its GPU would interrupt the host.
//! - In failsafe mode nothing runs that was queued; the kernel lets other engines go on.
//! - A submission queues both of its workloads or none; the kernel keeps the first if the second fails.
//! - A HEAD or TAIL beyond the ring is refused (`EINVAL`).
//! - A skip ends with a GGTT write to any page of the context, not only to its first one.
//! - A context page without translation when it is written back: as in the kernel the rest of the context
//!   is not written and the guest is told of the end; [`Completion::written_back`] says so, and the next
//!   populate is not skipped.
//! - A page table entry that cannot be shadowed when it is read again (page of 1 GiB, page that cannot be
//!   pinned, too many tables) is not present, and is an error of every submission whose root reaches it,
//!   which reads it once more, until it is mended. Other submissions are not concerned.
//! - A page that is mapped in two sizes is pinned and mapped for the device in each; the kernel maps it anew in
//!   the new size, below whoever uses the old one.
//! - A mapped page that was lost to an unmap ([`Vgpu::release_pins`]) is pinned again by the next
//!   workload whose root maps it, when it is created or runs, or refuses that (`ENXIO`).
//! - The workloads of a queue are limited (`EBUSY`), and so are page tables (`ENOMEM`). Where there is no memory for what
//!   a guest decides the size or the number of, that is an error ([`Error::NoMemory`]).
//! - Left out besides: register tables, out-of-sync page tables, the host's observation registers, pins of
//!   what the GGTT maps.

#![forbid(unsafe_code)]

mod audit;
mod command;
mod context;
mod descriptor;
mod engine;
mod error;
mod execlist;
mod ggtt;
mod guest_dma;
mod memory;
mod observe;
pub mod policy;
mod ppgtt;
mod regs;
mod ring;
pub mod trace;
mod vgpu;
mod workload;

pub use audit::{
    CommandAuditor, CommandError, CommandPlace, CommandProblem, CopiedBatch, MiAuditor, Scan,
};
pub use command::Gtt;
pub use context::{ContextPages, CopyMode, CopyStats, Run, Runs, ShadowImage};
pub use descriptor::{AddressingMode, ContextDescriptor};
pub use engine::{
    Engine, EngineJob, EngineMemory, Executed, RecordedJob, RecordingEngine, SimulatedEngine,
};
pub use error::{Cause, EngineFault, Error, Result};
pub use execlist::CsbEvent;
pub use ggtt::{Ggtt, GmWindow, GmWindows, HalfEntry};
pub use guest_dma::{ErrorMode, GuestDma};
pub use observe::{Access, AccessCounts, AccessKind, Counts, Observer, Step};
pub use ppgtt::{DeviceMap, PageTableRoot};
pub use regs::{interrupt_register, ring_context, ring_register, EngineId, Generation, PAGE_SIZE};
pub use ring::Ring;
pub use vgpu::{Completion, FailsafeReason, Submission, Vgpu, VgpuConfig};

/// Examples of the README are tested as those here are.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the DMA path costs, beside what a VMM uses today.
//!
//! # What for
//!
//! To say with numbers what an access, a guard, a map and an unmap cost, against those who do the
//! same work: a page loop over `GuestMemoryMmap` (the user-space shape of `kvm_read_guest`),
//! `IommuMemory`, a tree behind a lock, and the bare copy that nobody can beat.
//!
//! # How it works
//!
//! - [`candidates`] are those compared, each by one call that is not inlined; [`world`] gives them
//!   the same memory and mappings, [`workload`] the same addresses.
//! - [`compare`] has them take turns and relates them round by round, so that a change of the
//!   machine's load hits all; where the rounds do not agree it says `noisy`.
//! - [`parallel`], [`chain`], [`churn`], [`dirty`], [`gvt`] and [`footprint`] measure what is no single
//!   read: threads (on [`cpus`] of their own), virtqueues, changes of mappings, dirty pages, GPU
//!   workloads, bytes.
//! - [`bars`] is the table of what has to be reached; `ci/bench-bars` measures it.
//! - The groups (`cargo bench -p benches --bench peers`) go through the [`harness`], which keeps a
//!   [`record`]; `ci/bench-report` makes `docs/benchmarks.md` of it, see [`report`].
//!
//! # Gotchas
//!
//! - Figures are [`cycles::UNIT`] of the time stamp counter, which does not change with the clock of
//!   the core: ratios are the same, counts of core cycles are not.
//! - Ratios are of cargo's bench profile as the workspace has it: optimized, no LTO. What vm-memory
//!   costs depends on what gets inlined where it is called. It is generic code, so it is compiled into
//!   this package, one function a peer, and everything is inlined into that which the optimizer wants:
//!   its fastest form. The same call spread over a VMM's own layers can cost several times as much.
//! - A binary counts bytes only where it makes
//!   [`CountingAllocator`](footprint::CountingAllocator) its allocator.

pub mod bars;
pub mod candidates;
pub mod chain;
pub mod churn;
pub mod compare;
pub mod cpus;
pub mod cycles;
pub mod dirty;
pub mod footprint;
pub mod gvt;
pub mod harness;
pub mod parallel;
pub mod record;
pub mod report;
pub mod stats;
pub mod workload;
pub mod world;

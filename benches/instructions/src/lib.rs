// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How many instructions the operations of the DMA path take, against figures that are kept.
//!
//! # What for
//!
//! Times depend on what else the machine does, counts of instructions do not: they say on any
//! machine, in one run, whether an operation has become longer. `ci/instructions` asks that.
//!
//! # How it works
//!
//! - `operations.rs` has the operations; gungraun runs each under callgrind, which counts.
//! - [`summary`] reads what gungraun says, [`figures`] what is kept in `benches/instructions.txt`.
//! - [`comparison`] sets one beside the other.
//!
//! # Gotchas
//!
//! - What is counted depends on what the compiler inlines and on the C library: where these are not
//!   those that the figures were [made with](figures::Figures::made_with), the
//!   [tolerance](comparison::Tolerance) is wider.
//! - Fewer instructions need not be faster.

pub mod comparison;
pub mod figures;
pub mod summary;

/// How often an operation runs while its instructions are counted.
pub const OPERATIONS: u64 = 1000;

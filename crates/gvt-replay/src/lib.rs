// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Replays recorded GPU work through the whole stack and checks every byte of guest memory.
//!
//! # What for
//!
//! The other crates of this workspace are tested one by one. This one puts them together as a VMM
//! and a device model do, gives them what real programs made a real driver submit, and compares all
//! of guest memory with a model that shares none of their code. On the way it counts every access
//! to guest memory, which is what the copies in runs are about.
//!
//! # How it works
//!
//! - [`aub`] parses a recording: memory writes, register writes and register polls.
//! - A [`Contiguity`] profile says how the pages of context objects lie in the guest; a
//!   [`Placement`] finds a guest page for every physical page of the recording; a [`Plan`] is the
//!   recording with the guest's own addresses everywhere.
//! - A [`Machine`] is a virtual machine: memory slots in memfds, a container they are mapped
//!   through, an external user of the device's group, and a vGPU that runs on it.
//! - A [`Replay`] plays a plan on one or more machines in a [`Mode`] of copying, and compares each
//!   guest's memory with the [`Model`].
//! - [`ProfileFigures`] say what a profile makes of the copies and what the kernel's loop would
//!   have lost; a [`Report`] shows everything.
//!
//! # Example
//!
//! ```
//! use gvt_replay::{Contiguity, Mode, Model, Plan, Replay, Trace};
//!
//! let trace = Trace::from_bytes(include_bytes!("../data/h264-vcs-skl.aub.xz"))?;
//! let profile = Contiguity::bundled("consecutive").expect("a bundled profile");
//! let plan = Plan::new(&trace, &profile)?;
//! let model = Model::after(&plan)?;
//! let outcome = Replay::new(&plan, &model).run(Mode::Skip, &mut |_| Ok(()))?;
//! assert!(outcome.verified());
//! # Ok::<(), gvt_replay::Error>(())
//! ```
//!
//! # Gotchas
//!
//! - Contiguity is never the recording's: the recorder hands out consecutive pages. It is that of
//!   the profile, which was measured elsewhere.
//! - Only what the bundled kinds of recordings use is replayed: one context a submission, 4-level
//!   page tables of 4 KiB pages. Everything else is refused with its byte offset.

#![deny(unsafe_code)]

#[cfg(not(target_os = "linux"))]
compile_error!("gvt-replay keeps guest memory in memfds and is built for Linux only");

pub mod access_trace;
pub mod aub;
pub mod contiguity;
pub mod decompress;
mod error;
pub mod expected;
pub mod inject;
pub mod layout;
pub mod machine;
pub mod model;
pub mod path;
pub mod plan;
pub mod profiles;
pub mod relocate;
pub mod replay;
pub mod report;
pub mod side_by_side;
mod survey;
pub mod timing;
pub mod verify;

pub use aub::Trace;
pub use contiguity::Contiguity;
pub use error::{Error, Result};
pub use layout::Placement;
pub use machine::Machine;
pub use model::Model;
pub use path::Holds;
pub use plan::Plan;
pub use profiles::ProfileFigures;
pub use replay::{Mode, Replay};
pub use report::Report;
pub use side_by_side::SideBySide;

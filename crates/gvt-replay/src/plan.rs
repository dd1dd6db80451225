// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What one virtual machine does to replay a trace: its guest's writes, GGTT updates, register
//! accesses and submissions, all with the guest's own addresses.

use crate::aub::Trace;
use crate::contiguity::Contiguity;
use crate::error::{Error, Result};
use crate::layout::{guest_pages, Placement};
use crate::relocate::Relocator;
use crate::survey::Survey;

/// Pages of a gen9 render engine's context object that are copied: 2 to 21.
pub const RCS_COPIED_PAGES: usize = 20;

/// An engine as the recorder's register offsets name it.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct EngineInfo {
    /// Its name.
    pub name: &'static str,
    /// Offset of its first register.
    pub base: u32,
    /// Pages of its gen9 context object that are copied besides page 1.
    pub copied_pages: usize,
}

/// The engines of a gen9 GPU.
pub const ENGINES: [EngineInfo; 5] = [
    EngineInfo {
        name: "RCS",
        base: 0x2000,
        copied_pages: RCS_COPIED_PAGES,
    },
    EngineInfo {
        name: "VCS",
        base: 0x12000,
        copied_pages: 0,
    },
    EngineInfo {
        name: "VECS",
        base: 0x1a000,
        copied_pages: 0,
    },
    EngineInfo {
        name: "VCS2",
        base: 0x1c000,
        copied_pages: 0,
    },
    EngineInfo {
        name: "BCS",
        base: 0x22000,
        copied_pages: 0,
    },
];

/// Something the guest does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Write memory, within one page.
    Write {
        /// Guest physical address.
        gpa: u64,
        /// What to write.
        data: Vec<u8>,
    },
    /// Write a GGTT entry.
    GgttEntry {
        /// Its index.
        index: u32,
        /// Its value; the address in it is guest physical.
        value: u64,
    },
    /// Write a register that is not a submission port.
    RegisterWrite {
        /// Offset of the register.
        register: u32,
        /// Value.
        value: u32,
    },
    /// Wait until a register, under a mask, has a value.
    RegisterPoll {
        /// Offset of the register.
        register: u32,
        /// Bits that count.
        mask: u32,
        /// Their value.
        expected: u32,
    },
    /// Submit one context to an engine.
    Submit {
        /// The engine.
        engine: &'static EngineInfo,
        /// The four dwords in the order they are written to the engine's submission port.
        dwords: [u32; 4],
    },
}

impl Action {
    pub(crate) fn is_submission(&self) -> bool {
        matches!(self, Action::Submit { .. })
    }
}

/// Something the guest does, and where the trace says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Byte offset of the packet in the decompressed trace.
    pub offset: u64,
    /// What the guest does.
    pub action: Action,
}

/// A context object in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextObject {
    /// The engine it runs on.
    pub engine: &'static EngineInfo,
    /// GGTT page number of the object.
    pub lrca: u32,
    /// Guest physical addresses of the pages that are copied: page 2 and on.
    pub pages: Vec<u64>,
}

/// What one virtual machine does to replay a trace.
///
/// ```
/// use gvt_replay::aub::Trace;
/// use gvt_replay::{Contiguity, Plan};
///
/// let trace = Trace::bundled()?;
/// let profile = Contiguity::bundled("as-found").expect("a bundled profile");
/// let plan = Plan::new(&trace, &profile)?;
/// assert_eq!((plan.submissions(), plan.contexts().len()), (202, 34));
/// # Ok::<(), gvt_replay::Error>(())
/// ```
#[derive(Debug)]
pub struct Plan {
    events: Vec<Event>,
    contexts: Vec<ContextObject>,
    submissions: u64,
    modelled_rings: bool,
}

impl Plan {
    /// Lays the trace out in a guest whose context objects follow `profile`.
    ///
    /// # Errors
    ///
    /// What a trace can ask for and this replay does not do: see [`Error`].
    pub fn new(trace: &Trace, profile: &Contiguity) -> Result<Self> {
        let survey = Survey::of(trace)?;
        if survey.submissions() == 0 {
            return Err(Error::NoSubmission {
                offset: trace.len(),
            });
        }
        let objects: Vec<Vec<u64>> = survey
            .contexts()
            .iter()
            .map(|context| context.copied.clone())
            .filter(|pages| !pages.is_empty())
            .collect();
        let placement = Placement::new(&objects, survey.pages(), profile).ok_or_else(|| {
            Error::GuestMemoryFull {
                offset: trace.len(),
                pages: guest_pages(),
            }
        })?;
        Ok(Plan {
            events: Relocator::new(&survey, &placement).events(trace)?,
            contexts: survey
                .contexts()
                .iter()
                .map(|context| ContextObject {
                    engine: context.engine,
                    lrca: context.lrca,
                    pages: context
                        .copied
                        .iter()
                        .filter_map(|page| placement.gpa(page << 12))
                        .collect(),
                })
                .collect(),
            submissions: survey.submissions(),
            modelled_rings: survey.has_recorder_rings(),
        })
    }

    /// What the guest does, in order.
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    /// The context objects in the order of their first submission.
    pub fn contexts(&self) -> &[ContextObject] {
        &self.contexts
    }

    /// Whether context pages are copied at all: only a render engine's contexts have such pages.
    pub fn copies_context_pages(&self) -> bool {
        self.contexts
            .iter()
            .any(|context| !context.pages.is_empty())
    }

    /// How many workloads are submitted.
    pub fn submissions(&self) -> u64 {
        self.submissions
    }

    /// Whether rings of the recorder's 16 bytes were made requests of
    /// [`REQUEST_BYTES`](crate::relocate::REQUEST_BYTES).
    pub fn modelled_rings(&self) -> bool {
        self.modelled_rings
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The accesses the bundled recording must make, worked out by hand from what a workload does.

use gvt_scheduler::AccessKind;

use crate::replay::{Count, Mode};

const WORKLOADS: u64 = 202;
const CONTEXTS: u64 = 34;
const COPIED_PAGES: u64 = 20;
const CONTEXT_BYTES: u64 = COPIED_PAGES * 4096;
const PAGE1_BYTES: u64 = 4096 - 208;
const REQUEST_BYTES: u64 = 160;
/// 4-byte reads of the ring context: 7 and the 8 page directory pointers to create a workload, 5
/// to populate its context.
const CONTEXT_DWORDS: u64 = 7 + 8 + 5;
/// 43 tables are read whole when they become known, and 2186 of their entries again.
const PAGE_TABLE_ENTRIES: u64 = 43 * 512 + 2186;
/// HEAD, CTX_CTRL, TIMESTAMP.
const COMPLETION_DWORDS: u64 = 3;
/// Idle to active, complete and active to idle: 8 bytes and the 4 bytes of the pointer each.
const CONTEXT_EVENTS: u64 = 2;

/// The accesses of `kind` that one vGPU makes when it replays the bundled recording in a guest
/// whose context objects are consecutive. `None` for a mode that is not
/// [correct](Mode::CORRECT).
///
/// ```
/// use gvt_replay::expected::bundled;
/// use gvt_replay::Mode;
/// use gvt_scheduler::AccessKind;
///
/// let pages = |mode| bundled(mode, AccessKind::ContextPage).map(|count| (count.reads, count.writes));
/// assert_eq!(pages(Mode::Page), Some((3360, 4040)));
/// assert_eq!(pages(Mode::Run), Some((168, 202)));
/// assert_eq!(pages(Mode::Skip), Some((34, 202)));
/// ```
pub fn bundled(mode: Mode, kind: AccessKind) -> Option<Count> {
    // The first run of a context begins without an image: nothing is read.
    let populates = match mode {
        Mode::Page | Mode::Run => WORKLOADS - CONTEXTS,
        // Every context runs several times without another in between: its second run reads.
        Mode::Skip => CONTEXTS,
        Mode::Upstream => return None,
    };
    let calls_a_copy = if mode == Mode::Page { COPIED_PAGES } else { 1 };
    let reads = |reads, read_bytes| Count {
        reads,
        read_bytes,
        ..Count::default()
    };
    Some(match kind {
        AccessKind::ContextDword => {
            reads(WORKLOADS * CONTEXT_DWORDS, WORKLOADS * CONTEXT_DWORDS * 4)
        }
        AccessKind::Ring => reads(WORKLOADS, WORKLOADS * REQUEST_BYTES),
        AccessKind::Page1 => Count {
            reads: WORKLOADS,
            read_bytes: WORKLOADS * PAGE1_BYTES,
            writes: WORKLOADS,
            written_bytes: WORKLOADS * PAGE1_BYTES,
        },
        AccessKind::ContextPage => Count {
            reads: populates * calls_a_copy,
            read_bytes: populates * CONTEXT_BYTES,
            writes: WORKLOADS * calls_a_copy,
            written_bytes: WORKLOADS * CONTEXT_BYTES,
        },
        AccessKind::PageTable => reads(PAGE_TABLE_ENTRIES, PAGE_TABLE_ENTRIES * 8),
        AccessKind::Completion => Count {
            writes: WORKLOADS * (COMPLETION_DWORDS + CONTEXT_EVENTS * 2),
            written_bytes: WORKLOADS * (COMPLETION_DWORDS * 4 + CONTEXT_EVENTS * 12),
            ..Count::default()
        },
        // The recorded commands are not executed.
        AccessKind::Engine => Count::default(),
    })
}

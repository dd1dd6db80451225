// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The transfer of a context's pages, in both directions.

use vm_memory::GuestAddress;

use crate::context::runs::{CopyMode, Run, Runs, FIRST_PAGE};
use crate::error::{Error, Result};
use crate::ggtt::Ggtt;
use crate::guest_dma::{ErrorMode, GuestDma, Port};
use crate::observe::{AccessKind, Observer};
use crate::regs::{PAGE_SHIFT, PAGE_SIZE};

/// What a copy of context pages took.
///
/// ```
/// use gvt_scheduler::CopyStats;
///
/// assert_eq!(CopyStats { calls: 4, pages: 20 }.pages_per_call(), Some(5.0));
/// assert_eq!(CopyStats::default().pages_per_call(), None);
/// ```
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct CopyStats {
    /// Accesses to guest memory.
    pub calls: u64,
    /// Pages they copied.
    pub pages: u64,
}

impl CopyStats {
    /// Mean length of a run; `None` when nothing was copied.
    pub fn pages_per_call(&self) -> Option<f64> {
        (self.calls > 0).then(|| self.pages as f64 / self.calls as f64)
    }

    fn count(&mut self, run: &Run) {
        self.calls += 1;
        self.pages += run.pages as u64;
    }
}

/// The pages `2..n` of a context object: the engine context behind the ring context.
///
/// ```
/// use gvt_scheduler::{ContextPages, CopyMode, Ggtt};
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
///
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
/// memory.write_slice(b"engine state", GuestAddress(0x5000)).unwrap();
/// let mut ggtt = Ggtt::new(16);
/// ggtt.write_entry(8 + 2, 0x5000 | 1).unwrap();
/// ggtt.write_entry(8 + 3, 0x6000 | 1).unwrap();
///
/// let context = ContextPages::new(&ggtt, 8, 4);
/// let mut pages = [0; 2 * 4096];
/// let stats = context.populate(&memory, CopyMode::Coalesced, &mut pages, &mut ()).unwrap();
/// assert_eq!((stats.calls, stats.pages), (1, 2));
/// assert!(pages.starts_with(b"engine state"));
/// ```
#[derive(Clone, Copy, Debug)]
pub struct ContextPages<'a> {
    ggtt: &'a Ggtt,
    lrca: u32,
    n: usize,
    errors: ErrorMode,
}

impl<'a> ContextPages<'a> {
    /// The pages of the object of `n` pages that begins at GGTT page `lrca`.
    pub fn new(ggtt: &'a Ggtt, lrca: u32, n: usize) -> Self {
        Self {
            ggtt,
            lrca,
            n,
            errors: ErrorMode::Strict,
        }
    }

    /// What becomes of accesses that guest memory refuses; [`ErrorMode::Strict`] unless it is set.
    pub fn errors(self, errors: ErrorMode) -> Self {
        Self { errors, ..self }
    }

    /// The runs in which the pages are copied.
    pub fn runs(&self, mode: CopyMode) -> Runs<'a> {
        Runs::new(*self, mode)
    }

    /// Copies the pages from guest memory into `pages`, which holds pages `2..n` without a gap.
    ///
    /// # Errors
    ///
    /// [`Error::BufferSize`] (EINVAL): `pages` has another size. [`Error::ContextPageUnmapped`] or, unless `errors`
    /// ignores that, [`Error::Read`] (EFAULT); runs before it have been copied.
    pub fn populate<M: GuestDma, O: Observer>(
        &self,
        memory: &M,
        mode: CopyMode,
        pages: &mut [u8],
        observer: &mut O,
    ) -> Result<CopyStats> {
        self.check_size(pages.len())?;
        let mut port = self.port(memory, observer);
        self.transfer(mode, |run, at| {
            let bytes = &mut pages[at];
            match run.descending {
                false => port.read(AccessKind::ContextPage, run.gpa, bytes),
                true => port.read_descending(AccessKind::ContextPage, run.gpa, bytes),
            }
        })
    }

    /// Copies `pages`, which holds pages `2..n` without a gap, to guest memory.
    ///
    /// # Errors
    ///
    /// As [`populate`](Self::populate), with [`Error::Write`] (EFAULT).
    pub fn write_back<M: GuestDma, O: Observer>(
        &self,
        memory: &M,
        mode: CopyMode,
        pages: &[u8],
        observer: &mut O,
    ) -> Result<CopyStats> {
        self.check_size(pages.len())?;
        let mut port = self.port(memory, observer);
        self.transfer(mode, |run, at| {
            let bytes = &pages[at];
            match run.descending {
                false => port.write(AccessKind::ContextPage, run.gpa, bytes),
                true => port.write_descending(AccessKind::ContextPage, run.gpa, bytes),
            }
        })
    }

    fn port<'p, M, O>(&self, memory: &'p M, observer: &'p mut O) -> Port<'p, M, O> {
        Port {
            memory,
            observer,
            errors: self.errors,
        }
    }

    pub(super) fn lrca(&self) -> u32 {
        self.lrca
    }

    /// The number behind the last page.
    pub(super) fn end(&self) -> usize {
        self.n
    }

    pub(super) fn translate(&self, page: usize) -> Option<GuestAddress> {
        let gma = u64::from(self.lrca).checked_add(page as u64)?;
        self.ggtt.translate(gma.checked_mul(1 << PAGE_SHIFT)?)
    }

    /// Calls `copy` with each run and where its bytes are in the contiguous pages.
    fn transfer(
        &self,
        mode: CopyMode,
        mut copy: impl FnMut(&Run, std::ops::Range<usize>) -> Result<()>,
    ) -> Result<CopyStats> {
        let mut stats = CopyStats::default();
        for run in self.runs(mode) {
            let run = run?;
            let at = (run.first_page - FIRST_PAGE) * PAGE_SIZE;
            copy(&run, at..at + run.bytes())?;
            stats.count(&run);
        }
        Ok(stats)
    }

    fn check_size(&self, actual: usize) -> Result<()> {
        let expected = self.n.saturating_sub(FIRST_PAGE).saturating_mul(PAGE_SIZE);
        if actual != expected {
            return Err(Error::BufferSize { expected, actual });
        }
        Ok(())
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A whole context between guest and shadow image: fields, page 1 and the other pages.

use crate::context::{ContextPages, CopyMode, CopyStats, ShadowImage, SkipRecord};
use crate::error::Result;
use crate::guest_dma::{GuestDma, Port};
use crate::observe::{AccessKind, Observer};
use crate::regs::{ring_context, EngineId};
use crate::workload::ring_context::field;
use crate::workload::Workload;

/// Copies the context of one workload.
#[derive(Debug)]
pub(crate) struct ImageCopy<'a> {
    pub(crate) workload: &'a Workload,
    pub(crate) pages: ContextPages<'a>,
    pub(crate) mode: CopyMode,
    pub(crate) image: &'a mut ShadowImage,
}

impl ImageCopy<'_> {
    /// Copies the guest's context into the image. `skip` says what the image holds; without it all
    /// pages are read. Gives what was copied of the pages `2..n`, and whether that was skipped.
    pub(crate) fn populate<M: GuestDma, O: Observer>(
        &mut self,
        port: &mut Port<'_, M, O>,
        engine: EngineId,
        skip: Option<&mut SkipRecord>,
    ) -> Result<(CopyStats, bool)> {
        self.read_fields(port, engine)?;
        let rest = field(self.workload.ring_context, ring_context::SIZE);
        port.read(AccessKind::Page1, rest, self.image.page1_rest_mut())?;
        if self.image.pages().is_empty() {
            return Ok((CopyStats::default(), false));
        }
        match skip {
            Some(skip) => self.read_changed_pages(port, skip),
            None if self.image.restore_inhibit() => Ok((CopyStats::default(), false)),
            None => Ok((self.read_pages(port)?, false)),
        }
    }

    /// Copies the image back: the pages, then the fields that tell the guest how far the context
    /// is, then the rest of page 1.
    pub(crate) fn write_back<M: GuestDma, O: Observer>(
        &self,
        port: &mut Port<'_, M, O>,
    ) -> Result<CopyStats> {
        let stats =
            self.pages
                .write_back(port.memory, self.mode, self.image.pages(), port.observer)?;
        let at = self.workload.ring_context;
        for (offset, value) in [
            (ring_context::HEAD, self.workload.ring.tail()),
            (ring_context::CTX_CTRL, self.image.ctx_ctrl()),
            (ring_context::TIMESTAMP, self.image.ctx_timestamp()),
        ] {
            let bytes = value.to_le_bytes();
            port.write(AccessKind::Completion, field(at, offset), &bytes)?;
        }
        let rest = field(at, ring_context::SIZE);
        port.write(AccessKind::Page1, rest, self.image.page1_rest())?;
        Ok(stats)
    }

    fn read_fields<M: GuestDma, O: Observer>(
        &mut self,
        port: &mut Port<'_, M, O>,
        engine: EngineId,
    ) -> Result<()> {
        let batches: &[usize] = if engine.has_workaround_batches() {
            &[
                ring_context::BB_PER_CTX,
                ring_context::INDIRECT_CTX,
                ring_context::INDIRECT_CTX_OFFSET,
            ]
        } else {
            &[]
        };
        let fields = [ring_context::CTX_CTRL]
            .iter()
            .chain(batches)
            .chain(&[ring_context::TIMESTAMP]);
        for &offset in fields {
            let at = field(self.workload.ring_context, offset);
            let value = port.read_u32(AccessKind::ContextDword, at)?;
            self.image.set_dword(offset, value);
        }
        Ok(())
    }

    fn read_changed_pages<M: GuestDma, O: Observer>(
        &mut self,
        port: &mut Port<'_, M, O>,
        skip: &mut SkipRecord,
    ) -> Result<(CopyStats, bool)> {
        let context = (self.workload.descriptor.lrca(), self.workload.ring_context);
        if self.image.restore_inhibit() {
            skip.forget();
            return Ok((CopyStats::default(), false));
        }
        if skip.holds(context.0, context.1) {
            return Ok((CopyStats::default(), true));
        }
        skip.forget();
        let stats = self.read_pages(port)?;
        skip.hold(context.0, context.1);
        Ok((stats, false))
    }

    fn read_pages<M: GuestDma, O: Observer>(
        &mut self,
        port: &mut Port<'_, M, O>,
    ) -> Result<CopyStats> {
        let pages = self.image.pages_mut();
        self.pages
            .populate(port.memory, self.mode, pages, port.observer)
    }
}

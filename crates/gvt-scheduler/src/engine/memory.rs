// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What an engine reaches of guest memory.

use vm_memory::GuestAddress;

use crate::command::Gtt;
use crate::error::{Error, Result};
use crate::ggtt::Ggtt;
use crate::guest_dma::{GuestDma, Port};
use crate::observe::{AccessKind, Observer};
use crate::ppgtt::{PageTableRoot, Ppgtt};
use crate::ring::page_pieces;

/// Guest memory through the translation tables of a job.
///
/// A vGPU gives its engine the GGTT and the shadow of the context's page tables, so an engine reaches
/// what these map of the memory the vGPU was made with, and nothing else. Each access is cut at pages of
/// 4 KiB; [`AccessKind::Engine`] counts the pieces.
///
/// ```
/// use gvt_scheduler::{EngineMemory, Gtt};
///
/// // `()` maps nothing.
/// let error = EngineMemory::read(&mut (), Gtt::Global, 0x1000, &mut [0; 4]).unwrap_err();
/// assert_eq!(error.to_string(), "GGTT address 0x1000 does not translate");
/// ```
pub trait EngineMemory {
    /// Fills `buf` from `gma`.
    ///
    /// # Errors
    ///
    /// [`Error::NotTranslated`] or [`Error::Read`] (EFAULT): of a part of it.
    fn read(&mut self, gtt: Gtt, gma: u64, buf: &mut [u8]) -> Result<()>;

    /// Writes `buf` to `gma`.
    ///
    /// # Errors
    ///
    /// [`Error::NotTranslated`] or [`Error::Write`] (EFAULT): of a part of it; pieces before that have been written.
    fn write(&mut self, gtt: Gtt, gma: u64, buf: &[u8]) -> Result<()>;
}

impl EngineMemory for () {
    fn read(&mut self, gtt: Gtt, gma: u64, _: &mut [u8]) -> Result<()> {
        Err(Error::NotTranslated { gtt, gma })
    }

    fn write(&mut self, gtt: Gtt, gma: u64, _: &[u8]) -> Result<()> {
        Err(Error::NotTranslated { gtt, gma })
    }
}

/// The memory of a vGPU, as the job of one context sees it.
#[derive(Debug)]
pub(crate) struct JobMemory<'a, M, O, G> {
    pub(crate) port: Port<'a, M, O>,
    pub(crate) ggtt: &'a Ggtt,
    pub(crate) ppgtt: &'a Ppgtt<G>,
    pub(crate) root: PageTableRoot,
}

impl<M, O, G> JobMemory<'_, M, O, G> {
    fn translate(&self, gtt: Gtt, gma: u64) -> Result<GuestAddress> {
        let gpa = match gtt {
            Gtt::Global => self.ggtt.translate(gma),
            Gtt::PerProcess => self.ppgtt.translate(self.root, gma),
        };
        gpa.ok_or(Error::NotTranslated { gtt, gma })
    }
}

impl<M: GuestDma, O: Observer, G> EngineMemory for JobMemory<'_, M, O, G> {
    fn read(&mut self, gtt: Gtt, gma: u64, mut buf: &mut [u8]) -> Result<()> {
        for (gma, len) in page_pieces(gma, buf.len()) {
            let (piece, rest) = buf.split_at_mut(len);
            let gpa = self.translate(gtt, gma)?;
            self.port.read(AccessKind::Engine, gpa, piece)?;
            buf = rest;
        }
        Ok(())
    }

    fn write(&mut self, gtt: Gtt, gma: u64, mut buf: &[u8]) -> Result<()> {
        for (gma, len) in page_pieces(gma, buf.len()) {
            let (piece, rest) = buf.split_at(len);
            let gpa = self.translate(gtt, gma)?;
            self.port.write(AccessKind::Engine, gpa, piece)?;
            buf = rest;
        }
        Ok(())
    }
}

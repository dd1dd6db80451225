// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Operations, and what comes out of them.

use std::fmt;

/// One call on a container, as plain numbers: it can be made again on a fresh one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// `VFIO_IOMMU_MAP_DMA`.
    Map(Map),
    /// `VFIO_IOMMU_UNMAP_DMA`.
    Unmap(Unmap),
    /// `VFIO_IOMMU_DIRTY_PAGES`.
    Dirty(Dirty),
    /// `VFIO_IOMMU_GET_INFO` with this `argsz`.
    Info(u32),
    /// `VFIO_CHECK_EXTENSION` of this extension.
    Extension(u32),
}

/// Arguments of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Map {
    pub argsz: u32,
    pub flags: u32,
    pub vaddr: u64,
    pub iova: u64,
    pub size: u64,
}

/// Arguments of an unmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Unmap {
    pub argsz: u32,
    pub flags: u32,
    pub iova: u64,
    pub size: u64,
    pub bitmap: Option<Bitmap>,
}

/// Arguments of a call about dirty pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Dirty {
    pub argsz: u32,
    pub flags: u32,
    pub iova: u64,
    pub size: u64,
    pub bitmap: Bitmap,
}

/// A bitmap that the call fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Bytes a bit stands for, as given.
    pub pgsize: u64,
    /// Bytes of the bitmap, as given.
    pub size: u64,
    /// What each word is before.
    pub fill: u64,
}

impl Bitmap {
    /// Words that are looked at afterwards: more than any range that succeeds needs.
    pub const WORDS: usize = 64;

    /// The words before the call.
    pub fn words(&self) -> Vec<u64> {
        vec![self.fill; Bitmap::WORDS]
    }
}

/// What a call has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// What it returned, or its errno.
    pub result: Result<i32, i32>,
    /// What the `size` of an unmap is afterwards.
    pub size: u64,
    /// The bitmap afterwards.
    pub words: Vec<u64>,
    /// The buffer of a `VFIO_IOMMU_GET_INFO` afterwards.
    pub info: Vec<u8>,
}

impl Outcome {
    /// A call that only succeeds or not.
    pub fn plain(result: Result<i32, i32>) -> Self {
        Outcome {
            result,
            size: 0,
            words: Vec::new(),
            info: Vec::new(),
        }
    }
}

/// Whoever can be asked to do operations, from an empty container on.
pub trait Machine {
    /// Does one.
    fn apply(&mut self, op: &Op) -> Outcome;
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Op::Map(map) => write!(
                f,
                "map argsz={} flags={:#x} vaddr={:#x} iova={:#x} size={:#x}",
                map.argsz, map.flags, map.vaddr, map.iova, map.size
            ),
            Op::Unmap(unmap) => {
                let Unmap { argsz, flags, .. } = unmap;
                let (iova, size) = (unmap.iova, unmap.size);
                write!(
                    f,
                    "unmap argsz={argsz} flags={flags:#x} iova={iova:#x} size={size:#x}"
                )?;
                unmap.bitmap.map_or(Ok(()), |bitmap| write!(f, " {bitmap}"))
            }
            Op::Dirty(dirty) => write!(
                f,
                "dirty argsz={} flags={:#x} iova={:#x} size={:#x} {}",
                dirty.argsz, dirty.flags, dirty.iova, dirty.size, dirty.bitmap
            ),
            Op::Info(argsz) => write!(f, "info argsz={argsz}"),
            Op::Extension(extension) => write!(f, "extension {extension}"),
        }
    }
}

impl fmt::Display for Bitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Bitmap { pgsize, size, fill } = self;
        write!(f, "bitmap pgsize={pgsize:#x} size={size:#x} fill={fill:#x}")
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.result {
            Ok(value) => write!(f, "{value}")?,
            Err(errno) => write!(f, "errno {errno}")?,
        }
        write!(f, " size={:#x}", self.size)?;
        // The words behind the range are as they were: the last of them stands for them.
        let untouched = self.words.last();
        let shown = self.words.iter().rposition(|word| Some(word) != untouched);
        if !self.words.is_empty() {
            write!(
                f,
                " words={:x?}",
                &self.words[..shown.map_or(1, |last| last + 2)]
            )?;
        }
        let shown = self.info.iter().rposition(|byte| *byte != INFO_FILL);
        let shown = &self.info[..shown.map_or(0, |last| last + 1)];
        if !shown.is_empty() {
            write!(f, " info={shown:02x?}")?;
        }
        Ok(())
    }
}

/// What each byte of the buffer of a `VFIO_IOMMU_GET_INFO` is before, `argsz` apart.
pub const INFO_FILL: u8 = 0xa5;

/// Bytes of that buffer.
pub const INFO_BYTES: usize = 512;

/// That buffer.
pub fn info_buffer(argsz: u32) -> Vec<u8> {
    let mut buffer = vec![INFO_FILL; INFO_BYTES];
    buffer[..4].copy_from_slice(&argsz.to_ne_bytes());
    buffer
}

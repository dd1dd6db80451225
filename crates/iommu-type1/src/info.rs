// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What `VFIO_IOMMU_GET_INFO` says of a space, as values and as the bytes of the kernel's structs.

use std::ops::RangeInclusive;

use checked_sync::lock;

use crate::{Error, IoAddressSpace, Result};

/// Most bytes of a bitmap of dirty pages, as the kernel says it.
pub(crate) const MAX_DIRTY_BITMAP_SIZE: u64 = 256 << 20;

/// Bytes of `struct vfio_iommu_type1_info`, and of it without its last two fields, with which it was first
/// published.
const INFO_SIZE: usize = 24;
const INFO_MIN_SIZE: usize = 16;
/// Bytes of `struct vfio_info_cap_header`.
const HEADER_SIZE: usize = 8;
/// What each capability is aligned to.
const ALIGNMENT: usize = 8;

const FLAG_PGSIZES: u32 = 1;
const FLAG_CAPS: u32 = 2;

const CAP_IOVA_RANGE: u16 = 1;
const CAP_MIGRATION: u16 = 2;
const CAP_DMA_AVAIL: u16 = 3;

/// What can be mapped in a space, and what it can say of dirty pages.
///
/// ```
/// use iommu_type1::{page_size, Info, IoAddressSpace};
///
/// let info = IoAddressSpace::new().info();
/// assert_eq!(info.page_sizes & page_size(), page_size());
/// assert_eq!(info.dma_avail, Some(65535));
///
/// // As the ioctl answers, and back.
/// let mut answer = [0; 256];
/// answer[..4].copy_from_slice(&256_u32.to_ne_bytes());
/// info.encode(&mut answer)?;
/// assert_eq!(Info::decode(&answer)?, info);
/// # Ok::<(), iommu_type1::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Info {
    /// A bit for each size of pages; the lowest is the unit of mappings.
    pub page_sizes: u64,
    /// What is to be known for asking for dirty pages.
    pub migration: Option<Migration>,
    /// How many more mappings there may be.
    pub dma_avail: Option<u32>,
    /// The ranges that may be mapped; none where everything may be.
    pub iova_ranges: Vec<RangeInclusive<u64>>,
}

/// How bitmaps of dirty pages may be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Migration {
    /// A bit for each size of pages that a bit of the bitmap can stand for.
    pub page_sizes: u64,
    /// Most bytes of one bitmap.
    pub max_dirty_bitmap_size: u64,
}

impl IoAddressSpace {
    /// What `VFIO_IOMMU_GET_INFO` says.
    pub fn info(&self) -> Info {
        let space = &*self.view.space;
        let writer = lock(&space.writer);
        let avail = space.entry_limit.saturating_sub(writer.len());
        Info {
            page_sizes: space.page_sizes,
            migration: Some(Migration {
                page_sizes: space.unit(),
                max_dirty_bitmap_size: MAX_DIRTY_BITMAP_SIZE,
            }),
            dma_avail: Some(u32::try_from(avail).unwrap_or(u32::MAX)),
            iova_ranges: writer.ranges.usable(),
        }
    }
}

impl Info {
    /// Answers the ioctl in `buf`, which begins with a `struct vfio_iommu_type1_info` whose `argsz` says how
    /// much may be written. Where that is too little for the capabilities, `argsz` says how much it takes.
    ///
    /// # Errors
    ///
    /// [`Error::ArgumentSize`] (EINVAL): `argsz` is below 16. [`Error::ArgumentMemory`] (EFAULT): `buf` is
    /// shorter than what would be written of the `argsz` bytes; nothing is written.
    pub fn encode(&self, buf: &mut [u8]) -> Result<()> {
        let argsz = match buf.first_chunk() {
            Some(bytes) if buf.len() >= INFO_MIN_SIZE => u32::from_ne_bytes(*bytes),
            _ => return Err(too_short(INFO_MIN_SIZE, buf)),
        };
        let given = argsz as usize;
        if given < INFO_MIN_SIZE {
            return Err(Error::ArgumentSize {
                argsz,
                min: INFO_MIN_SIZE as u32,
            });
        }
        let caps = self.capabilities();
        let needed = INFO_SIZE + caps.len();
        let fits = given >= needed;
        let len = if fits { needed } else { given.min(INFO_SIZE) };
        if buf.len() < len {
            return Err(too_short(len, buf));
        }

        let mut flags = FLAG_PGSIZES;
        let (mut argsz, mut cap_offset) = (argsz, 0);
        if !caps.is_empty() {
            flags |= FLAG_CAPS;
            if fits {
                cap_offset = INFO_SIZE as u32;
                buf[INFO_SIZE..needed].copy_from_slice(&caps);
            } else {
                argsz = u32::try_from(needed).unwrap_or(u32::MAX);
            }
        }
        let mut info = Vec::with_capacity(INFO_SIZE);
        push_u32(&mut info, argsz);
        push_u32(&mut info, flags);
        push_u64(&mut info, self.page_sizes);
        push_u32(&mut info, cap_offset);
        push_u32(&mut info, 0);
        let len = len.min(INFO_SIZE);
        buf[..len].copy_from_slice(&info[..len]);
        Ok(())
    }

    /// Reads the answer of a kernel or a server, of which nothing is taken for granted. Capabilities that are
    /// not known are left out, of those that are there twice the last is taken.
    ///
    /// # Errors
    ///
    /// [`Error::InfoChain`] (EINVAL): something lies outside of `bytes`, a capability of a known version is
    /// wrong in itself, or the chain does not go forward.
    pub fn decode(bytes: &[u8]) -> Result<Info> {
        let mut info = Info::default();
        let flags = u32_at(bytes, 4)?;
        if flags & FLAG_PGSIZES != 0 {
            info.page_sizes = u64_at(bytes, 8)?;
        }
        if flags & FLAG_CAPS == 0 || bytes.len() < INFO_SIZE {
            return Ok(info);
        }
        let mut at = u32_at(bytes, 16)? as usize;
        // Nothing of the fixed part is a capability.
        let mut behind = INFO_SIZE;
        while at != 0 {
            if at < behind {
                return Err(Error::InfoChain { offset: at });
            }
            let id = u16_at(bytes, at)?;
            let version = u16_at(bytes, at + 2)?;
            let next = u32_at(bytes, at + 4)? as usize;
            let size = match (id, version) {
                (CAP_IOVA_RANGE, 1) => {
                    info.iova_ranges = ranges_at(bytes, at)?;
                    16 + 16 * info.iova_ranges.len()
                }
                (CAP_MIGRATION, 1) => {
                    info.migration = Some(Migration {
                        page_sizes: u64_at(bytes, at + 16)?,
                        max_dirty_bitmap_size: u64_at(bytes, at + 24)?,
                    });
                    32
                }
                (CAP_DMA_AVAIL, 1) => {
                    info.dma_avail = Some(u32_at(bytes, at + 8)?);
                    12
                }
                _ => HEADER_SIZE,
            };
            // Nothing is read twice: a chain that goes forward ends, and soon.
            behind = at + size;
            at = next;
        }
        Ok(info)
    }

    /// The chain as it stands behind the struct, in the order of the kernel.
    fn capabilities(&self) -> Vec<u8> {
        let mut caps = Vec::new();
        // Where the `next` of the newest capability stands.
        let mut newest: Option<usize> = None;
        let mut add = |id: u16, body: &dyn Fn(&mut Vec<u8>)| {
            if let Some(header) = newest {
                let offset = (INFO_SIZE + caps.len()) as u32;
                caps[header + 4..header + 8].copy_from_slice(&offset.to_ne_bytes());
            }
            newest = Some(caps.len());
            caps.extend_from_slice(&id.to_ne_bytes());
            caps.extend_from_slice(&1_u16.to_ne_bytes());
            push_u32(&mut caps, 0);
            body(&mut caps);
            caps.resize(caps.len().next_multiple_of(ALIGNMENT), 0);
        };
        if let Some(migration) = self.migration {
            add(CAP_MIGRATION, &|caps| {
                push_u32(caps, 0);
                push_u32(caps, 0);
                push_u64(caps, migration.page_sizes);
                push_u64(caps, migration.max_dirty_bitmap_size);
            });
        }
        if let Some(avail) = self.dma_avail {
            add(CAP_DMA_AVAIL, &|caps| push_u32(caps, avail));
        }
        if !self.iova_ranges.is_empty() {
            add(CAP_IOVA_RANGE, &|caps| {
                push_u32(caps, self.iova_ranges.len() as u32);
                push_u32(caps, 0);
                for range in &self.iova_ranges {
                    push_u64(caps, *range.start());
                    push_u64(caps, *range.end());
                }
            });
        }
        caps
    }
}

fn ranges_at(bytes: &[u8], at: usize) -> Result<Vec<RangeInclusive<u64>>> {
    let count = u32_at(bytes, at + 8)? as usize;
    // So many that they would not fit are refused at the first that is not there, before there is memory for
    // all of them.
    let mut ranges = Vec::new();
    for offset in (at + 16..).step_by(16).take(count) {
        ranges.push(u64_at(bytes, offset)?..=u64_at(bytes, offset + 8)?);
    }
    Ok(ranges)
}

fn too_short(needed: usize, buf: &[u8]) -> Error {
    Error::ArgumentMemory {
        needed: needed as u64,
        len: buf.len() as u64,
    }
}

fn push_u32(bytes: &mut Vec<u8>, value: u32) {
    bytes.extend_from_slice(&value.to_ne_bytes());
}

fn push_u64(bytes: &mut Vec<u8>, value: u64) {
    bytes.extend_from_slice(&value.to_ne_bytes());
}

fn u16_at(bytes: &[u8], offset: usize) -> Result<u16> {
    array_at(bytes, offset).map(u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], offset: usize) -> Result<u32> {
    array_at(bytes, offset).map(u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], offset: usize) -> Result<u64> {
    array_at(bytes, offset).map(u64::from_ne_bytes)
}

fn array_at<const N: usize>(bytes: &[u8], offset: usize) -> Result<[u8; N]> {
    let array = bytes.get(offset..).and_then(|rest| rest.first_chunk());
    array.copied().ok_or(Error::InfoChain { offset })
}

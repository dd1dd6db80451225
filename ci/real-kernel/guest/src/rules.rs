// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The rules of a type1 container as a plain program, one list of mappings and no cleverness: what the
//! generator is tried on where there is no kernel, and whom to believe where the kernel and our crate
//! differ.

use vfio_bindings::bindings::vfio::{
    VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_VADDR, VFIO_DMA_MAP_FLAG_WRITE,
    VFIO_DMA_UNMAP_FLAG_ALL, VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP, VFIO_DMA_UNMAP_FLAG_VADDR,
    VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP, VFIO_IOMMU_DIRTY_PAGES_FLAG_START,
    VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP,
};
use vm_memory::Permissions;

use crate::live::Mapped;
use crate::memory::{self, PAGE};
use crate::op::{info_buffer, Bitmap, Dirty, Machine, Map, Op, Outcome, Unmap};
use crate::setup::Setup;

const KNOWN: u32 = 7;
const LARGEST_BITMAP: u64 = 256 << 20;

/// A container of plain rules.
#[derive(Debug)]
pub struct Rules {
    setup: Setup,
    v2: bool,
    avail: u32,
    tracking: bool,
    mappings: Vec<Mapped>,
}

impl Rules {
    /// An empty one, of type 1 or of type 1 version 2.
    pub fn new(setup: &Setup, v2: bool, entry_limit: u32) -> Self {
        Rules {
            setup: setup.clone(),
            v2,
            avail: entry_limit,
            tracking: false,
            mappings: Vec::new(),
        }
    }

    fn overlapping(&self, iova: u64, last: u64) -> Option<usize> {
        let met = |mapped: &Mapped| mapped.iova <= last && iova <= mapped.last();
        self.mappings.iter().position(met)
    }

    fn cut_by(&self, iova: u64, last: u64) -> bool {
        self.mappings.iter().any(|mapped| {
            (mapped.iova < iova && iova <= mapped.last())
                || (mapped.iova <= last && last < mapped.last())
        })
    }

    fn map(&mut self, map: &Map) -> Result<(), i32> {
        let prot = map.flags & (VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE);
        let resume = map.flags & VFIO_DMA_MAP_FLAG_VADDR != 0;
        check(map.argsz >= 32 && map.flags & !KNOWN == 0)?;
        check(map.size > 0)?;
        let last = last_of(map.iova, map.size)?;
        last_of(map.vaddr, map.size)?;
        check((prot == 0) == resume)?;
        check(aligned(map.iova) && aligned(map.vaddr) && aligned(map.size))?;
        let met = self.overlapping(map.iova, last);
        if resume {
            let mapped = &mut self.mappings[met.ok_or(libc::ENOENT)?];
            check(mapped.invalid && mapped.iova == map.iova && mapped.size == map.size)?;
            mapped.invalid = false;
            return Ok(());
        }
        if met.is_some() {
            return Err(libc::EEXIST);
        }
        if self.avail == 0 {
            return Err(libc::ENOSPC);
        }
        let holds = |range: &(u64, u64)| range.0 <= map.iova && last <= range.1;
        check(self.setup.ranges.iter().any(holds))?;
        let needed = if prot & VFIO_DMA_MAP_FLAG_WRITE == 0 {
            Permissions::Read
        } else {
            Permissions::ReadWrite
        };
        if !memory::access(map.vaddr, map.size).allow(needed) {
            return Err(libc::EFAULT);
        }
        self.avail -= 1;
        let (iova, size, invalid) = (map.iova, map.size, false);
        self.mappings.push(Mapped {
            iova,
            size,
            invalid,
        });
        self.mappings.sort_by_key(|mapped| mapped.iova);
        Ok(())
    }

    fn unmap(&mut self, unmap: &Unmap, words: &mut [u64]) -> Result<u64, i32> {
        let all = unmap.flags & VFIO_DMA_UNMAP_FLAG_ALL != 0;
        let invalidate = unmap.flags & VFIO_DMA_UNMAP_FLAG_VADDR != 0;
        let get = unmap.flags & VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP != 0;
        check(unmap.argsz >= 24 && unmap.flags & !KNOWN == 0)?;
        check(!get || !(all || invalidate))?;
        let bitmap = unmap.bitmap.filter(|_| get);
        if get {
            check(unmap.argsz >= 48)?;
            check_bitmap(bitmap.as_ref(), unmap.size)?;
        }
        check(aligned(unmap.iova))?;
        let last = if all {
            check(unmap.iova == 0 && unmap.size == 0)?;
            u64::MAX
        } else {
            check(unmap.size > 0 && aligned(unmap.size))?;
            last_of(unmap.iova, unmap.size)?
        };
        check(bitmap.is_none_or(|bitmap| self.tracking && bitmap.pgsize == PAGE))?;
        check(!self.v2 || all || !self.cut_by(unmap.iova, last))?;
        let begins = |mapped: &Mapped| (unmap.iova..=last).contains(&mapped.iova);
        let cut = |mapped: &Mapped| mapped.iova < unmap.iova && unmap.iova <= mapped.last();
        if self.mappings.iter().any(cut) {
            return Ok(0);
        }
        let bytes = self
            .mappings
            .iter()
            .filter(|mapped| begins(mapped))
            .map(|mapped| mapped.size);
        let bytes = bytes.sum();
        if invalidate {
            check(
                !self
                    .mappings
                    .iter()
                    .any(|mapped| begins(mapped) && mapped.invalid),
            )?;
            let taken = self.mappings.iter_mut().filter(|mapped| begins(mapped));
            taken.for_each(|mapped| mapped.invalid = true);
            return Ok(bytes);
        }
        if get {
            self.fill(unmap.iova, last, words);
        }
        let before = self.mappings.len();
        self.mappings.retain(|mapped| !begins(mapped));
        self.avail += (before - self.mappings.len()) as u32;
        Ok(bytes)
    }

    /// Behind an IOMMU that does not say what was written, all that is mapped counts as written.
    fn fill(&self, iova: u64, last: u64, words: &mut [u64]) {
        for mapped in &self.mappings {
            if mapped.iova < iova || mapped.last() > last {
                continue;
            }
            let first = (mapped.iova - iova) / PAGE;
            for page in first..first + mapped.size / PAGE {
                if let Some(word) = words.get_mut((page / 64) as usize) {
                    *word |= 1 << (page % 64);
                }
            }
        }
    }

    fn dirty(&mut self, dirty: &Dirty, words: &mut [u64]) -> Result<(), i32> {
        if !self.v2 {
            return Err(libc::EACCES);
        }
        check(dirty.argsz >= 8)?;
        match dirty.flags {
            VFIO_IOMMU_DIRTY_PAGES_FLAG_START => self.tracking = true,
            VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP => self.tracking = false,
            VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP => {
                check(dirty.argsz >= 48)?;
                check(dirty.size > 0)?;
                let last = last_of(dirty.iova, dirty.size)?;
                check_bitmap(Some(&dirty.bitmap), dirty.size)?;
                check(dirty.bitmap.pgsize == PAGE)?;
                check(aligned(dirty.iova) && aligned(dirty.size))?;
                check(self.tracking && !self.cut_by(dirty.iova, last))?;
                self.fill(dirty.iova, last, words);
            }
            _ => return Err(libc::EINVAL),
        }
        Ok(())
    }

    fn info(&self, argsz: u32, buffer: &mut [u8]) -> Result<(), i32> {
        check(argsz >= 16)?;
        let caps = self.capabilities();
        let needed = 24 + caps.len();
        let fits = argsz as usize >= needed;
        let mut info = Vec::new();
        let size_out = if fits { argsz } else { needed as u32 };
        info.extend(size_out.to_ne_bytes());
        info.extend(3_u32.to_ne_bytes());
        info.extend(self.setup.page_sizes.to_ne_bytes());
        info.extend((if fits { 24_u32 } else { 0 }).to_ne_bytes());
        info.extend(0_u32.to_ne_bytes());
        info.truncate(argsz as usize);
        if fits {
            info.extend(caps);
        }
        buffer[..info.len()].copy_from_slice(&info);
        Ok(())
    }

    /// The chain behind a struct of 24 bytes.
    fn capabilities(&self) -> Vec<u8> {
        let header = |id: u16, next: u32| {
            [
                &id.to_ne_bytes()[..],
                &1_u16.to_ne_bytes(),
                &next.to_ne_bytes(),
            ]
            .concat()
        };
        let mut chain = header(2, 24 + 32);
        chain.extend([0; 8]);
        chain.extend(PAGE.to_ne_bytes());
        chain.extend(LARGEST_BITMAP.to_ne_bytes());
        chain.extend(header(3, 24 + 32 + 16));
        chain.extend(self.avail.to_ne_bytes());
        chain.extend([0; 4]);
        chain.extend(header(1, 0));
        chain.extend((self.setup.ranges.len() as u32).to_ne_bytes());
        chain.extend([0; 4]);
        for (first, last) in &self.setup.ranges {
            chain.extend(first.to_ne_bytes());
            chain.extend(last.to_ne_bytes());
        }
        chain
    }
}

impl Machine for Rules {
    fn apply(&mut self, op: &Op) -> Outcome {
        let plain = |result: Result<(), i32>| Outcome::plain(result.map(|()| 0));
        match op {
            Op::Map(map) => plain(self.map(map)),
            Op::Unmap(unmap) => {
                let mut words = unmap.bitmap.map_or(Vec::new(), |bitmap| bitmap.words());
                let result = self.unmap(unmap, &mut words);
                Outcome {
                    size: result.unwrap_or(unmap.size),
                    words,
                    ..plain(result.map(|_| ()))
                }
            }
            Op::Dirty(dirty) => {
                let mut words = dirty.bitmap.words();
                let result = self.dirty(dirty, &mut words);
                Outcome {
                    words,
                    ..plain(result)
                }
            }
            Op::Info(argsz) => {
                let mut info = info_buffer(*argsz);
                let result = self.info(*argsz, &mut info);
                Outcome {
                    info,
                    ..plain(result)
                }
            }
            Op::Extension(extension) => {
                Outcome::plain(Ok(i32::from(self.setup.extensions.contains(extension))))
            }
        }
    }
}

fn check(right: bool) -> Result<(), i32> {
    right.then_some(()).ok_or(libc::EINVAL)
}

fn aligned(value: u64) -> bool {
    value % PAGE == 0
}

fn last_of(first: u64, size: u64) -> Result<u64, i32> {
    first.checked_add(size - 1).ok_or(libc::EOVERFLOW)
}

fn check_bitmap(bitmap: Option<&Bitmap>, size: u64) -> Result<(), i32> {
    let bitmap = bitmap.ok_or(libc::EINVAL)?;
    check(bitmap.pgsize > 0)?;
    let pages = size >> bitmap.pgsize.trailing_zeros();
    let needed = pages.div_ceil(64) * 8;
    check(pages > 0 && (needed.max(1)..=LARGEST_BITMAP).contains(&bitmap.size))
}

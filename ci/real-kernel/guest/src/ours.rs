// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Our crate, asked through the structs of the ioctls.

use iommu_type1::uapi::{self, Type1, UserMemory};
use iommu_type1::{Backing, Error, IoAddressSpace, IovaRanges, Profile, Result};
use vfio_bindings::bindings::vfio::{
    VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP, VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP,
};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestRegionMmap, Permissions};

use crate::live::{Live, Mapped};
use crate::memory::{self, PAGE};
use crate::op::{info_buffer, Bitmap, Dirty, Machine, Op, Outcome, Unmap};
use crate::setup::Setup;
use crate::vfio::{map_arg, unmap_arg};

/// Words of a bitmap as large as the largest that is taken.
const MOST_WORDS: u64 = (256 << 20) / 8;

/// The memory of this process at the addresses that it has for it.
#[derive(Debug)]
pub struct OwnMemory;

impl UserMemory for OwnMemory {
    fn backing(&self, vaddr: u64, size: u64, prot: Permissions) -> Result<Backing> {
        let missing = || Error::NoRegion(vaddr);
        let allowed = memory::access(vaddr, size);
        // The kernel pins for writing what is mapped for writing, for reading otherwise.
        let needed = if prot.allow(Permissions::Write) {
            Permissions::ReadWrite
        } else {
            Permissions::Read
        };
        if !allowed.allow(needed) {
            return Err(missing());
        }
        let len = usize::try_from(size).map_err(|_| missing())?;
        let address = std::ptr::with_exposed_provenance_mut(vaddr as usize);
        let prot = if allowed.allow(Permissions::Write) {
            libc::PROT_READ | libc::PROT_WRITE
        } else {
            libc::PROT_READ
        };
        let region = MmapRegionBuilder::new_with_bitmap(len, ()).with_mmap_prot(prot);
        // SAFETY: the areas stay for good, and this one allows what was just said.
        let region = unsafe { region.with_raw_mmap_pointer(address) };
        let region = region
            .build()
            .map_err(|source| Error::Mmap { len, source })?;
        let region = GuestRegionMmap::new(region, GuestAddress(0)).ok_or_else(missing)?;
        Backing::from_region(&region, 0, len)
    }
}

/// A container of ours, behind an IOMMU that cannot say what was written.
#[derive(Debug)]
pub struct Ours {
    type1: Type1<OwnMemory>,
    live: Live,
}

impl Ours {
    /// An empty one.
    pub fn new(setup: &Setup, v2: bool, entry_limit: u32) -> Result<Self> {
        let profile = if v2 {
            Profile::Type1v2
        } else {
            Profile::Type1v1
        };
        let ranges: Vec<_> = setup
            .ranges
            .iter()
            .map(|(first, last)| *first..=*last)
            .collect();
        let space = IoAddressSpace::builder()
            .profile(profile)
            .page_sizes(setup.page_sizes)
            .iova_ranges(IovaRanges::new(&ranges, &[])?)
            .entry_limit(entry_limit as usize)
            .build();
        Ok(Ours {
            type1: Type1::new(space, OwnMemory),
            live: Live::default(),
        })
    }

    /// The space.
    pub fn space(&self) -> &IoAddressSpace {
        self.type1.space()
    }

    fn unmap(&self, unmap: &Unmap) -> Outcome {
        let harvests = unmap.flags & VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP != 0;
        let unmarked = self.write_everything(harvests);
        let mut words = unmap.bitmap.as_ref().map_or(Vec::new(), there);
        let mut arg = unmap_arg(unmap);
        let bitmap = unmap.bitmap.map(|bitmap| as_given(bitmap, &mut words));
        let result = self.type1.unmap_dma(&mut arg, bitmap);
        if result.is_ok() {
            add(&unmarked, unmap.iova, unmap.size, &mut words);
        }
        words.truncate(Bitmap::WORDS);
        Outcome {
            size: arg.size,
            words,
            ..plain(result)
        }
    }

    fn dirty(&self, dirty: &Dirty) -> Outcome {
        let harvests = dirty.flags == VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP;
        let unmarked = self.write_everything(harvests);
        let mut words = there(&dirty.bitmap);
        let get = (dirty.iova, dirty.size, as_given(dirty.bitmap, &mut words));
        let result = self.type1.dirty_pages(dirty.argsz, dirty.flags, Some(get));
        if result.is_ok() {
            add(&unmarked, dirty.iova, dirty.size, &mut words);
        }
        words.truncate(Bitmap::WORDS);
        Outcome {
            words,
            ..plain(result)
        }
    }

    /// What an IOMMU that keeps no account comes to before a harvest: any page may have been written. The
    /// kernel does not ask whether a device could: returns what was not to be marked, as it can only be read
    /// or has lost its memory.
    fn write_everything(&self, harvests: bool) -> Vec<Mapped> {
        let all = self.live.all().iter().filter(|_| harvests);
        let refused = all.filter(|mapped| {
            let marked = self.space().mark_dirty(mapped.iova, mapped.size as usize);
            marked.is_err()
        });
        refused.copied().collect()
    }
}

/// Adds pages that count as written, as far as they are of the range.
fn add(mappings: &[Mapped], iova: u64, size: u64, words: &mut [u64]) {
    for mapped in mappings {
        if mapped.iova < iova || iova + (size - 1) < mapped.last() {
            continue;
        }
        for page in (mapped.iova - iova) / PAGE..=(mapped.last() - iova) / PAGE {
            words[(page / 64) as usize] |= 1 << (page % 64);
        }
    }
}

impl Machine for Ours {
    fn apply(&mut self, op: &Op) -> Outcome {
        let outcome = match op {
            Op::Map(map) => plain(self.type1.map_dma(&map_arg(map))),
            Op::Unmap(unmap) => self.unmap(unmap),
            Op::Dirty(dirty) => self.dirty(dirty),
            Op::Info(argsz) => {
                let mut info = info_buffer(*argsz);
                let result = self.type1.get_info(&mut info);
                Outcome {
                    info,
                    ..plain(result)
                }
            }
            Op::Extension(extension) => Outcome::plain(Ok(self.type1.check_extension(*extension))),
        };
        self.live.note(op, &outcome);
        outcome
    }
}

fn plain(result: Result<()>) -> Outcome {
    Outcome::plain(result.map(|()| 0).map_err(|error| error.errno()))
}

/// As much memory as a bitmap says it has, which the kernel believes too.
fn there(bitmap: &Bitmap) -> Vec<u64> {
    let words = bitmap
        .size
        .div_ceil(8)
        .clamp(Bitmap::WORDS as u64, MOST_WORDS);
    let mut words = vec![0; words as usize];
    words[..Bitmap::WORDS].copy_from_slice(&bitmap.words());
    words
}

fn as_given(bitmap: Bitmap, data: &mut [u64]) -> uapi::Bitmap<'_> {
    uapi::Bitmap {
        pgsize: bitmap.pgsize,
        size: bitmap.size,
        data,
    }
}

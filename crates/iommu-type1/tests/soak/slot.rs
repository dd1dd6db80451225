// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A slot: a range that is always mapped, each time by another generation of memory.
//!
//! Every page begins with a stamp that says which slot, page and generation it is of, and never changes; then
//! come lanes, zeros at first, each written by one thread only. Memory that is unmapped is filled with
//! something else at once: who reads that was too late.

use std::fs::File;
use std::os::fd::FromRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Mutex;

use iommu_type1::{page_size, Backing};
use vm_memory::{FileOffset, Permissions};

use crate::{Kind, Soak, LANES};

pub(crate) const SLOTS: usize = 48;
pub(crate) const PAGES: usize = 4;
pub(crate) const PAGE: usize = 4096;
pub(crate) const BYTES: usize = PAGES * PAGE;
pub(crate) const STAMP: usize = 64;
pub(crate) const LANE: usize = 512;
/// What memory has that nobody may see any more.
const GONE: u8 = 0xee;

pub(crate) struct Slot {
    number: usize,
    /// Twice the generation that is mapped, and one more while it is replaced by the next.
    sequence: AtomicU64,
    /// The newest generation whose unmap has returned.
    gone: AtomicU64,
    /// What is mapped, in the hands of who unmaps it.
    memory: Mutex<Option<Backing>>,
    /// Of each page: the harvest that reported it last, and what lanes have written and is to be reported.
    pub(crate) reported: [AtomicU64; PAGES],
    pub(crate) unreported: [[Mutex<Option<Written>>; LANES]; PAGES],
}

/// A write that is to be found by a harvest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) generation: u64,
    /// The newest harvest that had begun before the write.
    pub(crate) harvest: u64,
}

/// A slot before something is done with it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Before {
    sequence: u64,
    gone: u64,
}

impl Slot {
    pub(crate) fn new(number: usize) -> Self {
        Slot {
            number,
            sequence: AtomicU64::new(1),
            gone: AtomicU64::new(0),
            memory: Mutex::new(None),
            reported: Default::default(),
            unreported: Default::default(),
        }
    }

    pub(crate) fn iova(&self) -> u64 {
        0x10_0000 + (self.number * BYTES) as u64
    }

    pub(crate) fn map_first(&self, soak: &Soak) {
        self.map(soak, 1);
    }

    /// The next generation of memory in the place of this.
    pub(crate) fn renew(&self, soak: &Soak) {
        let generation = self.sequence.fetch_add(1, Ordering::SeqCst) / 2;
        match soak.space.unmap(self.iova(), BYTES as u64) {
            Ok(bytes) => soak.differences.expect(bytes == BYTES as u64, || {
                format!("slot {}: {bytes} bytes unmapped", self.number)
            }),
            Err(error) => soak.differences.found(&error),
        }
        self.gone.store(generation, Ordering::SeqCst);
        let memory = self.memory.lock().unwrap().take().unwrap();
        // SAFETY: the memory is this slot's, and nobody has it mapped any more.
        unsafe { memory.host_address().write_bytes(GONE, BYTES) };
        self.map(soak, generation + 1);
        soak.count(Kind::Map);
    }

    fn map(&self, soak: &Soak, generation: u64) {
        // Files and memory of the process by turns.
        let memory = match generation % 2 {
            0 => file_memory(),
            _ => Backing::anonymous(BYTES).unwrap(),
        };
        for page in 0..PAGES {
            let stamp = self.stamp(page, generation);
            // SAFETY: the page lies in the memory, which nobody else has yet.
            unsafe {
                let at = memory.host_address().add(page * PAGE);
                at.copy_from_nonoverlapping(stamp.as_ptr(), STAMP);
            }
        }
        *self.memory.lock().unwrap() = Some(memory.clone());
        if let Err(error) = soak.space.map(self.iova(), memory, Permissions::ReadWrite) {
            soak.differences.found(&error);
        }
        self.sequence.fetch_add(1, Ordering::SeqCst);
    }

    /// To be asked before something is done, and given to what is asked after.
    pub(crate) fn before(&self) -> Before {
        Before {
            sequence: self.sequence.load(Ordering::SeqCst),
            gone: self.gone.load(Ordering::SeqCst),
        }
    }

    /// The generation that was mapped from `before` until now, if it was one.
    pub(crate) fn still(&self, before: Before) -> Option<u64> {
        let now = self.sequence.load(Ordering::SeqCst);
        (now == before.sequence && now % 2 == 0).then_some(now / 2)
    }

    /// The newest generation that can have been met by now.
    pub(crate) fn newest(&self) -> u64 {
        self.sequence.load(Ordering::SeqCst).div_ceil(2)
    }

    /// The generation that the stamp of a page says, if it can have been read since `before`.
    pub(crate) fn generation(&self, page: usize, stamp: &[u8], before: Before) -> Option<u64> {
        let generation = u64::from_ne_bytes(stamp[..8].try_into().unwrap());
        let can_be = generation > before.gone && generation <= self.newest();
        (can_be && stamp == self.stamp(page, generation)).then_some(generation)
    }

    fn stamp(&self, page: usize, generation: u64) -> [u8; STAMP] {
        let mut stamp = [0; STAMP];
        let mut word = generation;
        for (at, bytes) in stamp.chunks_exact_mut(8).enumerate() {
            bytes.copy_from_slice(&word.to_ne_bytes());
            let which = (self.number * PAGES + page) * 8 + at + 1;
            word = (generation ^ which as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
        stamp
    }
}

fn file_memory() -> Backing {
    assert_eq!(page_size() as usize, PAGE, "a host of other pages");
    // SAFETY: the name ends with a NUL; the descriptor is new.
    let file = unsafe {
        let fd = libc::memfd_create(c"soak".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.set_len(BYTES as u64).unwrap();
    Backing::file(FileOffset::new(file, 0), BYTES, Permissions::ReadWrite).unwrap()
}

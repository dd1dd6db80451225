// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Those who use the memory: inline, through leases, through pins.

use std::borrow::Borrow;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use iommu_type1::{
    DmaHandle, Error, Interest, IoAddressSpace, PinnedPages, Pinner, ReaderBarrier, Result,
};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryError, Permissions, VolatileSlice,
};

use super::memory::{block_bytes, page_at, page_bytes, Look, Span, BLOCKS, PAGES};
use super::overlap::{add, Met, Seat, HANDLES};
use super::random::Random;
use super::{Stress, UNMAPPERS};
use Permissions::{Read, ReadWrite};

/// Lists and pins that a holder keeps before it lets go of the oldest.
const KEPT: usize = 3;
/// How often memory that is held is read before it is let go.
const LOOKS: usize = 4;
/// Accesses after which a handle that has met no unmap goes without barriers, and one more.
const ENOUGH: usize = (1 << 16) + 1;

/// Inline accesses, the same through a handle and without one.
pub trait Inline {
    fn read(&self, iova: u64, buf: &mut [u8]) -> Result<()>;
    fn write(&self, iova: u64, buf: &[u8]) -> Result<()>;
}

impl Inline for DmaHandle {
    fn read(&self, iova: u64, buf: &mut [u8]) -> Result<()> {
        self.read(iova, buf)
    }

    fn write(&self, iova: u64, buf: &[u8]) -> Result<()> {
        self.write(iova, buf)
    }
}

impl Inline for IoAddressSpace {
    fn read(&self, iova: u64, buf: &mut [u8]) -> Result<()> {
        self.read(iova, buf)
    }

    fn write(&self, iova: u64, buf: &[u8]) -> Result<()> {
        self.write(iova, buf)
    }
}

impl Stress {
    pub fn inline(&self, number: usize, seat: &Seat, through: &impl Inline) {
        let mut random = Random::new(number);
        let mut buf = vec![0; block_bytes()];
        while self.goes_on() {
            // Threads take turns quickly where there are fewer processors. One does not: it is
            // interrupted anywhere, also in the middle of a look-up.
            if number > 0 && random.below(64) == 0 {
                thread::yield_now();
            }
            if self.space.reader_barrier() == ReaderBarrier::Membarrier
                && number < HANDLES
                && random.below(256) == 0
            {
                (0..ENOUGH).for_each(|_| through.read(0, &mut []).unwrap());
            }
            if random.below(4) == 0 {
                let span = Span::to_write(&mut random);
                let bytes = &mut buf[..span.len];
                span.fill_open(bytes);
                seat.sit(span.mask());
                let result = through.write(span.iova(), bytes);
                seat.leave();
                match result {
                    Ok(()) => add(&seat.writes, 1),
                    Err(error) => seat.refused(&error),
                }
            } else {
                let span = Span::to_read(&mut random);
                let bytes = &mut buf[..span.len];
                let mut look = self.memory.look(span);
                seat.sit(span.mask());
                let result = through.read(span.iova(), bytes);
                seat.leave();
                match result {
                    Ok(()) => {
                        add(&seat.reads, 1);
                        look.check(bytes);
                    }
                    Err(error) => {
                        look.check(&bytes[..error.completed()]);
                        seat.refused(&error);
                    }
                }
            }
        }
    }

    /// A guard for each request, as a device takes them.
    pub fn hold_guards(&self, seat: &Seat) {
        let mut random = Random::new(100);
        let mut buf = vec![0; block_bytes()];
        while self.goes_on() {
            let span = Span::to_read(&mut random);
            let bytes = &mut buf[..span.len];
            let mut look = self.memory.look(span);
            let guard = self.space.memory();
            let slices = guard
                .get_slices(GuestAddress(span.iova()), span.len, Read)
                .unwrap();
            match slices.collect::<std::result::Result<Vec<_>, _>>() {
                Ok(slices) => {
                    seat.sit(span.mask());
                    for _ in 0..LOOKS {
                        copy_out(slices.iter(), bytes);
                        look.check(bytes);
                        add(&seat.reads, 1);
                        random.sometimes_yield();
                    }
                    seat.leave();
                }
                Err(error) => seat.refused(inner(&error)),
            }
        }
    }

    /// Lists that outlive the call, read and written whenever their turn comes.
    pub fn hold_lists(&self, seat: &Seat) {
        let mut random = Random::new(200);
        let mut buf = vec![0; block_bytes()];
        let mut kept = VecDeque::new();
        while self.goes_on() {
            let span = Span::to_write(&mut random);
            let look = self.memory.look(span);
            match self.space.scatter(span.iova(), span.len, ReadWrite) {
                Ok(list) => kept.push_back((span, look, list)),
                Err(error) => seat.refused(&error),
            }
            seat.sit(kept.iter().fold(0, |mask, (span, ..)| mask | span.mask()));
            for (span, look, list) in &mut kept {
                let bytes = &mut buf[..span.len];
                copy_out(&mut list.iter(), bytes);
                look.check(bytes);
                add(&seat.reads, 1);
                span.fill_open(bytes);
                let mut done = 0;
                for slice in list.iter() {
                    slice.copy_from(&bytes[done..]);
                    done += slice.len();
                }
                add(&seat.writes, 1);
            }
            random.sometimes_yield();
            seat.leave();
            // Also when nothing new came: nothing is kept for ever.
            if kept.len() == KEPT || random.below(2) == 0 {
                kept.pop_front();
            }
        }
    }

    /// A cache of pinned pages that lets go when it is told, and of the oldest anyway.
    pub fn pin(&self) {
        let seat = &self.board.pinner;
        let cache: Arc<Mutex<VecDeque<(Span, Look, PinnedPages)>>> = Arc::default();
        let _watcher = self.watcher();
        let pinner = {
            let (cache, met) = (cache.clone(), self.met.clone());
            let notice = move |iova: u64, size: u64| {
                let page = page_at(iova);
                assert_eq!(size, page_bytes() as u64);
                let mut cache = cache.lock().unwrap_or_else(PoisonError::into_inner);
                let before = cache.len();
                cache.retain(|(span, ..)| span.mask() & 1 << page == 0);
                if cache.len() < before {
                    met_on(&met, page, 1 << Met::Pin as u64);
                }
            };
            self.space
                .pinner("pinner", Interest::Holder, Arc::new(notice))
        };
        let mut random = Random::new(300);
        let mut buf = vec![0; block_bytes()];
        while self.goes_on() {
            let span = Span::pages(&mut random, 0..BLOCKS);
            let look = self.memory.look(span);
            let npages = span.len / page_bytes();
            let pinned = pinner.pin_pages(span.iova(), npages, Read);
            // What is pinned but not in the cache yet is not dropped by the notice: an unmap waits.
            random.sometimes_yield();
            let mut cache = cache.lock().unwrap_or_else(PoisonError::into_inner);
            match pinned {
                Ok(pinned) => cache.push_back((span, look, pinned)),
                Err(error) => seat.refused(&error),
            }
            for (span, look, pinned) in cache.iter_mut() {
                let bytes = &mut buf[..span.len];
                let pages: Vec<_> = (0..pinned.npages())
                    .map(|index| pinned.page(index).unwrap())
                    .collect();
                copy_out(pages.iter(), bytes);
                look.check(bytes);
                add(&seat.reads, 1);
            }
            if cache.len() == KEPT || random.below(4) == 0 {
                cache.pop_front();
            }
            drop(cache);
            random.sometimes_yield();
        }
        // The notice keeps the cache, and pins keep the notice.
        cache.lock().unwrap().clear();
    }

    /// Looks in the middle of each unmap who is on its range.
    fn watcher(&self) -> Pinner {
        let (board, met) = (self.board.clone(), self.met.clone());
        let notice = move |iova: u64, _| {
            let page = page_at(iova);
            met_on(&met, page, board.beside(1 << page));
        };
        self.space
            .pinner("watcher", Interest::All, Arc::new(notice))
    }
}

fn met_on(met: &[AtomicU64; UNMAPPERS], page: usize, what: u64) {
    let unmapper = page / (PAGES / UNMAPPERS);
    met[unmapper].fetch_or(what, Ordering::Relaxed);
}

fn copy_out<'a, B: BitmapSlice + 'a>(
    slices: impl Iterator<Item = impl Borrow<VolatileSlice<'a, B>>>,
    bytes: &mut [u8],
) {
    let mut done = 0;
    for slice in slices {
        done += slice.borrow().copy_to(&mut bytes[done..]);
    }
    assert_eq!(done, bytes.len());
}

/// Our error inside one of vm-memory.
fn inner(error: &GuestMemoryError) -> &Error {
    let GuestMemoryError::IOError(error) = error else {
        panic!("{error}");
    };
    error.get_ref().unwrap().downcast_ref().unwrap()
}

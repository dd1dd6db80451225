// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The regions that are watched, as a signal handler may look at them: without a lock, and without memory that
//! could be freed below it.
//!
//! A list of entries that only grows; one that is not needed any more is used again, for another generation. A reader
//! that finds an entry between two passes on, because memory of a region that is being entered, or left, is not
//! accessed yet, or not any more. So whoever looks for an address that is accessed finds the entry of its region,
//! which does not change meanwhile. Entries of other regions may; the generation is in the word that says what is gone,
//! so nothing is said of a region but of the one that was looked at.

use std::collections::BTreeMap;
use std::ptr;

use checked_sync::{fence, lock, AtomicPtr, AtomicU64, AtomicUsize, Mutex, Ordering};

pub(crate) struct Watches {
    newest: AtomicPtr<Entry>,
    /// Held by whoever changes anything here.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// By the first byte and the last; the same region has one, however often it is watched: so what was missed is
    /// known to whoever comes later.
    used: BTreeMap<(usize, usize), Used>,
    /// Those that are not in use.
    free: Vec<&'static Entry>,
}

struct Used {
    entry: &'static Entry,
    watches: usize,
}

struct Entry {
    mark: AtomicU64,
    /// Address of the first byte of the region, and of the last.
    first: AtomicUsize,
    last: AtomicUsize,
    /// Bytes that memory can be replaced by.
    unit: AtomicUsize,
    prot: AtomicUsize,
    next: AtomicPtr<Entry>,
}

/// The generation of an entry, odd while it is nobody's, and from where on memory of its region is gone: in one word,
/// so that nobody can mark an entry that has changed hands.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Mark(u64);

/// Bits of an offset in pages; above them is the generation.
const OFFSET_BITS: u32 = 40;
/// All of a region is there. From here on it may be gone, but none has so much memory (4 PiB).
const WHOLE: u64 = (1 << OFFSET_BITS) - 1;
/// No page is smaller.
const PAGE: usize = 4096;
/// An entry has no other after this one, in which it is nobody's.
const LAST_GENERATION: u64 = u64::MAX >> OFFSET_BITS;

/// An entry as a handler finds it.
struct Seen {
    generation: u64,
    first: usize,
    last: usize,
    unit: usize,
    prot: i32,
}

/// A region that is watched until this is dropped.
pub(crate) struct Watch {
    watches: &'static Watches,
    /// Its first byte and its last.
    region: (usize, usize),
    entry: &'static Entry,
}

/// What has to be replaced: the memory of a region from the page of a fault to its end, or of several to the first end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Rest {
    pub(crate) first: usize,
    pub(crate) len: usize,
    pub(crate) prot: i32,
}

impl Watches {
    pub(crate) fn new() -> Self {
        Watches {
            newest: AtomicPtr::new(ptr::null_mut()),
            state: Mutex::new(State::default()),
        }
    }

    /// Watches `len` bytes of memory, at least one, that nobody accesses yet.
    pub(crate) fn watch(&'static self, first: usize, len: usize, unit: usize, prot: i32) -> Watch {
        let last = first + (len - 1);
        let region = (first, last);
        let mut state = lock(&self.state);
        if let Some(used) = state.used.get_mut(&region) {
            used.watches += 1;
            return Watch {
                watches: self,
                region,
                entry: used.entry,
            };
        }
        let entry = state.free.pop().unwrap_or_else(|| self.grow());
        entry.enter(region, unit, prot);
        let used = Used { entry, watches: 1 };
        state.used.insert(region, used);
        Watch {
            watches: self,
            region,
            entry,
        }
    }

    /// One entry more.
    fn grow(&self) -> &'static Entry {
        let entry = Box::leak(Box::new(Entry {
            mark: AtomicU64::new(Mark::whole(1).0),
            first: AtomicUsize::new(0),
            last: AtomicUsize::new(0),
            unit: AtomicUsize::new(1),
            prot: AtomicUsize::new(0),
            next: AtomicPtr::new(self.newest.load(Ordering::Relaxed)),
        }));
        self.newest.store(entry, Ordering::Release);
        entry
    }

    /// Marks the memory at an address that was accessed, and says what has to be replaced; `None` for memory that
    /// is not watched. Async-signal-safe.
    pub(crate) fn fault(&self, address: usize) -> Option<Rest> {
        let mut rest = None::<Rest>;
        self.each(|entry| {
            // A region may be a part of another: both hear of it. Which of them is accessed, and so cannot go meanwhile,
            // nobody knows: only what they have in common is replaced.
            rest = match (rest.take(), entry.fault(address)) {
                (Some(one), Some(other)) => Some(one.common(&other)),
                (one, other) => one.or(other),
            };
        });
        // So do those that begin behind it: nobody will miss anything there any more.
        if let Some(rest) = rest.as_ref().filter(|rest| rest.len > PAGE) {
            self.each(|entry| entry.replaced(rest));
        }
        rest
    }

    fn each(&self, mut visit: impl FnMut(&Entry)) {
        let mut next = self.newest.load(Ordering::Acquire);
        while !next.is_null() {
            // SAFETY: entries are never freed.
            let entry = unsafe { &*next };
            visit(entry);
            next = entry.next.load(Ordering::Acquire);
        }
    }
}

impl Rest {
    fn last(&self) -> usize {
        self.first + (self.len - 1)
    }

    /// What two have in common, which is the page of the fault at least; with all that either allows.
    fn common(&self, other: &Rest) -> Rest {
        let first = self.first.max(other.first);
        Rest {
            first,
            len: self.last().min(other.last()) - first + 1,
            prot: self.prot | other.prot,
        }
    }
}

impl Seen {
    /// Of the page of an address.
    fn offset(&self, address: usize) -> usize {
        (address - self.first) / self.unit * self.unit
    }
}

impl Mark {
    fn whole(generation: u64) -> Self {
        Mark(generation << OFFSET_BITS | WHOLE)
    }

    fn generation(self) -> u64 {
        self.0 >> OFFSET_BITS
    }

    fn is_used(self) -> bool {
        self.generation() % 2 == 0
    }

    /// The same with what is gone from an offset on, if it is not gone from farther below.
    fn gone_from(self, offset: usize) -> Self {
        let offset = ((offset / PAGE) as u64).min(WHOLE - 1);
        self.min(Mark(self.generation() << OFFSET_BITS | offset))
    }

    fn offset(self) -> Option<usize> {
        let offset = self.0 & WHOLE;
        (offset != WHOLE).then_some(offset as usize * PAGE)
    }
}

impl Entry {
    fn mark(&self, order: Ordering) -> Mark {
        Mark(self.mark.load(order))
    }

    /// Gives it, while it is nobody's, to a region. Only under the lock.
    fn enter(&self, (first, last): (usize, usize), unit: usize, prot: i32) {
        // Who finds any of these finds that it is nobody's, or what comes after.
        fence(Ordering::Release);
        self.first.store(first, Ordering::Relaxed);
        self.last.store(last, Ordering::Relaxed);
        self.unit.store(unit, Ordering::Relaxed);
        self.prot.store(prot as usize, Ordering::Relaxed);
        self.next_generation(Ordering::Release);
    }

    /// Takes it from its region; says whether another may have it. Only under the lock.
    fn leave(&self) -> bool {
        self.next_generation(Ordering::Relaxed) < LAST_GENERATION
    }

    fn next_generation(&self, order: Ordering) -> u64 {
        let generation = self.mark(Ordering::Relaxed).generation() + 1;
        // A store would do. Loom has no order between one and the exchanges of others.
        self.mark.swap(Mark::whole(generation).0, order);
        generation
    }

    /// What it is of, while it is somebody's; which it is as long as [`lose`](Entry::lose) says so.
    fn look(&self) -> Option<Seen> {
        let mark = self.mark(Ordering::Acquire);
        let seen = Seen {
            generation: mark.generation(),
            first: self.first.load(Ordering::Relaxed),
            last: self.last.load(Ordering::Relaxed),
            unit: self.unit.load(Ordering::Relaxed),
            prot: self.prot.load(Ordering::Relaxed) as i32,
        };
        fence(Ordering::Acquire);
        mark.is_used().then_some(seen)
    }

    fn fault(&self, address: usize) -> Option<Rest> {
        let seen = self.look()?;
        if address < seen.first || address > seen.last {
            return None;
        }
        let offset = seen.offset(address);
        let first = seen.first + offset;
        self.lose(seen.generation, offset).then(|| Rest {
            first,
            // To the end of the page where the region ends: a large one goes as a whole.
            len: (seen.last - first + 1).next_multiple_of(seen.unit),
            prot: seen.prot,
        })
    }

    /// Marks what is replaced of its memory because of a fault in another region.
    fn replaced(&self, rest: &Rest) {
        let Some(seen) = self.look() else { return };
        if seen.first <= rest.last() && rest.first <= seen.last {
            let offset = seen.offset(rest.first.max(seen.first));
            self.lose(seen.generation, offset);
        }
    }

    /// Marks memory as gone from an offset on, unless another generation has begun.
    fn lose(&self, generation: u64, offset: usize) -> bool {
        let mut mark = self.mark(Ordering::Relaxed);
        while mark.generation() == generation {
            let lost = mark.gone_from(offset);
            if lost == mark {
                return true;
            }
            let (ok, failed) = (Ordering::Release, Ordering::Relaxed);
            match self.mark.compare_exchange_weak(mark.0, lost.0, ok, failed) {
                Ok(_) => return true,
                Err(now) => mark = Mark(now),
            }
        }
        false
    }
}

impl Watch {
    /// Offset of the first byte that is gone.
    pub(crate) fn fault_offset(&self) -> Option<usize> {
        self.entry.mark(Ordering::Acquire).offset()
    }

    /// Notes what was gone before it was watched.
    pub(crate) fn note(&self, offset: usize) {
        let generation = self.entry.mark(Ordering::Relaxed).generation();
        self.entry.lose(generation, offset);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut state = lock(&self.watches.state);
        if let Some(used) = state.used.get_mut(&self.region) {
            used.watches -= 1;
            if used.watches > 0 {
                return;
            }
        }
        state.used.remove(&self.region);
        if self.entry.leave() {
            state.free.push(self.entry);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn watches() -> &'static Watches {
        // As in production something refers to them, or they would be memory that nobody has freed.
        static KEPT: std::sync::Mutex<Vec<&'static Watches>> = std::sync::Mutex::new(Vec::new());
        let watches = Box::leak(Box::new(Watches::new()));
        KEPT.lock().unwrap().push(watches);
        watches
    }

    #[test]
    fn the_rest_of_the_region_from_the_page_of_the_fault() {
        let watches = watches();
        let watch = watches.watch(0x1_0000, 0x8000, 0x1000, 3);
        assert_eq!(watches.fault(0xffff), None);
        assert_eq!(watches.fault(0x1_8000), None);
        assert_eq!(watch.fault_offset(), None);
        let rest = Rest {
            first: 0x1_7000,
            len: 0x1000,
            prot: 3,
        };
        assert_eq!(watches.fault(0x1_7fff), Some(rest));
        assert_eq!(watch.fault_offset(), Some(0x7000));
        assert_eq!(watches.fault(0x1_2001).map(|rest| rest.len), Some(0x6000));
        assert_eq!(watch.fault_offset(), Some(0x2000));
        // A later one behind it changes nothing.
        assert!(watches.fault(0x1_5000).is_some());
        assert_eq!(watch.fault_offset(), Some(0x2000));
    }

    #[test]
    fn of_regions_that_overlap_only_the_common_part_is_replaced() {
        let watches = watches();
        let whole = watches.watch(0x1_0000, 0x8000, 0x1000, 1);
        let part = watches.watch(0x1_2000, 0x3000, 0x1000, 3);
        let rest = Rest {
            first: 0x1_3000,
            len: 0x2000,
            prot: 3,
        };
        assert_eq!(watches.fault(0x1_3800), Some(rest));
        assert_eq!(part.fault_offset(), Some(0x1000));
        assert_eq!(whole.fault_offset(), Some(0x3000));
    }

    #[test]
    fn who_watches_only_what_is_behind_the_fault_hears_that_it_is_replaced() {
        let watches = watches();
        let part = watches.watch(0x1_4000, 0x2000, 0x1000, 3);
        let whole = watches.watch(0x1_0000, 0x8000, 0x1000, 3);
        let beside = watches.watch(0x1_8000, 0x1000, 0x1000, 3);
        let before = watches.watch(0x1_0000, 0x1000, 0x1000, 3);
        assert_eq!(watches.fault(0x1_1000).map(|rest| rest.len), Some(0x7000));
        assert_eq!(whole.fault_offset(), Some(0x1000));
        assert_eq!(part.fault_offset(), Some(0));
        assert_eq!(beside.fault_offset(), None);
        assert_eq!(before.fault_offset(), None);
    }

    #[test]
    fn large_pages_go_as_a_whole_and_the_last_of_the_address_space_is_one() {
        let watches = watches();
        let watch = watches.watch(usize::MAX - 0x3f_ffff, 0x40_0000, 0x20_0000, 1);
        let rest = watches.fault(usize::MAX).unwrap();
        assert_eq!(rest.first, usize::MAX - 0x1f_ffff);
        assert_eq!(rest.len, 0x20_0000);
        assert_eq!(watch.fault_offset(), Some(0x20_0000));
        let watch = watches.watch(0x4000_0000, 0x20_1000, 0x20_0000, 1);
        let rest = watches.fault(0x4020_0fff).unwrap();
        assert_eq!((rest.first, rest.len), (0x4020_0000, 0x20_0000));
        assert_eq!(watch.fault_offset(), Some(0x20_0000));
    }

    #[test]
    fn what_is_not_watched_any_more_is_not_found_and_its_entry_is_used_again() {
        let watches = watches();
        let first = watches.watch(0x1000, 0x1000, 0x1000, 3);
        let kept = watches.watch(0x8000, 0x1000, 0x1000, 3);
        assert!(watches.fault(0x1800).is_some());
        let entry: *const Entry = first.entry;
        drop(first);
        assert_eq!(watches.fault(0x1800), None);
        let next = watches.watch(0x4000, 0x1000, 0x1000, 3);
        assert!(ptr::eq(entry, next.entry));
        assert_eq!(next.fault_offset(), None);
        assert_eq!(watches.fault(0x1800), None);
        assert!(watches.fault(0x8000).is_some());
        assert_eq!(kept.fault_offset(), Some(0));
    }

    #[test]
    fn an_entry_whose_generations_are_used_up_is_left_alone() {
        let watches = watches();
        let first = watches.watch(0x1000, 0x1000, 0x1000, 3);
        let entry = first.entry;
        entry
            .mark
            .store(Mark::whole(LAST_GENERATION - 3).0, Ordering::Relaxed);
        drop(first);
        let last = watches.watch(0x1000, 0x1000, 0x1000, 3);
        assert!(ptr::eq(entry, last.entry));
        assert!(watches.fault(0x1000).is_some());
        drop(last);
        assert_eq!(watches.fault(0x1000), None);
        let next = watches.watch(0x1000, 0x1000, 0x1000, 3);
        assert!(!ptr::eq(entry, next.entry));
        assert_eq!(next.fault_offset(), None);
    }

    #[test]
    fn all_who_watch_the_same_memory_hear_of_it() {
        let watches = watches();
        let one = watches.watch(0x1000, 0x2000, 0x1000, 3);
        let other = watches.watch(0x1000, 0x2000, 0x1000, 3);
        assert!(watches.fault(0x2000).is_some());
        assert_eq!(
            (one.fault_offset(), other.fault_offset()),
            (Some(0x1000), Some(0x1000))
        );
        // Also who comes later, until the last has gone.
        drop(one);
        let late = watches.watch(0x1000, 0x2000, 0x1000, 3);
        drop(other);
        assert_eq!(late.fault_offset(), Some(0x1000));
        assert!(watches.fault(0x1000).is_some());
        drop(late);
        assert_eq!(watches.fault(0x1000), None);
        let next = watches.watch(0x1000, 0x2000, 0x1000, 3);
        assert_eq!(next.fault_offset(), None);
    }
}

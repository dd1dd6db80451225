// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who is on which page at the moment, so that it can be counted which unmaps met somebody.
//!
//! Everybody writes a seat of their own, with relaxed stores: nothing here orders the accesses that
//! are tested.

use std::sync::atomic::{AtomicU64, Ordering};

use iommu_type1::Error;

use super::memory::PAGES;

/// Of one thread, on cache lines of its own.
#[derive(Default)]
#[repr(align(128))]
pub struct Seat {
    /// How often somebody sat down, above a bit for each page that is used.
    at: AtomicU64,
    pub reads: AtomicU64,
    pub writes: AtomicU64,
    pub revoked: AtomicU64,
    pub not_mapped: AtomicU64,
}

impl Seat {
    /// From here on the pages of `mask` are used.
    pub fn sit(&self, mask: u64) {
        let turn = (self.at.load(Ordering::Relaxed) >> PAGES) + 1;
        self.at.store(turn << PAGES | mask, Ordering::Relaxed);
    }

    pub fn leave(&self) {
        let turn = self.at.load(Ordering::Relaxed) >> PAGES;
        self.at.store(turn << PAGES, Ordering::Relaxed);
    }

    /// What `at` is if one of these pages is used.
    fn on(&self, mask: u64) -> Option<u64> {
        let at = self.at.load(Ordering::Relaxed);
        (at & mask != 0).then_some(at)
    }

    /// Counts a refusal; nothing else may go wrong.
    pub fn refused(&self, error: &Error) {
        match error {
            Error::Revoked { .. } => add(&self.revoked, 1),
            Error::NotMapped { .. } => add(&self.not_mapped, 1),
            other => panic!("{other}"),
        }
    }
}

/// Adds to a counter that only this thread writes.
pub fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Ordering::Relaxed) + n, Ordering::Relaxed);
}

/// Inline users on their own handles, and on the shared path.
pub const HANDLES: usize = 2;
pub const SHARED: usize = 2;
/// One with guards, one with scatter lists.
pub const LEASES: usize = 2;

/// What an unmap met on its range.
#[derive(Clone, Copy)]
pub enum Met {
    /// A call that was under way when the unmap was called.
    CallBefore,
    /// A call that was under way when the unmap told of itself.
    CallBeside,
    /// A lease that was held when the unmap told of itself.
    Lease,
    /// A pin that was held when the unmap told of itself.
    Pin,
}

#[derive(Default)]
pub struct Board {
    pub inline: [Seat; HANDLES + SHARED],
    pub leases: [Seat; LEASES],
    pub pinner: Seat,
    pub unmaps: AtomicU64,
    /// Unmaps that met this, by `Met`, and at last those that met any of it.
    pub met: [AtomicU64; 5],
}

/// Somebody who was in a call: the seat and what it said.
pub type Caller<'a> = (&'a Seat, u64);

impl Board {
    /// Inline calls on one of these pages.
    pub fn callers(&self, mask: u64) -> Vec<Caller<'_>> {
        let seats = self.inline.iter();
        seats
            .filter_map(|seat| Some((seat, seat.on(mask)?)))
            .collect()
    }

    /// What is there now of calls and leases on one of these pages, a bit for each `Met`. A notice
    /// calls it: in the middle of the unmap.
    pub fn beside(&self, mask: u64) -> u64 {
        let calls = is_used(&self.inline, mask);
        let leases = is_used(&self.leases, mask);
        u64::from(calls) << Met::CallBeside as u64 | u64::from(leases) << Met::Lease as u64
    }

    /// Counts an unmap and what it met, a bit for each `Met`.
    pub fn unmapped(&self, met: u64) {
        self.unmaps.fetch_add(1, Ordering::Relaxed);
        let (any, each) = self.met.split_last().unwrap();
        for (bit, count) in each.iter().enumerate() {
            count.fetch_add(met >> bit & 1, Ordering::Relaxed);
        }
        any.fetch_add(u64::from(met != 0), Ordering::Relaxed);
    }

    pub fn reads(&self) -> u64 {
        sum(&self.inline, |seat| &seat.reads)
    }

    /// Everything that was counted, for people; panics if unmaps and accesses did not meet.
    pub fn report(&self) {
        let [before, beside, lease, pin, any] =
            self.met.each_ref().map(|met| met.load(Ordering::Relaxed));
        let unmaps = self.unmaps.load(Ordering::Relaxed);
        let (inline, leases) = (&self.inline, &self.leases);
        let pinner = std::slice::from_ref(&self.pinner);
        let revoked = |seats| sum(seats, |seat: &Seat| &seat.revoked);
        println!(
            "{unmaps} unmaps beside {} inline reads and {} inline writes, {} reads of leased and {} of pinned memory",
            self.reads(),
            sum(inline, |seat| &seat.writes),
            sum(leases, |seat| &seat.reads),
            sum(pinner, |seat| &seat.reads),
        );
        println!(
            "refused as revoked: {} inline accesses, {} leases, {} pins; as not mapped: {}, {}, {}",
            revoked(inline),
            revoked(leases),
            revoked(pinner),
            sum(inline, |seat| &seat.not_mapped),
            sum(leases, |seat| &seat.not_mapped),
            sum(pinner, |seat| &seat.not_mapped),
        );
        println!(
            "{any} unmaps overlapped with a user of their range: {before} began while an inline call was under way there, {beside} told of themselves while one was, {lease} while a lease was held, {pin} while a page was pinned"
        );
        for (what, count) in [
            ("calls before", before),
            ("calls beside", beside),
            ("leases", lease),
            ("pins", pin),
            ("refused calls", revoked(inline)),
            ("refused leases", revoked(leases)),
        ] {
            assert_ne!(count, 0, "no unmap overlapped with {what}");
        }
    }
}

/// Whether one of these seats is on one of these pages.
pub fn is_used(seats: &[Seat], mask: u64) -> bool {
    seats.iter().any(|seat| seat.on(mask).is_some())
}

/// Whether the caller has left what it was in.
pub fn has_moved_on((seat, at): &Caller<'_>) -> bool {
    seat.at.load(Ordering::Relaxed) != *at
}

fn sum(seats: &[Seat], counter: impl Fn(&Seat) -> &AtomicU64) -> u64 {
    seats
        .iter()
        .map(|seat| counter(seat).load(Ordering::Relaxed))
        .sum()
}

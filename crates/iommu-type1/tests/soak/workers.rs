// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The threads.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use iommu_type1::{DmaHandle, Error, Interest, PinnedPages};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, Permissions};

use crate::slot::{Slot, Written, BYTES, LANE, PAGE, PAGES, SLOTS, STAMP};
use crate::{Kind, Soak, LANES, MAPPERS};

/// Numbers that are different for each thread.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % n
    }
}

/// An error that an access may meet while its slot changes.
fn may_be_refused(error: &Error) -> bool {
    matches!(error, Error::NotMapped { .. } | Error::Revoked { .. })
}

/// Unmaps and maps the slots of its own.
pub(crate) fn unmap_and_map(soak: &Soak, number: usize) {
    let mut random = Random(number as u64 + 11);
    while soak.goes_on() {
        let slot = random.below(SLOTS / MAPPERS) * MAPPERS + number;
        soak.slots[slot].renew(soak);
    }
}

/// What a thread has written to its lane of a page.
enum Lane {
    /// In this generation; zeros in any other.
    Is(u64, u8),
    /// Anything, up to this generation.
    Unknown(u64),
}

/// Reads and writes the lane of its own in all pages.
pub(crate) fn read_and_write(soak: &Soak, lane: usize) {
    let mut random = Random(lane as u64 + 101);
    let mut lanes: HashMap<(usize, usize), Lane> = HashMap::new();
    let handle = soak.space.handle();
    while soak.goes_on() {
        let (number, page) = (random.below(SLOTS), random.below(PAGES));
        let slot = &soak.slots[number];
        let at = slot.iova() + (page * PAGE + STAMP + lane * LANE) as u64;
        if let Some(was) = lanes.get(&(number, page)) {
            read_lane(soak, slot, &handle, at, was);
        }
        let bytes = [random.below(256) as u8; LANE];
        let (harvest, before) = (soak.harvests.load(Ordering::SeqCst), slot.before());
        let result = write(soak, &handle, at, &bytes, way(page, &mut random));
        let is = match slot.still(before) {
            Some(generation) => {
                soak.differences
                    .expect(result.is_ok(), || format!("a write at {at:#x}: {result:?}"));
                let written = Written {
                    generation,
                    harvest,
                };
                *slot.unreported[page][lane].lock().unwrap() = Some(written);
                Lane::Is(generation, bytes[0])
            }
            None => Lane::Unknown(slot.newest()),
        };
        lanes.insert((number, page), is);
        match result {
            Ok(()) => {}
            Err(error) => {
                soak.differences
                    .expect(may_be_refused(&error), || error.to_string());
                soak.count(Kind::Refused);
            }
        }
    }
}

fn read_lane(soak: &Soak, slot: &Slot, handle: &DmaHandle, at: u64, was: &Lane) {
    let mut found = [0; LANE];
    let before = slot.before();
    let result = handle.read(at, &mut found);
    soak.count(Kind::Access);
    let Some(now) = slot.still(before) else {
        return;
    };
    let wanted = match was {
        Lane::Is(generation, byte) if *generation == now => [*byte; LANE],
        Lane::Unknown(generation) if *generation >= now => return,
        _ => [0; LANE],
    };
    soak.differences
        .expect(result.is_ok() && found == wanted, || {
            format!(
                "a lane at {at:#x} in generation {now}: {result:?}, {:?}...",
                &found[..8]
            )
        });
}

/// How a lane is written.
enum Way {
    List,
    Guard,
    Space,
    Handle,
}

/// Each page in ways of its own: a mark that one way forgets is not made by another.
fn way(page: usize, random: &mut Random) -> Way {
    match page {
        0 if random.below(2) == 0 => Way::List,
        0 => Way::Guard,
        1 => Way::Space,
        _ => Way::Handle,
    }
}

fn write(soak: &Soak, handle: &DmaHandle, at: u64, bytes: &[u8], way: Way) -> Result<(), Error> {
    match way {
        Way::List => {
            soak.count(Kind::Lease);
            let list = soak
                .space
                .scatter(at, bytes.len(), Permissions::ReadWrite)?;
            let mut done = 0;
            for slice in list.iter() {
                slice.copy_from(&bytes[done..]);
                done += slice.len();
            }
            Ok(())
        }
        Way::Guard => {
            soak.count(Kind::Lease);
            let guard = soak.space.memory();
            let written = guard.write_slice(bytes, GuestAddress(at));
            written.map_err(|_| Error::Revoked {
                iova: at,
                completed: 0,
            })
        }
        Way::Space => {
            soak.count(Kind::Access);
            soak.space.write(at, bytes)
        }
        Way::Handle => {
            soak.count(Kind::Access);
            handle.write(at, bytes)
        }
    }
}

/// Reads the end of one slot and the beginning of the next.
pub(crate) fn read_across(soak: &Soak) {
    let mut random = Random(7);
    let handle = soak.space.handle();
    let mut bytes = vec![0; BYTES];
    while soak.goes_on() {
        let number = random.below(SLOTS - 1);
        let slots = [&soak.slots[number], &soak.slots[number + 1]];
        let before = slots.map(Slot::before);
        let result = handle.read(slots[0].iova() + (BYTES / 2) as u64, &mut bytes);
        soak.count(Kind::Access);
        let still = [slots[0].still(before[0]), slots[1].still(before[1])];
        let read = match &result {
            Ok(()) => BYTES,
            Err(error) => {
                soak.differences
                    .expect(may_be_refused(error), || error.to_string());
                soak.count(Kind::Refused);
                error.completed()
            }
        };
        soak.differences
            .expect(result.is_ok() || still.contains(&None), || {
                format!("{result:?}")
            });
        for at in (0..read).step_by(PAGE) {
            let (which, page) = ((at + BYTES / 2) / BYTES, (at + BYTES / 2) % BYTES / PAGE);
            let found = slots[which].generation(page, &bytes[at..at + STAMP], before[which]);
            let right = found.is_some() && still[which].is_none_or(|now| found == Some(now));
            soak.differences.expect(right, || {
                format!("page {page} of {}: {found:?}", number + which)
            });
        }
    }
}

/// Pins pages, and looks whether they stay what they are.
pub(crate) fn pin(soak: &Soak) {
    let mut random = Random(19);
    let held: Arc<Mutex<Vec<PinnedPages>>> = Arc::default();
    let told = held.clone();
    let notice = move |iova: u64, size: u64| {
        let inside = |pinned: &PinnedPages| pinned.iova().wrapping_sub(iova) < size;
        told.lock().unwrap().retain(|pinned| !inside(pinned));
    };
    let pinner = soak
        .space
        .pinner("soak", Interest::Holder, Arc::new(notice));
    while soak.goes_on() {
        // Pinned pages are dirty whoever writes: not those that are written inline only.
        let (slot, page) = (&soak.slots[random.below(SLOTS)], random.below(2));
        let before = slot.before();
        let pinned =
            match pinner.pin_pages(slot.iova() + (page * PAGE) as u64, 1, Permissions::Read) {
                Ok(pinned) => pinned,
                Err(error) => {
                    let refused = may_be_refused(&error) && slot.still(before).is_none();
                    soak.differences.expect(refused, || error.to_string());
                    soak.count(Kind::Refused);
                    continue;
                }
            };
        soak.count(Kind::Pin);
        let memory = pinned.page(0).unwrap();
        let mut stamp = [0; STAMP];
        let mut look = || {
            memory.read_slice(&mut stamp, 0).unwrap();
            slot.generation(page, &stamp, before)
        };
        let first = look();
        for _ in 0..random.below(200) {
            std::hint::spin_loop();
        }
        // Whoever unmaps it meanwhile waits.
        let last = look();
        soak.differences
            .expect(first.is_some() && first == last, || {
                format!("a pinned page of generation {first:?}, then {last:?}")
            });
        let mut held = held.lock().unwrap();
        held.push(pinned);
        if held.len() > 8 {
            drop(held.remove(0));
        }
        // An unmap that began before it was held has told nobody, and waits for it.
        if slot.still(before).is_none() {
            held.clear();
        }
    }
    held.lock().unwrap().clear();
}

/// Takes the dirty pages of one slot after the other.
pub(crate) fn harvest(soak: &Soak) {
    let mut random = Random(23);
    while soak.goes_on() {
        let slot = &soak.slots[random.below(SLOTS)];
        let before = slot.before();
        // What had been written when it began has to be found.
        let written: Vec<_> = (0..PAGES * LANES)
            .map(|at| *slot.unreported[at / LANES][at % LANES].lock().unwrap())
            .collect();
        let harvest = soak.harvests.fetch_add(1, Ordering::SeqCst) + 1;
        let dirty = soak.space.take_dirty(slot.iova(), BYTES as u64);
        soak.count(Kind::Harvest);
        match dirty {
            // Also while the slot changes: what was taken then was perhaps of the memory that came.
            Ok(dirty) => dirty.iter().for_each(|iova| {
                let page = (iova - slot.iova()) as usize / PAGE;
                slot.reported[page].store(harvest, Ordering::SeqCst);
            }),
            Err(error) => soak.differences.found(&error),
        }
        let Some(generation) = slot.still(before) else {
            continue;
        };
        for (at, written) in written.into_iter().enumerate() {
            let Some(written) = written.filter(|written| written.generation == generation) else {
                continue;
            };
            let page = at / LANES;
            let reported = slot.reported[page].load(Ordering::SeqCst);
            soak.differences.expect(reported >= written.harvest, || {
                format!(
                    "page {page} at {:#x}: {written:?}, reported last in {reported}",
                    slot.iova()
                )
            });
        }
    }
}

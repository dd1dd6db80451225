// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's memory slots, and where in them each physical page of a trace goes.

use std::collections::HashMap;

use crate::contiguity::Contiguity;

/// Bytes of a page.
pub const PAGE_SIZE: u64 = 4096;

/// A memory slot of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// First guest physical address.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Where the two low memory slots meet.
const LOW_BOUNDARY: u64 = 128 * MIB;

/// The slots as a PC has them: conventional memory, then above the ROM hole two slots that meet
/// below 4 GiB (memory that was there and memory that was plugged in), then one above.
pub const SLOTS: [Slot; 4] = [
    Slot {
        gpa: 0,
        len: 640 * KIB,
    },
    Slot {
        gpa: MIB,
        len: LOW_BOUNDARY - MIB,
    },
    Slot {
        gpa: LOW_BOUNDARY,
        len: 128 * MIB,
    },
    Slot {
        gpa: 4 * GIB,
        len: 256 * MIB,
    },
];

/// Pages of the guest, all slots together.
pub fn guest_pages() -> u64 {
    SLOTS.iter().map(|slot| slot.len / PAGE_SIZE).sum()
}

/// Where each physical page of a trace lies in the guest.
///
/// The pages of context objects follow a [`Contiguity`] profile; between two runs one page is
/// left free, so that runs never join by accident. Objects go in turn to below and above 4 GiB,
/// the first across the boundary of two slots (if its runs reach that far). All other pages are
/// spread over the slots. Page 0 of the guest stays free: what points there by mistake shows.
///
/// ```
/// use gvt_replay::{Contiguity, Placement};
///
/// let profile = Contiguity::parse("mine", "4,16")?;
/// let object: Vec<u64> = (100..120).collect();
/// let placement = Placement::new(&[object], 0..3, &profile).expect("they fit");
/// let gpa = |page: u64| placement.gpa(page * 4096).unwrap();
/// assert_eq!(gpa(103), gpa(100) + 3 * 4096);
/// assert_ne!(gpa(104), gpa(103) + 4096);
/// assert_ne!(gpa(0), 0);
/// assert_eq!(placement.gpa(0x5000), None);
/// # Ok::<(), gvt_replay::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Placement {
    /// Guest page by trace page.
    pages: HashMap<u64, u64>,
}

impl Placement {
    /// Places the pages of the context `objects` and the `others`, all by physical page number.
    /// A page that is named twice stays where it was placed first. `None` if the guest is too
    /// small.
    pub fn new(
        objects: &[Vec<u64>],
        others: impl IntoIterator<Item = u64>,
        profile: &Contiguity,
    ) -> Option<Self> {
        let mut pages = HashMap::new();
        let mut areas = Areas::new();
        for (index, object) in objects.iter().enumerate() {
            let area = areas.of_object(index);
            let mut object = object.iter();
            for run in profile.runs(index) {
                let first = area.take(*run as u64 + 1)?;
                let last = first + *run as u64 - 1;
                for (page, at) in object.by_ref().take(*run).zip(0..) {
                    let target = match profile.descends() {
                        false => first + at,
                        true => last - at,
                    };
                    pages.entry(*page).or_insert(target);
                }
            }
        }
        let mut turn = 0;
        for page in others {
            if let std::collections::hash_map::Entry::Vacant(entry) = pages.entry(page) {
                entry.insert(areas.take_in_turn(&mut turn)?);
            }
        }
        Some(Placement { pages })
    }

    /// The guest physical address of a physical address of the trace.
    pub fn gpa(&self, physical: u64) -> Option<u64> {
        let page = self.pages.get(&(physical / PAGE_SIZE))?;
        Some(page * PAGE_SIZE + physical % PAGE_SIZE)
    }
}

/// Free pages `next..end` of the guest.
struct Area {
    next: u64,
    end: u64,
}

impl Area {
    fn between(gpa: u64, end: u64) -> Self {
        Area {
            next: gpa / PAGE_SIZE,
            end: end / PAGE_SIZE,
        }
    }

    fn take(&mut self, pages: u64) -> Option<u64> {
        let first = self.next;
        let next = first.checked_add(pages).filter(|next| *next <= self.end)?;
        self.next = next;
        Some(first)
    }
}

struct Areas([Area; 4]);

impl Areas {
    /// The areas follow the slots but for page 0 and for the boundary of the low slots, which is
    /// moved down so that the first object lies across the slots' own.
    fn new() -> Self {
        const BEFORE_BOUNDARY: u64 = 10 * PAGE_SIZE;
        let [conventional, low, plugged, high] = SLOTS;
        let split = plugged.gpa - BEFORE_BOUNDARY;
        Areas([
            Area::between(PAGE_SIZE, conventional.gpa + conventional.len),
            Area::between(low.gpa, split),
            Area::between(split, plugged.gpa + plugged.len),
            Area::between(high.gpa, high.gpa + high.len),
        ])
    }

    fn of_object(&mut self, index: usize) -> &mut Area {
        let [_, _, plugged, high] = &mut self.0;
        if index % 2 == 0 {
            plugged
        } else {
            high
        }
    }

    fn take_in_turn(&mut self, turn: &mut usize) -> Option<u64> {
        for _ in 0..self.0.len() {
            let index = *turn % self.0.len();
            *turn += 1;
            if let Some(page) = self.0[index].take(1) {
                return Some(page);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn in_a_slot(gpa: u64) -> bool {
        SLOTS
            .iter()
            .any(|slot| gpa >= slot.gpa && gpa < slot.gpa + slot.len)
    }

    fn objects(count: u64) -> Vec<Vec<u64>> {
        (0..count)
            .map(|object| (object * 24 + 1000..object * 24 + 1020).collect())
            .collect()
    }

    #[test]
    fn runs_are_exactly_those_of_the_profile() {
        let objects = objects(300);
        for name in Contiguity::NAMES {
            let profile = Contiguity::bundled(name).unwrap();
            let placement = Placement::new(&objects, 0..40_000, &profile).unwrap();
            for (index, object) in objects.iter().enumerate() {
                let mut runs = vec![1];
                for pair in object.windows(2) {
                    let gpa = |page: u64| placement.gpa(page * PAGE_SIZE).unwrap();
                    if gpa(pair[1]) == gpa(pair[0]) + PAGE_SIZE {
                        *runs.last_mut().unwrap() += 1;
                    } else {
                        runs.push(1);
                    }
                }
                assert_eq!(runs, profile.runs(index), "{name} object {index}");
            }
        }
    }

    #[test]
    fn descending_runs_are_the_same_the_other_way_round() {
        let objects = objects(3);
        let profile = Contiguity::parse("mine", "4,16\n20\n").unwrap();
        let place = |profile: &Contiguity| {
            let placement = Placement::new(&objects, [], profile).unwrap();
            move |page: u64| placement.gpa(page * PAGE_SIZE).unwrap()
        };
        let (up, down) = (place(&profile), place(&profile.clone().descending()));
        for (object, runs) in objects.iter().zip([&[4, 16][..], &[20], &[4, 16]]) {
            let mut pages = &object[..];
            for run in runs {
                let (now, later) = pages.split_at(*run);
                assert!(now
                    .iter()
                    .zip(now.iter().rev())
                    .all(|(page, other)| up(*page) == down(*other)));
                pages = later;
            }
        }
    }

    #[test]
    fn every_page_has_its_own_place_in_a_slot_and_none_is_page_0() {
        let profile = Contiguity::bundled("churned").unwrap();
        let placement = Placement::new(&objects(300), 0..100_000, &profile).unwrap();
        let places: HashSet<u64> = placement.pages.values().copied().collect();
        assert_eq!(places.len(), placement.pages.len());
        assert!(places.iter().all(|page| in_a_slot(page * PAGE_SIZE)));
        assert!(!places.contains(&0));
        assert!(places.iter().any(|page| page * PAGE_SIZE < 640 * KIB));
        assert!(places.iter().any(|page| page * PAGE_SIZE >= 4 * GIB));
    }

    #[test]
    fn the_first_object_lies_across_two_slots() {
        let profile = Contiguity::bundled("consecutive").unwrap();
        let placement = Placement::new(&objects(1), [], &profile).unwrap();
        let places: Vec<u64> = placement
            .pages
            .values()
            .map(|page| page * PAGE_SIZE)
            .collect();
        assert!(places.iter().any(|gpa| *gpa < LOW_BOUNDARY));
        assert!(places.iter().any(|gpa| *gpa >= LOW_BOUNDARY));
    }

    #[test]
    fn too_many_pages_do_not_fit() {
        let profile = Contiguity::bundled("consecutive").unwrap();
        let fits = |pages| Placement::new(&[], 0..pages, &profile).is_some();
        assert!(fits(guest_pages() - 1));
        assert!(!fits(guest_pages()));
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The pins of the pages that page tables map: one a frame, however many entries map it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use page_pin::PinPages;
use vm_memory::Permissions;

use crate::error::{Cause, Error, Result};
use crate::memory;
use crate::ppgtt::device::{Mapping, SharedMap};
use crate::ppgtt::entry::Leaf;
use crate::regs::PAGE_MASK;

/// A 2 MiB page whose frames cannot be pinned at once is pinned frame by frame; no other leaf is
/// pinned as a whole.
const LARGE: usize = 512;

/// The cache of leaf pins, by frame and by the device's address.
///
/// A frame that is mapped in two sizes is pinned and mapped once in each: whoever uses the one keeps it
/// when the other goes.
///
/// # Invariants
/// - `lost` are the keys of those `pins` that hold nothing.
/// - `addresses` has the first address of every mapping that `pins` hold, and whose it is.
pub(super) struct LeafPins<G> {
    pins: BTreeMap<Leaf, Pin<G>>,
    lost: BTreeSet<Leaf>,
    addresses: BTreeSet<(u64, Leaf)>,
    map: SharedMap<G>,
}

#[derive(Debug)]
struct Pin<G> {
    /// Entries that map the leaf.
    users: u64,
    held: Held<G>,
}

/// The mappings of a leaf.
#[derive(Debug)]
enum Held<G> {
    Whole(Mapping<G>),
    Frames(Vec<Mapping<G>>),
    /// The pages were taken away.
    Nothing,
}

impl<G> Held<G> {
    fn mappings(&self) -> &[Mapping<G>] {
        match self {
            Held::Whole(mapping) => std::slice::from_ref(mapping),
            Held::Frames(mappings) => mappings,
            Held::Nothing => &[],
        }
    }
}

impl<G> LeafPins<G> {
    pub(super) fn new(map: SharedMap<G>) -> Self {
        Self {
            pins: BTreeMap::new(),
            lost: BTreeSet::new(),
            addresses: BTreeSet::new(),
            map,
        }
    }

    /// The device's address of byte `offset` of a leaf that is pinned.
    pub(super) fn address(&self, leaf: Leaf, offset: u64) -> Option<u64> {
        let frame = leaf.gfn + (offset >> 12);
        let part =
            parts(leaf).find(|part| (part.gfn..part.gfn + part.pages as u64).contains(&frame))?;
        let within = frame - part.gfn;
        match &self.pins.get(&part)?.held {
            Held::Whole(mapping) => Some(mapping.address + (within << 12) + (offset & PAGE_MASK)),
            Held::Frames(mappings) => {
                let mapping = mappings.get(usize::try_from(within).ok()?)?;
                Some(mapping.address + (offset & PAGE_MASK))
            }
            Held::Nothing => None,
        }
    }

    /// The guest frame that the device reaches at `address`.
    pub(super) fn frame_at(&self, address: u64) -> Option<u64> {
        const LARGEST: u64 = (LARGE as u64) << 12;
        let from = (address.saturating_sub(LARGEST - 1), Leaf::LEAST);
        let candidates = self.addresses.range(from..=(address, Leaf::GREATEST));
        candidates.rev().find_map(|(_, leaf)| {
            let mappings = self.pins.get(leaf)?.held.mappings();
            let at = mappings
                .iter()
                .position(|mapping| mapping.contains(address))?;
            let offset = address - mappings[at].address;
            Some(leaf.gfn + at as u64 + (offset >> 12))
        })
    }

    /// Number of pinned leaves (4 KiB and 2 MiB ones).
    pub(super) fn len(&self) -> usize {
        self.pins.len() - self.lost.len()
    }

    /// An entry maps `leaf`.
    pub(super) fn acquire<P: PinPages<Pinned = G>>(&mut self, pins: &P, leaf: Leaf) -> Result<()> {
        for (done, part) in parts(leaf).enumerate() {
            if let Err(error) = self.acquire_part(pins, part) {
                parts(leaf)
                    .take(done)
                    .for_each(|part| self.release_part(part));
                return Err(error);
            }
        }
        Ok(())
    }

    /// An entry maps `leaf` no more.
    pub(super) fn release(&mut self, leaf: Leaf) {
        parts(leaf).for_each(|part| self.release_part(part));
    }

    /// Drops the pins of the frames `first..=last`. What they belonged to is lost until it is acquired
    /// or [pinned again](Self::pin_again).
    pub(super) fn unpin(&mut self, first: u64, last: u64) {
        // A large leaf that begins before the range may reach into it.
        let from = Leaf {
            gfn: first.saturating_sub(LARGE as u64 - 1),
            pages: 0,
        };
        let to = Leaf {
            gfn: last,
            pages: usize::MAX,
        };
        for (leaf, pin) in self.pins.range_mut(from..=to) {
            if leaf.gfn + leaf.pages as u64 > first {
                for mapping in pin.held.mappings() {
                    self.addresses.remove(&(mapping.address, *leaf));
                }
                pin.held = Held::Nothing;
                self.lost.insert(*leaf);
            }
        }
    }

    /// Whether any leaf that is mapped has lost its pages.
    pub(super) fn any_lost(&self) -> bool {
        !self.lost.is_empty()
    }

    /// What `leaf` has lost.
    pub(super) fn lost(&self, leaf: Leaf) -> impl Iterator<Item = Leaf> + '_ {
        parts(leaf).filter(|part| self.lost.contains(part))
    }

    /// Pins what is lost again.
    pub(super) fn pin_again<P: PinPages<Pinned = G>>(
        &mut self,
        pins: &P,
        part: Leaf,
    ) -> Result<()> {
        if !self.lost.contains(&part) {
            return Ok(());
        }
        if let Some(pin) = self.pins.get_mut(&part) {
            pin.held = pin_leaf(pins, &self.map, part)?;
            let mappings = pin.held.mappings().iter();
            self.addresses
                .extend(mappings.map(|mapping| (mapping.address, part)));
        }
        self.lost.remove(&part);
        Ok(())
    }

    fn acquire_part<P: PinPages<Pinned = G>>(&mut self, pins: &P, part: Leaf) -> Result<()> {
        self.pin_again(pins, part)?;
        if let Some(pin) = self.pins.get_mut(&part) {
            pin.users += 1;
            return Ok(());
        }
        let held = pin_leaf(pins, &self.map, part)?;
        let mappings = held.mappings().iter();
        self.addresses
            .extend(mappings.map(|mapping| (mapping.address, part)));
        self.pins.insert(part, Pin { users: 1, held });
        Ok(())
    }

    fn release_part(&mut self, part: Leaf) {
        let Some(pin) = self.pins.get_mut(&part) else {
            return;
        };
        pin.users -= 1;
        if pin.users == 0 {
            for mapping in pin.held.mappings() {
                self.addresses.remove(&(mapping.address, part));
            }
            self.pins.remove(&part);
            self.lost.remove(&part);
        }
    }
}

/// What is pinned and counted by itself: a large page, or each 4 KiB frame of another one.
fn parts(leaf: Leaf) -> impl Iterator<Item = Leaf> {
    let pages = if leaf.pages == LARGE { LARGE } else { 1 };
    (0..leaf.pages as u64)
        .step_by(pages)
        .map(move |frame| Leaf {
            gfn: leaf.gfn + frame,
            pages,
        })
}

fn pin_leaf<P: PinPages>(
    pins: &P,
    map: &SharedMap<P::Pinned>,
    leaf: Leaf,
) -> Result<Held<P::Pinned>> {
    match pin_part(pins, map, leaf) {
        Ok(mapping) => Ok(Held::Whole(mapping)),
        Err(_) if leaf.pages > 1 => {
            let mut mappings = Vec::new();
            memory::reserve(&mut mappings, leaf.pages)?;
            for gfn in leaf.gfn..leaf.gfn + leaf.pages as u64 {
                mappings.push(pin_part(pins, map, Leaf { gfn, pages: 1 })?);
            }
            Ok(Held::Frames(mappings))
        }
        Err(error) => Err(error),
    }
}

/// Pins and maps frames at once.
fn pin_part<P: PinPages>(
    pins: &P,
    map: &SharedMap<P::Pinned>,
    Leaf { gfn, pages }: Leaf,
) -> Result<Mapping<P::Pinned>> {
    pins.pin_pages(gfn << 12, pages, Permissions::ReadWrite)
        .map_err(Cause::from)
        .and_then(|pinned| Mapping::new(map, gfn, pages, pinned))
        .map_err(|source| Error::LeafPin { gfn, source })
}

impl<G> fmt::Debug for LeafPins<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeafPins")
            .field("pins", &self.pins.len())
            .field("lost", &self.lost)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::ppgtt::device::DeviceMap;

    /// Counts what is pinned; fails as told.
    #[derive(Clone, Default)]
    struct Pins {
        calls: Rc<Cell<usize>>,
        largest: usize,
        refused: Option<u64>,
    }

    #[derive(Debug, thiserror::Error)]
    #[error("refused")]
    struct Refused;

    impl PinPages for Pins {
        type Pinned = ();
        type Error = Refused;

        fn pin_pages(
            &self,
            iova: u64,
            npages: usize,
            _: Permissions,
        ) -> std::result::Result<(), Refused> {
            self.calls.set(self.calls.get() + 1);
            if npages > self.largest || self.refused == Some(iova >> 12) {
                return Err(Refused);
            }
            Ok(())
        }
    }

    fn pins(largest: usize) -> Pins {
        Pins {
            largest,
            ..Pins::default()
        }
    }

    fn leaf(gfn: u64, pages: usize) -> Leaf {
        Leaf { gfn, pages }
    }

    #[test]
    fn a_frame_is_pinned_once_however_often_it_is_mapped() {
        let pins = pins(1);
        let mut leaves = LeafPins::new(Arc::new(()));
        for _ in 0..3 {
            leaves.acquire(&pins, leaf(5, 1)).unwrap();
        }
        assert_eq!((pins.calls.get(), leaves.len()), (1, 1));
        leaves.release(leaf(5, 1));
        leaves.release(leaf(5, 1));
        assert_eq!(leaves.len(), 1);
        leaves.release(leaf(5, 1));
        assert_eq!(leaves.len(), 0);
    }

    #[test]
    fn sixty_four_kib_are_sixteen_frames_shared_with_small_pages() {
        let pins = pins(1);
        let mut leaves = LeafPins::new(Arc::new(()));
        leaves.acquire(&pins, leaf(35, 1)).unwrap();
        leaves.acquire(&pins, leaf(32, 16)).unwrap();
        assert_eq!((pins.calls.get(), leaves.len()), (16, 16));
        leaves.release(leaf(32, 16));
        assert_eq!(leaves.len(), 1);
    }

    #[test]
    fn two_mib_are_one_pin_or_one_a_frame() {
        let mut leaves = LeafPins::new(Arc::new(()));
        let whole = pins(512);
        leaves.acquire(&whole, leaf(512, 512)).unwrap();
        assert_eq!(whole.calls.get(), 1);
        let split = pins(1);
        leaves.acquire(&split, leaf(1024, 512)).unwrap();
        assert_eq!(split.calls.get(), 513);
        assert_eq!(leaves.len(), 2);
    }

    #[test]
    fn a_failure_takes_nothing() {
        let mut leaves = LeafPins::new(Arc::new(()));
        let refusing = Pins {
            refused: Some(40),
            ..pins(1)
        };
        for failing in [leaf(40, 1), leaf(32, 16), leaf(0, 512)] {
            let error = leaves.acquire(&refusing, failing).unwrap_err();
            assert!(matches!(error, Error::LeafPin { gfn: 40, .. }));
            assert_eq!(error.errno(), libc::ENXIO);
            assert!(leaves.pins.is_empty());
        }
    }

    #[test]
    fn pages_taken_away_are_pinned_again_by_the_next_entry() {
        let pins = pins(512);
        let mut leaves = LeafPins::new(Arc::new(()));
        for held in [leaf(511, 1), leaf(512, 512), leaf(700, 1), leaf(1024, 1)] {
            leaves.acquire(&pins, held).unwrap();
        }
        leaves.unpin(700, 1023);
        assert_eq!(leaves.len(), 2);
        assert_eq!(pins.calls.get(), 4);
        leaves.acquire(&pins, leaf(700, 1)).unwrap();
        assert_eq!((pins.calls.get(), leaves.len()), (5, 3));
        leaves.release(leaf(700, 1));
        assert_eq!(leaves.len(), 3);
        leaves.release(leaf(700, 1));
        assert_eq!(leaves.len(), 2);
        leaves.unpin(0, u64::MAX);
        assert_eq!(leaves.len(), 0);
        assert!(leaves.any_lost());
        for held in [leaf(511, 1), leaf(512, 512), leaf(1024, 1)] {
            leaves.release(held);
        }
        assert!(leaves.pins.is_empty() && !leaves.any_lost());
    }

    /// Gives addresses out from the top, and knows which are in use.
    #[derive(Default)]
    struct Iommu {
        live: Mutex<BTreeMap<u64, usize>>,
        next: Mutex<u64>,
        largest: usize,
    }

    impl DeviceMap<()> for Iommu {
        fn map(&self, _: u64, pages: usize, (): &()) -> std::result::Result<u64, Cause> {
            if pages > self.largest {
                return Err(Refused.into());
            }
            let mut next = self.next.lock().unwrap();
            *next += 0x1_0000_0000;
            self.live.lock().unwrap().insert(*next, pages);
            Ok(*next)
        }

        fn unmap(&self, address: u64, pages: usize) {
            let live = self.live.lock().unwrap().remove(&address);
            assert_eq!(live, Some(pages));
        }
    }

    #[test]
    fn frames_and_device_addresses_lead_to_each_other() {
        for largest in [512, 1] {
            let iommu = Arc::new(Iommu {
                largest,
                ..Iommu::default()
            });
            let pins = pins(512);
            let mut leaves = LeafPins::new(iommu.clone());
            // The frame that both map has an address for each size.
            let held = [leaf(3, 1), leaf(32, 16), leaf(512, 512), leaf(512, 1)];
            for held in held {
                leaves.acquire(&pins, held).unwrap();
                leaves.acquire(&pins, held).unwrap();
            }
            let live = if largest == 1 {
                1 + 16 + 512 + 1
            } else {
                1 + 16 + 1 + 1
            };
            assert_eq!(iommu.live.lock().unwrap().len(), live);
            for held in held {
                for frame in 0..held.pages as u64 {
                    let address = leaves.address(held, (frame << 12) + 0x123).unwrap();
                    assert_eq!(address & 0xfff, 0x123);
                    assert_eq!(leaves.frame_at(address), Some(held.gfn + frame));
                }
            }
            assert_eq!(leaves.frame_at(0x123), None);
            let address = leaves.address(held[0], 0).unwrap();
            assert_eq!(leaves.frame_at(address + 0x1000), None);

            // What is lost has no address, and gets another one.
            leaves.unpin(3, 3);
            assert_eq!(leaves.address(held[0], 0), None);
            assert_eq!(leaves.frame_at(address), None);
            leaves.pin_again(&pins, held[0]).unwrap();
            let again = leaves.address(held[0], 0).unwrap();
            assert_eq!((again != address, leaves.frame_at(again)), (true, Some(3)));

            for held in held.into_iter().chain(held) {
                leaves.release(held);
            }
            assert!(iommu.live.lock().unwrap().is_empty());
            assert!(leaves.addresses.is_empty());
        }
    }

    #[test]
    fn what_the_device_cannot_map_is_not_pinned() {
        let mut leaves = LeafPins::new(Arc::new(Iommu::default()));
        let error = leaves.acquire(&pins(1), leaf(40, 1)).unwrap_err();
        assert!(matches!(error, Error::LeafPin { gfn: 40, .. }));
        assert!(leaves.pins.is_empty());
    }
}

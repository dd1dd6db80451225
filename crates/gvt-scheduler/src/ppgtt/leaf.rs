// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The pins of the pages that page tables map: one a frame, however many entries map it.

use std::collections::{BTreeMap, BTreeSet};

use page_pin::PinPages;
use vm_memory::Permissions;

use crate::error::{Error, Result};
use crate::ppgtt::entry::Leaf;

/// A 2 MiB page whose frames cannot be pinned at once is pinned frame by frame; no other leaf is
/// pinned as a whole.
const LARGE: usize = 512;

/// The cache of leaf pins, by frame.
///
/// # Invariants
/// `lost` are the keys of those `pins` that hold nothing.
#[derive(Debug)]
pub(super) struct LeafPins<G> {
    pins: BTreeMap<Leaf, Pin<G>>,
    lost: BTreeSet<Leaf>,
}

#[derive(Debug)]
struct Pin<G> {
    /// Entries that map the leaf.
    users: u64,
    held: Held<G>,
}

/// The guards of a pin; they are there to be dropped.
#[derive(Debug)]
enum Held<G> {
    Whole(#[allow(dead_code)] G),
    Frames(#[allow(dead_code)] Vec<G>),
    /// The pages were taken away.
    Nothing,
}

impl<G> Default for LeafPins<G> {
    fn default() -> Self {
        Self {
            pins: BTreeMap::new(),
            lost: BTreeSet::new(),
        }
    }
}

impl<G> LeafPins<G> {
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
            pin.held = pin_leaf(pins, part)?;
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
        let held = pin_leaf(pins, part)?;
        self.pins.insert(part, Pin { users: 1, held });
        Ok(())
    }

    fn release_part(&mut self, part: Leaf) {
        let Some(pin) = self.pins.get_mut(&part) else {
            return;
        };
        pin.users -= 1;
        if pin.users == 0 {
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

fn pin_leaf<P: PinPages>(pins: &P, leaf: Leaf) -> Result<Held<P::Pinned>> {
    let whole = pins.pin_pages(leaf.gfn << 12, leaf.pages, Permissions::ReadWrite);
    match whole {
        Ok(guard) => Ok(Held::Whole(guard)),
        Err(_) if leaf.pages > 1 => (leaf.gfn..leaf.gfn + leaf.pages as u64)
            .map(|gfn| pin_frame(pins, gfn))
            .collect::<Result<_>>()
            .map(Held::Frames),
        Err(source) => Err(Error::LeafPin {
            gfn: leaf.gfn,
            source: source.into(),
        }),
    }
}

fn pin_frame<P: PinPages>(pins: &P, gfn: u64) -> Result<P::Pinned> {
    pins.pin_pages(gfn << 12, 1, Permissions::ReadWrite)
        .map_err(|source| Error::LeafPin {
            gfn,
            source: source.into(),
        })
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    use super::*;

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
        let mut leaves = LeafPins::default();
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
        let mut leaves = LeafPins::default();
        leaves.acquire(&pins, leaf(35, 1)).unwrap();
        leaves.acquire(&pins, leaf(32, 16)).unwrap();
        assert_eq!((pins.calls.get(), leaves.len()), (16, 16));
        leaves.release(leaf(32, 16));
        assert_eq!(leaves.len(), 1);
    }

    #[test]
    fn two_mib_are_one_pin_or_one_a_frame() {
        let mut leaves = LeafPins::default();
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
        let mut leaves = LeafPins::default();
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
        let mut leaves = LeafPins::default();
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
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is mapped, as far as the generator has to know to ask for what is interesting.

use vfio_bindings::bindings::vfio::{
    VFIO_DMA_MAP_FLAG_VADDR, VFIO_DMA_UNMAP_FLAG_ALL, VFIO_DMA_UNMAP_FLAG_VADDR,
};

use crate::op::{Map, Op, Outcome, Unmap};

/// One mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// Its first address.
    pub iova: u64,
    /// Its bytes.
    pub size: u64,
    /// Whether its memory was taken away.
    pub invalid: bool,
}

impl Mapped {
    /// Its last address.
    pub fn last(&self) -> u64 {
        self.iova + (self.size - 1)
    }
}

/// All mappings of a container.
#[derive(Debug, Default)]
pub struct Live(Vec<Mapped>);

impl Live {
    /// The mappings, in no order.
    pub fn all(&self) -> &[Mapped] {
        &self.0
    }

    /// Whether nothing is mapped in `iova..=last`.
    pub fn is_free(&self, iova: u64, last: u64) -> bool {
        self.0
            .iter()
            .all(|mapped| mapped.last() < iova || last < mapped.iova)
    }

    /// Follows what an operation has done.
    pub fn note(&mut self, op: &Op, outcome: &Outcome) {
        if outcome.result.is_err() {
            return;
        }
        match op {
            Op::Map(map) => self.note_map(map),
            Op::Unmap(unmap) => self.note_unmap(unmap),
            Op::Dirty(_) | Op::Info(_) | Op::Extension(_) => (),
        }
    }

    fn note_map(&mut self, map: &Map) {
        let (iova, size) = (map.iova, map.size);
        if map.flags & VFIO_DMA_MAP_FLAG_VADDR == 0 {
            let invalid = false;
            self.0.push(Mapped {
                iova,
                size,
                invalid,
            });
        } else if let Some(mapped) = self.0.iter_mut().find(|mapped| mapped.iova == iova) {
            mapped.invalid = false;
        }
    }

    fn note_unmap(&mut self, unmap: &Unmap) {
        let all = unmap.flags & VFIO_DMA_UNMAP_FLAG_ALL != 0;
        let last = unmap.iova.wrapping_add(unmap.size.wrapping_sub(1));
        // Type 1 stops at a mapping that begins before the range, and takes one that ends behind it.
        let stops = |mapped: &Mapped| mapped.iova < unmap.iova && unmap.iova <= mapped.last();
        let goes = |mapped: &Mapped| all || (unmap.iova..=last).contains(&mapped.iova);
        if !all && self.0.iter().any(stops) {
            return;
        }
        if unmap.flags & VFIO_DMA_UNMAP_FLAG_VADDR == 0 {
            self.0.retain(|mapped| !goes(mapped));
        } else {
            let gone = self.0.iter_mut().filter(|mapped| goes(mapped));
            gone.for_each(|mapped| mapped.invalid = true);
        }
    }
}

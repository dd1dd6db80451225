// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A batch that its space turns out to have no room for, while another unmap ends; and an unmap whose memory more hold
//! than a page has room to name.

use std::io;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vfio_dma::iommu::{
    Error, IoAddressSpace, Listener, MappingInfo, ScatterList, UnmapOptions, HOLDERS_LISTED,
};
use vm_memory::Permissions::ReadWrite;

use crate::common::deadline::{ended, within, DEADLINE};
use crate::inject::aside;
use crate::scenarios::{map, memory, p, step, State, MANY};

/// Listens, and lets go of what an unmap waits for when the first mapping of the batch comes.
#[derive(Default)]
struct Meanwhile {
    told: AtomicI64,
    unmap: Mutex<Option<(ScatterList, JoinHandle<u64>)>>,
}

impl Meanwhile {
    /// Has a page held, and a thread that waits to unmap it.
    fn begin(&self, space: &IoAddressSpace, page: u64) {
        let held = space.scatter(p(page), 1, ReadWrite).unwrap();
        let unmapping = space.clone();
        let unmapper = thread::spawn(move || {
            let patient = UnmapOptions::new().deadline(2 * DEADLINE);
            unmapping.unmap_with(p(page), p(1), patient).unwrap()
        });
        within("an unmap begins", || space.stats().leaving > 0);
        *self.unmap.lock().unwrap() = Some((held, unmapper));
    }

    fn end(&self) {
        if let Some((held, unmapper)) = self.unmap.lock().unwrap().take() {
            drop(held);
            assert_eq!(
                ended("an unmap ends when its page is let go", unmapper),
                p(1)
            );
        }
    }
}

impl Listener for Meanwhile {
    fn map(&self, _: &MappingInfo) -> io::Result<()> {
        self.told.fetch_add(1, Ordering::Relaxed);
        aside(|| self.end());
        Ok(())
    }

    fn unmap(&self, _: u64, _: u64) {
        self.told.fetch_sub(1, Ordering::Relaxed);
    }
}

pub fn batch() {
    let owner = Arc::new(());
    // For some hundred of them.
    let space = IoAddressSpace::builder().table_limit(24 << 10).build();
    let space = space.held_by(owner.clone());
    let (backing, page) = (memory(MANY), 1 << 20);
    let listener = Arc::new(Meanwhile::default());
    let listening = step(&space, "listen", || space.listen(listener.clone()));
    let empty = State::of(&space);
    map(&space, page, 1);
    aside(|| listener.begin(&space, page));
    let part = |n: u64| backing.slice(p(n) as usize, p(1) as usize).unwrap();
    let refused = space.map_batch((0..MANY).map(|n| (p(3 * n), part(n), ReadWrite)));
    match refused {
        Err(Error::TableLimit { .. } | Error::NoMemory { .. }) => {}
        other => panic!("{other:?}"),
    }
    aside(|| listener.end());
    assert_eq!(State::of(&space), empty);
    assert_eq!(listener.told.load(Ordering::Relaxed), 0);
    drop((listening, space));
    assert_eq!(Arc::strong_count(&owner), 1);
}

pub fn holders() {
    let space = IoAddressSpace::new();
    map(&space, 0, 1);
    let held: Vec<_> = aside(|| {
        let lists = (0..MANY).map(|_| space.scatter(0, 1, ReadWrite).unwrap());
        lists.collect()
    });
    let at_once = UnmapOptions::new().deadline(Duration::ZERO);
    match space.unmap_with(0, p(1), at_once) {
        Err(Error::Deadline { left, holders, .. }) => {
            assert_eq!(left, p(1));
            // Without memory some are named, or none.
            assert!(holders.len() <= HOLDERS_LISTED);
        }
        other => panic!("{other:?}"),
    }
    aside(|| drop(held));
    assert_eq!(step(&space, "unmap", || space.unmap(0, p(1))), p(1));
}

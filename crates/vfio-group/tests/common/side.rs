// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The other side of an address space, which tests stand in for: what it has, and what it refuses.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use iommu_type1::{page_size, Backing, IoAddressSpace, Profile};
use proptest::prelude::*;
use vfio_group::Result;
use vm_memory::Permissions::{self, Read, ReadWrite, Write};

/// What it has at an address: bytes, where they are in this process, and flags.
pub type Entry = (u64, u64, u32);

#[derive(Default)]
pub struct Side {
    pub mapped: Mutex<BTreeMap<u64, Entry>>,
    /// Maps until one is refused; none is while it is negative.
    refuse_in: AtomicI64,
    refuse_unmaps: AtomicBool,
    /// Something was asked for that was never right.
    wrong: Mutex<Option<String>>,
    /// Calls, with addresses in pages.
    calls: Mutex<Vec<(&'static str, u64, u64)>>,
}

impl Side {
    pub fn new() -> Arc<Self> {
        let side = Side::default();
        side.refuse_in(-1);
        Arc::new(side)
    }

    pub fn refuse_in(&self, maps: i64) {
        self.refuse_in.store(maps, Ordering::Relaxed);
    }

    pub fn refuse_unmaps(&self, refuse: bool) {
        self.refuse_unmaps.store(refuse, Ordering::Relaxed);
    }

    /// The error of what is to be refused now.
    pub fn refuses(&self) -> Option<i32> {
        let left = self.refuse_in.fetch_sub(1, Ordering::Relaxed);
        (left == 0).then_some(libc::ENOMEM)
    }

    pub fn map(&self, iova: u64, entry: Entry) -> std::result::Result<(), i32> {
        if let Some(errno) = self.refuses() {
            return Err(errno);
        }
        self.call("map", iova, entry.0);
        let mut mapped = self.mapped.lock().unwrap();
        let overlaps = |(first, (size, ..)): (&u64, &Entry)| first + size > iova;
        if mapped
            .range(..iova + entry.0)
            .next_back()
            .is_some_and(overlaps)
        {
            self.wrong(format!("map of {entry:x?} at {iova:#x} over {mapped:x?}"));
            return Err(libc::EEXIST);
        }
        mapped.insert(iova, entry);
        Ok(())
    }

    pub fn unmap(&self, iova: u64, size: u64) -> std::result::Result<(), i32> {
        self.call("unmap", iova, size);
        if self.refuse_unmaps.load(Ordering::Relaxed) {
            return Err(libc::EIO);
        }
        let removed = self.mapped.lock().unwrap().remove(&iova);
        if removed.is_none_or(|entry| entry.0 != size) {
            self.wrong(format!(
                "unmap of {size:#x} at {iova:#x}, which was {removed:x?}"
            ));
        }
        Ok(())
    }

    pub fn wrong(&self, what: String) {
        self.wrong.lock().unwrap().get_or_insert(what);
    }

    pub fn assert_never_wrong(&self) {
        assert_eq!(*self.wrong.lock().unwrap(), None);
    }

    fn call(&self, what: &'static str, iova: u64, size: u64) {
        let call = (what, iova / page_size(), size / page_size());
        self.calls.lock().unwrap().push(call);
    }

    /// Calls since it was asked before.
    pub fn calls(&self) -> Vec<(&'static str, u64, u64)> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }

    /// What stands at the start of each page it has: memory that is gone ends the test.
    pub fn pages(&self) -> Vec<Option<u64>> {
        let mut pages = vec![None; PAGES as usize];
        for (iova, (size, host, _)) in &*self.mapped.lock().unwrap() {
            for offset in (0..*size).step_by(page_size() as usize) {
                let at = std::ptr::with_exposed_provenance::<u64>((host + offset) as usize);
                // SAFETY: what has it mapped keeps its memory; that is what is tested.
                pages[((iova + offset) / page_size()) as usize] =
                    Some(unsafe { at.read_volatile() });
            }
        }
        pages
    }
}

pub const PAGES: u64 = 16;

pub fn p(pages: u64) -> u64 {
    pages * page_size()
}

/// Memory with a number of its own in each page.
pub fn marked(pages: u64) -> Backing {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let backing = Backing::anonymous(p(pages) as usize).unwrap();
    backing.host_address().expose_provenance();
    let scratch = IoAddressSpace::new();
    scratch.map(0, backing.clone(), ReadWrite).unwrap();
    for page in 0..pages {
        let mark = NEXT.fetch_add(1, Ordering::Relaxed).to_ne_bytes();
        scratch.write(p(page), &mark).unwrap();
    }
    backing
}

/// What stands at the start of each page of a space.
pub fn pages(space: &IoAddressSpace) -> Vec<Option<u64>> {
    let page = |page| {
        let mut mark = [0; 8];
        let read = space.read(p(page), &mut mark);
        read.ok().map(|()| u64::from_ne_bytes(mark))
    };
    (0..PAGES).map(page).collect()
}

#[derive(Clone, Debug)]
pub enum Op {
    Map(u64, u64, Permissions),
    Batch(Vec<(u64, u64)>),
    Unmap(u64, u64),
    Replace(u64, u64),
    Invalidate(u64, u64),
    Resume(u64, u64),
    All,
    Join,
    Leave,
    /// The so manieth map from now on is refused.
    RefuseMap(i64),
    RefuseUnmaps(bool),
}

pub fn op() -> impl Strategy<Value = Op> {
    let range = || (0..PAGES - 4, 1..5_u64);
    let permissions = prop::sample::select(vec![ReadWrite, ReadWrite, ReadWrite, Read, Write]);
    prop_oneof![
        8 => (range(), permissions).prop_map(|((page, n), prot)| Op::Map(page, n, prot)),
        2 => prop::collection::vec(range(), 1..4).prop_map(Op::Batch),
        4 => range().prop_map(|(page, n)| Op::Unmap(page, n)),
        2 => range().prop_map(|(page, n)| Op::Replace(page, n)),
        1 => range().prop_map(|(page, n)| Op::Invalidate(page, n)),
        1 => range().prop_map(|(page, n)| Op::Resume(page, n)),
        1 => Just(Op::All),
        3 => Just(Op::Join),
        1 => Just(Op::Leave),
        2 => (0..4_i64).prop_map(Op::RefuseMap),
        2 => any::<bool>().prop_map(Op::RefuseUnmaps),
    ]
}

/// What has a side follow a space.
pub trait Follows {
    fn stuck(&self) -> Vec<(u64, u64)>;
    fn is_lost(&self) -> bool;
}

fn change(space: &IoAddressSpace, op: &Op) {
    // Whether it succeeds is not what this is about.
    match op {
        Op::Map(page, n, prot) => drop(space.map(p(*page), marked(*n), *prot)),
        Op::Batch(ranges) => {
            let mappings = ranges
                .iter()
                .map(|(page, n)| (p(*page), marked(*n), ReadWrite));
            drop(space.map_batch(mappings));
        }
        Op::Unmap(page, n) => drop(space.unmap(p(*page), p(*n))),
        Op::Replace(page, n) => drop(space.replace(p(*page), marked(*n), ReadWrite)),
        Op::Invalidate(page, n) => drop(space.invalidate_vaddr(p(*page), p(*n))),
        Op::Resume(page, n) => drop(space.resume_vaddr(p(*page), p(*n), marked(*n))),
        Op::All => drop(space.unmap_all()),
        Op::Join | Op::Leave | Op::RefuseMap(_) | Op::RefuseUnmaps(_) => unreachable!(),
    }
}

/// After each operation the side has what the space has, and beside that only what it has refused to give
/// back. Returns what is still there in the end.
pub fn follow<F: Follows>(
    profile: Profile,
    ops: &[Op],
    side: &Side,
    join: impl Fn(&IoAddressSpace) -> Result<F>,
) {
    let space = IoAddressSpace::builder()
        .profile(profile)
        .entry_limit(12)
        .build();
    let mut joined: Option<F> = None;
    for op in ops {
        match op {
            Op::Join if joined.is_none() => {
                side.refuse_unmaps(false);
                joined = join(&space).ok();
            }
            Op::Join => (),
            Op::Leave => {
                side.refuse_unmaps(false);
                joined = None;
            }
            Op::RefuseMap(maps) => side.refuse_in(*maps),
            Op::RefuseUnmaps(refuse) => side.refuse_unmaps(*refuse && joined.is_some()),
            op => change(&space, op),
        }
        side.assert_never_wrong();
        let told = joined.as_ref().filter(|joined| !joined.is_lost());
        let mut expected = told.map_or(vec![None; PAGES as usize], |_| pages(&space));
        let has = side.pages();
        for (iova, size) in joined.iter().flat_map(Follows::stuck) {
            for page in iova / page_size()..(iova + size) / page_size() {
                let page = page as usize;
                assert_eq!(expected[page], None, "{op:?} mapped over what is stuck");
                assert_ne!(has[page], None, "{op:?}");
                expected[page] = has[page];
            }
        }
        assert_eq!(has, expected, "{op:?}");
    }
    side.refuse_unmaps(false);
    drop(joined);
    assert_eq!(side.pages(), vec![None; PAGES as usize]);
    side.assert_never_wrong();
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Those who listen: whatever happens, a mirror has what the space has.

#[path = "common/deadline.rs"]
mod deadline;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use deadline::{within, Over, DEADLINE};
use iommu_type1::{
    page_size, Backing, Error, IoAddressSpace, Listener, Listening, MappingInfo, PermissionPolicy,
    Profile, UnmapOptions, UnmapPolicy, LISTENER_LIMIT,
};
use proptest::prelude::*;
use vm_memory::Permissions::{self, Read, ReadWrite};

/// A space that is told what is mapped in another.
struct Mirror {
    space: IoAddressSpace,
    /// Calls of `map` until one is refused; none is while it is negative.
    refuse_in: AtomicI64,
    wrong: AtomicBool,
    /// What was called, with addresses in pages.
    calls: Mutex<Vec<(&'static str, u64, u64)>>,
}

impl Mirror {
    fn new() -> Arc<Self> {
        let builder = IoAddressSpace::builder();
        Arc::new(Mirror {
            space: builder.permission_policy(PermissionPolicy::Strict).build(),
            refuse_in: AtomicI64::new(-1),
            wrong: AtomicBool::new(false),
            calls: Mutex::new(Vec::new()),
        })
    }

    fn refuse_in(&self, calls: i64) {
        self.refuse_in.store(calls, Ordering::Relaxed);
    }

    fn called(&self, what: &'static str, iova: u64, size: u64) {
        let call = (what, iova / page_size(), size / page_size());
        self.calls.lock().unwrap().push(call);
    }

    /// What was called since it was asked before.
    fn calls(&self) -> Vec<(&'static str, u64, u64)> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }
}

impl Listener for Mirror {
    fn map(&self, mapping: &MappingInfo) -> io::Result<()> {
        if self.refuse_in.fetch_sub(1, Ordering::Relaxed) == 0 {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        self.called("map", mapping.iova, mapping.size);
        let backing = mapping.backing.clone();
        assert_eq!(backing.len() as u64, mapping.size);
        let mapped = self.space.map(mapping.iova, backing, mapping.permissions);
        if mapped.is_err() {
            self.wrong.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    fn unmap(&self, iova: u64, size: u64) {
        self.called("unmap", iova, size);
        if self.space.unmap(iova, size).ok() != Some(size) {
            self.wrong.store(true, Ordering::Relaxed);
        }
    }
}

fn p(pages: u64) -> u64 {
    pages * page_size()
}

fn memory(pages: u64) -> Backing {
    Backing::anonymous(p(pages) as usize).unwrap()
}

/// Memory with a byte of its own in each page.
fn marked(pages: u64) -> Backing {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let backing = memory(pages);
    let scratch = IoAddressSpace::new();
    scratch.map(0, backing.clone(), ReadWrite).unwrap();
    for page in 0..pages {
        let mark = NEXT.fetch_add(1, Ordering::Relaxed).to_ne_bytes();
        scratch.write(p(page), &mark).unwrap();
    }
    backing
}

const PAGES: u64 = 16;

/// What stands in each page, where it can be read.
fn pages(space: &IoAddressSpace) -> Vec<Option<[u8; 8]>> {
    let page = |page| {
        let mut mark = [0; 8];
        space.read(p(page), &mut mark).ok().map(|()| mark)
    };
    (0..PAGES).map(page).collect()
}

#[derive(Clone, Debug)]
enum Op {
    Map(u64, u64),
    Batch(Vec<(u64, u64)>),
    Unmap(u64, u64),
    /// While somebody holds a page, and without any patience.
    UnmapHeld(u64, u64, u64, bool),
    Replace(u64, u64),
    /// As the one above.
    ReplaceHeld(u64, u64, u64, bool),
    Invalidate(u64, u64),
    Resume(u64, u64),
    All,
    Join(usize),
    Leave(usize),
    /// The mirror refuses the so manieth map from now on.
    Refuse(usize, i64),
}

fn op() -> impl Strategy<Value = Op> {
    let range = || (0..PAGES, 1..5_u64);
    let held = || (0..PAGES, 1..5_u64, 0..4_u64, any::<bool>());
    prop_oneof![
        6 => range().prop_map(|(page, n)| Op::Map(page, n)),
        2 => prop::collection::vec(range(), 1..4).prop_map(Op::Batch),
        4 => range().prop_map(|(page, n)| Op::Unmap(page, n)),
        2 => held().prop_map(|(page, n, at, restore)| Op::UnmapHeld(page, n, at, restore)),
        2 => range().prop_map(|(page, n)| Op::Replace(page, n)),
        2 => held().prop_map(|(page, n, at, restore)| Op::ReplaceHeld(page, n, at, restore)),
        2 => range().prop_map(|(page, n)| Op::Invalidate(page, n)),
        2 => range().prop_map(|(page, n)| Op::Resume(page, n)),
        1 => Just(Op::All),
        2 => (0..2_usize).prop_map(Op::Join),
        1 => (0..2_usize).prop_map(Op::Leave),
        3 => (0..2_usize, 0..4_i64).prop_map(|(who, calls)| Op::Refuse(who, calls)),
    ]
}

fn run(space: &IoAddressSpace, op: &Op, mirrors: &[Arc<Mirror>], joined: &mut [Option<Listening>]) {
    let impatient = |restore| {
        let policy = match restore {
            true => UnmapPolicy::Restore,
            false => UnmapPolicy::Revoked,
        };
        UnmapOptions::new().deadline(Duration::ZERO).policy(policy)
    };
    let hold = |page: u64| space.scatter(p(page), 8, Read).ok();
    // Whether it succeeds is not what this is about.
    match op {
        Op::Map(page, n) => drop(space.map(p(*page), marked(*n), ReadWrite)),
        Op::Batch(ranges) => {
            let mappings = ranges
                .iter()
                .map(|(page, n)| (p(*page), marked(*n), ReadWrite));
            drop(space.map_batch(mappings));
        }
        Op::Unmap(page, n) => drop(space.unmap(p(*page), p(*n))),
        Op::UnmapHeld(page, n, at, restore) => {
            let held = hold(page + at);
            drop(space.unmap_with(p(*page), p(*n), impatient(*restore)));
            drop(held);
        }
        Op::Replace(page, n) => drop(space.replace(p(*page), marked(*n), ReadWrite)),
        Op::ReplaceHeld(page, n, at, restore) => {
            let held = hold(page + at);
            drop(space.replace_with(p(*page), marked(*n), ReadWrite, impatient(*restore)));
            drop(held);
        }
        Op::Invalidate(page, n) => drop(space.invalidate_vaddr(p(*page), p(*n))),
        Op::Resume(page, n) => drop(space.resume_vaddr(p(*page), p(*n), marked(*n))),
        Op::All => drop(space.unmap_all()),
        Op::Join(who) => {
            if joined[*who].is_none() {
                joined[*who] = space.listen(mirrors[*who].clone()).ok();
            }
        }
        Op::Leave(who) => joined[*who] = None,
        Op::Refuse(who, calls) => mirrors[*who].refuse_in(*calls),
    }
}

proptest! {
    #[test]
    fn a_mirror_has_what_the_space_has(
        profile in prop::sample::select(vec![Profile::Type1v1, Profile::Type1v2, Profile::Iommufd, Profile::Iotlb]),
        ops in prop::collection::vec(op(), 1..40),
    ) {
        let space = IoAddressSpace::builder()
            .profile(profile)
            .entry_limit(12)
            .unmap_deadline(Duration::ZERO)
            .build();
        let mirrors = [Mirror::new(), Mirror::new()];
        let mut joined = [None, None];
        let nothing = vec![None; PAGES as usize];
        for op in &ops {
            run(&space, op, &mirrors, &mut joined);
            for (mirror, listening) in mirrors.iter().zip(&joined) {
                prop_assert!(!mirror.wrong.load(Ordering::Relaxed), "{:?}: {:?}", op, mirror.calls());
                let is_told = listening.as_ref().is_some_and(|listening| !listening.is_lost());
                let expected = if is_told { pages(&space) } else { nothing.clone() };
                prop_assert_eq!(pages(&mirror.space), expected, "{:?}: {:?}", op, mirror.calls());
            }
        }
    }
}

#[test]
fn those_who_listen_have_a_limit() {
    let space = IoAddressSpace::new();
    let listen = || space.listen(Mirror::new());
    let mut listening: Vec<_> = (0..LISTENER_LIMIT).map(|_| listen().unwrap()).collect();
    let error = listen().unwrap_err();
    assert!(matches!(error, Error::ListenerLimit { limit } if limit == LISTENER_LIMIT));
    assert_eq!(error.errno(), libc::ENOSPC);
    listening.pop();
    let _one_more = listen().unwrap();
}

#[test]
fn who_comes_late_is_given_what_there_is() {
    let space = IoAddressSpace::new();
    for page in [9, 2, 5] {
        space.map(p(page), memory(1), Read).unwrap();
    }
    let mirror = Mirror::new();
    let listening = space.listen(mirror.clone()).unwrap();
    assert_eq!(
        mirror.calls(),
        [("map", 2, 1), ("map", 5, 1), ("map", 9, 1)]
    );
    space.map(p(3), memory(2), Read).unwrap();
    assert_eq!(mirror.calls(), [("map", 3, 2)]);
    drop(listening);
    let taken = [
        ("unmap", 9, 1),
        ("unmap", 5, 1),
        ("unmap", 3, 2),
        ("unmap", 2, 1),
    ];
    assert_eq!(mirror.calls(), taken);
    space.unmap_all().unwrap();
    assert_eq!(mirror.calls(), []);
}

/// A notifier that is registered while mappings are replayed to it, and fails half-way, keeps none of them.
#[test]
fn b08_who_refuses_half_way_keeps_nothing() {
    let space = IoAddressSpace::new();
    for page in [2, 5, 9] {
        space.map(p(page), memory(1), ReadWrite).unwrap();
    }
    let mirror = Mirror::new();
    mirror.refuse_in(2);
    let error = space.listen(mirror.clone()).unwrap_err();
    assert!(matches!(error, Error::Refused { iova, .. } if iova == p(9)));
    assert_eq!(error.errno(), libc::ENOMEM);
    let calls = [
        ("map", 2, 1),
        ("map", 5, 1),
        ("unmap", 5, 1),
        ("unmap", 2, 1),
    ];
    assert_eq!(mirror.calls(), calls);
    space.unmap_all().unwrap();
    assert_eq!(mirror.calls(), []);
}

#[test]
fn what_one_refuses_is_taken_back_from_the_others() {
    let space = IoAddressSpace::new();
    let (first, second) = (Mirror::new(), Mirror::new());
    let _first = space.listen(first.clone()).unwrap();
    let _second = space.listen(second.clone()).unwrap();
    second.refuse_in(1);
    let batch = [1, 2, 3].map(|page| (p(page), memory(1), ReadWrite));
    assert!(matches!(space.map_batch(batch), Err(Error::Refused { .. })));
    assert_eq!(second.calls(), [("map", 1, 1), ("unmap", 1, 1)]);
    assert_eq!(first.calls().len(), 6);
    assert_eq!(pages(&first.space), pages(&space));
    assert_eq!(space.mappings(), 0);
}

/// Told before anybody is waited for: the hardware must not use what is being unmapped.
#[test]
fn an_unmap_is_told_though_somebody_holds_the_memory() {
    for policy in [UnmapPolicy::Revoked, UnmapPolicy::Restore] {
        let space = IoAddressSpace::new();
        let mirror = Mirror::new();
        let _listening = space.listen(mirror.clone()).unwrap();
        space.map(p(1), memory(1), ReadWrite).unwrap();
        let held = space.scatter(p(1), 8, Read).unwrap();
        mirror.calls();
        let options = UnmapOptions::new().deadline(Duration::ZERO).policy(policy);
        space.unmap_with(p(1), p(1), options).unwrap_err();
        let restored = [("unmap", 1, 1), ("map", 1, 1)];
        let told = if policy == UnmapPolicy::Restore { 2 } else { 1 };
        assert_eq!(mirror.calls(), restored[..told]);
        drop(held);
        space.unmap(p(1), p(1)).unwrap();
        let told = if policy == UnmapPolicy::Restore { 1 } else { 0 };
        assert_eq!(mirror.calls(), restored[..told]);
    }
}

#[test]
fn what_cannot_be_restored_stays_revoked() {
    let space = IoAddressSpace::new();
    let mirror = Mirror::new();
    let listening = space.listen(mirror.clone()).unwrap();
    space.map(p(1), memory(1), ReadWrite).unwrap();
    let held = space.scatter(p(1), 8, Read).unwrap();
    mirror.refuse_in(0);
    let options = UnmapOptions::new()
        .deadline(Duration::ZERO)
        .policy(UnmapPolicy::Restore);
    space.unmap_with(p(1), p(1), options).unwrap_err();
    assert!(matches!(
        space.read(p(1), &mut [0]),
        Err(Error::Revoked { .. })
    ));
    assert!(!listening.is_lost());
    drop(held);
    assert_eq!(space.unmap(p(1), p(1)).unwrap(), p(1));
}

#[test]
fn who_does_not_take_the_parts_of_a_cut_is_lost() {
    let space = IoAddressSpace::builder().profile(Profile::Iotlb).build();
    let (stays, goes) = (Mirror::new(), Mirror::new());
    let stays_on = space.listen(stays.clone()).unwrap();
    let is_lost = space.listen(goes.clone()).unwrap();
    space.map(p(1), memory(4), ReadWrite).unwrap();
    space.map(p(8), memory(1), ReadWrite).unwrap();
    goes.calls();
    stays.calls();
    goes.refuse_in(1);
    assert_eq!(space.unmap(p(2), p(1)).unwrap(), p(1));
    let cut = [("unmap", 1, 4), ("map", 1, 1), ("map", 3, 2)];
    assert_eq!(stays.calls(), cut);
    let lost = [
        ("unmap", 1, 4),
        ("map", 1, 1),
        ("unmap", 1, 1),
        ("unmap", 8, 1),
    ];
    assert_eq!(goes.calls(), lost);
    assert!(is_lost.is_lost() && !stays_on.is_lost());
    space.unmap(p(8), p(1)).unwrap();
    assert_eq!(goes.calls(), []);
}

/// Does whatever it is given inside of its calls.
struct Inside<F>(F);

impl<F: Fn(&str) + Send + Sync> Listener for Inside<F> {
    fn map(&self, _mapping: &MappingInfo) -> io::Result<()> {
        (self.0)("map");
        Ok(())
    }

    fn unmap(&self, _iova: u64, _size: u64) {
        (self.0)("unmap");
    }
}

#[test]
fn changes_from_inside_a_call_are_errors_and_accesses_are_not() {
    let space = IoAddressSpace::new();
    space.map(p(7), memory(1), ReadWrite).unwrap();
    let errors = Arc::new(Mutex::new(Vec::new()));
    let (inner, seen) = (space.clone(), errors.clone());
    let listener = Inside(move |_: &str| {
        inner.write(p(7), &[1]).unwrap();
        assert!(inner.read(p(9), &mut [0]).is_err());
        let other = Arc::new(Inside(|_: &str| ()));
        let results = [
            inner.map(p(8), memory(1), ReadWrite),
            inner.map_batch([(p(8), memory(1), ReadWrite)]),
            inner.map_anywhere(memory(1), ReadWrite).map(drop),
            inner.unmap(p(7), p(1)).map(drop),
            inner.unmap_all().map(drop),
            inner.replace(p(7), memory(1), ReadWrite),
            inner.invalidate_vaddr(p(7), p(1)).map(drop),
            inner.mapping_set().unmap_all().map(drop),
            inner.listen(other).map(drop),
        ];
        let results = results.into_iter().map(Result::unwrap_err);
        seen.lock().unwrap().extend(results);
    });
    let listening = space.listen(Arc::new(listener)).unwrap();
    space.map(p(1), memory(1), ReadWrite).unwrap();
    space.unmap(p(1), p(1)).unwrap();
    drop(listening);
    let errors = errors.lock().unwrap();
    // The replay, a map, an unmap, and taking back.
    assert_eq!(errors.len(), 4 * 9);
    for error in &*errors {
        assert!(matches!(error, Error::InsideListener { .. }), "{error}");
        assert_eq!(error.errno(), libc::EDEADLK);
    }
    space.unmap(p(7), p(1)).unwrap();
}

#[test]
fn a_listening_that_is_dropped_inside_a_call_ends_after_it() {
    let space = IoAddressSpace::new();
    let slot = Arc::new(Mutex::new(None::<Listening>));
    let calls = Arc::new(Mutex::new(Vec::new()));
    let (mine, seen) = (slot.clone(), calls.clone());
    let listener = Inside(move |what: &str| {
        seen.lock().unwrap().push(what.to_owned());
        drop(mine.lock().unwrap().take());
    });
    *slot.lock().unwrap() = Some(space.listen(Arc::new(listener)).unwrap());
    space.map(p(1), memory(1), ReadWrite).unwrap();
    space.map(p(2), memory(1), ReadWrite).unwrap();
    assert_eq!(*calls.lock().unwrap(), ["map", "unmap"]);
    assert_eq!(space.mappings(), 2);
}

#[test]
fn a_panic_is_a_refusal() {
    let space = IoAddressSpace::new();
    let mirror = Mirror::new();
    let _mirror = space.listen(mirror.clone()).unwrap();
    let _panics = space
        .listen(Arc::new(Inside(|what: &str| assert_ne!(what, "map"))))
        .unwrap();
    let error = space.map(p(1), memory(1), ReadWrite).unwrap_err();
    assert!(matches!(error, Error::Refused { .. }));
    assert_eq!(mirror.calls(), [("map", 1, 1), ("unmap", 1, 1)]);
}

#[test]
fn memory_that_is_taken_away_and_given_back() {
    let space = IoAddressSpace::new();
    let mirror = Mirror::new();
    let _listening = space.listen(mirror.clone()).unwrap();
    space.map(p(1), marked(1), ReadWrite).unwrap();
    space.invalidate_vaddr(p(1), p(1)).unwrap();
    mirror.refuse_in(0);
    let refused = space.resume_vaddr(p(1), p(1), marked(1));
    assert!(matches!(refused, Err(Error::Refused { .. })));
    space.resume_vaddr(p(1), p(1), marked(1)).unwrap();
    assert_eq!(
        mirror.calls(),
        [("map", 1, 1), ("unmap", 1, 1), ("map", 1, 1)]
    );
    assert_eq!(pages(&mirror.space), pages(&space));
}

/// Who maps and unmaps, and who comes and goes, at the same time.
#[test]
fn nothing_is_missed_and_nothing_told_twice() {
    let space = IoAddressSpace::builder().unmap_deadline(DEADLINE).build();
    let is_over = AtomicBool::new(false);
    let always = Mirror::new();
    thread::scope(|scope| {
        let over = Over(&is_over);
        for worker in 0..2 {
            let (space, is_over) = (&space, &is_over);
            scope.spawn(move || {
                for round in 0.. {
                    if is_over.load(Ordering::Relaxed) {
                        break;
                    }
                    let page = 4 * worker + round % 4;
                    // One who comes refuses the first mapping, whether it was there or comes after.
                    if let Err(error) = space.map(p(page), marked(1), ReadWrite) {
                        assert!(matches!(error, Error::Refused { .. }), "{error}");
                    }
                    if round % 3 > 0 {
                        space.unmap(p(4 * worker), p(4)).unwrap();
                    } else {
                        space
                            .unmap_batch(&[(p(page), p(1)), (p(4 * worker), p(4))])
                            .unwrap();
                    }
                }
            });
        }
        for round in 0..300 {
            let mirror = Mirror::new();
            mirror.refuse_in(if round % 5 == 0 { 0 } else { -1 });
            let joined = space.listen(mirror.clone());
            mirror.refuse_in(-1);
            let calls = mirror.calls().len();
            let hears = || joined.is_err() || calls + mirror.calls().len() > 0;
            within("who listens is told of something", hears);
            drop(joined);
            assert!(!mirror.wrong.load(Ordering::Relaxed));
            assert!(pages(&mirror.space).iter().all(Option::is_none));
        }
        let _always = space.listen(always.clone()).unwrap();
        drop(over);
        within("who has mapped and unmapped tells nobody", || {
            Arc::strong_count(&always) <= 2
        });
    });
    assert!(!always.wrong.load(Ordering::Relaxed));
}

/// Refuses with whatever error it makes.
struct Refuses(fn() -> io::Error);

impl Listener for Refuses {
    fn map(&self, _mapping: &MappingInfo) -> io::Result<()> {
        Err((self.0)())
    }

    fn unmap(&self, _iova: u64, _size: u64) {}
}

#[test]
fn what_is_refused_in_words_has_an_errno() {
    let refusals: [(fn() -> io::Error, i32); 4] = [
        (|| io::ErrorKind::StorageFull.into(), libc::ENOSPC),
        (
            || io::Error::new(io::ErrorKind::PermissionDenied, "no"),
            libc::EPERM,
        ),
        (|| io::Error::from_raw_os_error(libc::EACCES), libc::EACCES),
        (|| io::Error::other("no"), libc::EIO),
    ];
    for (refusal, errno) in refusals {
        let space = IoAddressSpace::new();
        let _listening = space.listen(Arc::new(Refuses(refusal))).unwrap();
        let error = space.map(p(1), memory(1), Read).unwrap_err();
        assert_eq!(error.errno(), errno, "{error}");
    }
}

fn assert_permissions(mirror: &Mirror, iova: u64, prot: Permissions) {
    let write = mirror.space.write(iova, &[1]).is_ok();
    assert_eq!(write, prot.allow(Permissions::Write));
}

#[test]
fn permissions_are_told() {
    let space = IoAddressSpace::new();
    let mirror = Mirror::new();
    let _listening = space.listen(mirror.clone()).unwrap();
    for (page, prot) in [(1, Read), (2, ReadWrite)] {
        space.map(p(page), memory(1), prot).unwrap();
        assert_permissions(&mirror, p(page), prot);
    }
}

// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pins against a naive model: a list of (owner, page, kept), one element a pin.

mod common;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use common::Watching;
use page_pin::{Access, Interest, PinGuard, PinOptions, PinTable, Prevented};
use proptest::prelude::*;

const PAGE: u64 = 4096;
const OWNERS: usize = 3;
/// Pages around both ends of the space.
const PAGES: [u64; 6] = [
    0,
    1,
    2,
    u64::MAX / PAGE - 2,
    u64::MAX / PAGE - 1,
    u64::MAX / PAGE,
];

#[derive(Clone, Debug)]
enum Op {
    Pin {
        owner: usize,
        page: u64,
        npages: usize,
    },
    PinList {
        owner: usize,
        pages: Vec<u64>,
    },
    UnpinList {
        owner: usize,
        pages: Vec<u64>,
    },
    Close(usize),
    Reopen(usize),
    /// The account refuses this page from now on, or no page.
    Refuse(Option<u64>),
    Prevent {
        page: u64,
        npages: u64,
    },
    Allow,
    Drop(usize),
    Keep(usize),
    Unpin {
        owner: usize,
        page: u64,
        npages: usize,
    },
    Tell {
        page: u64,
        npages: u64,
    },
    End(usize),
}

fn page() -> impl Strategy<Value = u64> {
    prop::sample::select(PAGES.to_vec())
}

fn pages() -> impl Strategy<Value = Vec<u64>> {
    prop::collection::vec(page(), 0..5)
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0..OWNERS, page(), 0..5_usize).prop_map(|(owner, page, npages)| Op::Pin { owner, page, npages }),
        2 => (0..20_usize).prop_map(Op::Drop),
        2 => (0..20_usize).prop_map(Op::Keep),
        2 => (0..OWNERS, page(), 0..5_usize).prop_map(|(owner, page, npages)| Op::Unpin { owner, page, npages }),
        2 => (page(), 1..4_u64).prop_map(|(page, npages)| Op::Tell { page, npages }),
        4 => (0..OWNERS, pages()).prop_map(|(owner, pages)| Op::PinList { owner, pages }),
        2 => (0..OWNERS, pages()).prop_map(|(owner, pages)| Op::UnpinList { owner, pages }),
        1 => (0..OWNERS).prop_map(Op::Close),
        1 => (0..OWNERS).prop_map(Op::Reopen),
        1 => prop::option::of(page()).prop_map(Op::Refuse),
        1 => (page(), 1..3_u64).prop_map(|(page, npages)| Op::Prevent { page, npages }),
        1 => Just(Op::Allow),
        1 => (0..OWNERS).prop_map(Op::End),
    ]
}

struct Real {
    table: PinTable,
    accesses: Vec<Access>,
    guards: Vec<(usize, PinGuard)>,
    prevented: Vec<Prevented>,
    told: Arc<Mutex<BTreeSet<usize>>>,
}

impl Real {
    fn register(table: &PinTable, told: &Arc<Mutex<BTreeSet<usize>>>, owner: usize) -> Access {
        let told = told.clone();
        let interest = [
            Interest::Holder,
            Interest::Within {
                iova: PAGE,
                last: 2 * PAGE - 1,
            },
            Interest::All,
        ][owner];
        let notice = move |_, _| assert!(told.lock().unwrap().insert(owner), "told twice");
        table.register(format!("owner {owner}"), interest, Arc::new(notice))
    }
}

#[derive(Default)]
struct Model {
    /// One element a pin: who, which page, and whether it was left to the owner.
    pins: Vec<(usize, u64, bool)>,
    closed: BTreeSet<usize>,
    refused: Option<u64>,
    prevented: Vec<(u64, u64)>,
}

impl Model {
    fn has(&self, page: u64) -> bool {
        self.pins.iter().any(|pin| pin.1 == page)
    }

    /// Pins if it may; whether it may, or the errno.
    fn pin(&mut self, owner: usize, pages: &[u64]) -> Result<(), i32> {
        let prevented = |page: &u64| {
            let mut ranges = self.prevented.iter();
            ranges.any(|(first, npages)| (*first..=first + (npages - 1)).contains(page))
        };
        if self.closed.contains(&owner) {
            return Err(libc::ENOENT);
        }
        if pages.iter().any(prevented) {
            return Err(libc::EBUSY);
        }
        if pages
            .iter()
            .any(|page| self.refused == Some(*page) && !self.has(*page))
        {
            return Err(libc::ENOMEM);
        }
        self.pins
            .extend(pages.iter().map(|page| (owner, *page, false)));
        Ok(())
    }

    /// Takes one pin a page, all or none.
    fn unpin(&mut self, owner: usize, pages: &[u64], kept: bool) -> Result<(), i32> {
        let mut pins = self.pins.clone();
        for page in pages {
            let at = pins.iter().position(|pin| *pin == (owner, *page, kept));
            pins.swap_remove(at.ok_or(libc::EINVAL)?);
        }
        self.pins = pins;
        Ok(())
    }
}

/// The pages of a guard, which says the same of them one by one.
fn pages_of(guard: &PinGuard) -> Vec<u64> {
    let iovas: Vec<u64> = guard.iovas().collect();
    assert_eq!((guard.iova(), guard.npages()), (iovas[0], iovas.len()));
    let one_by_one = (0..=iovas.len()).map_while(|index| guard.iova_of(index));
    assert!(one_by_one.eq(iovas.iter().copied()));
    iovas.iter().map(|iova| iova / PAGE).collect()
}

fn errno<T>(result: Result<T, page_pin::Error>) -> Result<T, i32> {
    result.map_err(|error| error.errno())
}

fn range_fits(page: u64, npages: usize) -> bool {
    npages > 0 && page as u128 + npages as u128 <= (u64::MAX / PAGE) as u128 + 1
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn pins_equal_the_naive_model(ops in prop::collection::vec(op(), 1..60)) {
        let account = Arc::new(Watching::default());
        let table = PinTable::with_options(PAGE, PinOptions::new().account(account.clone()));
        let told = Arc::default();
        let accesses = (0..OWNERS).map(|owner| Real::register(&table, &told, owner)).collect();
        let mut real = Real { table, accesses, guards: Vec::new(), prevented: Vec::new(), told };
        let mut model = Model::default();

        for op in ops {
            match op {
                Op::Pin { owner, page, npages } if !range_fits(page, npages) => {
                    let expected = if npages == 0 { libc::EINVAL } else { libc::EOVERFLOW };
                    let result = real.accesses[owner].pin(page * PAGE, npages);
                    prop_assert_eq!(errno(result.map(drop)), Err(expected));
                    prop_assert_eq!(errno(real.table.check(page * PAGE, npages)), Err(expected));
                }
                Op::Pin { owner, page, npages } => {
                    let pages: Vec<u64> = (page..=page + (npages as u64 - 1)).collect();
                    let result = errno(real.accesses[owner].pin(page * PAGE, npages));
                    let expected = model.pin(owner, &pages);
                    prop_assert_eq!(result.as_ref().map(pages_of), expected.as_ref().map(|()| pages));
                    real.guards.extend(result.ok().map(|guard| (owner, guard)));
                }
                Op::PinList { owner, pages } => {
                    let iovas: Vec<u64> = pages.iter().map(|page| page * PAGE).collect();
                    prop_assert_eq!(real.table.check_list(&iovas).is_ok(), !pages.is_empty());
                    let result = errno(real.accesses[owner].pin_list(&iovas));
                    let expected = if pages.is_empty() {
                        Err(libc::EINVAL)
                    } else {
                        model.pin(owner, &pages)
                    };
                    prop_assert_eq!(result.as_ref().map(pages_of), expected.as_ref().map(|()| pages));
                    real.guards.extend(result.ok().map(|guard| (owner, guard)));
                }
                Op::Drop(_) | Op::Keep(_) if real.guards.is_empty() => {}
                Op::Drop(i) => {
                    let (owner, guard) = real.guards.swap_remove(i % real.guards.len());
                    model.unpin(owner, &pages_of(&guard), false).unwrap();
                    drop(guard);
                }
                Op::Keep(i) => {
                    let (owner, guard) = real.guards.swap_remove(i % real.guards.len());
                    let pages = pages_of(&guard);
                    model.unpin(owner, &pages, false).unwrap();
                    model.pins.extend(pages.iter().map(|page| (owner, *page, true)));
                    guard.keep();
                }
                Op::Unpin { owner, page, npages } => {
                    let result = errno(real.accesses[owner].unpin(page * PAGE, npages));
                    let expected = if npages == 0 {
                        Err(libc::EINVAL)
                    } else if range_fits(page, npages) {
                        let pages: Vec<u64> = (page..=page + (npages as u64 - 1)).collect();
                        model.unpin(owner, &pages, true)
                    } else {
                        Err(libc::EOVERFLOW)
                    };
                    prop_assert_eq!(result, expected);
                }
                Op::UnpinList { owner, pages } => {
                    let iovas: Vec<u64> = pages.iter().map(|page| page * PAGE).collect();
                    let result = errno(real.accesses[owner].unpin_list(&iovas));
                    let expected = if pages.is_empty() {
                        Err(libc::EINVAL)
                    } else {
                        model.unpin(owner, &pages, true)
                    };
                    prop_assert_eq!(result, expected);
                }
                Op::Close(owner) => {
                    real.accesses[owner].close();
                    model.closed.insert(owner);
                }
                Op::Reopen(owner) => {
                    real.accesses[owner].reopen();
                    model.closed.remove(&owner);
                }
                Op::Refuse(page) => {
                    *account.refused.lock().unwrap() = page.map(|page| page * PAGE).into_iter().collect();
                    model.refused = page;
                }
                Op::Prevent { page, npages } => {
                    if range_fits(page, npages as usize) {
                        let prevented = real.table.prevent(page * PAGE, npages * PAGE);
                        real.prevented.push(prevented);
                        model.prevented.push((page, npages));
                    }
                }
                Op::Allow => {
                    real.prevented.pop();
                    model.prevented.pop();
                }
                Op::Tell { page, npages } => {
                    let fits = range_fits(page, npages as usize);
                    real.told.lock().unwrap().clear();
                    real.table.tell(page * PAGE, npages * PAGE);
                    let mut expected: BTreeSet<usize> = BTreeSet::new();
                    if fits {
                        expected.extend(
                            model.pins.iter()
                                .filter(|pin| (page..=page + (npages - 1)).contains(&pin.1))
                                .map(|pin| pin.0),
                        );
                        if page <= 1 && page + npages > 1 {
                            expected.insert(1);
                        }
                        expected.insert(2);
                    }
                    prop_assert_eq!(&*real.told.lock().unwrap(), &expected);
                }
                Op::End(owner) => {
                    // With guards alive the old registration would live on beside the new one.
                    if real.guards.iter().any(|guard| guard.0 == owner) {
                        continue;
                    }
                    real.accesses[owner] = Real::register(&real.table, &real.told, owner);
                    model.pins.retain(|pin| pin.0 != owner);
                    model.closed.remove(&owner);
                }
            }

            for page in PAGES {
                let expected: Vec<_> = model.pins.iter().filter(|pin| pin.1 == page).collect();
                prop_assert_eq!(real.table.pins(page * PAGE), expected.len() as u64);
                let holders: BTreeSet<_> = real.table.holders(page * PAGE, 1)
                    .into_iter().map(|holder| holder.name).collect();
                let owners: BTreeSet<_> = expected.iter().map(|pin| format!("owner {}", pin.0)).collect();
                prop_assert_eq!(&holders, &owners);
                let released = real.table.wait_released(page * PAGE, PAGE, Instant::now());
                prop_assert_eq!(released.is_ok(), owners.is_empty());
                prop_assert_eq!(real.table.is_pinned(page * PAGE, PAGE), !owners.is_empty());
                for (owner, access) in real.accesses.iter().enumerate() {
                    let own = expected.iter().filter(|pin| pin.0 == owner).count();
                    prop_assert_eq!(access.pins(page * PAGE), own as u64);
                }
            }
            let pinned: BTreeSet<u64> = model.pins.iter().map(|pin| pin.1 * PAGE).collect();
            prop_assert_eq!(&*account.charged.lock().unwrap(), &pinned);
            for (owner, access) in real.accesses.iter().enumerate() {
                let own = model.pins.iter().filter(|pin| pin.0 == owner).count();
                prop_assert_eq!(access.total_pins(), own as u64);
            }
        }
    }
}

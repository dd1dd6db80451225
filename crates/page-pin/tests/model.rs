// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pins against a naive model: a list of (owner, page, kept), one element a pin.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use page_pin::{Access, Interest, PinGuard, PinTable};
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

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0..OWNERS, page(), 0..5_usize).prop_map(|(owner, page, npages)| Op::Pin { owner, page, npages }),
        2 => (0..20_usize).prop_map(Op::Drop),
        2 => (0..20_usize).prop_map(Op::Keep),
        2 => (0..OWNERS, page(), 0..5_usize).prop_map(|(owner, page, npages)| Op::Unpin { owner, page, npages }),
        2 => (page(), 1..4_u64).prop_map(|(page, npages)| Op::Tell { page, npages }),
        1 => (0..OWNERS).prop_map(Op::End),
    ]
}

struct Real {
    table: PinTable,
    accesses: Vec<Access>,
    guards: Vec<(usize, u64, usize, PinGuard)>,
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

/// One element a pin: who, which page, and whether it was left to the owner.
type Model = Vec<(usize, u64, bool)>;

fn range_fits(page: u64, npages: usize) -> bool {
    npages > 0 && page as u128 + npages as u128 <= (u64::MAX / PAGE) as u128 + 1
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn pins_equal_the_naive_model(ops in prop::collection::vec(op(), 1..60)) {
        let table = PinTable::new(PAGE);
        let told = Arc::default();
        let accesses = (0..OWNERS).map(|owner| Real::register(&table, &told, owner)).collect();
        let mut real = Real { table, accesses, guards: Vec::new(), told };
        let mut model = Model::new();

        for op in ops {
            match op {
                Op::Pin { owner, page, npages } => {
                    let result = real.accesses[owner].pin(page * PAGE, npages);
                    prop_assert_eq!(result.is_ok(), range_fits(page, npages));
                    if let Ok(guard) = result {
                        model.extend((0..npages as u64).map(|i| (owner, page + i, false)));
                        real.guards.push((owner, page, npages, guard));
                    }
                }
                Op::Drop(i) | Op::Keep(i) if real.guards.is_empty() => { let _ = i; }
                Op::Drop(i) => {
                    let (owner, page, npages, guard) = real.guards.swap_remove(i % real.guards.len());
                    drop(guard);
                    for page in (page..).take(npages) {
                        let at = model.iter().position(|pin| *pin == (owner, page, false)).unwrap();
                        model.swap_remove(at);
                    }
                }
                Op::Keep(i) => {
                    let (owner, page, npages, guard) = real.guards.swap_remove(i % real.guards.len());
                    guard.keep();
                    for page in (page..).take(npages) {
                        let at = model.iter().position(|pin| *pin == (owner, page, false)).unwrap();
                        model[at].2 = true;
                    }
                }
                Op::Unpin { owner, page, npages } => {
                    let result = real.accesses[owner].unpin(page * PAGE, npages);
                    let kept = |page| model.iter().position(|pin| *pin == (owner, page, true));
                    let expected = range_fits(page, npages)
                        && (page..).take(npages).all(|page| kept(page).is_some());
                    prop_assert_eq!(result.is_ok(), expected);
                    if expected {
                        for page in (page..).take(npages) {
                            let at = model.iter().position(|pin| *pin == (owner, page, true)).unwrap();
                            model.swap_remove(at);
                        }
                    }
                }
                Op::Tell { page, npages } => {
                    let fits = range_fits(page, npages as usize);
                    real.told.lock().unwrap().clear();
                    real.table.tell(page * PAGE, npages * PAGE);
                    let mut expected: BTreeSet<usize> = BTreeSet::new();
                    if fits {
                        expected.extend(
                            model.iter()
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
                    model.retain(|pin| pin.0 != owner);
                }
            }

            for page in PAGES {
                let expected: Vec<_> = model.iter().filter(|pin| pin.1 == page).collect();
                prop_assert_eq!(real.table.pins(page * PAGE), expected.len() as u64);
                let holders: BTreeSet<_> = real.table.holders(page * PAGE, 1)
                    .into_iter().map(|holder| holder.name).collect();
                let owners: BTreeSet<_> = expected.iter().map(|pin| format!("owner {}", pin.0)).collect();
                prop_assert_eq!(&holders, &owners);
                let released = real.table.wait_released(page * PAGE, PAGE, Instant::now());
                prop_assert_eq!(released.is_ok(), owners.is_empty());
            }
        }
    }
}

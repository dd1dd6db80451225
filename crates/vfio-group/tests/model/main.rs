// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Random histories of several groups and containers against plain bookkeeping: every result and
//! errno, every count, who is attached where, and whether the mappings are still there.

#![cfg(not(loom))]

mod naive;
mod ops;
mod real;

use std::collections::BTreeSet;

use iommu_type1::page_size;
use proptest::prelude::*;
use vfio_group::GroupFile;

use naive::Naive;
use ops::{op, PAGES};
use real::{number_of, Real};

fn check(naive: &Naive, real: &Real) -> Result<(), TestCaseError> {
    for (g, expected) in naive.groups.iter().enumerate() {
        prop_assert_eq!(real.groups[g].container_users(), expected.users);
        if let Some(file) = &real.group_files[g] {
            let attached = file.status() & GroupFile::CONTAINER_SET != 0;
            prop_assert_eq!(attached, expected.container.is_some());
            let viable = file.status() & GroupFile::VIABLE != 0;
            prop_assert_eq!(viable, !expected.bound_elsewhere);
        }
        prop_assert_eq!(real.groups[g].kvm().as_ref().map(number_of), expected.kvm);
    }
    for (c, number) in naive.open_containers.iter().enumerate() {
        let Some(container) = &real.containers[c] else {
            prop_assert!(number.is_none());
            continue;
        };
        let expected = number
            .and_then(|number| naive.containers[&number].as_ref())
            .filter(|iommu| iommu.iommu_type != 8)
            .map(|iommu| &iommu.pages);
        let mappings = container.address_space().ok().map(|space| space.mappings());
        prop_assert_eq!(mappings, expected.map(BTreeSet::len));
    }
    for (user, g) in real.users.iter().zip(&naive.users) {
        let mapped = naive.mapped(*g);
        prop_assert!(mapped.is_some(), "a user without an IOMMU");
        for page in 0..PAGES {
            let readable = user.read(page * page_size(), &mut [0]).is_ok();
            prop_assert_eq!(readable, mapped.is_some_and(|pages| pages.contains(&page)));
        }
    }
    prop_assert_eq!(real.listeners.len(), naive.listeners.len());
    for ((_, heard), (_, expected)) in real.listeners.iter().zip(&naive.listeners) {
        prop_assert_eq!(&*heard.lock().unwrap(), expected);
    }
    let mappings: usize = real.spaces.iter().map(|space| space.mappings()).sum();
    let iommus = naive.containers.values().flatten();
    let expected: usize = iommus.map(|iommu| iommu.pages.len()).sum();
    prop_assert_eq!(mappings, expected, "mappings of spaces that were released");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn behaves_as_the_bookkeeping_says(ops in prop::collection::vec(op(), 1..120)) {
        let (mut naive, mut real) = (Naive::default(), Real::new());
        for op in &ops {
            prop_assert_eq!(real.apply(op), naive.apply(op), "{:?}", op);
            check(&naive, &real)?;
            // Reading takes what is counted, so both counts begin anew.
            for (g, group) in naive.groups.iter_mut().enumerate() {
                let expected = group.asked.as_mut().map(std::mem::take).unwrap_or(0);
                let asked = real.notifiers[g].as_ref().and_then(|fd| fd.read().ok());
                prop_assert_eq!(asked.unwrap_or(0), expected, "requests");
            }
        }
    }
}

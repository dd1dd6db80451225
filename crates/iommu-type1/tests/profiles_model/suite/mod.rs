// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The four profiles against a naive model of each: maps, unmaps, replacements, copies, memory that is
//! taken away and given back, dirty pages, and lists that are held meanwhile, by one thread.
//!
//! A test draws what is done, and so does a fuzz target.

mod model;
mod op;
mod real;

use std::time::Duration;

use iommu_type1::{IoAddressSpace, PermissionPolicy, Profile};
use proptest::prelude::*;
use proptest::sample::Index;

use model::Model;
pub use op::Op;
use op::{aim, op, profile, LIMIT};
use real::{compare, step, Real};

/// A space, and what is done with it.
#[derive(Clone, Debug)]
pub struct Case {
    pub space: Space,
    pub steps: Vec<Step>,
}

/// What kind of space.
#[derive(Clone, Debug)]
pub struct Space {
    profile: Profile,
    other_policy: bool,
    is_tracked: bool,
    is_heard: bool,
}

/// What is done, and which of what is there it is done to.
pub type Step = (Op, Index);

pub fn space() -> impl Strategy<Value = Space> {
    let space = (profile(), any::<bool>(), any::<bool>(), any::<bool>());
    space.prop_map(|(profile, other_policy, is_tracked, is_heard)| Space {
        profile,
        other_policy,
        is_tracked,
        is_heard,
    })
}

pub fn one_step() -> impl Strategy<Value = Step> {
    (op(), any::<Index>())
}

/// Does it, and compares after each operation.
pub fn run(case: Case) -> Result<(), TestCaseError> {
    let Space {
        profile,
        other_policy,
        is_tracked,
        is_heard,
    } = case.space;
    let strict = matches!(profile, Profile::Iommufd | Profile::Iotlb) != other_policy;
    let mut builder = IoAddressSpace::builder()
        .entry_limit(LIMIT)
        .unmap_deadline(Duration::ZERO)
        .profile(profile);
    if other_policy {
        builder = builder.permission_policy(match strict {
            true => PermissionPolicy::Strict,
            false => PermissionPolicy::WriteNeedsRead,
        });
    }
    let mut real = Real::new(builder.build(), is_heard);
    let mut model = Model::new(profile, strict);
    step(&mut real, &mut model, Op::SetTracking(is_tracked))?;
    for (op, pick) in case.steps {
        let op = aim(op, &model, pick);
        step(&mut real, &mut model, op)?;
        compare(&real, &mut model)?;
    }

    // Whatever was not taken on the way.
    for mapped in model.mappings.clone() {
        step(&mut real, &mut model, Op::TakeDirty(mapped.range()))?;
    }

    // Nothing stays behind.
    real.held.clear();
    real.space.unmap_all().unwrap();
    let stats = real.space.stats();
    prop_assert_eq!(
        (
            stats.mappings,
            stats.leaving,
            stats.leases,
            stats.table_bytes
        ),
        (0, 0, 0, 0)
    );
    prop_assert_eq!(stats.dirty_bytes, 0);
    Ok(())
}

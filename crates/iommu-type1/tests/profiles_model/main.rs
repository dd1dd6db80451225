// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Every profile against its naive model.

mod suite;

use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2048))]

    #[test]
    fn every_profile_equals_its_naive_model(
        space in suite::space(),
        steps in prop::collection::vec(suite::one_step(), 1..60)
    ) {
        suite::run(suite::Case { space, steps })?;
    }
}

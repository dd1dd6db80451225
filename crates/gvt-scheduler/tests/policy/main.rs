// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The time-based policy: beside a naive model, rule by rule, and in the long run.

mod converge;
mod model;
mod rules;

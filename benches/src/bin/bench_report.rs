// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Makes `docs/benchmarks.md` and its plots of what the last runs recorded.

use benches::{record, report};

fn main() -> std::io::Result<()> {
    report::write(&record::workspace().join("docs"))
}
